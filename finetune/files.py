"""Files that are there whole or not at all, whenever a run is killed."""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

UNFINISHED = ".aside"  # how the name of what is still being written ends


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all, also after a power failure."""
    unfinished = path.with_name(path.name + UNFINISHED)
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A new path to write to, a file or a folder, which takes the place of `path` when the block succeeds."""
    unfinished = path.with_name(path.name + UNFINISHED)
    remove([unfinished])
    yield unfinished
    if path.is_dir():
        remove([path])
    os.replace(unfinished, path)


def remove(paths: Iterable[Path]) -> None:
    """Delete files, folders with all that is in them, and links (not what they point to); missing ones are fine."""
    for path in list(paths):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
