"""Memory for tensors as large as weights and their gradients."""

import mmap
from math import prod

import torch

# Smaller ones come from the heap, whose pages are mostly there already.
_LARGE = 4 * 2**20
_HUGE_PAGES = getattr(mmap, "MADV_HUGEPAGE", None)


def empty_like(tensor: torch.Tensor) -> torch.Tensor:
    """`empty` with shape, dtype and device of another tensor."""
    return empty(tensor.shape, tensor.dtype, tensor.device)


def empty(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`torch.empty`, on CPU in huge pages where the system has them.

    Linux hands out memory by the page, cleared, when it is first written. In pages of 4 KiB that takes longer than
    the matrix products whose result is written there; in pages of 2 MiB, a fraction of it.
    """
    size = prod(shape) * dtype.itemsize
    if device.type != "cpu" or _HUGE_PAGES is None or size < _LARGE:
        return torch.empty(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(_HUGE_PAGES)
    except OSError:  # a kernel that was built without them
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
