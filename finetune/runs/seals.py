"""Folders that are known again: a file `complete` in them, written last, lists all others by size and SHA-256.

{"files": {"optimizer.pt": {"bytes": 1234, "sha256": "..."}, ...}}
"""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..files import file_digest, write_text

COMPLETE = "complete"
_HASHED_AT_ONCE = 4


def seal(folder: Path) -> None:
    """Says that everything in this folder is on disk, and what it is.

    Files that an earlier call listed are not read again; `damage` tells whether they are still the same.
    """
    known = _listed(folder) or {}
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and not _is_passing(path))
    new = [path for path in paths if path.relative_to(folder).as_posix() not in known]
    if not new and known:
        return
    with ThreadPoolExecutor(_HASHED_AT_ONCE) as pool:
        digests = pool.map(file_digest, new)
        files = {
            path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": digest}
            for path, digest in zip(new, digests, strict=True)
        }
    write_text(folder / COMPLETE, json.dumps({"files": known | files}, indent=1) + "\n")


def is_sealed(folder: Path) -> bool:
    """Whether the folder was written to its end; `damage` tells whether it is still as it was then."""
    return (folder / COMPLETE).is_file()


def damage(folder: Path) -> str:
    """What is wrong with a folder that was sealed, in a few words; empty if nothing is."""
    files = _listed(folder)
    if files is None:
        return f"its {COMPLETE}, which lists the other files, cannot be read"
    for name, file in files.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (size := (folder / name).stat().st_size) != file["bytes"]:
            return f"{name} has {size:,} bytes instead of {file['bytes']:,}"
    with ThreadPoolExecutor(_HASHED_AT_ONCE) as pool:
        found = pool.map(lambda name: _change(folder / name, files[name]["sha256"]), files)
        return next((f"{name} {change}" for name, change in zip(files, found, strict=True) if change), "")


def _is_passing(path: Path) -> bool:
    return path.name == COMPLETE or path.suffix == ".lock"  # of the library datasets


def _listed(folder: Path) -> dict[str, dict[str, Any]] | None:
    """The files in the list, by name; None if there is none that can be read."""
    try:
        files = json.loads((folder / COMPLETE).read_bytes())["files"]
        return {name: {"bytes": int(file["bytes"]), "sha256": str(file["sha256"])} for name, file in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _change(path: Path, digest: str) -> str:
    try:
        return "" if file_digest(path) == digest else "has changed since it was written"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
