"""The report: one HTML page that needs nothing else, a Markdown file, and the charts as SVG files.

Titles, users, paths and commands are untrusted text: the template escapes everything, and control characters are
stripped. The page's content security policy forbids scripts and requests, should an escape be missed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..machine import console, files
from . import contents, figures, svg, tables
from .contents import MANY, Contents

POLICY = "default-src 'none'; style-src 'unsafe-inline'"
TEMPLATES = Path(__file__).resolve().parent / "templates"
MANY_ROWS = 40  # evaluations that one accuracy chart can show

Compare = Callable[[Sequence[Path]], Mapping[str, Any]]


def write_report(directories: Sequence[Path], out: Path, compare: Compare | None = None) -> list[Path]:
    """Writes `out` (HTML), and beside it NAME.md and NAME-charts/*.svg; returns what was written.

    compare  judge.compare.for_report, which adds differences with p-values and the trivial rankers; this room may not
             import it
    Raises UserError for a directory that holds no finished run or evaluation, or values of another kind.
    """
    if out.suffix == ".md":
        raise UserError(f"{out}: is where the Markdown would go: name the HTML file, {out.with_suffix('.html')}")
    found = contents.read_contents(directories)
    if compare and found.evaluations:
        added = compare([e.path for e in found.evaluations])
        found.comparison, found.baselines = added["comparison"], added["baselines"]
    try:
        charts = draw(found)
        page, markdown = render(found, charts), _markdown(found, charts, out)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        where = ", ".join(str(e.path / "metrics.json") for e in found.evaluations[:3])
        raise UserError(
            f"{where}: has values that this program does not write ({type(error).__name__}): evaluate again"
        ) from error
    folder = out.with_name(f"{out.stem}-charts")
    with files.writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(exist_ok=True)
        for old in folder.glob("*.svg"):
            old.unlink()
    written = [folder / f"{name}.svg" for name in charts]
    for path, drawn in zip(written, charts.values(), strict=True):
        files.write_text(path, svg.standalone(drawn))
    files.write_text(out.with_suffix(".md"), markdown)
    files.write_text(out, page)
    return [out, out.with_suffix(".md"), *written]


def draw(found: Contents) -> dict[str, str]:
    """Name -> SVG of every chart of the report."""
    charts: dict[str, str | None] = {}
    results, few = found.results, found.evaluations[:MANY]
    if results:
        best = sorted(results, key=lambda name: -results[name]["pair_accuracy"]["value"])[:MANY_ROWS]
        kept = {name: m for name, m in results.items() if name in best}
        charts["accuracy"] = figures.accuracy(kept | _named(found.baselines))
        charts["position-bias"] = figures.position_bias(kept)
        charts["popularity-bias"] = figures.popularity(kept)
        edges = figures.margin_edges([e.margins for e in few])
        tallest = figures.tallest_bin([e.margins for e in few], edges)
        for i, e in enumerate(few, 1):
            if e.metrics.get("calibration"):
                charts[f"calibration-{i}"] = figures.calibration(e.name, e.metrics["calibration"])
            charts[f"margins-{i}"] = figures.margins(e.name, e.margins, edges, tallest)
        charts |= _slices(few[:1] if len(few) > 4 else few)
    if found.runs:
        for i, drawn in enumerate(figures.curves({run.name: run.lines for run in found.runs}), 1):
            charts[f"training-{i}"] = drawn
    return {name: drawn for name, drawn in charts.items() if drawn}


def _slices(evaluations: Sequence[contents.Evaluation]) -> dict[str, str]:
    """One chart for each family and evaluation; those of a family share their axis."""
    charts = {}
    families = dict.fromkeys(family for e in evaluations for family in e.metrics.get("slices", {}))
    for family in families:
        kept = [(e, e.metrics["slices"].get(family, {"slices": []})["slices"]) for e in evaluations]
        kept = [(e, found) for e, found in kept if len(found) > 1]
        metrics = [s["pair_accuracy"] for _, found in kept for s in found]
        for i, (e, found) in enumerate(kept, 1):
            overall = e.metrics["pair_accuracy"]["value"]
            axis = figures.share_range([*metrics, *(e.metrics["pair_accuracy"] for e, _ in kept)], overall)
            charts[f"slices-{_file_name(family)}-{i}"] = figures.slices(family, e.name, found, overall, axis)
    return charts


def _named(baselines: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{name} (baseline)": {"pair_accuracy": m["pair_accuracy"]} for name, m in baselines.items()}


def _file_name(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "x"


def _gaps(found: Contents) -> list[str]:
    """The largest gap of each family where its interval leaves out 0, in words; then how many others there are."""
    lines, others = [], 0
    for e in found.evaluations[:MANY]:
        for family, part in e.metrics.get("slices", {}).items():
            gap = part.get("largest_gap")
            if gap and gap["low"] > 0:
                size = f"{100 * gap['value']:.1f} points (95 %: {100 * gap['low']:.1f} to {100 * gap['high']:.1f})"
                lines.append(f"{e.name}, {family.replace('_', ' ')}: {gap['higher']} above {gap['lower']} by {size}")
            others += bool(gap and gap["low"] <= 0)
    if others:
        lines.append(f"{others} largest gap{'s' if others > 1 else ''} of other families: the interval includes 0")
    return lines


def _notes(found: Contents) -> list[str]:
    """What a reader must know before the numbers."""
    notes = []
    for e in found.evaluations:
        if note := e.metrics.get("intervals", {}).get("note"):
            notes.append(f"{e.name}: {note}.")
        if trained := e.metrics.get("trained_on"):
            notes.append(f"{e.name}: {trained} of its examples were in the training data of the adapter.")
    for name, rows in (found.comparison or {}).get("only_in", {}).items():
        notes.append(f"{name}: {len(rows)} of its pairs were not scored by all others, and are not compared.")
    if len(found.evaluations) > MANY:
        notes.append(f"Small charts and slices show the first {MANY} of {len(found.evaluations)} evaluations.")
    return notes


def render(found: Contents, charts: Mapping[str, str]) -> str:
    """The page."""
    import jinja2
    from markupsafe import Markup

    def printable(value: Any) -> Any:
        return console.printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    groups: dict[str, list[Markup]] = {}
    for name, drawn in charts.items():  # built by svg.py, which escapes each text itself
        groups.setdefault(name.split("-")[0], []).append(Markup(drawn))
    style = svg.variables(":root") + svg.STYLE + (TEMPLATES / "page.css").read_text(encoding="utf-8")
    return (
        environment.get_template("page.html")
        .render(
            policy=POLICY,
            style=Markup(style),
            headline=contents.headline(found),
            what=contents.what_was_run(found),
            notes=_notes(found),
            charts=groups,
            found=found,
            results=_with_baselines(found),
            comparison=contents.comparison_table(found),
            ranking=contents.ranking_table(found),
            generation=contents.generation_table(found),
            others={
                e.name: e.metrics["generation"]["others"] for e in found.evaluations if e.metrics.get("generation")
            },
            gaps=_gaps(found),
            legend=[(run.name, i % svg.SERIES) for i, run in enumerate(found.runs)],
            pairs=[(e.name, contents.pair_table(e.hardest), contents.pair_table(e.easiest)) for e in found.evaluations],
            explanations=contents.explanations(found),
            commands=contents.commands(found),
            settings=[(x.name, contents.facts(x.manifest)) for x in found.runs],
            popularity=_popularity_source(found),
        )
        .lstrip()
        + "\n"
    )


def _popularity_source(found: Contents) -> str:
    sources = [e.metrics["popularity"].get("source", "") for e in found.evaluations if e.metrics.get("popularity")]
    return sources[0] if sources else ""


def _with_baselines(found: Contents) -> list[list[str]]:
    return tables.result_rows(found.results | {f"{n} (baseline)": m for n, m in found.baselines.items()})


def _markdown(found: Contents, charts: Mapping[str, str], out: Path) -> str:
    """The same in Markdown: sentences, tables, and links to the charts."""
    parts = [f"# {tables.markdown_text(contents.headline(found))}", tables.markdown_text(contents.what_was_run(found))]
    parts += [f"- {tables.markdown_text(note)}" for note in _notes(found)]
    if found.evaluations:
        # one evaluation a row is wide; in Markdown each metric gets a row
        parts += ["## Results", tables.markdown_table(list(zip(*_with_baselines(found), strict=True)))]
    for heading, table in (
        ("Comparisons", contents.comparison_table(found)),
        ("Ranking among candidates", contents.ranking_table(found)),
        ("Does it answer?", contents.generation_table(found)),
    ):
        if table:
            parts += [f"## {heading}", tables.markdown_table(table)]
    if gaps := _gaps(found):
        parts += ["## Largest gaps", "\n".join(f"- {tables.markdown_text(gap)}" for gap in gaps)]
    folder = f"{out.stem}-charts".replace(" ", "%20")
    parts += ["## Charts", "\n".join(f"![{name}]({folder}/{name}.svg)" for name in charts)]
    shell = "\n".join(console.printable(command) for command in contents.commands(found))
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", shell)), default=0))
    parts += ["## How to reproduce it", f"{fence}sh\n{shell}\n{fence}"]
    return "\n\n".join(part for part in parts if part) + "\n"
