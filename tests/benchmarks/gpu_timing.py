"""Timing on a CUDA device: sides by turns, by events; the two roofs; a budget of minutes; peak memory.

On the CPU, where the benchmark is only rehearsed, the host's clock and the process's memory stand in.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from gpu_counts import Roofs
from measure import Prepare, alternate, peak_bytes, reset_peak, resident_bytes

_CYCLES = 2e9  # a second, of a clock that is not slower than the device's
_WARM_UPS = 3


def alternate_on_device(sides: Mapping[str, Prepare], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each side in every round, after a warm-up of each.

    Each round begins with another side, and all sides get the same seed in it. Before each step the device waits for
    as long as the host takes to launch it, so that what is timed is the device's work and not the launching, which a
    training loop hides the same way. A step that waits for the device in its midst shows its gaps all the same.
    """
    if device.type != "cuda":
        return alternate(sides, repeats)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    launching = {}
    for name, prepare in sides.items():
        for step_number in range(_WARM_UPS):
            step = prepare(step_number)
            torch.cuda.synchronize()
            begin = time.perf_counter()
            result = step()
            launching[name] = time.perf_counter() - begin
            torch.cuda.synchronize()
            del result
    for round_number in range(repeats):
        gc.collect()
        turns = list(sides.items())
        first = round_number % len(turns)
        for name, prepare in turns[first:] + turns[:first]:
            step = prepare(round_number + _WARM_UPS)
            seconds[name].append(event_seconds(step, wait=1.5 * launching[name]))
    return seconds


def event_seconds(step: Callable[[], Any], wait: float = 0.0) -> float:
    """What one step takes on the device, which first waits that many seconds."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(int(_CYCLES * min(wait, 0.2)) + 1)
    begin.record()
    result = step()
    end.record()
    torch.cuda.synchronize()
    del result
    return begin.elapsed_time(end) / 1e3


def captured(calls: Sequence[Callable[[], Any]], device: torch.device) -> Callable[[], Any]:
    """All calls as one CUDA graph; what they return is kept as long as the graph. On the CPU one after the other.

    Raises:
        RuntimeError: a call does what no graph can hold, such as waiting for the device.
    """
    if device.type != "cuda":
        return lambda: [call() for call in calls]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # A capture that fails leaves its stream the current one.
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
        results = [call() for call in calls]

    def replay(kept=results) -> None:
        graph.replay()

    return replay


def peak_memory(step: Callable[[], Any], device: torch.device) -> int:
    """Bytes that one step takes at most above what is allocated before it."""
    gc.collect()
    if device.type != "cuda":
        reset_peak()
        before = resident_bytes()
        step()
        return max(1, peak_bytes() - before)
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = step()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def measured_roofs(device: torch.device, repeats: int) -> Roofs:
    """Of a bfloat16 product of two matrices of 8192 x 8192 and of a copy of 2 GB, read plus written.

    Medians on several sets of random inputs; products of zeros would run faster. Smaller on the CPU.
    """
    width, copied = (8192, 2**32) if device.type == "cuda" else (256, 2**22)
    pairs = [tuple(torch.randn(2, width, width, device=device, dtype=torch.bfloat16)) for _ in range(3)]
    buffers = [torch.randint(0, 255, (copied // 2,), device=device, dtype=torch.uint8) for _ in range(2)]

    def product(seed: int):
        return lambda: torch.mm(*pairs[seed % len(pairs)])

    def copy(seed: int):
        return lambda: buffers[seed % 2].copy_(buffers[1 - seed % 2])

    seconds = alternate_on_device({"product": product, "copy": copy}, repeats, device)
    return Roofs(2 * width**3 / statistics.median(seconds["product"]), copied / statistics.median(seconds["copy"]))


class Budget:
    """Minutes for the whole run, of which each section may use its share of what is left."""

    def __init__(self, minutes: float, shares: Mapping[str, float]):
        self.end = time.monotonic() + 60 * minutes
        self.shares = dict(shares)
        self.section_end = self.end

    def enter(self, section: str) -> None:
        """Begins a section; time that an earlier one left over is shared by those that follow."""
        left = self.end - time.monotonic()
        share = self.shares[section] / sum(self.shares.values())
        del self.shares[section]
        self.section_end = time.monotonic() + max(left, 0.0) * share

    def leave(self) -> None:
        """After the last section its bound is that of the run."""
        self.section_end = self.end

    @property
    def is_over(self) -> bool:
        """Whether no further row may start."""
        return time.monotonic() >= self.section_end
