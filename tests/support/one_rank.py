"""A process group of this process alone, for what DDP does to a model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.nn.parallel import DistributedDataParallel

Result = TypeVar("Result")


def under_ddp(
    folder: Path, model: torch.nn.Module, work: Callable[[DistributedDataParallel], Result], **options: Any
) -> Result:
    """What `work` makes of the wrapped model.

    The wrapper must be gone before its process group is. The last one to let go of the group waits for gloo's
    threads, and where that is the wrapper, it holds the interpreter meanwhile, which those threads may need: one
    run in a thousand never ended (torch 2.13).
    """
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    try:
        return work(DistributedDataParallel(model, **options))
    finally:
        torch.distributed.destroy_process_group()
