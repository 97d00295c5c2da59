"""A spread model's weights and moments in a checkpoint: written in parts, read by any number of processes."""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from transformers.distributed.checkpoint import load_optimizer_distributed, save_optimizer_distributed

from .._compat import as_checkpointed
from ..errors import UserError
from ..files import write_text

FOLDER = "spread"
_WEIGHTS, _MOMENTS, _STEP = "weights", "moments", "step.json"


@torch.no_grad()
def save_weights(model: nn.Module, folder: Path, rows: int) -> None:
    """Writes what is trained, and the buffers; every process calls it.

    Args:
        model: without a wrapper.
        folder: of the checkpoint.
        rows: of one step in all processes, which a run that goes on has to have.
    """
    path = folder / FOLDER / _WEIGHTS
    path.mkdir(parents=True, exist_ok=True)
    with _alone():
        writer = HuggingFaceStorageWriter(path=str(path), save_distributed=True, enable_consolidation=False)
        checkpoint.save(as_checkpointed(_trained(model)), storage_writer=writer)
    if _rank() == 0:
        write_text(folder / FOLDER / _STEP, json.dumps({"rows": rows}) + "\n")


@torch.no_grad()
def load_weights(model: nn.Module, folder: Path) -> None:
    """Gives the model what `save_weights` wrote in any number of processes; every process calls it."""
    here = _trained(model)
    state = as_checkpointed(here)
    with _alone():
        checkpoint.load(state, storage_reader=HuggingFaceStorageReader(str(folder / FOLDER / _WEIGHTS)))
    state = as_checkpointed(state, here)
    for name, tensor in here.items():
        if state[name] is not tensor:
            tensor.copy_(state[name])


def save_moments(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Writes the optimizer's state; every process calls it."""
    with _alone():
        save_optimizer_distributed(model, optimizer, str(folder / FOLDER / _MOMENTS))


def load_moments(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Gives the optimizer what `save_moments` wrote in any number of processes; every process calls it."""
    with _alone():
        load_optimizer_distributed(model, optimizer, str(folder / FOLDER / _MOMENTS))


def check_rows(folder: Path, rows: int) -> None:
    """Raise a UserError if the steps of a checkpoint had another number of rows than those that follow."""
    before = json.loads((folder / FOLDER / _STEP).read_bytes())["rows"]
    if before != rows:
        raise UserError(
            f"{folder} was written by a run with {before} rows a step, and here a step has {rows}: set "
            f"`global_batch_size: {before}`, or start as many processes as then"
        )


def _trained(model: nn.Module) -> dict[str, torch.Tensor]:
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}


@contextmanager
def _alone() -> Iterator[None]:
    """In it, torch does not say that one process is alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch.distributed is (disabled|unavailable)", UserWarning)
        yield


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
