"""The product with gate and up of all experts, SwiGLU behind it, and SwiGLU's gradient behind the product with down.

Of one tile of h a program makes both sums, gate's and up's, so that no gate_up is stored where none is saved; the
backward pass makes h again from the gate_up that was. Sorted rows and programs are those of `grouped_gemm`.
"""

import torch
import triton
import triton.language as tl

from .grouped_gemm import (
    GROUP,
    Tiles,
    find_rows,
    find_tile,
    low_rank_arguments,
    multiply,
    product_tiles,
    row_tiles,
    with_whole_rows,
)
from .launch import INTERPRETED, launch, rounded, shared_memory
from .pair_sorting import SortedPairs


def gate_up_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    rows: SortedPairs,
    top_k: int,
    low: tuple[torch.Tensor, torch.Tensor] | None = None,
    save: bool = False,
    config: Tiles | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """SwiGLU of each row's product with gate and up of its expert.

    Args:
        x: `[N, H]`; a row is the token of its pair.
        weight: `[E, 2I, H]`, gate before up. Any strides.
        rows: what `sort_pairs` gives.
        top_k: K.
        low: `t [R, r]` in sorted order and `M [E, r, 2I]` of any strides: adds `t M[e]` to gate_up.
        save: whether gate_up is returned.
        config: instead of `product_tiles`.

    Returns:
        h `[R, I]`, and gate_up `[R, 2I]` or None, in sorted order and the dtype of `x`. gate_up is rounded to that
        dtype before SwiGLU, so that h is the same when it is made from it again. Rows of pairs that another rank
        serves are not written.
    """
    x = with_whole_rows(x)
    R, (E, columns, H) = len(rows.pairs), weight.shape
    # Of a tile's columns half are gate's, half up's.
    tiles = config or product_tiles(R, E, columns, x.itemsize, shared_memory(x.device))
    h = x.new_empty(R, columns // 2)
    gate_up = x.new_empty(R, columns) if save else None
    launch(
        _gate_up_kernel,
        (row_tiles(R, E, tiles.rows) * triton.cdiv(columns, tiles.columns),),
        *(x, weight, h, gate_up, *rows, *low_rank_arguments(low, tiles)),
        *(E, H, columns // 2, top_k, x.stride(0), *weight.stride()),
        *(tiles.rows, tiles.columns, tiles.depth, GROUP, INTERPRETED),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return h, gate_up


def gate_backward(
    dy: torch.Tensor,
    weight: torch.Tensor,
    gate_up: torch.Tensor,
    row_weights: torch.Tensor,
    rows: SortedPairs,
    top_k: int,
    low: tuple[torch.Tensor, torch.Tensor] | None = None,
    save_h: bool = False,
    config: Tiles | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Gradients of gate_up and of the routing weights, from that of the experts' output.

    With p = dy W2 (+ v M) of each row and w its routing weight, `d gate_up = SwiGLU'(gate_up, w p)` and `dw = p h'`.

    Args:
        dy: `[N, H]`; a row is the token of its pair.
        weight: `[E, H, I]`, that of down. Any strides.
        gate_up: `[R, 2I]` in sorted order.
        row_weights: `[R]` by pair.
        rows: what `sort_pairs` gives.
        top_k: K.
        low: `v [R, r]` in sorted order and `M [E, r, I]` of any strides: adds `v M[e]` to p.
        save_h: whether `w h` is returned, as the gradients of down's weight and of its factors take it.
        config: instead of `product_tiles`.

    Returns:
        d gate_up `[R, 2I]` and `w h [R, I]` or None in sorted order and the dtype of `dy`, and dw `[R]` by pair in
        float32. Of pairs that another rank serves dw is 0 and the others are not written.
    """
    dy = with_whole_rows(dy)
    R, (E, H, width) = len(rows.pairs), weight.shape
    tiles = config or product_tiles(R, E, width, dy.itemsize, shared_memory(dy.device))
    d_gate_up, h = dy.new_empty(R, 2 * width), dy.new_empty(R, width) if save_h else None
    column_tiles = triton.cdiv(width, tiles.columns)
    parts = torch.zeros(R, column_tiles, dtype=torch.float32, device=dy.device)  # of dw, one of each tile
    launch(
        _gate_backward_kernel,
        (row_tiles(R, E, tiles.rows) * column_tiles,),
        *(dy, weight, gate_up.contiguous(), d_gate_up, h, parts, row_weights, *rows, *low_rank_arguments(low, tiles)),
        *(E, H, width, top_k, dy.stride(0), *weight.stride()),
        *(tiles.rows, tiles.columns, tiles.depth, GROUP, INTERPRETED),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return d_gate_up, h, parts.sum(1)


@triton.jit
def _halves(tile):
    """The left and the right half of the columns."""
    rows: tl.constexpr = tile.shape[0]
    columns: tl.constexpr = tile.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(tile, [rows, 2, columns]), [0, 2, 1]))


@triton.jit
def _gate_up_kernel(
    x,
    weight,
    h,
    gate_up,
    pairs,
    ends,
    t,
    low,
    RANK: tl.constexpr,
    T_ROW: tl.constexpr,
    LOW_E: tl.constexpr,
    LOW_K: tl.constexpr,
    LOW_N: tl.constexpr,
    LOW_BK: tl.constexpr,
    E: tl.constexpr,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    TOP_K: tl.constexpr,
    X_ROW: tl.constexpr,
    WEIGHT_E: tl.constexpr,
    WEIGHT_N: tl.constexpr,
    WEIGHT_K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    HALF: tl.constexpr = BN // 2
    expert, first, end, column_tile = find_tile(ends, tl.cdiv(WIDTH, HALF), E, BM, GROUP)
    if expert == E:
        return
    place, is_row, pair = find_rows(pairs, first, end, BM)
    # One product of HALF columns of gate and, right of them, the same columns of up.
    both = tl.arange(0, BN)
    columns = (column_tile * HALF + both % HALF) % WIDTH + both // HALF * WIDTH
    columns = tl.max_contiguous(tl.multiple_of(columns, 16), 16)
    expert = expert.to(tl.int64)
    acc = tl.zeros([BM, BN], tl.float32)
    x_rows = x + (pair // TOP_K).to(tl.int64) * X_ROW
    acc = multiply(acc, x_rows, weight + expert * WEIGHT_E, columns, H, WEIGHT_K, WEIGHT_N, BK, UPCAST)
    if RANK:
        t_rows = t + place.to(tl.int64) * T_ROW
        acc = multiply(acc, t_rows, low + expert * LOW_E, columns, RANK, LOW_K, LOW_N, LOW_BK, UPCAST)
    gate, up = _halves(rounded(acc, x.dtype.element_ty, UPCAST))
    column = column_tile * HALF + tl.arange(0, HALF)
    mask = is_row[:, None] & (column < WIDTH)[None, :]
    place = place.to(tl.int64)[:, None]
    if gate_up is not None:
        gate_target = gate_up + place * (2 * WIDTH) + column[None, :]
        tl.store(gate_target, gate, mask=mask)
        tl.store(gate_target + WIDTH, up, mask=mask)
    gate = gate.to(tl.float32)
    product = rounded(gate * tl.sigmoid(gate) * up.to(tl.float32), h.dtype.element_ty, UPCAST)
    tl.store(h + place * WIDTH + column[None, :], product, mask=mask)


@triton.jit
def _gate_backward_tile(
    p, gate_up, d_gate_up, h, source, target, w, is_row, first, WIDTH: tl.constexpr, UPCAST: tl.constexpr
):
    """Stores d gate_up and `w h` of the columns of p from `first` on; their part of dw.

    16 columns at a time: what SwiGLU's gradient needs of a whole tile has no room in the registers, and so the sums
    come to where the loads and stores want them without leaving their warp.
    """
    columns: tl.constexpr = p.shape[1]
    if columns > 16:
        left, right = _halves(p)
        dw = _gate_backward_tile(left, gate_up, d_gate_up, h, source, target, w, is_row, first, WIDTH, UPCAST)
        first += columns // 2
        return dw + _gate_backward_tile(right, gate_up, d_gate_up, h, source, target, w, is_row, first, WIDTH, UPCAST)
    else:
        column = first + tl.arange(0, columns)
        mask = is_row[:, None] & (column < WIDTH)[None, :]
        source = source[:, None] + column[None, :]
        gate = tl.load(gate_up + source, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(gate_up + source + WIDTH, mask=mask, other=0.0).to(tl.float32)
        dtype: tl.constexpr = d_gate_up.dtype.element_ty
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        product = silu * up
        dw = tl.sum(p * product, 1)
        if h is not None:
            tl.store(h + target[:, None] + column[None, :], rounded(product * w[:, None], dtype, UPCAST), mask=mask)
        p *= w[:, None]
        d_gate = p * (up * sigmoid + product * (1 - sigmoid))
        tl.store(d_gate_up + source, rounded(d_gate, dtype, UPCAST), mask=mask)
        tl.store(d_gate_up + source + WIDTH, rounded(p * silu, dtype, UPCAST), mask=mask)
        return dw


@triton.jit
def _gate_backward_kernel(
    dy,
    weight,
    gate_up,
    d_gate_up,
    h,
    parts,
    row_weights,
    pairs,
    ends,
    v,
    low,
    RANK: tl.constexpr,
    V_ROW: tl.constexpr,
    LOW_E: tl.constexpr,
    LOW_K: tl.constexpr,
    LOW_N: tl.constexpr,
    LOW_BK: tl.constexpr,
    E: tl.constexpr,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    TOP_K: tl.constexpr,
    DY_ROW: tl.constexpr,
    WEIGHT_E: tl.constexpr,
    WEIGHT_K: tl.constexpr,
    WEIGHT_N: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    expert, first, end, column_tile = find_tile(ends, tl.cdiv(WIDTH, BN), E, BM, GROUP)
    if expert == E:
        return
    place, is_row, pair = find_rows(pairs, first, end, BM)
    column = (column_tile * BN + tl.arange(0, BN)) % WIDTH
    expert = expert.to(tl.int64)
    p = tl.zeros([BM, BN], tl.float32)
    dy_rows = dy + (pair // TOP_K).to(tl.int64) * DY_ROW
    p = multiply(p, dy_rows, weight + expert * WEIGHT_E, column, H, WEIGHT_K, WEIGHT_N, BK, UPCAST)
    if RANK:
        v_rows = v + place.to(tl.int64) * V_ROW
        p = multiply(p, v_rows, low + expert * LOW_E, column, RANK, LOW_K, LOW_N, LOW_BK, UPCAST)
    w = tl.load(row_weights + pair).to(tl.float32)
    place = place.to(tl.int64)
    first = column_tile * BN
    dw = _gate_backward_tile(
        p, gate_up, d_gate_up, h, place * (2 * WIDTH), place * WIDTH, w, is_row, first, WIDTH, UPCAST
    )
    tl.store(parts + pair.to(tl.int64) * tl.cdiv(WIDTH, BN) + column_tile, dw, mask=is_row)
