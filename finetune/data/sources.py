"""Where rows come from: JSONL files and data sets of the Hub."""

import difflib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets

from .._compat import fingerprint
from ..errors import UserError
from ..files import file_digest
from .report import RowError

Rows = Iterator[tuple[str, Any]]


def open_rows(source: str, split: str, streaming: bool = False) -> tuple[Callable[[], Rows], str]:
    """A function that begins to read the rows, and what tells this state of the source from others.

    Args:
        source: path of a JSONL file, else the Hub name of a data set.
        split: which split of a Hub data set.
        streaming: read a Hub data set row by row instead of downloading it first.

    Returns:
        A function whose result gives for each row where it is (`line 3`) and what it is; a line that is not JSON comes
        as a `RowError`. And a string that changes with the rows; empty for a stream of the Hub.

    Raises:
        UserError: there is no such file or data set.
    """
    check_source(source)
    path = Path(source)
    if path.is_file():
        return lambda: _jsonl_rows(path), "" if streaming else file_digest(path)
    try:
        data = datasets.load_dataset(source, split=split, streaming=streaming)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"cannot load data {source!r}, split {split!r}: {str(error).splitlines()[0]}") from error
    return lambda: ((f"row {number}", row) for number, row in enumerate(data)), "" if streaming else fingerprint(data)


def check_source(source: str) -> None:
    """Raise a UserError for what can only be a file's path and is none; it costs nothing, so it can come first."""
    path = Path(source)
    if path.is_file():
        return
    if path.exists() or path.suffix in (".jsonl", ".json") or source.startswith((".", "/", "~")):
        reason = "is a folder, not a JSONL file" if path.is_dir() else "does not exist"
        files = [other.name for other in path.parent.iterdir() if other.is_file()] if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, files, n=1)
        hint = f" (did you mean {str(path.with_name(close[0]))!r}?)" if close else ""
        raise UserError(f"data {source!r} {reason}{hint}: give the path of a JSONL file or the Hub name of a data set")


def _jsonl_rows(path: Path) -> Rows:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if not line.strip():
                continue
            try:
                yield f"line {number}", json.loads(line)
            except ValueError as error:
                yield f"line {number}", RowError(f"not JSON ({error}); a JSONL file has one object a line", "not JSON")
