"""Reports: right numbers in the tables, pictures that are pictures, untrusted text that stays text."""

import html.parser
import json
import re
import struct
import xml.etree.ElementTree as ElementTree

import pytest

from mlx_dmpo.errors import UserError
from mlx_dmpo.judge import metrics
from mlx_dmpo.judge.compare import for_report
from mlx_dmpo.machine import files
from mlx_dmpo.report import charts, contents, names, svg, tables
from mlx_dmpo.report import page as report_page

pytestmark = pytest.mark.usefixtures("pictures")

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
    rows = scores(users=10)
    found = metrics.ranking_metrics(rows, resamples=100)
    table = tables.results_table({"sft": found})
    lines = {line.split("  ")[0]: line for line in table.splitlines()}
    assert lines["pairs"].split() == ["pairs", "10"] and lines["users"].split() == ["users", "10"]
    accuracy = found["pair_accuracy"]
    assert accuracy["value"] == 0.5
    assert f"0.500 [{accuracy['low']:.3f}, {accuracy['high']:.3f}]" in lines["pair accuracy"]
    # even users' positives win listed first (+3) and lose listed second; odd users' lose both
    assert "0.500 [" in lines["positive first"] and "0.000 [" in lines["positive second"]
    assert "+0.250 [" in lines["position bias"] and "+0.00 [" in lines["margin, nats"]
    page = tmp_path / "report.html"
    report_page.write_report([write_evaluation(tmp_path / "sft" / "eval", rows)], page)
    cells = [re.sub("<.*?>", "", cell) for cell in re.findall(r"<td.*?</td>", Page(page).source)]
    assert cells[:4] == ["sft", "10", "10", f"0.500{accuracy['low']:.3f} to {accuracy['high']:.3f}"]


def test_the_terminals_table_shows_ranking_and_answers_where_there_are_any():
    plain = {"n": 3, "users": 3, "ties": 0, "pair_accuracy": {"value": 0.5}}
    ranked = plain | {"hr@1": {"value": 0.25, "low": 0.1, "high": 0.4}, "generation": {"valid": {"value": 0.9}}}
    table = tables.results_table({"a": plain, "b": ranked})
    lines = {line.split("  ")[0]: line.split("  ")[1:] for line in table.splitlines()}
    assert "0.250 [0.100, 0.400]" in " ".join(lines["HR@1"]) and "0.900" in " ".join(lines["valid answers"])
    assert "MRR" not in lines and "HR@1" not in tables.results_table({"a": plain})


def test_format_metric():
    assert tables.format_metric({"value": 0.71234, "low": 0.68, "high": 0.741}, ".3f") == "0.712 [0.680, 0.741]"
    assert tables.format_metric({"value": 0.71234}, ".2f") == "0.71"
    assert tables.format_metric({"value": None}, ".3f") == "-"


def test_the_hardest_and_the_easiest_pairs(tmp_path):
    page = tmp_path / "report.html"
    rows = scores(users=30)
    report_page.write_report([write_evaluation(tmp_path / "e", rows)], page)
    shown = re.findall(r"<td>([+-]\d+\.\d\d)</td>", Page(page).source)
    margins = sorted(row["margin"] for row in rows)
    assert shown[-20:] == [f"{m:+.2f}" for m in (*margins[:10], *margins[::-1][:10])]


