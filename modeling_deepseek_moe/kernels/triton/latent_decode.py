"""Decode attention over a cache of latents in Triton: one key-value head of width `rank + rope` for all query heads.

B sequences, h heads, T query tokens (1 to 16), L cached tokens, c = rank. A sequence's T*h queries are the rows of one
matrix. A program holds a block of rows and walks over every `splits`-th tile of the cache, so that visible tokens,
wherever they lie, are shared out evenly; a tile is loaded once and serves the scores and the weighted sum. A second
kernel joins the splits. What a program reads is decided by shapes and by the mask on the device: nothing is asked of
the host, sums have one order, and a CUDA graph can hold both launches.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ...fp8_blocks import FP8_BLOCK, FP8_MAX
from .latent_kernels import attend_tiles, join_splits
from .launch import INTERPRETED, launch, next_power, refusal, shared_memory

MOST_TOKENS = 16
"""Query tokens of a sequence that one call takes."""
WIDEST_RANK = 512
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MOST_SPLITS = 128
_GROUP = FP8_BLOCK[1]
# Beginning and ending a program, and joining it with the others, take about as long as so many tiles.
_TILES_OF_A_START = 3
_INTERPRETED_PROCESSORS = 4
# Bytes of shared memory that a program with 16 rows takes.
_SHARED_OF_FEW_ROWS = 92 * 1024


class FP8Latent(NamedTuple):
    """Cached tokens with latents in eight bits: 656 bytes a token for c = 512 (FACTS 2.3).

    values: float8_e4m3fn `[B, L, c]`; scales: float32 `[B, L, ceil(c / 128)]`; rope: `[B, L, rope]`, not quantised.
    """

    values: torch.Tensor
    scales: torch.Tensor
    rope: torch.Tensor


class Tiles(NamedTuple):
    """Rows and cached tokens of a program's tile, its warps and stages, and how many fit on a multiprocessor."""

    rows: int
    tokens: int
    warps: int
    stages: int
    resident: int


def quantize_latent(cached: torch.Tensor, rank: int) -> FP8Latent:
    """Cached tokens `[B, L, c + rope]` with the latents of width `rank` in FP8: of 128, the largest becomes 448."""
    latents, rope = cached.float().split([rank, cached.shape[-1] - rank], dim=-1)
    groups = F.pad(latents, (0, -rank % _GROUP)).unflatten(-1, (-1, _GROUP))
    largest = groups.abs().amax(-1)
    # A subnormal scale would lose digits, and one of zero would make zeros no numbers.
    scales = (largest / FP8_MAX).clamp_min(torch.finfo(torch.float32).tiny)
    values = (groups / scales[..., None]).flatten(-2)[..., :rank].to(torch.float8_e4m3fn)
    return FP8Latent(values, scales, rope.to(cached.dtype))


def dequantize_latent(cached: FP8Latent) -> torch.Tensor:
    """The cached tokens `[B, L, c + rope]` that an FP8 cache stands for, in the dtype of its rope part."""
    scales = cached.scales.repeat_interleave(_GROUP, dim=-1)[..., : cached.values.shape[-1]]
    return torch.cat(((cached.values.float() * scales).to(cached.rope.dtype), cached.rope), dim=-1)


