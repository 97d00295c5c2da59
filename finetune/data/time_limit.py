"""A bound on the time of code that comes with a model."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class TimeLimit(Exception):
    """The code did not come to its end."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Ends the block by a TimeLimit when this process has computed for so long in it, all its threads together.

    Only the main thread of a system with such a timer (not Windows) can be interrupted; elsewhere there is no limit.
    A limit within a limit has no effect.
    """
    can = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    if not can or signal.getsignal(signal.SIGVTALRM) not in (signal.SIG_DFL, signal.SIG_IGN):
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise TimeLimit(f"it did not come to an end in {seconds:g} seconds")

    before = signal.signal(signal.SIGVTALRM, end)
    # Again and again, should the code catch whatever is raised in it.
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 0.1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