def test_charts_are_inside_the_page_and_files_of_their_own(tmp_path):
    page = tmp_path / "report.html"
    written = report_page.write_report([write_evaluation(tmp_path / "e", scores()), write_run(tmp_path / "r")], page)
    assert written[:2] == [page, tmp_path / "report.md"]
    files_of = {p.stem for p in written[2:]}
    assert {"accuracy", "position-bias", "calibration-1", "margins-1", "training-1", "training-4"} <= files_of
    source = page.read_text(encoding="utf-8")
    assert source.count('<svg class="chart" viewBox="0 0 ') == len(files_of)
    for path in written[2:]:
        root = ElementTree.fromstring(path.read_text(encoding="utf-8"))  # well-formed
        assert root.tag == "{http://www.w3.org/2000/svg}svg" and "prefers-color-scheme:dark" in root[0].text
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "## Results" in markdown and "](report-charts/accuracy.svg)" in markdown
    report_page.write_report([write_run(tmp_path / "r2")], page)  # no chart of the earlier report stays
    assert {p.stem for p in (tmp_path / "report-charts").iterdir()} == {f"training-{i}" for i in (1, 2, 3, 4)}


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
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    fenced = markdown.index("## How to reproduce")  # a code block shows text as it is
    assert "<script" not in markdown[:fenced] and not any(c in markdown for c in "\x1b\u202e\u2028")
    for path in (tmp_path / "report-charts").glob("*.svg"):
        assert "<script" not in path.read_text(encoding="utf-8")
    table = tables.results_table({HOSTILE: json.loads((evaluation / "metrics.json").read_text())})
    assert all(c.isprintable() for c in table.replace("\n", ""))


def test_a_page_fetches_nothing(tmp_path):
    report_page.write_report(
        [write_evaluation(tmp_path / "e", scores()), write_run(tmp_path / "r")], tmp_path / "report.html"
    )
    page = Page(tmp_path / "report.html")
    assert {"script", "link", "iframe", "object", "form"}.isdisjoint(page.tags)
    assert all(value.startswith("#") for name, value in page.attributes if name in ("src", "href"))
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
    assert "position-bias" not in {p.stem for p in (tmp_path / "report-charts").iterdir()}
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
    assert list(names.short_names(directories).values()) == ["sft", "dmpo"]
    assert list(names.short_names([tmp_path / "runs" / "sft" / "eval"]).values()) == ["sft"]
    same = [tmp_path / "x", tmp_path / "x" / "eval"]
    assert list(names.short_names(same).values()) == [str(d) for d in same]  # none hides the other
    assert list(names.short_names([tmp_path / "one" / "a", tmp_path / "two" / "a"]).values()) == ["one/a", "two/a"]


# --- sentences


def result(accuracy, low=None, high=None):
    interval = {} if low is None else {"low": low, "high": high}
    return {"n": 10, "users": 10, "ties": 0, "pair_accuracy": {"value": accuracy, **interval}}


def contents_of(results, differences=(), baselines=()):
    import numpy as np

    manifest = {"command": "mlx-dmpo evaluate", "config": {}}
    found = contents.Contents(
        [contents.Evaluation(n, None, m, manifest, np.zeros(1), [], []) for n, m in results.items()]
    )
    rows = [
        {"a": a, "b": b, "metric": "pair_accuracy", "difference": d, "low": low, "high": high}
        for a, b, d, low, high in differences
    ]
    found.comparison, found.baselines = {"differences": rows} if rows else None, dict(baselines)
    return found


def test_headlines():
    base, sft, dmpo = result(0.5), result(0.587), result(0.744, 0.7, 0.79)
    three = {"base": base, "sft": sft, "dmpo": dmpo}
    differences = [("base", "dmpo", -0.244, -0.3, -0.2), ("sft", "dmpo", -0.157, -0.2, -0.11)]
    assert contents.headline(contents_of(three, differences)) == (
        "dmpo ranks 74.4 % of pairs right, 15.7 points above sft (95 %: 11 to 20)"
    )
    close = contents_of(three, [("dmpo", "sft", 0.01, -0.02, 0.04)])
    assert contents.headline(close).endswith("1 points above sft (95 %: −2 to 4), not a significant difference")
    few = contents_of(three, [("dmpo", "sft", 0.157, None, None)])
    assert contents.headline(few).endswith("15.7 points above sft (too few users for an interval)")
    alone = contents_of({"dmpo": dmpo}, baselines={"popularity": result(0.608)})
    assert contents.headline(alone) == (
        "dmpo ranks 74.4 % of pairs right (95 %: 70 to 79); popularity alone ranks 60.8 %"
    )


