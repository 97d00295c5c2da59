"""Frozen weights in four bits (NF4, arXiv 2305.14314), which LoRA adapters can be trained on.

A weight keeps its name, shape and dtype; its values are 16 levels a block of 64, the levels being quantiles of the
normal distribution times the block's largest magnitude: 4.5 bits a value. The routed experts are dequantised one at a
time, for the products with its tokens, and once more in the backward pass; so is each linear layer.

    model = DeepseekMoeForCausalLM.from_pretrained(name, quantization_config=NF4Config())
    quantize_weights(model)  # in memory; both are in `quantized_loading`

bitsandbytes computes the levels and the values. Its own `Linear4bit` is not used: after a forward pass in evaluation
mode on a CPU with AVX512-BF16 it silently gives no gradient any more (bitsandbytes 0.50).
"""

from types import ModuleType

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .._compat import TO_COPY, make_wrapper, return_and_correct_aliasing, without_torch_function
from ..half_products import linear, product
from ..parts import is_linear_weight, is_stack

NF4_BLOCK = 64
BITS = 4 + 32 / NF4_BLOCK  # a value, with its share of the block's float32 magnitude

_WAY_OUT = (
    "weights in four bits are frozen, and read one matrix at a time: experts need "
    'experts_implementation="sorted_mm" and adapters by `modeling_deepseek_moe.expert_lora`; adapters are merged into '
    "the unquantised checkpoint (`deepseek-moe convert MODEL TARGET --to bf16 --adapter ADAPTER`)"
)


