"""Memory for tensors of the size of a stack of experts."""

import mmap
from math import prod

import torch

# Smaller ones come from the heap, whose pages are mostly there already.
_LARGE = 32 * 2**20
_HUGE_PAGES = getattr(mmap, "MADV_HUGEPAGE", None)


def empty_like(tensor: torch.Tensor) -> torch.Tensor:
    """`torch.empty_like` of a contiguous tensor, on CPU in huge pages where the system has them.

    Linux hands out memory by the page, cleared, when it is first written. In pages of 4 KiB that takes longer than
    the matrix products whose result is written there; in pages of 2 MiB, a fraction of it.
    """
    size = prod(tensor.shape) * tensor.itemsize
    if tensor.device.type != "cpu" or _HUGE_PAGES is None or size < _LARGE:
        return torch.empty_like(tensor, memory_format=torch.contiguous_format)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(_HUGE_PAGES)
    except OSError:  # a kernel that was built without them
        return torch.empty_like(tensor, memory_format=torch.contiguous_format)
    return torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape)
