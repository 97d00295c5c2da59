"""Expert blocks on a CUDA device: forward, forward + backward, and with LoRA on frozen experts."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from gpu_checks import experts_of
from gpu_counts import V2_LITE, ExpertSize, Roofs
from gpu_rows import RANK, Row
from gpu_timing import alternate_on_device, peak_memory
from measure import agreement, compare, quartiles
from peft import LoraConfig, get_peft_model
from routing import Routing, ZipfRouting, read_routing
from torch import nn
from transformers.modeling_utils import local_torch_dtype

from modeling_deepseek_moe.expert_lora import register_expert_lora
from modeling_deepseek_moe.experts import DeepseekMoeExperts

OURS, THEIRS = "triton", "grouped_mm"
# Of the largest entry: bfloat16 keeps 8 bits, and both sides round different intermediate results.
BOUND = 0.03
GRADIENT_BOUND = 0.05  # PEFT also rounds W + B A
_INPUT_SETS = 3


class GpuBench:
    """What all rows share: roofs, repeats, routing, and the experts of the size in use."""

    def __init__(self, device: torch.device, roofs: Roofs, repeats: int, routing_file: Path | None):
        self.device, self.roofs, self.repeats = device, roofs, repeats
        self.real = None if routing_file is None else Routing(V2_LITE.E, V2_LITE.K, read_routing(routing_file))
        self._block: tuple[ExpertSize, nn.Module] | None = None

    def routing(self, size: ExpertSize) -> Routing:
        """Real routing where a file has it, else Zipf's."""
        return self.real if self.real is not None and size == V2_LITE else ZipfRouting(size.E, size.K)

    def block(self, size: ExpertSize) -> nn.Module:
        """Experts with random weights of such a size that outputs are near 1; one size is held at a time."""
        if self._block is None or self._block[0] != size:
            self.release()
            with self.device, local_torch_dtype(torch.bfloat16):
                module = experts_of(size, THEIRS)
            with torch.no_grad():
                module.gate_up_proj.normal_(std=size.H**-0.5)
                module.down_proj.normal_(std=size.I**-0.5)
            self._block = size, module
        return self._block[1]

    def release(self) -> None:
        """Frees the experts."""
        self._block = None
        torch.cuda.empty_cache()


def experts_row(bench: GpuBench, row: Row) -> list[dict[str, Any]]:
    """Ours against transformers' grouped_mm on the same module."""
    size, tokens, backward = row.facts["size"], row.facts["tokens"], row.facts["backward"]
    module = bench.block(size).requires_grad_(backward)
    inputs = _input_sets(bench, size, tokens)

    def side(name: str):
        def prepare(seed: int) -> Callable[[], dict[str, torch.Tensor]]:
            module.zero_grad()
            module.config._experts_implementation = name
            return lambda: _run(module, inputs[seed % len(inputs)], backward)

        return prepare

    sides = {OURS: side(OURS), THEIRS: side(THEIRS)}
    try:
        agrees = _agreement(sides[OURS], sides[THEIRS], row.work, BOUND)
        seconds = alternate_on_device(sides, bench.repeats, bench.device)
    finally:
        module.zero_grad()
        module.requires_grad_(False)
    ours, theirs = (OURS, seconds[OURS]), (f"transformers, {THEIRS}", seconds[THEIRS])
    found = compared(row, THEIRS, ours, theirs, agreement=agrees)
    return [found | achieved(row, seconds[OURS], bench.roofs)]


def lora_row(bench: GpuBench, row: Row) -> list[dict[str, Any]]:
    """Adapters on frozen experts, ours and PEFT's, and the same experts without; times and peak memory."""
    size, tokens = row.facts["size"], row.facts["tokens"]
    base = bench.block(size).requires_grad_(False)
    inputs = _input_sets(bench, size, tokens)
    blocks = {OURS: _adapted(base, is_ours=True), THEIRS: _adapted(base, is_ours=False), "frozen": base}

    def side(name: str):
        experts = getattr(blocks[name], "experts", blocks[name])
        config = base.config if name == "frozen" else experts.get_base_layer().config

        def prepare(seed: int) -> Callable[[], dict[str, torch.Tensor]]:
            experts.zero_grad()
            config._experts_implementation = THEIRS if name == THEIRS else OURS
            return lambda: _run(experts, inputs[seed % len(inputs)], backward=True)

        return prepare

    sides = {name: side(name) for name in blocks}
    peaks = {name: _peak_or_none(prepare, bench.device) for name, prepare in sides.items()}
    frozen_label, peft_label = row.others
    found = []
    if peaks[THEIRS] is None:
        del sides[THEIRS], blocks[THEIRS]
        note = f"{row.work}: {peft_label} runs out of memory, ours takes {peaks[OURS] / 1e9:.1f} GB above the weights"
        found.append({"work": row.work, "note": note})
        agrees = None
    else:
        agrees = _agreement(sides[OURS], sides[THEIRS], row.work, GRADIENT_BOUND)
    seconds = alternate_on_device(sides, bench.repeats, bench.device)
    ours = OURS, seconds[OURS]
    first = compared(row, frozen_label, ours, (frozen_label, seconds["frozen"]))
    found.append(first | achieved(row, seconds[OURS], bench.roofs))
    if agrees is None:
        return found
    found.append(compared(row, peft_label, ours, (peft_label, seconds[THEIRS]), agreement=agrees))
    memory = (OURS, [peaks[OURS]]), (peft_label, [peaks[THEIRS]])
    below = compare(f"{row.work}: peak memory above weights and inputs", *memory, unit="bytes")
    saved = peaks[THEIRS] - peaks[OURS]
    below |= {"goal": {"below by": size.weight_bytes}, "reached": saved >= size.weight_bytes}
    return [*found, below]


