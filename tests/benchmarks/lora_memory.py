"""Peak memory of a LoRA step, of each side in a process of its own."""

from __future__ import annotations

import gc
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from lora import ALL_EXPERTS, MEMORY_GOAL, Adapted, our_config, pefts_config
from measure import compare, peak_bytes, reset_peak, resident_bytes
from workbench import SIZES, Settings, Workbench

# In the new process everything that a model needs is loaded already; it has not computed anything yet.
_PRELOADED = ["torch", "peft", "modeling_deepseek_moe"]


def memory_rows(bench: Workbench) -> list[dict[str, Any]]:
    """Two steps' peak above the base model's memory: activations, and parameters, gradients, state of the adapters."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*_PRELOADED, bench.size.model_class.__module__])
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        found = {
            name: pool.submit(peak_of_step, name, bench.settings).result() for name in ("ours", "theirs", "attention")
        }
    ours, theirs, attention = (found[name]["peak"] for name in ("ours", "theirs", "attention"))
    stack, own = found["ours"]["stack"], found["ours"]["adapters"] - found["attention"]["adapters"]
    label = "peak memory of the LoRA step above the base model"
    below = compare(label, ("ours", [ours]), ("transformers + PEFT, grouped_mm", [theirs]), unit="bytes")
    below |= {"goal": {"below by": stack}, "reached": theirs - ours >= stack}
    growth = compare(
        f"{label}, without what the further adapters hold themselves",
        ("ours", [ours - own]),
        ("ours, LoRA on attention only", [attention]),
        at_most=MEMORY_GOAL,
        unit="bytes",
        further_adapters=own,
    )
    return [below, growth]


def peak_of_step(name: str, settings: Settings) -> dict[str, int]:
    """In bytes: the peak; the size of the stacked gate and up projection; what the adapters hold themselves.

    Args:
        name: `ours` or `theirs` with adapters on attention, routed and shared experts; `attention`: ours with adapters
            there only.
    """
    torch.set_num_threads(settings.threads)
    # The code that a first step loads takes memory too, but that is not the model's.
    size = SIZES[settings.size]
    if not size.is_tiny:
        _peak(name, Workbench(replace(settings, size=size.tiny)))
    return _peak(name, Workbench(settings))


def _peak(name: str, bench: Workbench) -> dict[str, int]:
    side = bench.build_ours(torch.bfloat16)
    side.model.requires_grad_(False)
    stack = side.moe.experts.gate_up_proj.nbytes
    config = our_config(side.model, ("attention",) if name == "attention" else ALL_EXPERTS)
    if name == "theirs":
        side, config = bench.theirs_on(side.model), pefts_config(config)
    gc.collect()
    before = resident_bytes()
    reset_peak()
    adapted = Adapted(side, config)
    for seed in range(2):
        adapted.prepare_step(bench, seed)()
    own = sum(parameter.numel() * parameter.itemsize for parameter in adapted.parameters.values())
    return {
        "peak": peak_bytes() - before,
        "stack": stack,
        "adapters": 4 * own,  # itself, its gradient, AdamW's two moments
    }
