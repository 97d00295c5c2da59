"""Rows of a file, one by one, each with where it is; what cannot be read of it comes as a `RowError`.

.jsonl .ndjson    an object a line; also any file whose name ends otherwise
.json             the same, or one array of objects, which is read whole
.csv .tsv         a line of names, then rows; every value is text
.parquet

Each may be compressed, but for Parquet, which is by itself: .gz, .bz2, .xz, .zst.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow
from pyarrow import parquet

from ..errors import UserError, first_line
from .messages import JSON_OPTIONS, parse_json, too_deep
from .report import RowError

Rows = Iterator[tuple[str, Any]]
_KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_PACKED = (".gz", ".bz2", ".xz", ".zst")
_BOM = b"\xef\xbb\xbf"
_DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError, pyarrow.ArrowInvalid)
_NOT_JSON = "not JSON"
_DECODER = json.JSONDecoder(**JSON_OPTIONS)


def is_rows_file(path: Path) -> bool:
    """Whether a file's name ends as those of rows do."""
    return kind_of_file(path) in _KINDS


def kind_of_file(path: Path) -> str:
    """The ending of a file's name that says its format, without that of its compression."""
    name = path.with_suffix("") if path.suffix in _PACKED else path
    return name.suffix.lower()


def file_rows(path: Path) -> Rows:
    """The rows of a file.

    Raises:
        UserError: the file cannot be opened, or is damaged: what is left of it cannot be read.
    """
    kind, where = kind_of_file(path), "its beginning"
    delimiter = {".csv": ",", ".tsv": "\t"}.get(kind)
    rows = _parquet_rows(path) if kind == ".parquet" else _text_rows(path, delimiter)
    try:
        for where, row in rows:
            yield where, row
    except _DAMAGED as error:
        raise UserError(f"data {str(path)!r} cannot be read behind {where}: {first_line(error)}") from error


def _text_rows(path: Path, delimiter: str | None) -> Rows:
    with _opened(path) as file:
        if delimiter:
            yield from _csv_rows(file, delimiter, path)
            return
        start = file.peek(1 << 16).removeprefix(_BOM).lstrip()
        if start.startswith(b"["):
            yield from _array_rows(file.read(), path)
        else:
            yield from _jsonl_rows(file)


def _opened(path: Path) -> BinaryIO:
    if path.suffix == ".zst":
        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"), 1 << 20)
    openers = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return io.BufferedReader(openers[path.suffix](path), 1 << 20) if path.suffix in openers else path.open("rb")


def _jsonl_rows(file: BinaryIO) -> Rows:
    for number, line in enumerate(file, start=1):
        line = line.removeprefix(_BOM) if number == 1 else line
        if line.strip():
            yield f"line {number}", _row(line)


def _row(line: bytes) -> Any:
    try:
        return parse_json(line)
    except RowError as error:
        return error
    except ValueError as error:
        return RowError(f"not JSON ({error}); a JSONL file has one object a line", _NOT_JSON)


# What matters to where an item of an array ends: brackets, commas and strings, in which those mean nothing.
_STRUCTURE = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{},]', re.DOTALL)
_SPACE = re.compile(r"[ \t\r\n]*")


def _array_rows(content: bytes, path: Path) -> Rows:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"data {str(path)!r} is not text in UTF-8: {error}") from error
    place, number, line, counted = _behind_space(text, text.index("[") + 1), 0, 1, 0
    if text[place : place + 1] == "]":
        return
    while True:
        number += 1
        line, counted = line + text.count("\n", counted, place), place
        row, place = _item(text, place)
        yield f"item {number} (line {line})", row
        if text[place : place + 1] != ",":
            break
        place = _behind_space(text, place + 1)
    if place >= len(text):
        yield f"item {number + 1}", RowError("not JSON (the array has no end: is the file cut off?)", _NOT_JSON)
    elif text[place + 1 :].strip():
        yield f"behind item {number}", RowError("not JSON (something follows the end of the array)", _NOT_JSON)


def _item(text: str, start: int) -> tuple[Any, int]:
    """An item of an array, and where the comma or the bracket behind it is."""
    try:
        row, end = _DECODER.raw_decode(text, start)
        end = _behind_space(text, end)
        if text[end : end + 1] in ("", ",", "]"):
            return row, end
        row = RowError("not JSON (neither a comma nor the end of the array follows)", _NOT_JSON)
    except RowError as error:
        row = error
    except RecursionError:
        row = too_deep()
    except ValueError as error:
        row = RowError(f"not JSON ({error}); a JSON file has one array of objects, or one object a line", _NOT_JSON)
    return row, _end_of_item(text, start)


def _behind_space(text: str, place: int) -> int:
    return _SPACE.match(text, place).end()


def _end_of_item(text: str, place: int) -> int:
    """Where the comma or the bracket behind an item of an array stands; the end of the text if there is none."""
    depth = 0
    for found in _STRUCTURE.finditer(text, place):
        sign = found[0]
        if depth == 0 and sign in (",", "]"):
            return found.start()
        depth += (sign in ("[", "{")) - (sign in ("]", "}") and depth > 0)
    return len(text)


def _csv_rows(file: BinaryIO, delimiter: str, path: Path) -> Rows:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # of the whole process; 128 KiB by default, less than many texts
    # A byte that is no UTF-8 becomes half a character, which makes its row a bad one.
    with io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        yield from _table_rows(csv.reader(lines, delimiter=delimiter, strict=True), path)


def _table_rows(reader: Any, path: Path) -> Rows:
    names, line = None, 1
    while True:
        where, row = f"line {line}", None
        try:
            fields = next(reader, None)
            if fields is None:
                return
            if fields and names is None:
                names = _checked_names(fields, path)
            elif fields and len(fields) != len(names):
                row = RowError(
                    f"{len(fields)} fields, but the first line has {len(names)}", "another number of fields"
                )
            elif fields:
                row = dict(zip(names, fields, strict=True))
        except csv.Error as error:
            row = RowError(f"not CSV ({error})", "not CSV")
        line = reader.line_num + 1
        if row is not None:
            yield where, row


def _checked_names(names: list[str], path: Path) -> list[str]:
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"data {str(path)!r} has two columns {ascii(twice)}: rename one of them")
    return names


def _parquet_rows(path: Path) -> Rows:
    number = 0
    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=1000):
            for row in batch.to_pylist():
                yield f"row {number}", row
                number += 1
