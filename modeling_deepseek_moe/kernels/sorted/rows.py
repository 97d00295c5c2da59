"""The pairs of token and chosen expert, sorted by expert into rows that one matrix product takes."""

from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ...cpu_rules import FEW_SIZES, TWO_ROWS_FOR_ONE, holds


class Segment(NamedTuple):
    """Rows that one matrix product takes: those of one expert, or those of all of them on CUDA."""

    rows: slice  # their places among all rows
    tokens: torch.Tensor  # of each row
    expert: int | slice
    slot: int | slice  # the expert's place among those whose factors are stacked
    ends: torch.Tensor | None = None  # on CUDA: [E], the row behind the last one of each expert
    places: torch.Tensor | None = None  # on CUDA: [N, K], the row of each pair, one row too many if served elsewhere

    def rows_of(self, x_NH: torch.Tensor) -> torch.Tensor:
        return x_NH.index_select(0, self.tokens)  # a third of the time of x_NH[tokens] on CPU

    def add_up(self, sums_NH: torch.Tensor, rows: torch.Tensor) -> None:
        if self.places is None:
            sums_NH.index_add_(0, self.tokens, rows.to(sums_NH.dtype))
        else:  # where `index_add_` adds in no fixed order
            sums_NH += F.pad(rows, (0, 0, 0, 1))[self.places].sum(1, dtype=sums_NH.dtype)


class SortedRows:
    """The segments of one routing.

    Args:
        top_k_index: `[N, K]` expert ids; `num_experts` marks a slot that another rank serves.
        num_experts: E.
        dtype: type of the experts' weights.
        at_once: whether one product may take all experts, on devices that have it.
    """

    def __init__(self, top_k_index: torch.Tensor, num_experts: int, dtype: torch.dtype, at_once: bool = True):
        self.num_experts, self.dtype, self.shape = num_experts, dtype, top_k_index.shape
        self.at_once = at_once and grouped(top_k_index.device)
        ids, pairs = top_k_index.flatten().sort(stable=True)
        every_id = torch.arange(num_experts, device=ids.device, dtype=ids.dtype)
        ends = torch.searchsorted(ids, every_id, right=True, out_int32=True)
        self.few: torch.Tensor | None = None
        self.unserved: list[int] = []
        if self.at_once:
            self._one_segment(ids, pairs, ends)
        else:
            self._one_segment_an_expert(pairs, ends.tolist())  # on CUDA the only wait for the device

    def _one_segment(self, ids: torch.Tensor, pairs: torch.Tensor, ends: torch.Tensor) -> None:
        self.pairs, self.is_real = pairs, ids < self.num_experts
        rows = torch.arange(len(ids), device=ids.device).where(self.is_real, len(ids))
        places = torch.empty_like(rows).index_copy_(0, pairs, rows).view(self.shape)
        every = slice(None)
        self.segments = [Segment(every, pairs // self.shape[1], every, every, ends, places)]

    def _one_segment_an_expert(self, pairs: torch.Tensor, ends: list[int]) -> None:
        starts = [0, *ends[:-1]]
        served = [expert for expert in range(self.num_experts) if starts[expert] < ends[expert]]
        self.unserved = sorted(set(range(self.num_experts)) - set(served))
        if 2 * len(served) < self.num_experts:
            self.few = torch.tensor(served, dtype=torch.long, device=pairs.device)
        counts = [ends[expert] - starts[expert] for expert in served]
        sizes = [filled(count, self.dtype) for count in counts] if pairs.device.type == "cpu" else counts
        self.pairs = pairs[: ends[-1]]
        self.is_real = torch.ones_like(self.pairs, dtype=torch.bool)
        if sizes != counts:
            # Rows that only fill up repeat the first one of their expert, with weight zero.
            place = torch.cat([torch.arange(size) for size in sizes])
            first, count = (
                torch.repeat_interleave(torch.tensor(values), torch.tensor(sizes))
                for values in ([starts[expert] for expert in served], counts)
            )
            self.is_real = place < count
            self.pairs = pairs.index_select(0, first + place.where(self.is_real, 0))
        tokens = (self.pairs // self.shape[1]).split(sizes)
        stops = accumulate(sizes)
        self.segments = [
            Segment(slice(stop - size, stop), of_rows, expert, expert if self.few is None else slot)
            for slot, (expert, size, stop, of_rows) in enumerate(zip(served, sizes, stops, tokens, strict=True))
        ]

    def inputs(
        self, hidden_states: torch.Tensor, top_k_weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens in the experts' dtype `[N, H]`, the weight of each row `[rows, 1]`, zeros to add up in `[N, H]`."""
        dtype = torch.promote_types(self.dtype, torch.float32)
        weights = top_k_weights.flatten().to(dtype).index_select(0, self.pairs)
        sums = torch.zeros_like(hidden_states, dtype=dtype)
        return hidden_states.to(self.dtype), weights.where(self.is_real, 0)[:, None], sums

    def of_pairs(self, of_rows: torch.Tensor) -> torch.Tensor:
        """One number a row `[rows]` as `[N, K]`, 0 where another rank serves."""
        # Every row that is not real goes to a place of its own behind the pairs.
        target = self.pairs.where(self.is_real, self.shape.numel())
        of_pairs = of_rows.new_zeros(self.shape.numel() + 1)
        return of_pairs.index_copy_(0, target, of_rows)[:-1].view(self.shape)


def grouped(device: torch.device) -> bool:
    """Whether all experts are multiplied at once there; `grouped_mm` needs compute capability 8."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def filled(count: int, dtype: torch.dtype) -> int:
    """How many rows a product of `count` rows gets on CPU.

    Routing gives every number there is. Where few sizes are better, powers of two, then multiples of 16, coarser above
    128, leave a few.
    """
    if not holds(FEW_SIZES, dtype):
        return count
    if count <= 8:
        return max(1 + holds(TWO_ROWS_FOR_ONE, dtype), 1 << (count - 1).bit_length())
    step = 16
    while 8 * step < count:
        step *= 2
    return -(-count // step) * step
