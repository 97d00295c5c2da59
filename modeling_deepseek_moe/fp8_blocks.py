"""Weights in FP8 blocks as DeepSeek publishes them: float8_e4m3fn with one scale a block of 128x128 (FACTS 3.4).

`weight = fp8 * weight_scale_inv` block by block, despite that name; blocks at the lower and right edge are cut off.
"""

import torch
import torch.nn.functional as F

SCALE_SUFFIX = "_scale_inv"
FP8_BLOCK = (128, 128)
FP8_MAX = 448.0

_FLOAT32_TINY = torch.finfo(torch.float32).tiny
# A float8_e4m3fn shifted into the bits of a float16 is its value divided by this.
_FLOAT16_BIAS = 256.0


def scale_shape(shape: tuple[int, ...], block: tuple[int, int] = FP8_BLOCK) -> tuple[int, int]:
    """Rows and columns of the scales of a weight `[R, C]`."""
    rows, columns = shape
    return -(-rows // block[0]), -(-columns // block[1])


def dequantize_blocks(
    weight: torch.Tensor,
    scale: torch.Tensor,
    dtype: torch.dtype = torch.bfloat16,
    block: tuple[int, int] = FP8_BLOCK,
) -> torch.Tensor:
    """The weight `[R, C]` in `dtype`: the float32 product of each value with its block's scale, rounded once.

    Args:
        weight: float8_e4m3fn `[R, C]`.
        scale: float32 or float8_e8m0fnu, `scale_shape(weight.shape, block)`.
        dtype: type of the result.
        block: rows and columns of a block.
    """
    rows, columns = weight.shape
    scale = scale.float()
    result = torch.empty(rows, columns, dtype=dtype, device=weight.device)
    exact = _shift_is_exact(weight, scale)
    factors = scale * _FLOAT16_BIAS if exact else scale
    for band, start in enumerate(range(0, rows, block[0])):
        # One band at a time stays in the processor's cache.
        values = weight[start : start + block[0]]
        values = _shifted(values) if exact else values.float()
        values *= factors[band].repeat_interleave(block[1])[:columns]
        result[start : start + block[0]] = values
    return result


def quantize_blocks(weight: torch.Tensor, block: tuple[int, int] = FP8_BLOCK) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight `[R, C]` as float8_e4m3fn `[R, C]` and float32 scales: each block's largest magnitude becomes 448.

    Quantizing the bfloat16 weight that comes back from it gives the same bits again.

    Raises:
        ValueError: the weight has a value that is not finite.
    """
    rows, columns = weight.shape
    quantized = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=weight.device)
    scale = torch.empty(scale_shape(weight.shape, block), dtype=torch.float32, device=weight.device)
    for band, start in enumerate(range(0, rows, block[0])):
        values = weight[start : start + block[0]].float()
        largest = torch.maximum(values.amax(dim=0), -values.amin(dim=0))
        largest = F.pad(largest, (0, -columns % block[1])).view(-1, block[1]).amax(dim=1)
        if not torch.isfinite(largest).all():
            raise ValueError("holds values that are not finite")
        # A block of zeros keeps its zeros under any scale; a subnormal scale would lose digits.
        scale[band] = torch.where(largest > 0, (largest / FP8_MAX).clamp_min(_FLOAT32_TINY), 1.0)
        values = values / scale[band].repeat_interleave(block[1])[:columns]
        quantized[start : start + block[0]] = values
    return quantized, scale


def _shift_is_exact(weight: torch.Tensor, scale: torch.Tensor) -> bool:
    """NaN has no place in the shifted bits, and a scale near the end of float32 would overflow."""
    if not weight.numel():
        return True
    has_nan = weight.view(torch.int8).max() == 0x7F or weight.view(torch.uint8).max() == 0xFF
    return not has_nan and bool((scale.abs() < 2.0**119).all())


def _shifted(weight: torch.Tensor) -> torch.Tensor:
    """float32 of float8_e4m3fn divided by `_FLOAT16_BIAS`; several times faster than torch's own conversion."""
    bits = weight.view(torch.int8).to(torch.int16)
    bits <<= 7
    bits &= ~0x4000  # the copy of the sign
    return bits.view(torch.float16).float()
