"""Gradients of the weights and factors of all experts: each sums over its own rows."""

import torch
import triton
import triton.language as tl

from .grouped_gemm import Tiles, fitting, with_whole_rows
from .launch import INTERPRETED, dot, launch, next_power, rounded, shared_memory
from .pair_sorting import SortedPairs


def weight_gradient_tiles(pairs: int, num_experts: int, left: int, right: int, itemsize: int, room: int) -> Tiles:
    """Tiles of the gradients of `left` x `right` weights, `depth` of whose rows are summed in one step.

    Many rows an expert: the 128 x 256 tile of `product_tiles`, for the same reason. With few the time goes into
    storing the gradients, and of a factor as narrow as a LoRA rank into loading the rows: then several smaller
    programs share a multiprocessor, some of which load while others store.

    Args:
        pairs: R.
        num_experts: E.
        left, right: L and Rr, the shape of one gradient.
        itemsize: bytes of one element.
        room: bytes of shared memory for one program.
    """
    height, width = next_power(left, 16), next_power(right, 16)
    if itemsize == 4:
        tiles = Tiles(min(height, 64), min(width, 64), 32, 8 if min(height, width) >= 64 else 4, 4)
    elif min(height, width) <= 64:
        tiles = Tiles(min(height, 128), min(width, 128), 64, 4, 4)
    elif pairs <= 512 * num_experts:
        tiles = Tiles(128, 128, 64, 8, 3)
    else:
        tiles = Tiles(128, min(width, 256), 64, 8, 4)
    return fitting(tiles, itemsize, room)


def weight_gradient(
    left: torch.Tensor,
    right: torch.Tensor,
    rows: SortedPairs,
    *,
    gather_left: int = 0,
    gather_right: int = 0,
    row_weights: torch.Tensor | None = None,
    dtype: torch.dtype,
    config: Tiles | None = None,
) -> torch.Tensor:
    """The sum of `w left' right` over the rows of each expert, `[E, L, Rr]`; zeros where an expert has none.

    Args:
        left: `[R, L]` in sorted order, or `[N, L]` with `gather_left`.
        right: `[R, Rr]` in sorted order, or `[N, Rr]` with `gather_right`.
        rows: what `sort_pairs` gives.
        gather_left, gather_right: K, where a row is the token of its pair.
        row_weights: `[R]` by pair, w; 1 without.
        dtype: type of the result, which is summed in float32.
        config: instead of `weight_gradient_tiles`.
    """
    left, right = with_whole_rows(left), with_whole_rows(right)
    R, E, height, width = len(rows.pairs), len(rows.ends), left.shape[1], right.shape[1]
    tiles = config or weight_gradient_tiles(R, E, height, width, left.itemsize, shared_memory(left.device))
    # Where a row's place is read before the row, Triton loads it so many stages ahead that half of them are left.
    stages = 2 * tiles.stages - 1 if gather_left or gather_right else tiles.stages
    result = torch.empty(E, height, width, dtype=dtype, device=left.device)
    launch(
        _weight_gradient_kernel,
        (triton.cdiv(height, tiles.rows) * triton.cdiv(width, tiles.columns), E),
        *(left, right, result, *rows, row_weights),
        *(height, width, left.stride(0), right.stride(0), gather_left, gather_right),
        *(tiles.rows, tiles.columns, tiles.depth, INTERPRETED),
        num_warps=tiles.warps,
        num_stages=stages,
    )
    return result


@triton.jit
def _weight_gradient_kernel(
    left,
    right,
    result,
    pairs,
    ends,
    row_weights,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    LEFT_ROW: tl.constexpr,
    RIGHT_ROW: tl.constexpr,
    GATHER_LEFT: tl.constexpr,
    GATHER_RIGHT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    expert = tl.program_id(1)
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends + expert)
    height_tiles: tl.constexpr = tl.cdiv(HEIGHT, BM)
    line = tl.program_id(0) % height_tiles * BM + tl.arange(0, BM)
    column = tl.program_id(0) // height_tiles * BN + tl.arange(0, BN)
    left += line % HEIGHT  # loads need no mask for lines and columns
    right += column % WIDTH
    acc = tl.zeros([BM, BN], tl.float32)
    for first in range(start, end, BK):
        row = first + tl.arange(0, BK)
        is_row = row < end
        row = tl.minimum(row, end - 1)
        if GATHER_LEFT or GATHER_RIGHT or row_weights is not None:
            pair = tl.load(pairs + row)
        left_row = pair // GATHER_LEFT if GATHER_LEFT else row
        right_row = pair // GATHER_RIGHT if GATHER_RIGHT else row
        # Rows too many are zero on one side; on the other they repeat the expert's last one, which is finite if it is.
        a = tl.load(left + left_row.to(tl.int64)[:, None] * LEFT_ROW, mask=is_row[:, None], other=0.0)
        b = tl.load(right + right_row.to(tl.int64)[:, None] * RIGHT_ROW)
        if row_weights is not None:
            w = tl.load(row_weights + pair).to(tl.float32)[:, None]
            if BM <= BN:  # fewer products
                a = rounded(a * w, a.dtype, UPCAST)
            else:
                b = rounded(b * w, b.dtype, UPCAST)
        acc = dot(tl.trans(a), b, acc, UPCAST)
    mask = (line < HEIGHT)[:, None] & (column < WIDTH)[None, :]
    target = result + expert.to(tl.int64) * (HEIGHT * WIDTH) + line[:, None] * WIDTH + column[None, :]
    tl.store(target, rounded(acc, result.dtype.element_ty, UPCAST), mask=mask)
