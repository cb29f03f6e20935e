"""MyAnimeList's XML export, and CSV copies of it."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from ...config import PrepareSettings
from ...errors import UserError
from . import files
from .contract import BadRows, Ratings
from .personal import Entry, Export, find, need, rating_of, ratings_of, read_csv, read_text, time_of

PLANNED = {"plantowatch", "plantoread", "6", "plan_to_watch", "plan_to_read"}


def myanimelist(path: Path, settings: PrepareSettings, bad: BadRows) -> Ratings:
    """series_title, my_score (1 to 10, 0 is not rated), my_status, my_finish_date; titles planned are left out."""
    if path.is_dir():
        lists = [p for p in sorted(path.iterdir()) if p.name.removesuffix(".gz").endswith((".xml", ".csv"))]
        if len(lists) != 1:
            raise UserError(f"{path}: holds {len(lists)} XML or CSV files: name the exported list itself")
        path = lists[0]
    file = find(path, (), "MyAnimeList export")
    export = Export()
    chosen = files.encoding_of(file, settings.encoding)
    first = files.start(file, encoding="" if chosen == files.UTF8 else chosen.codec)
    entries = (_xml if first.lstrip()[:1] == "<" else _csv)(file, export, settings, first)
    planned = 0
    for where, title, score, status, date in entries:
        if status.replace(" ", "").lower() in PLANNED:
            planned += 1
            continue
        rating = rating_of(score, where, bad, lambda r: r == 0)
        export.entries.append(Entry(title, rating, time_of(date)))
    if planned:
        export.notes.append(f"{planned:,} planned titles left out")
    return ratings_of(export, "MyAnimeList", "anime", (1, 10))


def _xml(path: Path, export: Export, settings: PrepareSettings, first: str) -> list[tuple[str, str, str, str, str]]:
    """(where, title, score, status, date) of each anime or manga. Raises UserError."""
    text = read_text(path, settings.encoding).lstrip()
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise UserError(
            f"{path}: declares entities, which MyAnimeList's export does not: use the file as it was exported"
        )
    try:
        root = ElementTree.fromstring(text.encode())
    except ElementTree.ParseError as error:
        raise UserError(f"{path}:{error.position[0]}: not valid XML: export the list again") from None
    if root.tag != "myanimelist":
        raise UserError(f"{path}: not MyAnimeList's XML (<{root.tag}>): name the list exported there")
    export.files.append(path)
    found = []
    for n, entry in enumerate((e for e in root if e.tag in ("anime", "manga")), 1):
        cell = {child.tag: (child.text or "").strip() for child in entry}
        finished = cell.get("my_finish_date", "")
        date = cell.get("my_start_date", "") if not finished or finished.startswith("0000") else finished
        title = cell.get("series_title") or cell.get("manga_title", "")
        found.append((f"{path}:entry {n}", title, cell.get("my_score", ""), cell.get("my_status", ""), date))
    return found


def _csv(path: Path, export: Export, settings: PrepareSettings, first: str) -> list[tuple[str, str, str, str, str]]:
    """The same of a CSV with series_title or title, my_score or score, my_status or status."""
    names = [("title", "score"), ("series_title", "my_score")]["my_score" in first.partition("\n")[0].lower()]
    need(path, names, "a MyAnimeList export", settings.encoding)
    found = []
    for where, row in read_csv(path, export, settings.encoding):
        title, score = (row[name.replace("_", "")] for name in names)
        status = row.get("mystatus") or row.get("status", "")
        date = row.get("myfinishdate") or row.get("finishdate") or row.get("mystartdate") or row.get("startdate", "")
        found.append((where, title, score, status, date))
    return found
