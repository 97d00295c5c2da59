"""`deepseek-moe convert`: the function with a progress bar and its report as text."""

import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from modeling_deepseek_moe import CheckpointError

from .one_conversion import ConversionReport, convert
from .upcycle.split import UpcycleOptions


def run_convert(
    source: Path, target: Path, to: str, *, dry_run: bool, upcycle: dict[str, int | None], **options
) -> None:
    """Converts, and prints what happened; a dry run prints the plan, one line a tensor.

    Arguments are those of `convert`; `upcycle` holds the fields of `UpcycleOptions`, None where they were not given.

    Raises:
        CheckpointError: as `convert` does, and for an unknown format or dtype.
        KeyboardInterrupt: says that the same call goes on.
    """
    try:
        options["upcycle"] = _upcycle_options(upcycle)
        if dry_run:
            report = convert(source, target, to, dry_run=True, **options)
            sys.stdout.write("\n".join([*report.plan.lines(), *report.lines(), ""]))
            return
        report = _with_bar(source, target, to, **options)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(f"stopped: finished files stay in {target}, and the same call goes on") from stop
    sys.stdout.write("\n".join([*report.lines(), ""]))


def _upcycle_options(fields: dict[str, int | None]) -> UpcycleOptions | None:
    given = {name: value for name, value in fields.items() if value is not None}
    if not given:
        return None
    missing = [name for name in ("experts", "shared_experts", "top_k") if name not in given]
    if missing:
        raise CheckpointError(f"upcycle needs {', '.join(f'--{name}' for name in missing)} as well".replace("_", "-"))
    return UpcycleOptions(**given)


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
