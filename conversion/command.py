"""`deepseek-moe convert`: the function with a progress bar and its report as text."""

import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from modeling_deepseek_moe import CheckpointError

from .convert import ConversionReport, convert


def run_convert(
    source: Path, target: Path, to: str, *, dtype: str | None, verify: bool, dry_run: bool, copy: bool
) -> None:
    """Converts, and prints what happened; a dry run prints the plan, one line a tensor.

    Raises:
        CheckpointError: as `convert` does, and for an unknown format or dtype.
        KeyboardInterrupt: says that the same call goes on.
    """
    try:
        if dry_run:
            report = convert(source, target, to, dtype=dtype, dry_run=True)
            sys.stdout.write("\n".join([*report.plan.lines(), *report.lines(), ""]))
            return
        report = _with_bar(source, target, to, dtype=dtype, verify=verify, copy=copy)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(f"stopped: finished files stay in {target}, and the same call goes on") from stop
    sys.stdout.write("\n".join([*report.lines(), ""]))


def _with_bar(source: Path, target: Path, to: str, **options) -> ConversionReport:
    columns = [TextColumn("{task.description}"), BarColumn(), DownloadColumn()]
    columns += [TransferSpeedColumn(), TimeRemainingColumn()]
    bar = Progress(*columns, console=Console(stderr=True))
    task = bar.add_task("", total=None)

    def on_progress(file: str, count: int, total: int) -> None:
        bar.start()  # only now: a source that is refused shows no bar
        bar.update(task, advance=count, total=total, description=file)

    try:
        return convert(source, target, to, on_progress=on_progress, **options)
    finally:
        if bar.live.is_started:
            bar.stop()
