"""Weights that lie in parts in several processes (FSDP, ZeRO-3), brought together to be saved."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from accelerate import PartialState
from peft.utils.integrations import gather_params_ctx
from torch import nn
from torch.distributed.tensor import DTensor

from modeling_deepseek_moe.expert_lora import ParamWrapper
from modeling_deepseek_moe.experts import DeepseekMoeExperts

from ..errors import UserError


def is_cut(model: nn.Module) -> bool:
    """Whether this process holds but parts of the model's weights."""
    return any(isinstance(p, DTensor) or hasattr(p, "ds_shape") for p in model.parameters())


def gather_experts_as_one(model: nn.Module) -> None:
    """Tells DeepSpeed's ZeRO-3 to gather a layer's experts, with their adapters, as one module.

    Which of their parts run depends on the tokens of a process, while all processes have to gather the same ones.
    """
    from deepspeed.utils import set_z3_leaf_modules

    kinds = {type(module) for module in model.modules() if isinstance(module, DeepseekMoeExperts | ParamWrapper)}
    if kinds:
        set_z3_leaf_modules(model, list(kinds))


def count(weight: torch.Tensor) -> int:
    """How many numbers a weight has, in all processes that hold a part of it."""
    return getattr(weight, "ds_numel", weight.numel())


@torch.no_grad()
def gathered(model: nn.Module, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, torch.Tensor]:
    """Whole weights, one after the other: copies in the memory of the main process, nothing in the others.

    Every process calls it.

    Args:
        model: without the wrapper of DDP or DeepSpeed.
        wanted: which entries of its `state_dict`, by name.

    Raises:
        UserError: a part of a weight is nowhere.
    """
    state, keeps = {}, PartialState().is_main_process
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not wanted(name):
            continue
        with whole(name, tensor) as values:
            if keeps:
                state[name] = values.detach().to("cpu", copy=True)
    return state


@contextlib.contextmanager
def whole(name: str, tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """All values of one entry of a model's `state_dict`, in every process; every process calls it.

    Raises:
        UserError: a part of it is nowhere.
    """
    with gather_params_ctx(tensor, modifier_rank=None):
        values = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        shape = shape_of(tensor)
        if tuple(values.shape) != shape or not values.numel():
            raise UserError(
                f"{name} is not saved: of {list(shape)} only {list(values.shape)} is here, under a layout that runs "
                "do not know; what was trained is in the last checkpoint"
            )
        yield values


def shape_of(weight: torch.Tensor) -> tuple[int, ...]:
    """The shape of a weight of which this process may hold a part."""
    return tuple(getattr(weight, "ds_shape", weight.shape))
