"""A lock file: one process at a time works in a folder. However that ends, the system takes the lock off."""

import contextlib
import datetime
import errno
import os
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_TAKEN = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)  # the last one on Windows
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
# A byte far behind the text: Windows lets nobody read a byte that is locked.
_LOCKED_BYTE = 1 << 30
_held: set[int] = set()


class Locked(Exception):
    """Another process holds the lock; the message says which."""


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock file, which is made for the block and taken away after it.

    Where the file system knows no locks, a warning says so, and the block runs without one.

    Args:
        path: the lock file, in a folder that is there; it says which process holds it.

    Raises:
        Locked: another process holds it.
        OSError: the file cannot be written.
    """
    descriptor = _acquire(path)
    _held.add(descriptor)
    try:
        yield
    finally:
        _held.discard(descriptor)
        # Taken away while it is still held, so that nobody else's is; Windows does not allow that.
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(descriptor)
        if fcntl is None:
            with contextlib.suppress(OSError):
                path.unlink()


def _close_in_child() -> None:
    """A forked worker that outlives its killed parent for a while would keep the lock."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


def _acquire(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(descriptor, path)
            # Whoever held it before may have taken the file away after it was opened here.
            if _is_still(path, descriptor):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, _this_process().encode())
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int, path: Path) -> None:
    try:
        if fcntl:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            import msvcrt

            os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            os.lseek(descriptor, 0, os.SEEK_SET)
    except OSError as error:
        if error.errno in _TAKEN:
            os.lseek(descriptor, 0, os.SEEK_SET)
            holder = os.read(descriptor, 500).decode(errors="replace").strip()
            raise Locked(holder or "another process") from error
        if error.errno not in _NO_LOCKS:
            raise
        warnings.warn(
            f"{path.parent} is on a file system without locks ({error.strerror}): do not start a second process in it",
            stacklevel=2,
        )


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _this_process() -> str:
    now = datetime.datetime.now().strftime("%Y-%m-%d %H:%M:%S")
    return f"process {os.getpid()} on {socket.gethostname()}, since {now}"
