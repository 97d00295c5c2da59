"""Progress bars, on stderr."""

import sys
import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


def counting_bar(stays: bool = True) -> Progress:
    """A bar for each task that counts what is done, and the time left; it stays when it is done, if it `stays`."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    # Lines for a file or a pipe go there and not to the terminal of the bar.
    return Progress(
        *columns,
        console=Console(stderr=True, force_jupyter=False),
        transient=not stays,
        redirect_stdout=sys.stdout.isatty(),
    )


def row_progress() -> Progress:
    """A bar for each task of rows; a task has the field `speed`, in tokens a second."""
    columns = (
        *(TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TextColumn("rows")),
        *(TextColumn("{task.fields[speed]:,.0f} tokens/s"), TimeRemainingColumn()),
    )
    # A notebook's bars are widgets of a package that may not be there; as text its cell shows their last state.
    return Progress(*columns, console=Console(stderr=True, force_jupyter=False))


def speedometer(progress: Progress, task: TaskID) -> Callable[[int, int], None]:
    """Starts a task of `row_progress`; call the result with the rows and tokens of every batch done."""
    started, tokens = time.monotonic(), 0
    progress.start_task(task)

    def show(new_rows: int, new_tokens: int) -> None:
        nonlocal tokens
        tokens += new_tokens
        progress.update(task, advance=new_rows, speed=tokens / (time.monotonic() - started))

    return show
