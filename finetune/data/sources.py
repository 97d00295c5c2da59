"""Where rows come from: files and folders, and data sets of the Hub."""

import difflib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets

from .._compat import files_of_splits, fingerprint
from ..errors import UserError, first_line
from ..files import path_digest
from .files import Rows, file_rows, is_rows_file

_NAMES = "a file (JSONL, a JSON array, CSV, Parquet), a folder of such files, or the Hub name of a data set"


def open_rows(source: str, split: str, streaming: bool = False) -> tuple[Callable[[], Rows], str]:
    """A function that begins to read the rows, and what tells this state of the source from others.

    Args:
        source: path of a file or a folder (`files.py` says of which formats), else the Hub name of a data set.
        split: which split of a folder or a Hub data set.
        streaming: read a Hub data set row by row instead of downloading it first. Files are read so anyway, but for
            JSON arrays.

    Returns:
        A function whose result gives for each row where it is (`line 3`) and what it is; what cannot be read comes as
        a `RowError`. And a string that changes with the rows; empty for a stream.

    Raises:
        UserError: there is no such source or split.
    """
    check_source(source)
    path = Path(source)
    if os.path.isfile(source):
        return lambda: file_rows(path), "" if streaming else path_digest(path)
    if os.path.isdir(source):
        return _open_folder(path, split, streaming)
    try:
        data = datasets.load_dataset(source, split=split, streaming=streaming)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"cannot load data {source!r}, split {split!r}: {first_line(error)}") from error
    return lambda: _numbered(data), "" if streaming else fingerprint(data)


def check_source(source: str) -> None:
    """Raise a UserError for what can only be a path and is none; it costs nothing, so it can come first."""
    if not source.strip():
        raise UserError(f"data is {source!r}: give the path of {_NAMES}")
    path = Path(source)
    if os.path.exists(source) or not (is_rows_file(path) or source.startswith((".", "/", "~"))):
        return
    others = os.listdir(path.parent) if os.path.isdir(path.parent) else []
    close = difflib.get_close_matches(path.name, others, n=1, cutoff=0.8)
    hint = f" (did you mean {str(path.with_name(close[0]))!r}?)" if close else ""
    raise UserError(f"data {source!r} does not exist{hint}: give the path of {_NAMES}")


def _open_folder(folder: Path, split: str, streaming: bool) -> tuple[Callable[[], Rows], str]:
    mark = "" if streaming else path_digest(folder)
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        try:
            saved = datasets.load_from_disk(os.fspath(folder))
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"cannot load data {str(folder)!r}: {first_line(error)}") from error
        if isinstance(saved, datasets.DatasetDict):
            saved = _of_split(saved, split, folder)
        return lambda: _numbered(saved), mark
    paths = {name: [path for path in paths if is_rows_file(path)] for name, paths in files_of_splits(folder).items()}
    paths = {name: found for name, found in paths.items() if found}
    if not paths:
        raise UserError(f"data {str(folder)!r} is a folder without rows: give the path of {_NAMES}")
    files = _of_split(paths, split, folder)

    def rows() -> Rows:
        for path in files:
            for where, row in file_rows(path):
                yield f"{path.relative_to(folder.absolute())}, {where}", row

    return rows, f"{mark} {split}"


def _of_split(splits: dict[str, Any], split: str, folder: Path) -> Any:
    if split not in splits:
        raise UserError(
            f"data {str(folder)!r} has no split {split!r}: it has {', '.join(splits)} (`data_split` and `eval_split` "
            "in a recipe, --split elsewhere)"
        )
    return splits[split]


def _numbered(data: Any) -> Iterator[tuple[str, Any]]:
    return ((f"row {number}", row) for number, row in enumerate(data))
