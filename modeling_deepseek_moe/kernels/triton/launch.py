"""What every Triton kernel here needs: where it can run, on which device it is launched, and its matrix product."""

from collections.abc import Callable

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # `refusal` says so
    triton = tl = None

_LEAST_CAPABILITY = (8, 0)  # tensor cores that take bfloat16, and copies to shared memory that do not wait

INTERPRETED = triton is not None and triton.knobs.runtime.interpret
"""Whether kernels run as Python on tensors of any device, which TRITON_INTERPRET=1 says before Triton is imported."""


def _jit(function: Callable) -> Callable:
    return function if triton is None else triton.jit(function)


def refusal(device: torch.device) -> str | None:
    """Why Triton's kernels cannot run on `device`; None if they can."""
    if triton is None:
        return "Triton is not installed"
    if INTERPRETED:
        return None
    if device.type != "cuda":
        return f"Triton's kernels run on CUDA devices, the tensors are on {device.type}"
    properties = torch.cuda.get_device_properties(device)  # torch.compile knows it, and not get_device_capability
    if (capability := (properties.major, properties.minor)) < _LEAST_CAPABILITY:
        has, needs = ("{}.{}".format(*version) for version in (capability, _LEAST_CAPABILITY))
        return f"the device has compute capability {has}, the kernels need {needs}"
    return None


def launch(kernel, grid: tuple[int, ...], *arguments, **options) -> None:
    """Runs `kernel` on the device of its first tensor; nothing where the grid has no program."""
    if 0 in grid:
        return
    with torch.cuda.device_of(next(argument for argument in arguments if isinstance(argument, torch.Tensor))):
        kernel[grid](*arguments, **options)


def shared_memory(device: torch.device) -> int:
    """Bytes that one program may take there; an H100's where kernels are interpreted."""
    if device.type != "cuda":
        return 227 * 1024
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def next_power(number: int, least: int = 1) -> int:
    """The smallest power of two that is neither below `number` nor below `least`, a power of two."""
    return max(least, 1 << max(0, number - 1).bit_length())


@_jit
def dot(a, b, acc, UPCAST: "tl.constexpr"):
    """`a b + acc`, summed in float32 and never in TensorFloat-32.

    UPCAST is `INTERPRETED`: the interpreter's product of bfloat16 is garbage.
    """
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="ieee")


@_jit
def rounded(x, dtype: "tl.constexpr", UPCAST: "tl.constexpr"):
    """float32 to `dtype`, to the nearest.

    UPCAST is `INTERPRETED`: the interpreter cuts off what bfloat16 has no place for.
    """
    if UPCAST and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        x = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return x.to(dtype)
