"""Reports: right numbers in the tables, pictures that are pictures, untrusted text that stays text."""

import html.parser
import json
import re
import struct

import pytest

from mlx_dmpo.errors import UserError
from mlx_dmpo.judge import metrics
from mlx_dmpo.machine import files
from mlx_dmpo.report import charts, tables
from mlx_dmpo.report import page as report_page

HOSTILE = '<script>alert("x")</script>\x1b[31m\u202e\u2028"\'&$\\'


def scores(titles=("amber", "river"), users=12):
    """Margins +1, −1, +2, −2, … summed over the orders; the first-listed item wins in every prompt of even users."""
    rows = []
    for user in range(users):
        margin = (user // 2 + 1) * (-1) ** user
        first, second = (margin / 2 + 3, margin / 2 - 3) if user % 2 == 0 else (margin / 2, margin / 2)
        orders = {
            name: {"chosen_logp": -10.0, "rejected_logp": -10.0 - m}
            for name, m in (("positive_first", first), ("positive_second", second))
        }
        rows.append(
            {
                "user": f"u{user}",
                "domain": "movie",
                "positive": titles[0],
                "negative": titles[1],
                **orders,
                "margin": float(margin),
            }
        )
    return rows


def write_evaluation(directory, rows):
    directory.mkdir(parents=True)
    files.write_json(directory / "metrics.json", metrics.ranking_metrics(rows, resamples=100))
    files.write_text(directory / "scores.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    files.write_json(directory / "manifest.json", {"command": "mlx-dmpo evaluate", "config": {}, "adapter": None})
    return directory


def write_run(directory, command="mlx-dmpo sft"):
    directory.mkdir(parents=True)
    lines = [
        {"step": s, "loss": 1 / s, "margin": 0.1 * s, "pair_accuracy": 0.5, "learning_rate": 1e-4} for s in range(1, 6)
    ]
    lines.append({"step": 5, "valid_loss": 0.3, "valid_margin": 0.4, "valid_pair_accuracy": 0.75})
    files.write_text(directory / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    files.write_json(
        directory / "manifest.json",
        {"command": command, "config": {"seed": 0, "data": HOSTILE}, "steps": 5, "device": "cpu"},
    )
    return directory


class Page(html.parser.HTMLParser):
    """Elements, attributes and text as a browser would see them."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text, self.attributes = [], [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.text.append(data)


def png_size(data):
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[-8:-4] == b"IEND"
    return struct.unpack(">II", data[16:24])


def test_numbers_by_hand(tmp_path):
    rows = scores()
    found = metrics.ranking_metrics(rows, resamples=100)
    table = tables.results_table({"sft": found})
    lines = {line.split("  ")[0]: line for line in table.splitlines()}
    assert lines["pairs"].split() == ["pairs", "6"] and lines["users"].split() == ["users", "6"]
    accuracy = found["pair_accuracy"]
    assert accuracy["value"] == 0.5
    assert f"0.500 [{accuracy['low']:.3f}, {accuracy['high']:.3f}]" in lines["pair accuracy"]
    # positives win listed first for users 0, 2, 4 (+3), lose listed second; users 1, 3, 5 lose both
    assert "0.500 [" in lines["positive first"] and "0.000 [" in lines["positive second"]
    assert "+0.250 [" in lines["position bias"] and "+0.00 [" in lines["margin, nats"]
    page = tmp_path / "report.html"
    report_page.write_report([write_evaluation(tmp_path / "sft" / "eval", rows)], page)
    cells = [re.sub("<.*?>", "", cell) for cell in re.findall(r"<td>.*?</td>", Page(page).source)]
    assert cells[:4] == ["sft", "6", "6", f"0.500 [{accuracy['low']:.3f}, {accuracy['high']:.3f}]"]


def test_told():
    assert tables.told({"value": 0.71234, "low": 0.68, "high": 0.741}, ".3f") == "0.712 [0.680, 0.741]"
    assert tables.told({"value": 0.71234}, ".2f") == "0.71"
    assert tables.told({"value": None}, ".3f") == "-"


def test_the_pairs_of_least_margin_stand_first(tmp_path):
    page = tmp_path / "report.html"
    rows = scores(users=30)
    report_page.write_report([write_evaluation(tmp_path / "e", rows)], page)
    shown = re.findall(r"<td>([+-]\d+\.\d\d)</td>", Page(page).source)
    worst = sorted(row["margin"] for row in rows)[: report_page.HARDEST]
    assert shown[-len(worst) :] == [f"{m:+.2f}" for m in worst]


def test_pictures_are_inside_the_page(tmp_path):
    page = tmp_path / "report.html"
    report_page.write_report([write_evaluation(tmp_path / "e", scores()), write_run(tmp_path / "r")], page)
    import base64

    pictures = [value for name, value in Page(page).attributes if name == "src"]
    assert len(pictures) == 3
    for source in pictures:
        kind, data = source.split(",")
        width, height = png_size(base64.b64decode(data))
        assert kind == "data:image/png;base64" and width > 400 and height > 300


def test_every_picture_draws(tmp_path):
    rows = scores()
    found = metrics.ranking_metrics(rows, resamples=100)
    charts.plot_comparison({"base": found, "with $x^2$ \\alpha": found, "日本語": found}, tmp_path / "a.png")
    charts.plot_margins(rows, tmp_path / "m.png")
    charts.plot_margins(rows[:1], tmp_path / "one.png")
    charts.plot_training([{"step": 1, "loss": 0.5}], tmp_path / "t.png")
    assert all(min(png_size(f.read_bytes())) > 300 for f in tmp_path.glob("*.png"))
    assert not [f for f in tmp_path.iterdir() if f.name.startswith(".")]


@pytest.mark.parametrize("where", ["title", "user", "directory", "command", "setting"])
def test_untrusted_text_stays_text(where, tmp_path, capsys):
    rows = scores((HOSTILE, "river") if where == "title" else ("amber", "river"))
    if where == "user":
        rows[0]["user"] = HOSTILE
    name = HOSTILE.replace("/", "-") if where == "directory" else "e"
    evaluation = write_evaluation(tmp_path / name, rows)
    run = write_run(tmp_path / "r", HOSTILE if where == "command" else "mlx-dmpo sft")
    report_page.write_report([evaluation, run], tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert "script" not in page.tags and not any(name.startswith("on") for name, _ in page.attributes)
    assert any("alert(" in part for part in page.text)  # it is shown, as text
    assert not any(c in page.source for c in "\x1b\u202e\u2028")
    table = tables.results_table({HOSTILE: json.loads((evaluation / "metrics.json").read_text())})
    assert all(c.isprintable() for c in table.replace("\n", ""))


def test_a_page_fetches_nothing(tmp_path):
    report_page.write_report(
        [write_evaluation(tmp_path / "e", scores()), write_run(tmp_path / "r")], tmp_path / "report.html"
    )
    page = Page(tmp_path / "report.html")
    assert {"script", "link", "iframe", "object", "form"}.isdisjoint(page.tags)
    assert all(value.startswith("data:") for name, value in page.attributes if name in ("src", "href"))
    assert any("default-src 'none'" in (value or "") for _, value in page.attributes)
    assert "url(" not in page.source and "@import" not in page.source


def test_a_line_separator_in_a_title_survives_the_file(tmp_path):
    """JSON leaves U+2028 as it is, and str.splitlines() splits there."""
    evaluation = write_evaluation(tmp_path / "e", scores(("am\u2028ber", "ri\x85ver")))
    assert files.read_lines(evaluation / "scores.jsonl")[0]["positive"] == "am\u2028ber"
    report_page.write_report([evaluation], tmp_path / "report.html")


def test_free_text_has_no_printed_orders(tmp_path):
    rows = [{**row, "given": row["positive_first"], "margin": 1.0} for row in scores()]
    for row in rows:
        del row["positive_first"], row["positive_second"]
    evaluation = write_evaluation(tmp_path / "e", rows)
    report_page.write_report([evaluation], tmp_path / "report.html")
    assert "<td>-</td>" in (tmp_path / "report.html").read_text()
    (evaluation / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [rows[0], scores()[0]]))
    with pytest.raises(UserError, match="mixes"):
        report_page.write_report([evaluation], tmp_path / "report.html")


@pytest.mark.parametrize("missing", ["metrics.json", "scores.jsonl", "manifest.json"])
def test_a_missing_piece_of_an_evaluation(missing, tmp_path):
    evaluation = write_evaluation(tmp_path / "e", scores())
    (evaluation / missing).unlink()
    with pytest.raises(UserError):
        report_page.write_report([evaluation], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("missing", ["metrics.jsonl", "manifest.json"])
def test_a_missing_piece_of_a_run(missing, tmp_path):
    run = write_run(tmp_path / "r")
    (run / missing).unlink()
    with pytest.raises(UserError, match="no finished run"):
        report_page.write_report([run], tmp_path / "report.html")


def test_an_earlier_report_stands_where_the_new_one_fails(tmp_path):
    out = tmp_path / "report.html"
    report_page.write_report([write_run(tmp_path / "r")], out)
    before = out.read_bytes()
    (tmp_path / "r" / "metrics.jsonl").write_text('{"step": "one"}\n')
    with pytest.raises(UserError, match="row 1"):
        report_page.write_report([tmp_path / "r"], out)
    assert out.read_bytes() == before


def test_names_leave_out_what_all_have_in_common(tmp_path):
    directories = [tmp_path / "runs" / name / "eval" for name in ("sft", "dmpo")]
    assert list(report_page._names(directories).values()) == ["sft", "dmpo"]
    assert list(report_page._names([tmp_path / "runs" / "sft" / "eval"]).values()) == ["sft"]
    same = [tmp_path / "x", tmp_path / "x" / "eval"]
    assert list(report_page._names(same).values()) == [str(d) for d in same]  # none hides the other
    assert list(report_page._names([tmp_path / "one" / "a", tmp_path / "two" / "a"]).values()) == ["one/a", "two/a"]
