"""One matrix product for all experts: each multiplies its own of the rows sorted by expert with its own weight.

A program makes one tile of the result. It finds its expert and its rows from `SortedPairs.ends` alone: the grid has as
many programs as any routing of so many pairs can need, and those that find no rows leave. Rows are gathered as they
are loaded and scattered as they are stored, low-rank updates are added to the sums before the store.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import INTERPRETED, dot, launch, next_power, rounded, shared_memory
from .pair_sorting import SortedPairs

GROUP = 8  # row tiles of one expert that take turns at a weight's columns while these are in the L2 cache
_MOST_STAGES = 4
_LEAST_WIDTH = 16  # of a tensor core's tile


class Tiles(NamedTuple):
    """What one program of a product makes, and how.

    Args:
        rows, columns: those of the result that a program computes.
        depth: summed over in one step.
        warps: groups of 32 threads.
        stages: steps whose tiles are in shared memory, one being multiplied and the others on their way.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def product_tiles(pairs: int, num_experts: int, columns: int, itemsize: int, room: int) -> Tiles:
    """Tiles of a product of sorted rows with weights that are `columns` wide.

    Of many rows, 128 x 256: 85 operations for each byte from the L2 cache, where 128 x 128 has 64 and anything larger
    no room in the registers; two groups of four warps, of which one such program fills a multiprocessor. With fewer
    rows an expert the weights, read once, bound the time: then what counts is bytes on their way, so several small
    programs share a multiprocessor, and no tile is much taller than the rows of an expert. The same holds for results
    as narrow as a LoRA rank, for which the rows are read once. float32 has no tensor cores to feed here.

    Args:
        pairs: R.
        num_experts: E.
        columns: of the result.
        itemsize: bytes of one element.
        room: bytes of shared memory for one program.
    """
    rows = min(next_power(triton.cdiv(pairs, num_experts), _LEAST_WIDTH), 128)
    width = next_power(columns, _LEAST_WIDTH)
    if itemsize == 4:
        tiles = Tiles(min(rows, 64), min(width, 64), 32, 8 if rows >= 64 else 4, _MOST_STAGES)
    elif rows <= 32:
        tiles = Tiles(rows, min(width, 64), 128, 4, _MOST_STAGES)
    elif width <= 64:
        tiles = Tiles(64, width, 128, 4, _MOST_STAGES)
    elif rows == 64:
        tiles = Tiles(rows, min(width, 256), 64, 4, _MOST_STAGES)
    else:
        tiles = Tiles(rows, min(width, 256), 64, 8, _MOST_STAGES)
    return fitting(tiles, itemsize, room)


