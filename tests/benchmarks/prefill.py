"""A prompt of 2,048 tokens into an empty cache."""

from __future__ import annotations

from typing import Any

import torch
from measure import Case, agreement, alternate, compare
from workbench import LOGIT_BOUND, Side, Workbench

TOKENS = 2048
GOALS = {torch.bfloat16: 2.0, torch.float32: 1.3}


def cases(bench: Workbench) -> list[Case]:
    return [
        Case(f"{bench.tokens(TOKENS)} tokens, {_name(dtype)}", lambda dtype=dtype: prefill_rows(bench, dtype))
        for dtype in GOALS
    ]


@torch.inference_mode()
def prefill_rows(bench: Workbench, dtype: torch.dtype) -> list[dict[str, Any]]:
    ours, theirs = bench.pair(dtype)
    sides = {"ours": _prefill(bench, ours), "theirs": _prefill(bench, theirs)}
    outputs = [prepare(0)() for prepare in sides.values()]
    agrees = agreement(f"logits after a prompt in {_name(dtype)}", *outputs, LOGIT_BOUND[dtype])
    seconds = alternate(sides, bench.settings.repeats)
    if dtype == torch.float32:
        bench.release(dtype)
    return [
        compare(
            f"prefill of {bench.tokens(TOKENS)} tokens, {_name(dtype)}",
            (ours.experts, seconds["ours"]),
            (f"transformers, sdpa, {theirs.experts}", seconds["theirs"]),
            at_least=GOALS[dtype],
            agreement=agrees,
        )
    ]


def _prefill(bench: Workbench, side: Side):
    def prepare(seed: int):
        side.route(bench.tokens(TOKENS), seed)
        ids = bench.ids(bench.tokens(TOKENS), seed)
        return lambda: side.model(input_ids=ids, use_cache=True, logits_to_keep=1).logits

    return prepare


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
