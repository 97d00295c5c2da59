"""Files that are there whole or not at all, whenever a run is killed."""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from modeling_deepseek_moe.errors import UserError

UNFINISHED = ".aside"  # how the name of what is still being written ends
_MOST_FILES = 10_000  # of a data set in a folder
_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))  # Windows has no quotas
_TEXTS = (os.strerror(errno.ENOSPC), "Not enough disk space")  # the second one is of the library datasets


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all, also after a power failure."""
    unfinished = path.with_name(path.name + UNFINISHED)
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A new path to write to, a file or a folder, which takes the place of `path` when the block succeeds."""
    unfinished = path.with_name(path.name + UNFINISHED)
    remove([unfinished])
    try:
        yield unfinished
    except BaseException:
        with contextlib.suppress(OSError):
            remove([unfinished])
        raise
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


def check_replaceable(files: Iterable[Path], is_ours: Callable[[], bool]) -> None:
    """Makes sure that a command may write to files which may be there.

    Args:
        files: what it is going to write.
        is_ours: whether an earlier call of the command wrote those that are there.

    Raises:
        UserError: one of them is something else.
    """
    there = [path for path in files if path.exists()]
    if there and not is_ours():
        raise UserError(
            f"{there[0]} is there already and is no result of this command, so it is not replaced: name another output"
        )


def says_full(error: BaseException) -> bool | None:
    """Whether an error came of a full disk; None if neither it nor one of its causes says."""
    cause, seen = error, set()
    while cause is not None and id(cause) not in seen:  # where one is raised again by hand, they can go in circles
        seen.add(id(cause))
        if number := getattr(cause, "errno", None):
            return number in _FULL
        if any(text in str(cause) for text in _TEXTS):
            return True
        cause = cause.__cause__ or cause.__context__
    return None


@contextlib.contextmanager
def nothing_lost_if_full(output: Path) -> Iterator[None]:
    """Errors because the disk is full as one line, around a command that writes its results last and all at once.

    Args:
        output: the file or folder of the results.

    Raises:
        UserError: the disk is full.
    """
    try:
        yield
    except Exception as error:  # of whatever library was writing; all others go on as they are
        if not says_full(error):
            raise
        raise UserError(
            f"the disk of {output} is full: free some room; nothing there has changed, and the same command can be "
            "repeated"
        ) from error


def read_object(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None if there is no such file, or something else in it."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def path_digest(path: Path) -> str:
    """SHA-256 of a file's bytes; of a folder, that of its files' names and bytes, hidden ones left out.

    Raises:
        UserError: a folder of more files than rows come in.
    """
    if not path.is_dir():
        return file_digest(path)
    digest = hashlib.sha256()
    files = list(itertools.islice(path.rglob("*"), _MOST_FILES + 1))
    if len(files) > _MOST_FILES:
        raise UserError(
            f"{path} is a folder with more than {_MOST_FILES:,} files: name one that holds rows and no more"
        )
    for file in sorted(files):
        name = file.relative_to(path)
        if file.is_file() and not any(part.startswith(".") for part in name.parts):
            digest.update(f"{name.as_posix()}\0{file_digest(file)}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
