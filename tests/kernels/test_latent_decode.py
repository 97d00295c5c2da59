"""Latent decode attention in Triton, interpreted, against its reference in float64."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed here")

from torch._subclasses.fake_tensor import FakeTensorMode

from modeling_deepseek_moe.kernels.triton import latent_decode, reference
from modeling_deepseek_moe.kernels.triton.latent_decode import (
    FP8Latent,
    Tiles,
    dequantize_latent,
    latent_attention,
    latent_attention_fp8_op,
    latent_attention_op,
    quantize_latent,
    split_count,
)

# Outputs are means of standard normal numbers. float32 sums in another order; the halves round the weights, of which
# the largest is 1, and the result.
ATOL = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
FEW_ROWS, MANY_ROWS = Tiles(16, 32, 4, 3, 1), Tiles(64, 64, 8, 2, 1)


def inputs(batch, heads, tokens, length, rank, rope, dtype=torch.float32, seed=0):
    """Queries and cache, standard normal."""
    torch.manual_seed(seed)
    queries = torch.randn(batch, heads, tokens, rank + rope).to(dtype)
    return queries, torch.randn(batch, length, rank + rope).to(dtype)


def assert_equals_the_reference(queries, cached, rank, mask=None, **options):
    # A softmax that is neither flat nor one-hot.
    scaling = 2 / queries.shape[-1] ** 0.5
    found = latent_attention(queries, cached, rank, scaling, mask, **options)
    exact = dequantize_latent(cached) if isinstance(cached, FP8Latent) else cached
    expected = reference.latent_attention(queries.double(), exact.double(), rank, scaling, mask)
    assert found.dtype == queries.dtype
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=ATOL[queries.dtype])
    return found


SHAPES = {
    "one cached token": (1, 16, 1, 1, 32, 16),
    "a ragged last tile": (2, 16, 1, 75, 32, 16),
    "whole tiles": (1, 16, 1, 64, 32, 16),
    "few heads, rows of several tokens in a tile": (2, 3, 7, 40, 16, 8),
    "one head, the most tokens": (1, 1, 16, 33, 16, 16),
    "as many tokens as are cached": (1, 4, 5, 5, 16, 8),
    "128 heads": (1, 128, 1, 70, 16, 16),
    "a rank that is no power of two": (1, 4, 2, 40, 48, 24),
    "V2-Lite's widths": (1, 16, 1, 40, 512, 64),
}


@pytest.mark.parametrize("dtype", ATOL, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_it_is_softmax_attention_over_the_cache(shape, dtype):
    queries, cached = inputs(*shape, dtype)
    # The tiles that the GPU takes in half precision, whatever the dtype.
    tiles = FEW_ROWS if queries.shape[1] * queries.shape[2] <= 16 else MANY_ROWS
    assert_equals_the_reference(queries, cached, shape[4], tiles=tiles, splits=1)


@pytest.mark.parametrize(("tokens", "splits"), [(1, 1), (1, 5), (3, 2)])
def test_a_mask_is_all_that_a_query_sees(tokens, splits):
    """More splits than the 3 tiles of 32; an empty row, an empty sequence, holes, both ends empty."""
    queries, cached = inputs(5, 2, tokens, 90, 16, 8)
    mask = torch.zeros(5, tokens, 90, dtype=torch.bool)
    mask[0, :, 37:] = True  # left padding
    mask[1, :, :41] = True  # a static cache's end
    mask[2] = torch.rand(tokens, 90) > 0.5
    mask[2, -1] = False
    mask[3, :, 70] = True
    found = assert_equals_the_reference(queries, cached, 16, mask, splits=splits, tiles=FEW_ROWS)
    assert not found[4].any() and not found[2, :, -1].any()


def test_tiles_before_the_first_and_after_the_last_visible_token_are_not_read():
    """What lies there, as in a static cache's empty end, may be anything."""
    queries, cached = inputs(1, 2, 1, 160, 16, 8)
    mask = torch.zeros(1, 1, 160, dtype=torch.bool)
    mask[..., 40:70] = True
    expected = latent_attention(queries, cached, 16, 1.0, mask, splits=2, tiles=FEW_ROWS)
    cached[:, :32] = cached[:, 96:] = torch.nan
    found = latent_attention(queries, cached, 16, 1.0, mask, splits=2, tiles=FEW_ROWS)
    assert torch.equal(found, expected) and expected.isfinite().all()


