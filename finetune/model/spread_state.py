"""A spread model's weights and moments in a checkpoint: written in parts, read by any number of processes.

spread/weights/   what is trained, and the buffers; safetensors, a file of each process
spread/moments/   of the optimizer, likewise, named after the weights: KIND/NAME, however the optimizer groups them
spread/step.json  how many rows a step had
"""

import json
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.optim.lr_scheduler import LRScheduler

from .._compat import as_checkpointed
from ..errors import UserError
from ..files import write_text

FOLDER = "spread"
_WEIGHTS, _MOMENTS, _STEP = "weights", "moments", "step.json"
_ONE_A_GROUP = ("base_lrs", "_last_lr", "lr_lambdas", "min_lrs")  # in the state of a scheduler
State = dict[str, torch.Tensor]


@torch.no_grad()
def save_weights(model: nn.Module, folder: Path, rows: int) -> None:
    """Writes what is trained, and the buffers; every process calls it.

    Args:
        model: without a wrapper.
        folder: of the checkpoint.
        rows: of one step in all processes, which a run that goes on has to have.
    """
    _write(_trained(model), folder / FOLDER / _WEIGHTS)
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        write_text(folder / FOLDER / _STEP, json.dumps({"rows": rows}) + "\n")


@torch.no_grad()
def load_weights(model: nn.Module, folder: Path) -> None:
    """Gives the model what `save_weights` wrote in any number of processes; every process calls it."""
    here = _trained(model)
    for name, tensor in _read(here, folder / FOLDER / _WEIGHTS).items():
        if tensor is not here[name]:
            here[name].copy_(tensor)


@torch.no_grad()
def save_moments(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Writes the optimizer's state; every process calls it."""
    state = {
        f"{kind}/{name}": value
        for name, parameter in model.named_parameters()
        for kind, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, torch.Tensor)
    }
    _write(state, folder / FOLDER / _MOMENTS)


@torch.no_grad()
def load_moments(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Gives the optimizer what `save_moments` wrote in any number of processes; every process calls it.

    Raises:
        UserError: the checkpoint has moments of other weights than the optimizer.
    """
    path = folder / FOLDER / _MOMENTS
    written = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    names = {parameter: name for name, parameter in model.named_parameters()}
    state: State = {}
    kinds = sorted({key.partition("/")[0] for key in written})
    for group in optimizer.param_groups:
        is_step_beside = group.get("fused") or group.get("capturable")
        for parameter in group["params"]:
            for kind in kinds:
                key = f"{kind}/{names[parameter]}"
                if key not in written:
                    raise UserError(f"{path} has no {key}: the checkpoint is not of what is trained here")
                dtype = written[key].properties.dtype
                if written[key].size == parameter.shape:
                    state[key] = torch.zeros_like(parameter, dtype=dtype)
                else:
                    device = parameter.device if is_step_beside else "cpu"
                    state[key] = torch.zeros(written[key].size, dtype=dtype, device=device)
    state = _read(state, path)
    for parameter, name in names.items():
        if parameter.requires_grad:
            optimizer.state[parameter] = {kind: state[f"{kind}/{name}"] for kind in kinds}


def load_schedule(scheduler: LRScheduler, optimizer: torch.optim.Optimizer, file: Path) -> None:
    """Restores a scheduler whose groups, all of one learning rate, may be as many as then or not."""
    saved = torch.load(file, weights_only=True)
    count = len(optimizer.param_groups)
    scheduler.load_state_dict(saved | {key: saved[key][:1] * count for key in _ONE_A_GROUP if key in saved})
    for group in optimizer.param_groups:
        group["lr"] = saved["_last_lr"][0]


def check_rows(folder: Path, rows: int) -> None:
    """Raise a UserError if the steps of a checkpoint had another number of rows than those that follow."""
    before = json.loads((folder / FOLDER / _STEP).read_bytes())["rows"]
    if before != rows:
        raise UserError(
            f"{folder} was written by a run with {before} rows a step, and here a step has {rows}: set "
            f"`global_batch_size: {before}`, or start as many processes as then"
        )


def _trained(model: nn.Module) -> State:
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}


def _write(state: State, path: Path) -> None:
    path.mkdir(parents=True, exist_ok=True)
    writer = HuggingFaceStorageWriter(path=str(path), save_distributed=True, enable_consolidation=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # one process is enough
        checkpoint.save(as_checkpointed(state), storage_writer=writer)


def _read(here: State, path: Path) -> State:
    """What is in the files by the names of `here`, and cut up as that is."""
    state = as_checkpointed(here)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        checkpoint.load(state, storage_reader=HuggingFaceStorageReader(str(path)))
    return as_checkpointed(state, here)
