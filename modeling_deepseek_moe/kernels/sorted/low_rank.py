"""Low-rank updates of stacked expert weights, as PEFT stores them and as the products take them."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ...large_tensors import empty, empty_like
from .rows import SortedRows

_STRIP = 128


class Adapter(NamedTuple):
    """One adapter's factors for one stacked weight, laid out as PEFT stores them."""

    A: torch.Tensor  # [E r, in]: the ranks of one expert are neighbours
    B: torch.Tensor  # [out, r E]: the experts of one rank are neighbours
    scaling: float


class EveryExpert(NamedTuple):
    """What stands for `SortedRows` where every product takes all experts and makes the memory of its result."""

    num_experts: int
    dtype: torch.dtype
    at_once: bool = True
    few: torch.Tensor | None = None
    unserved: tuple[int, ...] | None = None


class LowRank:
    """The factors of all adapters of one weight: A `[E, R, in]`, B `[E, R, out]` with the scaling in it.

    If few experts serve, only theirs are stacked.
    """

    def __init__(self, adapters: list[Adapter], routing: SortedRows | EveryExpert, is_trained: bool):
        self.adapters, self.routing, self.is_trained = adapters, routing, is_trained
        stacks_A, stacks_B = [], []
        for A, B, scaling in adapters:
            A, B = A.unflatten(0, (routing.num_experts, -1)), B.unflatten(1, (-1, routing.num_experts))
            if routing.few is not None:
                A, B = A.index_select(0, routing.few), B.index_select(2, routing.few)
            stacks_A.append(A.to(routing.dtype))
            scaled = torch.mul(B, scaling, out=empty(B.shape, routing.dtype, B.device)).flatten(1)
            stacks_B.append(_transposed_copy(scaled, scaled.dtype).unflatten(0, B.shape[1:]))
        self.A, B = _cat(stacks_A, 1), _cat(stacks_B, 0)
        # Rows that `grouped_mm` reads are multiples of 16 bytes.
        if routing.at_once and (padding := padded_rank(len(B), B.dtype) - len(B)):
            self.A, B = F.pad(self.A, (0, 0, 0, padding)), F.pad(B, (0, 0, 0, 0, 0, padding))
        self.B = B.transpose(0, 1)
        if is_trained and routing.unserved is not None:
            self.dA, self.dB = empty_like(self.A), empty_like(B).transpose(0, 1)
            if routing.few is None:
                for expert in routing.unserved:
                    self.dA[expert].zero_()
                    self.dB[expert].zero_()

    def gradients(self) -> Iterator[torch.Tensor | None]:
        """Gradients of A and B of each adapter, laid out as they are."""
        start = 0
        for A, B, scaling in self.adapters:
            if not self.is_trained:
                yield from (None, None)
                continue
            rank = len(A) // self.routing.num_experts
            dA, dB = self.dA[:, start : start + rank], self.dB[:, start : start + rank]
            if (few := self.routing.few) is not None:
                every = self.routing.num_experts
                dA, dB = (g.new_zeros(every, *g.shape[1:]).index_copy_(0, few, g) for g in (dA, dB))
            yield empty_like(A).copy_(dA.flatten(0, 1))
            yield _transposed_copy(dB.transpose(0, 1).flatten(0, 1), B.dtype).mul_(scaling)
            start += rank


def padded_rank(rank: int, dtype: torch.dtype) -> int:
    """The least rank whose rows are multiples of 16 bytes."""
    step = 16 // dtype.itemsize
    return -(-rank // step) * step


def low_ranks(routing: SortedRows | EveryExpert, scalings, factors, needs=()) -> list[LowRank | None]:
    """Low-rank products of gate_up and of down, None where there is no adapter; `needs` says which factors train."""
    result, start = [], 0
    for scalings_of_weight in scalings:
        part = slice(start, start + 2 * len(scalings_of_weight))
        adapters = [
            Adapter(*adapter)
            for adapter in zip(factors[part][::2], factors[part][1::2], scalings_of_weight, strict=True)
        ]
        result.append(LowRank(adapters, routing, any(needs[part])) if adapters else None)
        start = part.stop
    return result


def _transposed_copy(matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`matrix.t()` in another dtype, contiguous."""
    result = empty(matrix.shape[::-1], dtype, matrix.device)
    if matrix.device.type == "cpu":  # in strips that stay in the cache, a third of the time
        for strip, columns in zip(matrix.split(_STRIP), result.split(_STRIP, 1), strict=True):
            columns.copy_(strip.t())
        return result
    return result.copy_(matrix.t())


def _cat(tensors: list[torch.Tensor], dim: int) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)
