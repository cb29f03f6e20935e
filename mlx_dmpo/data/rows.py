"""Files -> rows: JSON lines, a JSON array, objects one after another, Parquet, or a data set of the hub.

A row is (source, value): the source is `file:line` (JSON lines) or `file:row N`, for messages; the value of a row that is no
JSON is the UserError that says so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError

Rows = Iterator[tuple[str, Any]]


HUB_NAME = re.compile(r"(?P<name>[\w][\w.-]*/[\w][\w.-]*?)(?::(?P<config>[\w.-]+))?(?:@(?P<split>[\w.-]+))?")


SUFFIXES = (".json", ".jsonl", ".parquet", ".csv", ".txt", ".gz", ".zip")


SPLITS = {"train": ("train",), "valid": ("validation", "valid", "dev"), "test": ("test",)}  # as the hub names them


def hub_name(data: str | Path) -> re.Match[str] | None:
    """`owner/name[:config][@split]`, where it is no path, nor a mistyped one: `owner` is no directory here, `name` bears no suffix of a file."""
    found = HUB_NAME.fullmatch(str(data))
    typo = found and (Path(data).exists() or Path(found["name"]).parent.exists() or found["name"].endswith(SUFFIXES))
    return None if typo else found


def data_file(data: str | Path, split: str) -> Path | None:
    """The file of a split: a directory's own, or the one named; None for a data set of the hub."""
    path = Path(data)
    return None if hub_name(data) else path / f"{split}.jsonl" if path.is_dir() else path


def has_split(data: str | Path, split: str) -> bool:
    """Whether a directory or a data set of the hub brings a split of its own. A file, or one named split, is but itself."""
    found = hub_name(data)
    if found:
        return not found["split"] and any(name in _hub(found) for name in SPLITS[split])
    return Path(data).is_dir() and (Path(data) / f"{split}.jsonl").exists()


def read_rows(data: str | Path, split: str) -> Rows:
    """Raises UserError where there is nothing to read."""
    found = hub_name(data)
    if found:
        return _hub_rows(found, split)
    path = data_file(data, split)
    assert path is not None
    if Path(data).is_dir() and not path.is_file():
        raise UserError(f"{path}: no such file: a prepared directory holds train.jsonl, valid.jsonl and test.jsonl")
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file: name a data file, a directory with train.jsonl, valid.jsonl and test.jsonl, or a data set of the hub"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}): name a readable file"
        ) from None
    if content.startswith(b"PAR1"):
        return _parquet_rows(path)
    if content.startswith(b"\x1f\x8b"):
        raise UserError(f"{path}: is compressed: unpack it first (gunzip)")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text: save it as UTF-8") from None
    if not text.strip():
        raise UserError(f"{path}: is empty: give at least one row")
    rows = _json_rows(path, text)
    return map(_without_surrogates, rows) if "\\ud" in text.lower() else rows


def _objects(text: str) -> list[Any] | None:
    """JSON values one after another, white space or commas between; None where that is not what the text is."""
    decoder, at = json.JSONDecoder(), 0
    found: list[Any] = []
    try:
        while True:
            while at < len(text) and text[at] in " \t\r\n,":
                at += 1
            if at == len(text):
                return found
            value, at = decoder.raw_decode(text, at)
            found.append(value)
    except (ValueError, RecursionError):
        return None


def _json_rows(path: Path, text: str) -> Rows:
    if text.lstrip().startswith("["):
        try:
            whole = json.loads(text)
        except (ValueError, RecursionError) as error:
            if getattr(error, "msg", "") != "Extra data":  # else lines, the first of which is a list
                raise _no_json(f"{path}:{getattr(error, 'lineno', 1)}", error) from None
        else:
            if not whole:
                raise UserError(f"{path}: is empty: give at least one row")
            yield from ((f"{path}:row {n}", value) for n, value in enumerate(whole, 1))
            return
    lines: list[tuple[str, Any]] = []
    for n, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                lines.append((f"{path}:{n}", json.loads(line)))
            except (ValueError, RecursionError) as error:
                lines.append((f"{path}:{n}", _no_json(f"{path}:{n}", error)))
    if any(isinstance(value, UserError) for _, value in lines):
        values = _objects(text)
        if values is not None:
            yield from ((f"{path}:row {n}", value) for n, value in enumerate(values, 1))
            return
    yield from lines


def _no_json(where: str, error: Exception) -> UserError:
    return UserError(f"{where}: not valid JSON ({getattr(error, 'msg', error)}): mend the syntax")


