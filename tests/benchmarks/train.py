"""Full fine-tuning: one step over 2,048 tokens, every parameter trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from measure import Case, agreement, alternate, compare
from workbench import Side, Workbench

TOKENS = 2048
GOAL = 3.0
# Of the largest entry of a gradient: bfloat16 sums over all tokens in another order.
GRADIENT_BOUND = 0.05


def cases(bench: Workbench) -> list[Case]:
    return [
        Case("forward, backward, clearing gradients", lambda: rows(bench, with_optimizer=False)),
        Case("the same and AdamW", lambda: rows(bench, with_optimizer=True)),
    ]


def rows(bench: Workbench, with_optimizer: bool) -> list[dict[str, Any]]:
    """Both sides train the same parameters, with one optimizer and its state."""
    ours, theirs = bench.pair()
    ours.model.requires_grad_(True)
    try:
        for side in (ours, theirs):
            side.model.train()
        agrees = _check(bench, ours, theirs)
        # A rate that leaves the weights as good as they are.
        optimizer = torch.optim.AdamW(ours.model.parameters(), lr=1e-7, weight_decay=0.0, fused=True)
        optimizer = optimizer if with_optimizer else None
        sides = {name: _step(bench, side, optimizer) for name, side in (("ours", ours), ("theirs", theirs))}
        seconds = alternate(sides, bench.settings.repeats)
    finally:
        bench.pair()  # frozen and in eval mode again
    work = "forward + backward + AdamW" if with_optimizer else "forward + backward"
    return [
        compare(
            f"full fine-tuning, {bench.tokens(TOKENS)} tokens, {work}",
            (ours.experts, seconds["ours"]),
            (f"transformers, sdpa, {theirs.experts}", seconds["theirs"]),
            at_least=None if with_optimizer else GOAL,
            agreement=agrees,
        )
    ]


def _step(bench: Workbench, side: Side, optimizer: torch.optim.Optimizer | None):
    def prepare(seed: int) -> Callable[[], None]:
        side.route(bench.tokens(TOKENS), seed)
        ids = bench.ids(bench.tokens(TOKENS), seed)

        def step() -> None:
            side.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            if optimizer:
                optimizer.step()
            side.model.zero_grad()

        return step

    return prepare


def _check(bench: Workbench, ours: Side, theirs: Side) -> dict[str, float]:
    """Losses agree, and gradients of the first expert, of attention and of the embedding's first rows."""
    losses, gradients = [], []
    for side in (ours, theirs):
        side.route(bench.tokens(TOKENS), seed=0)
        ids = bench.ids(bench.tokens(TOKENS), seed=0)
        loss = side.model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        losses.append(loss.detach())
        watched = {"kv_b_proj": side.model.model.layers[0].self_attn.kv_b_proj.weight}
        watched |= dict(side.moe.experts.named_parameters()) | {"gate": side.moe.gate.weight}
        gradients.append({name: p.grad[:1].clone() if p.dim() == 3 else p.grad for name, p in watched.items()})
        side.model.zero_grad()
    agreement("loss of a training step", *losses, 0.01)
    found = [
        agreement(f"gradient of {name}", gradients[0][name], gradients[1][name], GRADIENT_BOUND) for name in watched
    ]
    return max(found, key=lambda each: each["difference"])
