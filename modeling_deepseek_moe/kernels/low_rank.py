"""Low-rank updates of stacked expert weights, as PEFT stores them and as the products take them."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .sorted_rows import SortedRows, grouped


class Adapter(NamedTuple):
    """One adapter's factors for one stacked weight, laid out as PEFT stores them."""

    A: torch.Tensor  # [E r, in]: the ranks of one expert are neighbours
    B: torch.Tensor  # [out, r E]: the experts of one rank are neighbours
    scaling: float


class LowRank:
    """The factors of all adapters of one weight: A `[E, R, in]`, B `[E, R, out]` with the scaling in it.

    If few experts serve, only theirs are stacked.
    """

    def __init__(self, adapters: list[Adapter], routing: SortedRows, is_trained: bool):
        self.adapters, self.routing, self.is_trained = adapters, routing, is_trained
        stacks_A, stacks_B = [], []
        for A, B, scaling in adapters:
            A, B = A.unflatten(0, (routing.num_experts, -1)), B.unflatten(1, (-1, routing.num_experts))
            if routing.few is not None:
                A, B = A.index_select(0, routing.few), B.index_select(2, routing.few)
            B = (B * scaling).to(routing.dtype)
            stacks_A.append(A.to(routing.dtype))
            # Transposed as a matrix, for which there is a fast copy.
            stacks_B.append(B.flatten(1).t().contiguous().unflatten(0, B.shape[1:]))
        self.A, B = _cat(stacks_A, 1), _cat(stacks_B, 0)
        # Rows that `grouped_mm` reads are multiples of 16 bytes.
        if grouped(B.device) and (padding := -len(B) % (16 // B.itemsize)):
            self.A, B = F.pad(self.A, (0, 0, 0, padding)), F.pad(B, (0, 0, 0, 0, 0, padding))
        self.B = B.transpose(0, 1)
        self.dA, self.dB = (torch.zeros_like(f) if is_trained else None for f in (self.A, self.B))

    def add_gradients(self, slot: int | slice, outer: Callable, dt, x, t, dy) -> None:
        """`outer(a, b)` is `a' b` of each expert's rows."""
        self.dA[slot] = outer(dt, x)
        self.dB[slot] = outer(t, dy)

    def gradients(self) -> Iterator[torch.Tensor | None]:
        """Of A and B of each adapter, laid out as they are."""
        start = 0
        for A, B, scaling in self.adapters:
            if not self.is_trained:
                yield from (None, None)
                continue
            rank = len(A) // self.routing.num_experts
            dA, dB = (gradient[:, start : start + rank] for gradient in (self.dA, self.dB))
            if (few := self.routing.few) is not None:
                every = self.routing.num_experts
                dA, dB = (g.new_zeros(every, *g.shape[1:]).index_copy_(0, few, g) for g in (dA, dB))
            yield dA.flatten(0, 1).to(A.dtype)
            yield dB.transpose(0, 1).flatten(0, 1).t().contiguous().to(B.dtype).mul_(scaling)
            start += rank


def low_ranks(routing: SortedRows, scalings, factors, needs=()) -> list[LowRank | None]:
    """Of gate_up and of down; None where there is no adapter. `needs` says which factors are trained."""
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


def _cat(tensors: list[torch.Tensor], dim: int) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)