def test_the_page_compares_and_shows_the_trivial_rankers(tmp_path):
    rows = [
        row | {"popularity": [i % 5, i % 3], "source_positive_first": True} for i, row in enumerate(scores(users=40))
    ]
    better = [row | {"margin": row["margin"] + 30} for row in rows]
    directories = [write_evaluation(tmp_path / n / "eval", r) for n, r in (("sft", rows), ("dmpo", better))]
    report_page.write_report(directories, tmp_path / "report.html", for_report)
    page = Page(tmp_path / "report.html")
    text = " ".join(page.text)
    assert "dmpo ranks 100.0 % of pairs right, 50.0 points above sft" in text
    assert "popularity (baseline)" in text and "first-listed (baseline)" in text and "dmpo − sft" in text
    assert {"results", "bias", "reproduce"} <= {v for n, v in page.attributes if n == "id"}


def test_explanations_in_a_directory_are_shown(tmp_path):
    run = write_run(tmp_path / "r")
    one = {
        "margin": 1.25,
        "history": [{"title": HOSTILE, "effect": -0.5}, {"title": "Heat", "effect": 1.0}],
        "flip": ["Heat"],
    }
    files.write_json(run / "explain.json", {**one, "models": [{"name": "dmpo", **one}]})
    report_page.write_report([run], tmp_path / "report.html")
    text = " ".join(Page(tmp_path / "report.html").text)
    assert "Without Heat the order is reversed" in text and "-0.50" in text
    files.write_json(run / "explain-2.json", {"margin": "much"})
    with pytest.raises(UserError, match="holds no explanation"):
        report_page.write_report([run], tmp_path / "report.html")


@pytest.mark.parametrize("key", ["calibration", "slices", "popularity", "mrr", "generation"])
def test_malformed_parts_of_metrics_are_named(key, tmp_path):
    evaluation = write_evaluation(tmp_path / "e", scores())
    found = json.loads((evaluation / "metrics.json").read_text())
    found[key] = {"curve": 3, "history": [], "by_positive": None, "prefers_popular": "x"}
    files.write_json(evaluation / "metrics.json", found)
    with pytest.raises(UserError, match=r"metrics\.json: has values that this program does not write"):
        report_page.write_report([evaluation], tmp_path / "report.html")


# --- charts by hand


def test_ticks_are_round_and_inside():
    assert svg.ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert svg.ticks(-2.3, 4.1) == [-2, 0, 2, 4]
    assert svg.ticks(0, 3e-5, 3) == [0, 1e-5, 2e-5, 3e-5]
    assert svg.ticks(5, 5) == [5]
    assert (svg.shown(-2, "g"), svg.shown(0.25, "%"), svg.shown(1e-5, "g")) == ("−2", "25 %", "1e-5")


def test_thinning_keeps_the_mean_and_short_curves():
    from mlx_dmpo.report import figures

    points = [(float(i), float(i % 7)) for i in range(1000)]
    thin = figures.thinned(points)
    assert len(thin) == figures.POINTS and thin[0][0] < 7 and thin[-1][0] > 990
    assert sum(y for _, y in thin) / len(thin) == pytest.approx(sum(y for _, y in points) / 1000, rel=0.01)
    assert figures.thinned(points[:20]) == points[:20]


def test_histograms_share_their_edges_and_lose_no_pair():
    import numpy as np

    from mlx_dmpo.report import figures

    margins = [np.random.default_rng(i).normal(i, 3, 500) for i in range(3)] + [np.array([1e9])]
    edges = figures.margin_edges(margins)
    assert 0 in edges
    for m in margins:
        assert np.histogram(np.clip(m, edges[0], edges[-1]), edges)[0].sum() == len(m)
        figures.margins("x", m, edges, figures.tallest_bin(margins, edges))
    assert len(figures.margin_edges([np.zeros(5)])) > 1  # all ties


