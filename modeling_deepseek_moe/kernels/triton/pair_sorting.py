"""The pairs of token and chosen expert in the order of their experts, without waiting for the device."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import INTERPRETED, launch, next_power, rounded

_MOST_IDS = 4096  # that a program looks at in one step, 16 a thread


class SortedPairs(NamedTuple):
    """R pairs sorted by expert, those of one expert by number.

    Pair n K + k is token n with its k-th expert. Pairs that another rank serves come last.
    """

    pairs: torch.Tensor  # int32 [R]
    ends: torch.Tensor  # int32 [E], the row behind the last one of each expert


def sort_pairs(top_k_index: torch.Tensor, num_experts: int) -> SortedPairs:
    """Sorts by expert, in one launch.

    Args:
        top_k_index: `[N, K]` expert ids in int32 or int64; `num_experts` marks a pair that another rank serves.
        num_experts: E.
    """
    ids = top_k_index.contiguous().view(-1)  # `reshape` keeps the stride of a single column
    pairs = torch.empty(ids.shape, dtype=torch.int32, device=ids.device)
    if not len(ids):
        return SortedPairs(pairs, torch.zeros(num_experts, dtype=torch.int32, device=ids.device))
    ends = torch.empty(num_experts, dtype=torch.int32, device=ids.device)
    block = min(next_power(len(ids), 32), _MOST_IDS)
    grid = (num_experts + 1,)
    launch(_sort_kernel, grid, ids, pairs, ends, len(ids), num_experts, block, num_warps=min(8, max(1, block // 256)))
    return SortedPairs(pairs, ends)


@triton.jit(do_not_specialize=["count"])
def _sort_kernel(ids, pairs, ends, count, E: tl.constexpr, BLOCK: tl.constexpr):
    # Every program reads all ids, which the L2 cache holds, and needs no other one's result.
    expert = tl.program_id(0)
    place = tl.arange(0, BLOCK)
    before = tl.zeros([BLOCK], tl.int32)
    for start in range(0, count, BLOCK):
        id = tl.load(ids + start + place, mask=start + place < count, other=E + 1)
        before += (id < expert).to(tl.int32)
    end = tl.sum(before)
    for start in range(0, count, BLOCK):
        id = tl.load(ids + start + place, mask=start + place < count, other=E + 1)
        is_mine = id == expert
        rank = tl.cumsum(is_mine.to(tl.int32))
        tl.store(pairs + end + rank - 1, start + place, mask=is_mine)
        end += tl.sum(is_mine.to(tl.int32))
    if expert < E:
        tl.store(ends + expert, end)


def sum_pairs(
    y: torch.Tensor, top_k_index: torch.Tensor, num_experts: int, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """The sum of each token's pairs in float32, `[N, H]`.

    Args:
        y: `[R, H]` by pair, contiguous. Rows of pairs whose id is `num_experts` are not read.
        top_k_index: `[N, K]`.
        num_experts: E.
        dtype: type of the result, that of `y` if None.
    """
    (tokens, top_k), width = top_k_index.shape, y.shape[1]
    result = torch.empty(tokens, width, dtype=dtype or y.dtype, device=y.device)
    block = min(next_power(width, 32), 1024)
    grid = (tokens, triton.cdiv(width, block))
    launch(
        *(_sum_kernel, grid, y, top_k_index.contiguous(), result, num_experts, top_k, width, block, INTERPRETED),
        num_warps=4,
    )
    return result


@triton.jit
def _sum_kernel(
    y,
    ids,
    result,
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(TOP_K):
        pair = token * TOP_K + k
        width = tl.where(tl.load(ids + pair) < E, WIDTH, 0)
        total += tl.load(y + pair * WIDTH + column, mask=column < width, other=0.0).to(tl.float32)
    tl.store(result + token * WIDTH + column, rounded(total, result.dtype.element_ty, UPCAST), mask=column < WIDTH)
