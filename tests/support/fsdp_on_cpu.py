"""FSDP in processes on CPUs: accelerate (1.15) takes `fsdp` for GPUs alone, and trains with DDP without a word."""

from typing import Any

import pytest
from accelerate import ParallelismConfig
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType


def take_fsdp_on_cpu(patch: pytest.MonkeyPatch) -> None:
    """Lets accelerate shard over gloo, as it does on GPUs."""
    real = AcceleratorState.__init__

    def sharding(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        real(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    patch.setattr(AcceleratorState, "__init__", sharding)


def take_tp_on_cpu(patch: pytest.MonkeyPatch) -> None:
    """Lets accelerate deal rows out to the groups of tensor parallelism over gloo, which it refuses on CPUs alone."""
    patch.setattr(ParallelismConfig, "_validate_accelerator", lambda self, accelerator: None)