def fitting(tiles: Tiles, itemsize: int, room: int) -> Tiles:
    """The same tiles with as many stages as have room."""
    stage = (tiles.rows + tiles.columns) * tiles.depth * itemsize
    return tiles._replace(stages=max(1, min(tiles.stages, room // stage)))


def row_tiles(pairs: int, num_experts: int, rows: int) -> int:
    """The most tiles of `rows` rows that a routing of R pairs can need, each expert's last one being ragged."""
    return (pairs + min(pairs, num_experts) * (rows - 1)) // rows


def rows_product(
    a: torch.Tensor,
    weight: torch.Tensor,
    rows: SortedPairs,
    *,
    transposed: bool,
    gather: int = 0,
    scatter: bool = False,
    row_weights: torch.Tensor | None = None,
    low: tuple[torch.Tensor, torch.Tensor] | None = None,
    config: Tiles | None = None,
) -> torch.Tensor:
    """Each row times its expert's weight, `[R, out]`.

    Args:
        a: `[R, in]` in sorted order, or `[N, in]` with `gather`.
        weight: `[E, out, in]` to multiply by its transpose if `transposed`, else `[E, in, out]`. Any strides.
        rows: what `sort_pairs` gives.
        gather: K, where a row of `a` is the token of its pair.
        scatter: whether a result is stored at its pair n K + k instead of its sorted place.
        row_weights: `[R]` by pair, multiplied into the results.
        low: `t [R, r]` in sorted order and `M [E, r, out]` of any strides: adds `t M[e]` before the row weights.
        config: instead of `product_tiles`.

    Returns:
        `[R, out]` in the dtype of `a`, summed in float32. Rows of pairs that another rank serves are not written.
    """
    a = with_whole_rows(a)
    E, (k_stride, n_stride) = len(weight), weight.stride()[:0:-1] if transposed else weight.stride()[1:]
    depth, columns = weight.shape[:0:-1] if transposed else weight.shape[1:]
    tiles = config or product_tiles(len(rows.pairs), E, columns, a.itemsize, shared_memory(a.device))
    result = torch.empty(len(rows.pairs), columns, dtype=a.dtype, device=a.device)
    launch(
        _rows_product_kernel,
        (row_tiles(len(rows.pairs), E, tiles.rows) * triton.cdiv(columns, tiles.columns),),
        *(a, weight, result, *rows, row_weights, *low_rank_arguments(low, tiles)),
        *(E, depth, columns, a.stride(0), weight.stride(0), k_stride, n_stride, gather, scatter),
        *(tiles.rows, tiles.columns, tiles.depth, GROUP, INTERPRETED),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return result


def low_rank_arguments(low: tuple[torch.Tensor, torch.Tensor] | None, tiles: Tiles) -> tuple:
    """`t`, `M`, the rank, `t`'s row stride, `M`'s three strides, and the depth of a step."""
    if low is None:
        return None, None, 0, 0, 0, 0, 0, 1
    t, M = with_whole_rows(low[0]), low[1]
    return t, M, t.shape[1], t.stride(0), *M.stride(), min(tiles.depth, next_power(t.shape[1], _LEAST_WIDTH))


def with_whole_rows(a: torch.Tensor) -> torch.Tensor:
    return a if a.stride(-1) == 1 else a.contiguous()


@triton.jit
def find_tile(ends, column_tiles: tl.constexpr, E: tl.constexpr, BM: tl.constexpr, GROUP: tl.constexpr):
    """Expert, first row of the tile, row behind the expert's last one, and column tile of this program.

    The expert is E for a program too many. Programs that follow each other take the row tiles of one expert, at most
    GROUP of them, at the same weight columns, then at the next ones.
    """
    program = tl.program_id(0)
    expert = tl.arange(0, triton.next_power_of_2(E))
    end = tl.load(ends + expert, mask=expert < E, other=0)
    start = tl.load(ends + expert - 1, mask=(expert > 0) & (expert < E), other=0)
    tiles = tl.cdiv(end - start, BM)
    is_before = tl.cumsum(tiles) <= program // column_tiles
    chosen = tl.minimum(tl.sum(is_before.to(tl.int32)), E)
    program -= tl.sum(tl.where(is_before, tiles, 0)) * column_tiles
    start = tl.load(ends + chosen - 1, mask=chosen > 0, other=0)
    end = tl.load(ends + chosen, mask=chosen < E, other=0)
    first = program // (GROUP * column_tiles) * GROUP
    group = tl.maximum(tl.minimum(tl.cdiv(end - start, BM) - first, GROUP), 1)
    program -= first * column_tiles
    return chosen, start + (first + program % group) * BM, end, program // group


@triton.jit
def find_rows(pairs, first, end, BM: tl.constexpr):
    """Sorted places of the tile's rows, whether they are real, and their pairs; the expert's last row fills up."""
    row = first + tl.arange(0, BM)
    place = tl.minimum(row, end - 1)
    return place, row < end, tl.load(pairs + place)


@triton.jit
def multiply(
    acc,
    a,
    weight,
    columns,
    DEPTH: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    BK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """`acc + a weight`: `a [BM]` points to rows, `weight` has strides K and N and `columns [BN]` are taken."""
    k = tl.arange(0, BK)
    a = a[:, None] + k[None, :]
    weight = weight + k[:, None] * K + columns[None, :] * N
    for start in range(0, DEPTH, BK):
        if DEPTH % BK == 0:
            acc = dot(tl.load(a), tl.load(weight), acc, UPCAST)
        else:
            is_inside = k < DEPTH - start
            a_tile = tl.load(a, mask=is_inside[None, :], other=0.0)
            acc = dot(a_tile, tl.load(weight, mask=is_inside[:, None], other=0.0), acc, UPCAST)
        a += BK
        weight += BK * K
    return acc


@triton.jit
def _rows_product_kernel(
    a,
    weight,
    result,
    pairs,
    ends,
    row_weights,
    t,
    low,
    RANK: tl.constexpr,
    T_ROW: tl.constexpr,
    LOW_E: tl.constexpr,
    LOW_K: tl.constexpr,
    LOW_N: tl.constexpr,
    LOW_BK: tl.constexpr,
    E: tl.constexpr,
    DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    A_ROW: tl.constexpr,
    WEIGHT_E: tl.constexpr,
    WEIGHT_K: tl.constexpr,
    WEIGHT_N: tl.constexpr,
    GATHER: tl.constexpr,
    SCATTER: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    expert, first, end, column_tile = find_tile(ends, tl.cdiv(COLUMNS, BN), E, BM, GROUP)
    if expert == E:
        return
    place, is_row, pair = find_rows(pairs, first, end, BM)
    column = column_tile * BN + tl.arange(0, BN)
    inside = column % COLUMNS  # loads need no mask
    expert = expert.to(tl.int64)
    source = pair // GATHER if GATHER else place
    acc = tl.zeros([BM, BN], tl.float32)
    a_rows = a + source.to(tl.int64) * A_ROW
    acc = multiply(acc, a_rows, weight + expert * WEIGHT_E, inside, DEPTH, WEIGHT_K, WEIGHT_N, BK, UPCAST)
    if RANK:
        t_rows = t + place.to(tl.int64) * T_ROW
        acc = multiply(acc, t_rows, low + expert * LOW_E, inside, RANK, LOW_K, LOW_N, LOW_BK, UPCAST)
    if row_weights is not None:
        acc *= tl.load(row_weights + pair).to(tl.float32)[:, None]
    target = pair if SCATTER else place
    rows_of_result = result + target.to(tl.int64) * COLUMNS
    mask = is_row[:, None] & (column < COLUMNS)[None, :]
    tl.store(rows_of_result[:, None] + column[None, :], rounded(acc, result.dtype.element_ty, UPCAST), mask=mask)
