"""The two kernels of latent decode attention: `attend_tiles` walks over the cache, `join_splits` joins its programs.

Exponents are of base 2: scores are multiplied with log2(e), and what a split knows of a row's softmax is kept as
`peak + log2(sum)`.
"""

import triton
import triton.language as tl

from .launch import dot

# Tokens of a mask that are looked at together.
_SCAN = tl.constexpr(1024)
# Latents that share a scale, and what a float8_e4m3fn shifted into the bits of a float16 is to be multiplied with.
_GROUP = tl.constexpr(128)
_FLOAT16_BIAS = tl.constexpr(256.0)


# One kernel for all lengths and splits.
_VARYING = ["tokens", "length", "splits", "mask_batch", "mask_token", "scale_batch"]


@triton.jit(do_not_specialize=_VARYING)
def attend_tiles(
    queries,  # [B, h, T, RANK + ROPE]
    latents,  # [B, L, RANK], uint8 if there are scales
    ropes,  # [B, L, ROPE]
    scales,  # float32 [B, L, RANK / 128] or None
    mask,  # uint8 [B, T, L] or None
    sums,  # [B, splits, T h, RANK]
    peaks,  # float32 [B, splits, T h], None if there is one split
    query_batch,  # strides
    query_head,
    query_token,
    latent_batch,
    latent_token,
    rope_batch,
    rope_token,
    scale_batch,
    scale_token,
    mask_batch,
    mask_token,
    heads,
    tokens,
    length,
    splits,
    scaling,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    RANK_TILE: tl.constexpr,
    ROPE_TILE: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    ONE_TOKEN: tl.constexpr,
    FAR: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Sums of latents for a block of rows over every `splits`-th tile of the cache.

    Program ids: the block, first, so that programs of the same tokens run together; the split; the sequence. Row
    `t h + head` is a query. What a row sees nothing of gets a sum of zeros and a peak of minus infinity.
    """
    split = tl.program_id(1)
    # A batch of caches can pass 2^31 numbers, a sequence's only where FAR says so.
    batch = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < heads * tokens
    token = row // heads
    column = tl.arange(0, RANK_TILE)
    rope_column = tl.arange(0, ROPE_TILE)

    starts = queries + batch * query_batch + (row % heads) * query_head + token * query_token
    query = _load_rows(starts, column, is_row, RANK, RANK_TILE)
    query_rope = _load_rows(starts + RANK, rope_column, is_row, ROPE, ROPE_TILE)
    latents += batch * latent_batch
    ropes += batch * rope_batch

    first = 0
    count = _own_tiles(length, split, splits, TOKENS)
    if mask is not None:
        mask += batch * mask_batch
        first, count = _visible_tiles(mask, mask_token, tokens, length, split, splits, count, TOKENS)
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums_of_rows = tl.zeros((ROWS, RANK_TILE), tl.float32)
    # Counted from zero: from a start found on the device, Triton no longer sees that addresses are aligned.
    for step in range(count):
        key = ((first + step) * splits + split) * TOKENS + tl.arange(0, TOKENS)
        is_key = key < length
        # The last token again instead of a mask, which would cost registers; it is not visible.
        present = tl.minimum(key, length - 1)
        if FAR:
            present = present.to(tl.int64)
        tile = _load_tile(latents + present * latent_token, column, RANK, RANK_TILE)
        rope = _load_tile(ropes + present * rope_token, rope_column, ROPE, ROPE_TILE)
        if scales is not None:
            of_tokens = scales + batch * scale_batch + present * scale_token
            tile = _dequantised(tile, of_tokens, RANK, RANK_TILE, TOKENS).to(query.dtype)
        scores = dot(query_rope, tl.trans(rope), tl.zeros((ROWS, TOKENS), tl.float32), UPCAST)
        scores = dot(query, tl.trans(tile), scores, UPCAST) * scaling
        if mask is None:
            is_seen = key[None, :] <= length - tokens + token[:, None]
        elif ONE_TOKEN:
            is_seen = (tl.load(mask + present) != 0)[None, :]
        else:
            is_seen = tl.load(mask + token[:, None] * mask_token + present[None, :], is_row[:, None], other=0) != 0
        scores = tl.where(is_seen & is_key[None, :], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        # Minus infinity from itself would be no number.
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(peak - base)
        total = total * shrink + tl.sum(weights, 1)
        sums_of_rows = dot(weights.to(tile.dtype), tile, sums_of_rows * shrink[:, None], UPCAST)
        peak = new_peak
    total = tl.where(total == 0, 1.0, total)
    sums_of_rows = sums_of_rows / total[:, None]
    place = (batch * splits + split) * (heads * tokens) + row
    is_stored = is_row[:, None] & (column < RANK)[None, :]
    tl.store(sums + place[:, None] * RANK + column[None, :], sums_of_rows.to(sums.dtype.element_ty), is_stored)
    if peaks is not None:
        tl.store(peaks + place, peak + tl.log2(total), is_row)


@triton.jit(do_not_specialize=["rows", "splits"])
def join_splits(
    sums,  # float32 [B, splits, rows, width]
    peaks,  # float32 [B, splits, rows]
    result,  # [B, rows, width]
    rows,
    splits,
    width,
    SPLITS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The splits' sums, each weighed with its share of the softmax. Program ids: row, block of columns, sequence."""
    row = tl.program_id(0)
    batch = tl.program_id(2).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    split = tl.arange(0, SPLITS)
    place = (batch * splits + split) * rows + row
    peak = tl.load(peaks + place, split < splits, other=float("-inf"))
    highest = tl.max(peak, 0)
    share = tl.exp2(peak - tl.where(highest == float("-inf"), 0.0, highest))
    total = tl.sum(share, 0)
    is_there = (split < splits)[:, None] & (column < width)[None, :]
    parts = tl.load(sums + place[:, None] * width + column[None, :], is_there, other=0.0)
    joined = tl.sum(parts * share[:, None], 0) / tl.where(total == 0, 1.0, total)
    tl.store(result + (batch * rows + row) * width + column, joined.to(result.dtype.element_ty), column < width)


@triton.jit
def _own_tiles(length, split, splits, TOKENS: tl.constexpr):
    """How many tiles a split has: those that `splits` divides with its number as the rest."""
    return tl.cdiv(tl.cdiv(length, TOKENS) - split, splits)


@triton.jit
def _visible_tiles(mask, mask_token, tokens, length, split, splits, count, TOKENS: tl.constexpr):
    """The first of a split's tiles of which a query sees something, and how many there are up to the last one."""
    first = tl.full((_SCAN,), 2**30, tl.int32)
    last = tl.full((_SCAN,), -1, tl.int32)
    for start in range(0, count * TOKENS, _SCAN):
        spot = start + tl.arange(0, _SCAN)
        tile = spot // TOKENS
        key = (tile * splits + split) * TOKENS + spot % TOKENS
        for token in range(tokens):
            is_seen = tl.load(mask + token * mask_token + key, key < length, other=0) != 0
            first = tl.where(is_seen, tl.minimum(first, tile), first)
            last = tl.where(is_seen, tl.maximum(last, tile), last)
    begin = tl.min(first, 0)
    return begin, tl.max(last, 0) + 1 - begin


@triton.jit
def _load_rows(starts, column, is_row, WIDTH: tl.constexpr, TILE: tl.constexpr):
    at = starts[:, None] + column[None, :]
    if TILE == WIDTH:
        return tl.load(at, is_row[:, None], other=0.0)
    return tl.load(at, is_row[:, None] & (column < WIDTH)[None, :], other=0.0)


@triton.jit
def _load_tile(starts, column, WIDTH: tl.constexpr, TILE: tl.constexpr):
    at = starts[:, None] + column[None, :]
    if TILE == WIDTH:
        return tl.load(at)
    return tl.load(at, (column < WIDTH)[None, :], other=0)


@triton.jit
def _dequantised(tile, scales, RANK: tl.constexpr, RANK_TILE: tl.constexpr, TOKENS: tl.constexpr):
    """float8_e4m3fn bits `[TOKENS, RANK_TILE]` times their groups' scales, in float32.

    Not by Triton's own conversion, which older GPUs and its interpreter lack; NaN, which is not cached, has no place
    in the shifted bits.
    """
    WIDTH: tl.constexpr = min(RANK_TILE, _GROUP)
    GROUPS: tl.constexpr = RANK_TILE // WIDTH
    group = tl.arange(0, GROUPS)
    scale = tl.load(scales[:, None] + group[None, :], (group * WIDTH < RANK)[None, :], other=0.0) * _FLOAT16_BIAS
    bits = tile.to(tl.int16)
    bits = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
    values = tl.reshape(bits.to(tl.float16, bitcast=True).to(tl.float32), (TOKENS, GROUPS, WIDTH))
    return tl.reshape(values * scale[:, :, None], (TOKENS, RANK_TILE))
