"""The routed experts alone: every implementation, and nothing but their matrix products.

The bare products take the real number of rows of each expert, filled up to a multiple of 16, from tensors that are
ready; they gather, weigh and add up nothing. Gradients of weights go to fresh memory, as they do in training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from measure import Case, agreement, alternate, compare
from torch import nn
from workbench import Side, Workbench

GOAL = 1.3
TOKENS = (1, 16, 256, 1024, 4096)
BACKWARD_TOKENS = (1024, 4096)
# transformers copies a token's expert weights for this one, which is meant for few tokens.
BATCHED_AT_MOST = 16
# Of the largest entry. bfloat16 keeps 8 bits; sums of up to 6 experts are added in another order and precision.
BOUND = 0.03


def cases(bench: Workbench) -> list[Case]:
    return [
        Case(f"{tokens} tokens, {_WORKS[work]}", lambda tokens=tokens, work=work: rows(bench, tokens, work))
        for work in _WORKS
        for tokens in sorted({bench.tokens(count) for count in (TOKENS if work == "forward" else BACKWARD_TOKENS)})
    ]


_WORKS = {
    "forward": "forward",
    "frozen": "forward + backward, frozen weights",
    "trained": "forward + backward, trained weights",
}


def rows(bench: Workbench, tokens: int, work: str) -> list[dict[str, Any]]:
    """Ours against each other implementation and against the bare products.

    Args:
        work: a key of `_WORKS`. With frozen weights the backward pass gives the input's gradient only.
    """
    ours, theirs = bench.pair()
    ours.moe.experts.requires_grad_(work == "trained")
    names = ["grouped_mm", *(["batched_mm"] if tokens <= BATCHED_AT_MOST else []), "eager"]
    sides: dict[str, Any] = {"ours": _step(bench, ours, ours.experts, tokens, work)}
    sides |= {name: _step(bench, theirs, name, tokens, work) for name in names}
    try:
        agrees = {name: _agreement(sides["ours"], sides[name], f"{name}, {tokens} tokens, {work}") for name in names}
        sides["bare"] = _bare(bench, ours.moe.experts, tokens, work)
        seconds = alternate(sides, bench.settings.repeats)
    finally:
        theirs.model.set_experts_implementation("grouped_mm")
        ours.moe.experts.requires_grad_(False)
        ours.moe.experts.zero_grad()
    label = f"experts, {tokens} tokens, {_WORKS[work]}"
    found = [
        compare(label, (ours.experts, seconds["ours"]), (f"transformers, {n}", seconds[n]), agreement=agrees[n])
        for n in names
    ]
    bare = ("bare matrix products", seconds["bare"])
    return [*found, compare(label, (ours.experts, seconds["ours"]), bare, at_most=GOAL)]


def _step(bench: Workbench, side: Side, name: str, tokens: int, work: str):
    module = side.moe.experts

    def prepare(seed: int) -> Callable[[], dict[str, torch.Tensor]]:
        side.model.set_experts_implementation(name)
        module.zero_grad()
        inputs = routed_inputs(bench, module, tokens, seed)
        return lambda: outputs_of(module, *inputs, backward=work != "forward")

    return prepare


def routed_inputs(bench: Workbench, module: nn.Module, tokens: int, seed: int) -> list[torch.Tensor]:
    """Hidden states `[N, H]`, chosen experts `[N, K]`, their weights `[N, K]`, the output's gradient `[N, H]`."""
    generator = torch.Generator().manual_seed(seed)
    index = bench.routing.draw(tokens, seed)
    weights = torch.rand(index.shape, generator=generator) / index.shape[1]
    states, gradient = torch.randn(2, tokens, module.hidden_dim, generator=generator).bfloat16()
    return [states, index, weights, gradient]


def outputs_of(module: nn.Module, states, index, weights, gradient, backward: bool) -> dict[str, torch.Tensor]:
    """The output and, with a backward pass, the gradients of input and trained weights."""
    if not backward:
        with torch.inference_mode():
            return {"output": module(states, index, weights)}
    states = states.requires_grad_()
    output = module(states, index, weights)
    output.backward(gradient)
    found = {"output": output.detach(), "input gradient": states.grad}
    trained = {name: parameter.grad for name, parameter in module.named_parameters() if parameter.requires_grad}
    return found | {f"gradient of {name}": gradient for name, gradient in trained.items()}


def _agreement(ours, other, what: str) -> dict[str, float]:
    """The largest of all outputs' differences. One expert's weight gradient stands for all: comparing takes memory."""
    actual = {name: tensor[:1].clone() if tensor.dim() == 3 else tensor for name, tensor in ours(0)().items()}
    expected = other(0)()
    found = [
        agreement(f"{what}: {name}", actual[name], tensor[: len(actual[name])], BOUND)
        for name, tensor in expected.items()
    ]
    return max(found, key=lambda each: each["difference"])


def _bare(bench: Workbench, module: nn.Module, tokens: int, work: str):
    gate_up, down = module.gate_up_proj.detach(), module.down_proj.detach()
    gate_up_of, down_of = gate_up.unbind(0), down.unbind(0)
    widths = (module.hidden_dim, module.intermediate_dim, 2 * module.intermediate_dim, module.hidden_dim)
    most = tokens * bench.routing.top_k + 16 * module.num_experts
    pools = [torch.randn(most, width).bfloat16() for width in widths]

    def prepare(seed: int) -> Callable[[], None]:
        counts = bench.routing.draw(tokens, seed).flatten().bincount(minlength=module.num_experts).tolist()
        filled = [-(-count // 16) * 16 for count in counts]
        split = zip(*(pool[: sum(filled)].split(filled) for pool in pools), strict=True)
        rows_of = {expert: parts for expert, parts in enumerate(split) if counts[expert]}

        def products() -> None:
            for expert, (x, h, _, _) in rows_of.items():
                x @ gate_up_of[expert].t()
                h @ down_of[expert].t()
            if work == "forward":
                return
            for expert, (_, _, d_gate_up, dy) in rows_of.items():
                dy @ down_of[expert]
                d_gate_up @ gate_up_of[expert]
            if work == "frozen":
                return
            d_gate_up_stack, d_down_stack = torch.zeros_like(gate_up), torch.zeros_like(down)
            for expert, (x, h, d_gate_up, dy) in rows_of.items():
                torch.mm(d_gate_up.t(), x, out=d_gate_up_stack[expert])
                torch.mm(dy.t(), h, out=d_down_stack[expert])

        return products

    return prepare