def test_masks_and_caches_may_lie_in_memory_in_other_ways():
    """A mask for all sequences, a cache that is the beginning of a buffer, columns that are not adjacent."""
    queries, cached = inputs(2, 2, 2, 50, 16, 8)
    mask = torch.ones(2, 50, dtype=torch.bool).tril(40).expand(2, 2, 50)
    expected = assert_equals_the_reference(queries, cached, 16, mask, splits=2)
    buffer = torch.full((2, 64, 24), torch.nan)
    buffer[:, :50] = cached
    strided = queries.mT.contiguous().mT
    columns_first = mask.mT.contiguous().mT
    for q, cache, seen in [
        (strided, buffer[:, :50], mask),
        (queries.transpose(1, 2).contiguous().transpose(1, 2), cached.mT.contiguous().mT, columns_first),
    ]:
        assert torch.equal(latent_attention(q, cache, 16, 2 / 24**0.5, seen, splits=2), expected)


def test_tokens_may_lie_further_apart_than_32_bits_count():
    """As in a buffer `[L, B, c + rope]` of long sequences. Of the 4 GiB only the pages of three tokens are touched."""
    queries, cached = inputs(1, 2, 1, 3, 16, 8, torch.float16)
    apart = torch.empty(2**31 + 24, dtype=torch.float16).as_strided(cached.shape, (24, 2**30, 1)).copy_(cached)
    assert torch.equal(latent_attention(queries, apart, 16, 0.4), latent_attention(queries, cached, 16, 0.4))


def test_large_scores_do_not_overflow():
    queries, cached = inputs(1, 4, 1, 50, 16, 8)
    assert_equals_the_reference(queries * 300, cached, 16, splits=2)


@pytest.mark.parametrize("dtype", ATOL, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize(
    "shape", [(2, 4, 1, 40, 512, 16), (1, 3, 6, 33, 192, 16), (1, 4, 1, 33, 48, 8)], ids=["512", "192", "48"]
)
def test_an_fp8_cache_is_read_as_what_it_stands_for(shape, dtype):
    """Groups of 128 latents, one and a half of them, and fewer."""
    queries, cached = inputs(*shape, dtype)
    cached[..., : shape[4]] *= torch.logspace(-3, 3, shape[3])[:, None].to(dtype)  # each token needs its own scale
    quantized = quantize_latent(cached / cached.abs().amax(), shape[4])
    mask = torch.rand(shape[0], shape[2], shape[3]) > 0.3
    assert_equals_the_reference(queries, quantized, shape[4], splits=1, tiles=FEW_ROWS)
    assert_equals_the_reference(queries, quantized, shape[4], mask, splits=1, tiles=MANY_ROWS)


def test_fp8_keeps_every_number_to_a_sixteenth_and_takes_656_bytes_a_token():
    _, cached = inputs(2, 1, 1, 20, 512, 64, torch.bfloat16)
    cached[0, 0, :128] = 0
    quantized = quantize_latent(cached, 512)
    assert sum(part[0, 0].nbytes for part in quantized) == 656
    found, exact = dequantize_latent(quantized).float(), cached.float()
    assert torch.equal(found[..., 512:], exact[..., 512:])
    # Three bits after the leading one, half of the last is lost; numbers 2**-6 * 448 below the largest lose more.
    # bfloat16 rounds once more.
    largest = exact[..., :512].unflatten(-1, (-1, 128)).abs().amax(-1).repeat_interleave(128, -1)
    error = (found - exact)[..., :512].abs()
    assert (error <= exact[..., :512].abs() * (2**-4 + 2**-8) + largest * 2**-10 / 448).all()
    # All 254 numbers of the type that are numbers come through the kernel's shifts.
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    numbers = numbers.where(numbers.float().isfinite(), torch.zeros_like(numbers))[None, None]
    cache = FP8Latent(numbers, torch.ones(1, 1, 2), torch.zeros(1, 1, 8))
    found = latent_attention(torch.zeros(1, 1, 1, 264), cache, 256, 1.0)
    assert torch.equal(found[0, 0], numbers[0].float())


@pytest.mark.parametrize("is_fp8", [False, True], ids=["latents", "fp8"])
def test_the_custom_ops_keep_their_promises_to_torch_compile(is_fp8):
    queries, cached = inputs(2, 4, 3, 20, 16, 8)
    mask = torch.rand(2, 3, 20) > 0.5
    if is_fp8:
        values, scales, rope = quantize_latent(cached, 16)
        arguments = (queries, values.view(torch.uint8), scales, rope, 1.0, mask, 1, list(FEW_ROWS))
        torch.library.opcheck(latent_attention_fp8_op, arguments)
    else:
        torch.library.opcheck(latent_attention_op, (queries, cached, 16, 1.0, None, 1, list(FEW_ROWS)))
    with FakeTensorMode():
        queries, cached = inputs(2, 4, 3, 20, 16, 8, torch.bfloat16)
        fake = latent_attention(queries, quantize_latent(cached, 16) if is_fp8 else cached, 16, 1.0)
    assert fake.shape == (2, 4, 3, 16) and fake.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("blocks", "tiles", "expected"),
    [(1, 1, 1), (1, 64, 64), (1, 2048, 128), (64, 2048, 2), (132, 64, 1), (264, 64, 1), (200, 1000, 11)],
)
def test_splits_fill_the_gpu_and_are_no_more_than_tiles(blocks, tiles, expected):
    """Where 132 multiprocessors have a block each, one; two for half of them; many where the last round is short."""
    assert split_count(blocks, tiles, 132) == expected