def _without_surrogates(row: tuple[str, Any]) -> tuple[str, Any]:
    """JSON can write half of a surrogate pair, which is no text: nothing can encode it."""
    source, value = row
    try:
        if not isinstance(value, UserError):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return source, UserError(
            f"{source}: holds half of a surrogate pair (\\ud800 to \\udfff): write the whole character"
        )
    return row


def _parquet_rows(path: Path) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if not file.metadata.num_rows:
                raise UserError(f"{path}: is empty: give at least one row")
            n = 0
            for batch in file.iter_batches():
                for value in batch.to_pylist():
                    n += 1
                    yield f"{path}:row {n}", value
    except (OSError, ValueError, NotImplementedError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: is no readable Parquet file ({_first_line(error)}): write it anew") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _hub(found: re.Match[str]) -> Mapping[str, Any]:
    import datasets

    try:
        return datasets.load_dataset(found["name"], found["config"])
    except (
        Exception
    ) as error:  # the hub and its readers raise many kinds; each means "this is not a data set we can load"
        raise UserError(
            f"{found[0]}: no such path, and no data set of the hub that can be loaded ({type(error).__name__}: {_first_line(error)}): "
            "name a file, a directory, or owner/name[:config][@split]"
        ) from error


def _hub_rows(found: re.Match[str], split: str) -> Rows:
    loaded = _hub(found)
    wanted = (found["split"],) if found["split"] else SPLITS[split]
    name = next((name for name in wanted if name in loaded), None)
    if name is None:
        raise UserError(
            f"{found[0]}: has no split {wanted[0]}: name one as {found['name']}@SPLIT, of {', '.join(map(str, loaded))}"
        )
    for n, value in enumerate(loaded[name], 1):
        yield f"{found['name']}@{name}:row {n}", value


ALPACA_COLUMNS = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "history": "history",
    "system": "system",
    "chosen": "chosen",
    "rejected": "rejected",
}


SHAREGPT_COLUMNS = {"messages": "conversations", "system": "system", "chosen": "chosen", "rejected": "rejected"}


TAGS = {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt", "system_tag": "system"}


def column_map(path: Path) -> Callable[[Any, str], Any] | None:
    """What the `dataset_info.json` beside a file says of its columns, as a function (row, source) -> row in the standard names.

    None where there is no such file, or it says nothing of this one. Raises UserError for a map that cannot be followed.
    """
    info = path.parent / "dataset_info.json"
    if path == info or not info.is_file():
        return None
    try:
        entries = json.loads(info.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{info}: cannot be read ({error}): mend it or take it away from beside {path.name}") from None
    entries = entries.items() if isinstance(entries, dict) else ()
    found = [(name, e) for name, e in entries if isinstance(e, dict) and e.get("file_name") == path.name]
    if not found or not {"columns", "tags"} & set(found[0][1]):
        return None
    name, entry = found[0]
    columns, tags = entry.get("columns", {}), entry.get("tags", {})
    standard = SHAREGPT_COLUMNS if entry.get("formatting") == "sharegpt" else ALPACA_COLUMNS
    for part, known, given in (("columns", standard, columns), ("tags", TAGS, tags)):
        if not isinstance(given, dict) or any(not isinstance(v, str) for v in given.values()):
            raise UserError(f'{info}: "{part}" of {name} is not a map of names: write {{"prompt": "question", ...}}')
        for key in given:
            if key not in known:
                raise UserError(f'{info}: {part} of {name}: "{key}" is not supported: known are {", ".join(known)}')
    # a tag's value -> the standard one: {"role": "from", "content": "value", "user": "human", ...}
    names = {tags.get(tag, value): value for tag, value in TAGS.items()}

    def retagged(message: Any) -> Any:
        if isinstance(message, list):
            return [retagged(m) for m in message]
        if not isinstance(message, dict):
            return message
        found = {names.get(key, key): value for key, value in message.items()}
        return found | {"from": names.get(str(found["from"]), found["from"])} if "from" in found else found

    def mapped(row: Any, source: str) -> Any:
        if not isinstance(row, dict):
            return row
        for key, column in columns.items():
            if column not in row:
                raise UserError(f'{source}: column "{column}" is missing: {info.name} names it as the {key} of {name}')
        # what the entry does not name keeps its place only where it bears the standard name already
        row = {standard[k]: row[c] for k, c in columns.items()} | {
            s: row[s] for k, s in standard.items() if k not in columns and s in row and s not in columns.values()
        }
        return {k: retagged(v) for k, v in row.items()} if standard is SHAREGPT_COLUMNS else row

    return mapped