# --- in a browser


def opened(browser, path, **how):
    """The page, and what it requested or complained about."""
    page, seen = browser.new_page(**how), []
    page.on("console", lambda message: seen.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: seen.append(f"error: {error}"))
    page.on("dialog", lambda dialog: seen.append("dialog") or dialog.dismiss())
    page.on("request", lambda request: seen.append(request.url) if request.url != path.as_uri() else None)
    page.goto(path.as_uri())
    return page, seen


def test_the_page_in_a_browser(browser, tmp_path):
    hostile = "<img src=x onerror=alert(1)></title></svg><script>alert(2)</script>"
    rows = [row | {"popularity": [i % 5, i % 3]} for i, row in enumerate(scores((hostile, "river " * 30), users=40))]
    rows = [row | {"groups": {hostile: "ab"[i % 2]}} for i, row in enumerate(rows)]
    directories = [write_evaluation(tmp_path / n, rows) for n in ("<svg onload=alert(3)>", "dmpo")]
    directories.append(write_run(tmp_path / "run", f"mlx-dmpo sft --data '{hostile}'"))
    out = tmp_path / "report.html"
    report_page.write_report(directories, out, for_report)
    colours = {}
    for scheme, width in (("light", 1280), ("dark", 1280), ("light", 390), ("dark", 390)):
        page, seen = opened(browser, out, viewport={"width": width, "height": 800}, color_scheme=scheme)
        assert seen == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate("document.querySelectorAll('svg.chart').length") >= 10
        assert page.evaluate("document.querySelectorAll('script,img,iframe,[onload],[onerror]').length") == 0
        height = "e => e.getBoundingClientRect().height"
        sizes = page.evaluate(f"[...document.querySelectorAll('figure > svg')].map({height})")
        assert min(sizes) > 50
        assert page.evaluate(
            "[...document.querySelectorAll('nav a')].every(a => document.querySelector(a.getAttribute('href')))"
        )
        fill = "getComputedStyle(document.querySelector('figure circle')).fill"
        fill = f"[getComputedStyle(document.body).backgroundColor, {fill}]"
        colours[scheme] = page.evaluate(fill)
        page.close()
    assert colours["light"][0] != colours["dark"][0] and colours["light"][1] != colours["dark"][1]


@pytest.mark.slow
def test_many_runs_and_pairs_stay_small_and_open_at_once(browser, tmp_path):
    import numpy as np

    rng = np.random.default_rng(0)
    base = scores(users=1)[0]
    rows = [
        base | {"user": f"u{i // 5}", "positive": f"A title {i}", "margin": float(m)}
        for i, m in enumerate(rng.normal(0.5, 1, 10_000))
    ]
    first = write_evaluation(tmp_path / "eval-0", rows)
    directories = [first]
    for i in range(1, 100):  # 100 evaluations of 10,000 pairs, 100 training runs of 1,000 lines
        directory = tmp_path / f"eval-{i}"
        directory.mkdir()
        for name in ("metrics.json", "manifest.json"):
            (directory / name).write_bytes((first / name).read_bytes())
        (directory / "scores.jsonl").symlink_to(first / "scores.jsonl")
        directories.append(directory)
    line = '{{"step": {0}, "loss": {1:.4f}, "margin": {1:.4f}, "pair_accuracy": 0.5, "learning_rate": 1e-5}}\n'
    for i in range(100):
        run = write_run(tmp_path / f"run-{i}")
        (run / "metrics.jsonl").write_text("".join(line.format(s, v) for s, v in enumerate(rng.random(1000), 1)))
        directories.append(run)
    out = tmp_path / "report.html"
    report_page.write_report(directories, out)
    print(f"{out.stat().st_size / 1e6:.2f} MB")
    assert out.stat().st_size < 5e6
    page, seen = opened(browser, out, viewport={"width": 1280, "height": 800})
    assert seen == [] and page.evaluate("document.querySelectorAll('svg.chart').length") > 20