def compared(row: Row, other: str, ours, theirs, **facts: Any) -> dict[str, Any]:
    """`measure.compare` with the row's goal against that side."""
    kind, value = row.ratios.get(other, (None, None))
    goal = {} if kind is None else {kind.replace(" ", "_"): value}
    return compare(row.work, ours, theirs, **goal, **facts)


def achieved(row: Row, seconds: list[float], roofs: Roofs) -> dict[str, Any]:
    """Counted operations and bytes over the median time, and the share of the measured roofs."""
    median = quartiles(seconds)[0]
    flops, moved = row.ours.flops / median, row.ours.bytes / median
    shares = {"product": flops / roofs.flops, "copy": moved / roofs.bytes}
    found = {"flops_per_second": flops, "bytes_per_second": moved, "shares": shares}
    if row.share is not None:
        roof, goal = row.share
        found |= {"share_goal": {"of": roof, "at least": goal, "reached": shares[roof] >= goal}}
    return found


def _adapted(base: nn.Module, is_ours: bool) -> nn.Module:
    """The same frozen experts with adapters that do something; the same numbers on both sides."""
    holder = nn.Module()
    with torch.device("meta"):
        experts = DeepseekMoeExperts(base.config)
    experts.load_state_dict(base.state_dict(keep_vars=True), assign=True)
    experts.config = SimpleNamespace(**vars(base.config))
    holder.add_module("experts", experts)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    get_peft_model(holder, register_expert_lora(config, holder) if is_ours else config)
    generator = torch.Generator(base.gate_up_proj.device).manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted(holder.named_parameters()):
            if parameter.requires_grad:
                parameter.normal_(std=0.01, generator=generator)
    return holder


def _input_sets(bench: GpuBench, size: ExpertSize, tokens: int) -> list[tuple[torch.Tensor, ...]]:
    """Hidden states, ids, routing weights, the output's gradient: sets for steps that follow each other."""
    found = []
    for seed in range(_INPUT_SETS):
        generator = torch.Generator(bench.device).manual_seed(seed)
        draw = {"generator": generator, "device": bench.device}
        index = bench.routing(size).draw(tokens, seed).to(bench.device)
        weights = torch.rand(index.shape, **draw) / size.K
        states, gradient = torch.randn(2, tokens, size.H, dtype=torch.bfloat16, **draw)
        found.append((states, index, weights, gradient))
    return found


def _run(experts: nn.Module, inputs: tuple[torch.Tensor, ...], backward: bool) -> dict[str, torch.Tensor]:
    """The output and, with a backward pass, the gradients of inputs and trained parameters."""
    states, index, weights, gradient = inputs
    if not backward:
        with torch.inference_mode():
            return {"output": experts(states, index, weights)}
    states, weights = states.detach().requires_grad_(), weights.detach().requires_grad_()
    output = experts(states, index, weights)
    output.backward(gradient)
    found = {"output": output.detach(), "gradient of hidden states": states.grad, "of weights": weights.grad}
    return found | {f"of {name}": p.grad for name, p in experts.named_parameters() if p.requires_grad}


def _agreement(ours, other, what: str, bound: float) -> dict[str, float]:
    """The worst of all results. One expert's weight gradient stands for all: comparing takes memory."""
    actual = {name: tensor[:1].clone() if tensor.dim() == 3 else tensor for name, tensor in ours(0)().items()}
    expected = other(0)()
    found = [
        agreement(f"{what}: {name}", actual[name], tensor[: len(actual[name])], bound)
        for name, tensor in expected.items()
    ]
    return max(found, key=lambda each: each["difference"])


def _peak_or_none(prepare, device: torch.device) -> int | None:
    """Bytes of a step, its first one included that compiles; None if the device has not so many."""
    try:
        prepare(0)()
        return peak_memory(prepare(1), device)
    except torch.OutOfMemoryError:
        pass  # its frames hold tensors until here
    gc.collect()
    torch.cuda.empty_cache()
    return None
