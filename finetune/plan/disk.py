"""Whether a run's files will fit on the disk, asked before the first step."""

import shutil
from pathlib import Path

import torch
from torch import nn
from transformers import Trainer

from ..errors import RecipeError
from ..files import says_full
from ..model.gather import count
from ..model.load import trains_adapter
from ..recipe.schema import Recipe
from .memory import OPTIMIZERS, optimizer_bytes
from .model import Parameter


def checkpoint_bytes(trainer: Trainer) -> int:
    """Bytes of one checkpoint: the weights it holds, and the optimizer's state (as Adam's, if it is none we know)."""
    model, optimizer = trainer.model, trainer.args.optim
    weights = _bytes(model, trained=trains_adapter(model))
    if trainer.args.save_only_model:
        return weights
    trained = [
        Parameter(name, tuple(getattr(p, "ds_shape", p.shape)), p.element_size(), is_trained=True)
        for name, p in model.named_parameters()
        if p.requires_grad
    ]
    name = getattr(optimizer, "value", optimizer)
    states, _ = optimizer_bytes(name if name in OPTIMIZERS else "adamw_torch", trained, trainer.args.device.type)
    return weights + states


def check_room(trainer: Trainer, recipe: Recipe, folder: Path) -> None:
    """Raise a RecipeError if the run's checkpoints and results do not fit, with what is there of it already."""
    arguments, checkpoint = trainer.args, checkpoint_bytes(trainer)
    if arguments.save_strategy == "no":
        count = 0
    elif arguments.save_total_limit:
        # The Trainer writes one before it deletes the oldest, and never deletes the best or the last.
        count = max(arguments.save_total_limit, 2 if arguments.load_best_model_at_end else 1) + 1
    else:
        count = 2  # without a limit nobody can say; at least these
    adapted = trains_adapter(trainer.model)
    results = _bytes(trainer.model, trained=True) if adapted else 0
    results += _bytes(trainer.model) if recipe.merge or not adapted else 0
    needed = count * checkpoint + results
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    room = shutil.disk_usage(folder).free + there
    if needed > room:
        raise RecipeError(
            f"`output_dir` {folder} has room for {room / 1e9:.2f} GB, and this run writes {needed / 1e9:.2f} GB "
            f"({count} checkpoints of {checkpoint / 1e9:.2f} GB, results of {results / 1e9:.2f} GB): choose another "
            "disk, or set `training.save_total_limit: 1` or `training.save_only_model: true`"
        )


def is_full(error: BaseException, folder: Path, checkpoint: int = 0) -> bool:
    """Whether an error came of a full disk.

    torch passes on neither the number nor the text of the system's error.

    Args:
        error: what was raised.
        folder: on that disk.
        checkpoint: with less than these bytes of room, an error that does not say its reason had this one.
    """
    if (says := says_full(error)) is not None:
        return says
    of_a_device = isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError)
    return not of_a_device and shutil.disk_usage(folder).free < checkpoint


def _bytes(model: nn.Module, trained: bool = False) -> int:
    return sum(count(p) * p.element_size() for p in model.parameters() if p.requires_grad or not trained)
