"""Timing by turns, the rows that come of it, and the memory of this process."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

# A side that has run so many seconds in a comparison takes part no longer, but in two rounds at least.
PATIENCE = 60.0

# Prepares step number `seed` and returns what is timed.
Prepare = Callable[[int], Callable[[], Any]]


class DisagreementError(AssertionError):
    """Both sides compute different things, so comparing their times means nothing."""


class Case(NamedTuple):
    """One comparison: what is said on the screen, and what gives its rows."""

    label: str
    run: Callable[[], list[dict[str, Any]]]


def alternate(sides: Mapping[str, Prepare], repeats: int) -> dict[str, list[float]]:
    """Seconds of each side in every round, after a warm-up of each.

    Each round begins with another side (A, B, then B, A), so that none is always the one that comes after the pause.
    Every step has a seed of its own, so that no side finds what another one prepared for the same shapes.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for index, prepare in enumerate(sides.values()):
        spent = 0.0
        for step in range(min(3, repeats)):
            spent += _timed(prepare(step * len(sides) + index))
            if spent > 1.0:
                break
    for round_number in range(repeats):
        gc.collect()
        turns = list(enumerate(sides.items()))
        first = round_number % len(turns)
        for index, (name, prepare) in turns[first:] + turns[:first]:
            if round_number < 2 or sum(seconds[name]) < PATIENCE:
                seconds[name].append(_timed(prepare((round_number + 3) * len(sides) + index)))
    return seconds


def _timed(step: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    result = step()
    seconds = time.perf_counter() - begin
    del result
    return seconds


def compare(
    work: str,
    ours: tuple[str, Sequence[float]],
    other: tuple[str, Sequence[float]],
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    as_multiple: bool = False,
    unit: str = "s",
    **facts: Any,
) -> dict[str, Any]:
    """One row. The ratio is the median of those of neighbouring runs, which a drifting machine does not move.

    Args:
        work: what was done.
        ours, other: a label, and what was measured in each round.
        at_least: goal for other / ours.
        at_most: goal for ours / other; the row then states that ratio.
        as_multiple: state ours / other without a goal.
        unit: `s` or `bytes`.
        **facts: further keys.
    """
    (our_label, our_values), (other_label, other_values) = ours, other
    pairs = list(zip(our_values, other_values, strict=False))
    as_multiple = as_multiple or at_most is not None
    ratio = quartiles([a / b for a, b in pairs] if as_multiple else [b / a for a, b in pairs])
    goal = reached = None
    if at_least is not None:
        goal, reached = {"at least": at_least}, ratio[0] >= at_least
    elif at_most is not None:
        goal, reached = {"at most": at_most}, ratio[0] <= at_most
    return {
        "work": work,
        "ours": {"label": our_label, "quartiles": quartiles(our_values), "n": len(our_values)},
        "other": {"label": other_label, "quartiles": quartiles(other_values), "n": len(other_values)},
        "unit": unit,
        "ratio": {"of": "ours / other" if as_multiple else "other / ours", "quartiles": ratio, "n": len(pairs)},
        "goal": goal,
        "reached": reached,
        **facts,
    }


def quartiles(values: Sequence[float]) -> list[float]:
    """Median, lower and upper quartile."""
    if len(values) == 1:
        return [*values] * 3
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return [median, lower, upper]


def agreement(what: str, ours: torch.Tensor, other: torch.Tensor, bound: float) -> dict[str, float]:
    """The largest difference over the largest entry of `other`, and the bound it keeps.

    Raises:
        DisagreementError: it does not, or there is nothing to compare.
    """
    largest = other.float().abs().max().item()
    difference = (ours.float() - other.float()).abs().max().item() / max(largest, 1e-30)
    if not difference <= bound or largest == 0:
        raise DisagreementError(
            f"{what} of both sides differ by {difference:.2g} of the largest entry {largest:.2g}, more than {bound}: "
            "they do not compute the same"
        )
    return {"difference": difference, "bound": bound}


def resident_bytes() -> int:
    """Memory of this process now."""
    return _status("VmRSS")


def reset_peak() -> None:
    """Starts a new maximum for `peak_bytes`; where the system does not permit it, that stays the one so far."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def peak_bytes() -> int:
    """The most memory this process had since `reset_peak`."""
    return _status("VmHWM")


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")
