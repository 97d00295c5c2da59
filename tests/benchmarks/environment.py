"""Where a benchmark ran: versions, device, settings, and what this machine does on a bare product and a copy."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from workbench import SIZES, Settings

from modeling_deepseek_moe.cpu_rules import machine


def environment(settings: Settings) -> dict[str, Any]:
    """Facts by name; the `roofs` are a second: operations, bytes."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "device": processor(),
        "instructions": instructions(),
        "threads": torch.get_num_threads(),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "unset"),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")},
        "size": settings.size,
        "layers": settings.layers,
        "repeats": settings.repeats,
        "routing": settings.routing.name if settings.routing else "uniform",
        "roofs": roofs(256 if SIZES[settings.size].is_tiny else 2048),
    }


def instructions() -> str:
    """The kind of this CPU: vector instructions, and what it has for half precision besides."""
    kind = machine()
    return kind.capability + (" and AMX" if kind.has_tiles else " and BF16" if kind.has_dots else "")


def roofs(width: int) -> dict[str, float]:
    """Medians of five: products of two `width` x `width` matrices, and a copy of 256 MB for a width of 2,048."""
    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        a, b = torch.randn(2, width, width).to(dtype)
        name = str(dtype).removeprefix("torch.")
        found[f"{name} product, FLOP/s"] = 2 * width**3 / _median_seconds(lambda a=a, b=b: a @ b)
    source = torch.ones(125_000 * width, dtype=torch.uint8)
    target = torch.empty_like(source)
    found["copy, B/s"] = source.numel() / _median_seconds(lambda: target.copy_(source))
    return found


def _median_seconds(work: Callable[[], Any]) -> float:
    work()
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return sorted(seconds)[2]


def processor() -> str:
    """The CPU's name."""
    named = re.search(r"model name\s*: (.+)", cpuinfo())
    return named[1] if named else platform.processor()


def cpuinfo() -> str:
    """What Linux says of the CPU; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8") if path.exists() else ""


def commit() -> str:
    """Short hash of the checkout, with `+changes` if it differs from that."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=here).stdout.strip()

    name = git("rev-parse", "--short", "HEAD") or "unknown"
    return f"{name}+changes" if git("status", "--porcelain", "--untracked-files=no") else name
