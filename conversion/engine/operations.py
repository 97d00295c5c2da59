"""How output tensors come from source tensors. A format is a choice of these; each can check its own result."""

from dataclasses import dataclass, field
from typing import Protocol

import torch

from modeling_deepseek_moe.finite import all_finite
from modeling_deepseek_moe.fp8_blocks import dequantize_blocks, quantize_blocks

# e4m3 has three mantissa bits, and below 2^-6 steps of 2^-9; half a step is the rounding. The third term covers the
# float32 roundings of scale, quotient and product.
_FP8_RELATIVE, _FP8_ABSOLUTE, _FLOAT32_SLACK = 2.0**-4, 2.0**-10, 1 + 2.0**-20

_BANDS_A_MEASUREMENT = 4


class Operation(Protocol):
    """How the outputs of one step are made of its sources.

    `apply` makes them; `problem` says what is wrong with outputs that were read back, None if nothing is.
    """

    def apply(self, *sources: torch.Tensor) -> tuple[torch.Tensor, ...]: ...

    def problem(self, sources: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, ...]) -> str | None: ...


@dataclass(frozen=True)
class Copy:
    """Leaves a tensor as it is; the worker copies its bytes without reading them into memory."""

    def apply(self, source: torch.Tensor) -> tuple[torch.Tensor]:
        return (source,)

    def problem(self, sources, outputs) -> str | None:
        return difference(outputs[0], sources[0])


@dataclass(frozen=True)
class Cast:
    """Rounds a tensor to another floating point type."""

    dtype: torch.dtype

    def apply(self, source: torch.Tensor) -> tuple[torch.Tensor]:
        result = source.to(self.dtype)
        if not all_finite(result):
            reason = (
                f"beyond {str(self.dtype).removeprefix('torch.')}" if all_finite(source) else "that are not finite"
            )
            raise ValueError(f"holds values {reason}")
        return (result,)

    def problem(self, sources, outputs) -> str | None:
        return difference(outputs[0], sources[0].to(self.dtype))


@dataclass(frozen=True)
class Dequantize:
    """Makes a plain weight of FP8 blocks and their scales (FACTS 3.4)."""

    dtype: torch.dtype
    block: tuple[int, int]

    def apply(self, weight: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor]:
        result = dequantize_blocks(weight, scale, self.dtype, self.block)
        if not all_finite(result):
            raise ValueError("holds values that are not finite, or its scales do")
        return (result,)

    def problem(self, sources, outputs) -> str | None:
        weight, scale = sources
        return difference(outputs[0], _dequantized_plainly(weight, scale, self.block).to(self.dtype))


@dataclass(frozen=True)
class Quantize:
    """Makes FP8 blocks and float32 scales of a plain weight (FACTS 3.4)."""

    block: tuple[int, int]

    def apply(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return quantize_blocks(weight, self.block)

    def problem(self, sources, outputs) -> str | None:
        weight, (quantized, scale) = sources[0].float(), outputs
        scales = scale.repeat_interleave(self.block[0], 0)[: weight.shape[0]]
        scales = scales.repeat_interleave(self.block[1], 1)[:, : weight.shape[1]]
        bound = torch.maximum(weight.abs() * _FP8_RELATIVE, scales * _FP8_ABSOLUTE) * _FLOAT32_SLACK
        error = (_dequantized_plainly(quantized, scale, self.block) - weight).abs()
        beyond = ~(error <= bound)
        return f"{int(beyond.sum())} values are further off than FP8 rounding" if beyond.any() else None


@dataclass
class QuantizationError:
    """What FP8 did to the weights of one part of the model, measured on a quarter of their rows.

    Attributes:
        tensors: how many were measured.
        relative: root mean square of the error over that of the weights.
        largest: largest error of one value, relative to the largest weight of its tensor.
    """

    tensors: int = 0
    largest: float = 0.0
    _squared_error: float = field(default=0.0, repr=False)
    _squared_weight: float = field(default=0.0, repr=False)

    @property
    def relative(self) -> float:
        return (self._squared_error / self._squared_weight) ** 0.5 if self._squared_weight else 0.0

    def add(self, weight: torch.Tensor, quantized: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> None:
        """Measures one tensor: every fourth band of blocks, since measuring takes longer than quantizing."""
        top = error_top = 0.0
        for band in range(0, scale.shape[0], _BANDS_A_MEASUREMENT):
            rows = slice(band * block[0], (band + 1) * block[0])
            values = weight[rows].float().flatten()
            error = dequantize_blocks(quantized[rows], scale[band : band + 1], torch.float32, block).flatten()
            error -= values
            self._squared_error += float(error.dot(error))
            self._squared_weight += float(values.dot(values))
            error_top = max(error_top, *(abs(float(end)) for end in error.aminmax()))
            top = max(top, *(abs(float(end)) for end in values.aminmax()))
        self.largest = max(self.largest, error_top / top if top else 0.0)
        self.tensors += 1

    def merge(self, other: "QuantizationError") -> None:
        """Adds what another one measured."""
        self._squared_error += other._squared_error
        self._squared_weight += other._squared_weight
        self.largest = max(self.largest, other.largest)
        self.tensors += other.tensors


def _dequantized_plainly(weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """The same as `dequantize_blocks` in float32 by another way, so that a check does not repeat its mistake."""
    rows, columns = weight.shape
    blocks = scale.float().repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    return weight.float() * blocks


def difference(found: torch.Tensor, expected: torch.Tensor) -> str | None:
    """What is different in type, shape or bits; None if nothing is."""
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return f"is {found.dtype} {list(found.shape)} instead of {expected.dtype} {list(expected.shape)}"
    same_nan = torch.isnan(found.float()) & torch.isnan(expected.float())
    as_bytes = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[found.element_size()]
    different = (found.view(as_bytes) != expected.view(as_bytes)) & ~same_nan
    return f"{int(different.sum())} of {found.numel()} values differ" if different.any() else None