def test_the_number_of_splits_changes_sums_by_roundings_only():
    queries, cached = inputs(1, 2, 1, 130, 16, 8)
    results = [latent_attention(queries, cached, 16, 0.4, splits=splits, tiles=FEW_ROWS) for splits in (1, 2, 5)]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=2e-6)
    assert torch.equal(latent_attention(queries, cached, 16, 0.4, splits=5, tiles=FEW_ROWS), results[2])
    torch.testing.assert_close(latent_attention(queries, cached, 16, 0.4), results[0], rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("tokens", "rank", "cache", "message"),
    [
        (17, 16, torch.float32, "up to 16 query tokens .* got 17 query tokens"),
        (1, 528, torch.float32, "a rank up to 512 .* got 1 query tokens and a rank of 528"),
        (1, 24, torch.float32, "multiple of 16, got 1 query tokens and a rank of 24"),
        (1, 16, torch.bfloat16, "queries are torch.float32, the cache is torch.bfloat16: cast both to one of"),
    ],
)
def test_what_it_does_not_take_is_said_in_one_line(tokens, rank, cache, message):
    queries, cached = torch.zeros(1, 2, tokens, rank + 8), torch.zeros(1, 20, rank + 8, dtype=cache)
    with pytest.raises(ValueError, match=message) as refused:
        latent_attention(queries, cached, rank, 1.0)
    assert "\n" not in str(refused.value)


def test_nothing_is_read_beyond_what_is_given():
    queries, cached = inputs(2, 4, 3, 20, 16, 8)
    quantized = quantize_latent(cached, 16)
    seen = torch.ones(2, 3, 20, dtype=torch.bool)
    for cache, mask, message in [
        (cached[:1], None, r"read a cache of \[\(2, 20, 24\)\], got \[\(1, 20, 24\)\]"),
        (cached[..., :16], None, r"got \[\(2, 20, 16\)\]"),
        (quantized._replace(values=quantized.values[:, 1:]), None, r"got \[\(2, 19, 16\), \(2, 20, 1\)"),
        (quantized._replace(scales=quantized.scales[:1]), None, r"\(1, 20, 1\)"),
        (cached, seen[..., 1:], r"the mask has to be torch.bool \(2, 3, 20\), got torch.bool \(2, 3, 19\)"),
        (cached, seen[:, :1], r"got torch.bool \(2, 1, 20\)"),
        (cached, seen.float(), r"got torch.float32 \(2, 3, 20\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            latent_attention(queries, cache, 16, 1.0, mask)


def test_where_triton_cannot_run_it_says_so(monkeypatch):
    monkeypatch.setattr(latent_decode, "refusal", lambda device: "Triton is not installed")
    queries, cached = inputs(1, 2, 1, 5, 16, 8)
    with pytest.raises(ValueError, match='^latent_attention: Triton is not installed. Use attn_implementation="sdpa"'):
        latent_attention(queries, cached, 16, 1.0)
