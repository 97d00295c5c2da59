"""Bad input to a verb: what comes of it is one of five words."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from typer.testing import CliRunner

from modeling_deepseek_moe.cli.main import app

OUTCOMES = ("clear", "silent", "traceback", "hang")
SECONDS = 60  # of one input; the slowest that is clear takes the ten that a chat template may compute


class Case(NamedTuple):
    """One input.

    Attributes:
        name: what is wrong.
        arguments: of the command; `{folder}` is the case's own folder, `{base}` a sound model, and so on (`Places`).
        prepare: puts files into the folder.
        stdin: what is typed.
        says: a part of the line that comes.
    """

    name: str
    arguments: list[str]
    prepare: Callable[[Path, "dict[str, Path]"], None] = lambda folder, places: None
    stdin: str = ""
    says: str = ""


class Tried(NamedTuple):
    """What came of a case: one of `OUTCOMES`, and the line or the error."""

    case: Case
    outcome: str
    line: str


class Hang(BaseException):
    """Nothing catches it but the one who waits."""


@contextmanager
def ended_after(seconds: float) -> Iterator[None]:
    def end(number, frame):
        raise Hang

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def try_case(case: Case, folder: Path, places: dict[str, Path]) -> Tried:
    """Calls the command in this process.

    Args:
        folder: an empty one.
        places: paths by the names that arguments have for them.
    """
    places = {**places, "folder": folder}
    case.prepare(folder, places)
    arguments = [argument.format(**places) if "{" in argument else argument for argument in case.arguments]
    before = sorted(path.name for path in folder.iterdir())
    try:
        with ended_after(SECONDS):
            result = CliRunner().invoke(app, arguments, input=case.stdin)
    except Hang:
        return Tried(case, "hang", "")
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        return Tried(case, "traceback", repr(result.exception)[:300])
    if result.exit_code == 0:
        # In a conversation the line comes where the answer would, and the conversation goes on.
        is_said = arguments[0] == "chat" and case.says and case.says in result.stderr
        return Tried(case, "clear" if is_said else "silent", "\n".join(lines)[-300:])
    # typer's own, of an option that does not exist or is no number, is a box of several lines.
    is_clear = result.exit_code == 2 or (result.exit_code == 1 and lines and case.says in lines[-1])
    left = sorted(path.name for path in folder.iterdir())
    if is_clear and left != before:
        return Tried(case, "silent", f"left {set(left) - set(before)} behind: {lines[-1]}")
    return Tried(case, "clear" if is_clear else "silent", "\n".join(lines)[-300:])