def latent_attention(
    queries: torch.Tensor,
    cached: torch.Tensor | FP8Latent,
    rank: int,
    scaling: float,
    mask: torch.Tensor | None = None,
    splits: int | None = None,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """The sums of latents that queries in the latent space attend to, `[B, h, T, c]`; there is no backward pass.

    Args:
        queries: `[B, h, T, c + rope]`, float16, bfloat16 or float32; T at most `MOST_TOKENS`.
        cached: `[B, L, c + rope]` of the same dtype, or an `FP8Latent` whose rope part has it.
        rank: c, at most `WIDEST_RANK` and a multiple of 16.
        scaling: factor on the scores, before the softmax.
        mask: bool `[B, T, L]`, True where a query sees a token; a query that sees none gets zeros. Without a mask the
            last query sees all tokens, and each one before it one token less.
        splits: programs that share a sequence's tokens, instead of `split_count`'s.
        tiles: instead of `choose_tiles`'.

    Raises:
        ValueError: the shapes or dtypes are none of these, or Triton cannot run on the tensors' device.
    """
    _check_inputs(queries, cached, rank, mask)
    if isinstance(cached, FP8Latent):
        bits = cached.values.view(torch.uint8)
        result = latent_attention_fp8_op(queries, bits, cached.scales, cached.rope, scaling, mask, splits, tiles)
    else:
        result = latent_attention_op(queries, cached, rank, scaling, mask, splits, tiles)
    return result.transpose(1, 2)


@torch.library.custom_op("deepseek_moe::latent_attention", mutates_args=())
def latent_attention_op(
    queries: torch.Tensor,
    cached: torch.Tensor,
    rank: int,
    scaling: float,
    mask: torch.Tensor | None = None,
    splits: int | None = None,
    tiles: Sequence[int] | None = None,
) -> torch.Tensor:
    """`latent_attention` as `[B, T, h, c]`, for torch.compile."""
    _check_device(queries)
    cached = _with_adjacent_columns(cached)
    return attend_cache(queries, cached[..., :rank], cached[..., rank:], None, scaling, mask, splits, tiles)


@torch.library.custom_op("deepseek_moe::latent_attention_fp8", mutates_args=())
def latent_attention_fp8_op(
    queries: torch.Tensor,
    bits: torch.Tensor,
    scales: torch.Tensor,
    rope: torch.Tensor,
    scaling: float,
    mask: torch.Tensor | None = None,
    splits: int | None = None,
    tiles: Sequence[int] | None = None,
) -> torch.Tensor:
    """`latent_attention` over the parts of an `FP8Latent`, its values as uint8; `[B, T, h, c]`, for torch.compile."""
    _check_device(queries)
    bits, scales, rope = map(_with_adjacent_columns, (bits, scales, rope))
    return attend_cache(queries, bits, rope, scales, scaling, mask, splits, tiles)


@latent_attention_op.register_fake
def _(queries, cached, rank, scaling, mask=None, splits=None, tiles=None):
    return queries.new_empty(queries.shape[0], queries.shape[2], queries.shape[1], rank)


@latent_attention_fp8_op.register_fake
def _(queries, bits, scales, rope, scaling, mask=None, splits=None, tiles=None):
    return queries.new_empty(queries.shape[0], queries.shape[2], queries.shape[1], bits.shape[-1])


def choose_tiles(rows: int, dtype: torch.dtype, is_fp8: bool, device: torch.device) -> Tiles:
    """The tiles for `rows` queries a sequence on a device."""
    if dtype == torch.float32:
        return Tiles(16, 16, 8, 2, 1)
    # Hopper multiplies blocks of 64 rows; elsewhere their sums do not fit into registers.
    is_hopper = device.type != "cuda" or torch.cuda.get_device_capability(device)[0] == 9
    if rows <= 16 or not is_hopper:
        return Tiles(16, 32, 4, 3, max(1, shared_memory(device) // _SHARED_OF_FEW_ROWS))
    # What undoes the quantisation takes registers.
    return Tiles(64, 32 if is_fp8 else 64, 8, 2, 1)


@functools.lru_cache(maxsize=4096)
def split_count(blocks: int, tiles: int, slots: int) -> int:
    """How many programs share the tokens of a sequence, so that the last one ends soonest.

    Args:
        blocks: how many blocks of rows there are, in all sequences together.
        tiles: how many tiles of tokens the cache has.
        slots: programs that the device runs at a time.
    """

    def duration(splits: int) -> int:
        return -(-blocks * splits // slots) * (-(-tiles // splits) + _TILES_OF_A_START)

    return min(range(1, min(_MOST_SPLITS, tiles) + 1), key=duration, default=1)


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def attend_cache(
    queries: torch.Tensor,
    latents: torch.Tensor,
    rope: torch.Tensor,
    scales: torch.Tensor | None,
    scaling: float,
    mask: torch.Tensor | None,
    splits: int | None = None,
    tiles: Sequence[int] | None = None,
) -> torch.Tensor:
    """The launches: `[B, T, h, c]` from latents `[B, L, c]`, which are bytes if there are scales, and their ropes."""
    (batch, heads, tokens, _), (length, rank) = queries.shape, latents.shape[1:]
    queries = _with_adjacent_columns(queries)
    rows, device, dtype = heads * tokens, queries.device, queries.dtype
    tiles = choose_tiles(rows, dtype, scales is not None, device) if tiles is None else Tiles(*tiles)
    blocks = -(-rows // tiles.rows)
    if splits is None:
        splits = split_count(batch * blocks, -(-length // tiles.tokens), _processors(device) * tiles.resident)
    is_split = splits > 1
    result = torch.empty(batch, tokens, heads, rank, dtype=dtype, device=device)
    sums = torch.empty(batch, splits, rows, rank, device=device) if is_split else result
    peaks = torch.empty(batch, splits, rows, device=device) if is_split else None
    if mask is not None:
        mask = _with_adjacent_columns(mask).view(torch.uint8)
    launch(
        attend_tiles,
        (blocks, splits, batch),
        *(queries, latents, rope, scales, mask, sums, peaks),
        *queries.stride()[:3],
        *latents.stride()[:2],
        *rope.stride()[:2],
        *((0, 0) if scales is None else scales.stride()[:2]),
        *((0, 0) if mask is None else mask.stride()[:2]),
        heads,
        tokens,
        length,
        splits,
        scaling * math.log2(math.e),
        RANK=rank,
        ROPE=rope.shape[-1],
        RANK_TILE=next_power(rank, 16),
        ROPE_TILE=next_power(rope.shape[-1], 16),
        ROWS=tiles.rows,
        TOKENS=tiles.tokens,
        ONE_TOKEN=tokens == 1,
        FAR=length * max(latents.stride(1), rope.stride(1)) >= 2**31,
        UPCAST=INTERPRETED,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    if is_split:
        columns = min(64, next_power(rank))
        grid = (rows, -(-rank // columns), batch)
        launch(join_splits, grid, sums, peaks, result, rows, splits, rank, next_power(splits), columns)
    return result


def _check_inputs(queries, cached, rank, mask) -> None:
    """The kernels read memory where they are told."""
    batch, _, tokens, width = queries.shape
    parts, widths = (cached,), (width,)
    if isinstance(cached, FP8Latent):
        parts, widths = cached, (rank, -(-rank // _GROUP), width - rank)
    length, dtype = parts[-1].shape[1], parts[-1].dtype
    if tokens > MOST_TOKENS or rank > WIDEST_RANK or rank % 16:
        raise ValueError(
            f"latent_attention takes up to {MOST_TOKENS} query tokens and a rank up to {WIDEST_RANK} that is a "
            f"multiple of 16, got {tokens} query tokens and a rank of {rank}"
        )
    if queries.dtype not in DTYPES or dtype != queries.dtype:
        names = ", ".join(str(each) for each in DTYPES)
        raise ValueError(f"queries are {queries.dtype}, the cache is {dtype}: cast both to one of {names}")
    found, expected = [tuple(part.shape) for part in parts], [(batch, length, each) for each in widths]
    if found != expected:
        raise ValueError(f"queries {tuple(queries.shape)} of rank {rank} read a cache of {expected}, got {found}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (batch, tokens, length)):
        wanted = (batch, tokens, length)
        raise ValueError(f"the mask has to be torch.bool {wanted}, got {mask.dtype} {tuple(mask.shape)}")


def _with_adjacent_columns(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _check_device(tensor: torch.Tensor) -> None:
    if reason := refusal(tensor.device):
        raise ValueError(f'latent_attention: {reason}. Use attn_implementation="sdpa"')