class NF4Weight(torch.Tensor):
    """A matrix `[out, in]` or a stack of matrices `[E, out, in]` in four bits, in the place of the weight itself.

    `weight[expert]` is one matrix of a stack, `weight.dequantize()` the only one, in the dtype of the weight.
    `F.linear` takes it as it is. Whatever else would read or write values raises a ValueError.

    Args:
        packed: `[..., blocks, NF4_BLOCK / 2]`, uint8, two values a byte; zeros fill the last block of a matrix.
        magnitudes: `[..., blocks]`, float32.
        shape, dtype: those of the weight that this stands for.
    """

    @staticmethod
    def __new__(cls, packed: torch.Tensor, magnitudes: torch.Tensor, shape: torch.Size, dtype: torch.dtype):
        return make_wrapper(cls, shape, dtype, packed.device)

    def __init__(self, packed: torch.Tensor, magnitudes: torch.Tensor, shape: torch.Size, dtype: torch.dtype):
        self.packed, self.magnitudes = packed, magnitudes

    def __getitem__(self, expert: int) -> torch.Tensor:
        if self.ndim != 3 or not isinstance(expert, int):
            raise ValueError(f"weight[{expert!r}] of {list(self.shape)}: {_WAY_OUT}")
        return dequantize_matrix(self.packed[expert], self.magnitudes[expert], self.shape[1:], self.dtype)

    def dequantize(self) -> torch.Tensor:
        """The matrix `[out, in]`, of a weight that is no stack."""
        if self.ndim != 2:
            raise ValueError(f"dequantize() of {list(self.shape)}: {_WAY_OUT}")
        return dequantize_matrix(self.packed, self.magnitudes, self.shape, self.dtype)

    @property
    def held_bytes(self) -> int:
        """What the weight takes in memory."""
        return self.packed.nbytes + self.magnitudes.nbytes

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={list(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __tensor_flatten__(self):
        return ["packed", "magnitudes"], (self.shape, self.dtype)

    @classmethod
    def __tensor_unflatten__(cls, parts, shape_and_dtype, outer_size, outer_stride):
        return cls(parts["packed"], parts["magnitudes"], *shape_and_dtype)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.linear:
            return _linear(*args, **(kwargs or {}))
        with without_torch_function():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function not in _COPIES or not isinstance(args[0], cls):
            raise ValueError(f"{function}: {_WAY_OUT}")
        weight, dtype = args[0], kwargs.get("dtype") or args[0].dtype
        options = {key: value for key, value in kwargs.items() if key in ("device", "non_blocking")}
        parts = [function(part, **options) for part in (weight.packed, weight.magnitudes)]
        return return_and_correct_aliasing(function, args, kwargs, cls(*parts, weight.shape, dtype))


_COPIES = (torch.ops.aten.detach.default, torch.ops.aten.clone.default, TO_COPY)


def quantize(weight: torch.Tensor) -> NF4Weight:
    """A matrix `[out, in]` or a stack `[E, out, in]` in four bits; a stack is read one matrix at a time.

    Raises:
        ImportError: bitsandbytes is not installed.
    """
    blocks = -(-weight.shape[-2:].numel() // NF4_BLOCK)
    packed = torch.empty(*weight.shape[:-2], blocks, NF4_BLOCK // 2, dtype=torch.uint8, device=weight.device)
    magnitudes = torch.empty(*weight.shape[:-2], blocks, dtype=torch.float32, device=weight.device)
    if weight.ndim == 2:
        quantize_matrix(weight, packed, magnitudes)
    else:
        for expert in range(len(weight)):
            quantize_matrix(weight[expert], packed[expert], magnitudes[expert])
    return NF4Weight(packed, magnitudes, weight.shape, weight.dtype)


def quantize_matrix(matrix: torch.Tensor, packed: torch.Tensor, magnitudes: torch.Tensor) -> None:
    """Writes `matrix [out, in]` into `packed [blocks, NF4_BLOCK / 2]` and `magnitudes [blocks]`."""
    values = matrix.detach().flatten()
    values = F.pad(values, (0, -len(values) % NF4_BLOCK))
    nibbles, state = load_bitsandbytes().functional.quantize_4bit(values, blocksize=NF4_BLOCK, quant_type="nf4")
    packed.copy_(nibbles.view(packed.shape))
    magnitudes.copy_(state.absmax)


def dequantize_matrix(
    packed: torch.Tensor, magnitudes: torch.Tensor, shape: torch.Size, dtype: torch.dtype
) -> torch.Tensor:
    """The values `[out, in]` of `packed [blocks, NF4_BLOCK / 2]` and `magnitudes [blocks]`."""
    functional = load_bitsandbytes().functional
    # One block a row: bitsandbytes 0.50 on CPUs with AVX512 misreads rows that end within a block.
    state = functional.QuantState(
        magnitudes, (len(magnitudes), NF4_BLOCK), dtype=dtype, blocksize=NF4_BLOCK, quant_type="nf4"
    )
    values = functional.dequantize_4bit(packed.view(-1, 1), state)
    return values.flatten()[: shape.numel()].view(shape)


def is_quantized(name: str) -> bool:
    """Whether the parameter of this name goes into four bits: routed experts, linear layers of attention and MLPs.

    Embedding, head, norms, routers and what joins the inputs of multi-token prediction stay as they are.
    """
    return is_stack(name) or is_linear_weight(name)


def load_bitsandbytes() -> ModuleType:
    """The library, which is imported only where weights are in four bits."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise ImportError(
            "weights in four bits need bitsandbytes, which is not installed: pip install bitsandbytes"
        ) from error
    return bitsandbytes


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: NF4Weight) -> torch.Tensor:
        ctx.weight = weight
        return linear(x, weight.dequantize().to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: torch.Tensor):
        weight = ctx.weight.dequantize().to(grad_output.dtype)
        rows = grad_output.reshape(-1, len(weight))
        return product(rows, weight).view(*grad_output.shape[:-1], -1), None


def _linear(input: torch.Tensor, weight: NF4Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    device = input.device.type
    if torch.is_autocast_enabled(device):
        input = input.to(torch.get_autocast_dtype(device))
    output = _Linear.apply(input, weight)
    return output if bias is None else output + bias.to(output.dtype)
