"""What the bodies of the routed experts keep for the backward pass, and hold besides while they run, in bytes.

S = N K pairs of token and chosen expert, H hidden size, I width of one expert, E experts, R ranks of all adapters of
a layer's experts together, w bytes of a number of their weights.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from .sorted.rows import filled

FLOAT, INDEX = 4, 8


@dataclass(frozen=True)
class ExpertsPass:
    """One pass of a micro-batch through the routed experts of a layer.

    Attributes:
        tokens, pairs: N and S.
        hidden, width, experts: H, I and E.
        itemsize: w.
    """

    tokens: int
    pairs: int
    hidden: int
    width: int
    experts: int
    itemsize: int


class HeldBytes(NamedTuple):
    """Bytes that a pass saves for its backward pass, and that it needs besides in forward and in backward."""

    saved: int
    forward: int
    backward: int


def grouped_mm_bytes(run: ExpertsPass, is_trained: bool) -> HeldBytes:
    """transformers' "grouped_mm".

    saved    gate_up `[S, 2I]`, silu(gate), y `[S, H]`; x and h where the weights are trained
    besides  x, and y and its gradients in float32
    """
    kept = 3 * run.width + run.hidden + (run.hidden + run.width if is_trained else 0)
    besides = run.pairs * run.hidden * (3 * FLOAT + run.itemsize)
    return HeldBytes(run.pairs * (kept * run.itemsize + 4 * INDEX), besides, besides)


def one_by_one_bytes(
    run: ExpertsPass, ranks: int, copied: tuple[int, int], on_cpu: bool, in_four_bits: bool
) -> HeldBytes:
    """`sorted.experts` where one expert is multiplied after the other: on CPU, and over weights in four bits.

    saved    gate_up `[S, 2I]`, t and u `[S, R]` of adapters, indices
    besides  sums `[N, H]` in float32; rows of x, h, y and their gradients, and dequantised weights, of one expert

    Args:
        run: the pass.
        ranks: R.
        copied: bytes of trained weights or factors that are copied or get room for gradients, forward and backward.
        on_cpu: products are filled up to sizes that were prepared.
        in_four_bits: weights are dequantised for their products.
    """
    w, of_one = run.itemsize, run.pairs // run.experts or 1
    if on_cpu:
        of_one = filled(of_one, torch.bfloat16 if w == 2 else torch.float32)
    rows = of_one * min(run.experts, run.pairs)
    besides = run.tokens * run.hidden * FLOAT + of_one * (3 * run.hidden + 7 * run.width) * max(w, 3)
    besides += 3 * run.hidden * run.width * w * in_four_bits
    saved = rows * ((2 * run.width + ranks) * w + 2 * INDEX + 1)
    return HeldBytes(saved, besides + copied[0], besides + copied[1])


def all_at_once_bytes(run: ExpertsPass, ranks: int, copied: tuple[int, int]) -> HeldBytes:
    """`sorted.experts` and `triton.experts` on GPUs, where all experts are multiplied at once.

    saved    gate_up `[S, 2I]`, t and u `[S, R]` of adapters, indices
    besides  sums `[N, H]` in float32; rows of x, h, y and their gradients

    Args:
        run: the pass.
        ranks: R.
        copied: bytes of trained weights or factors that are copied or get room for gradients, forward and backward.
    """
    w, sums = run.itemsize, run.tokens * run.hidden * FLOAT
    forward = run.pairs * (run.hidden * (3 * FLOAT + w) + run.width * w) + sums
    backward = run.pairs * 4 * (run.hidden + run.width) * w + sums
    saved = run.pairs * ((2 * run.width + ranks) * w + 3 * INDEX)
    return HeldBytes(saved, forward + copied[0], backward + copied[1])
