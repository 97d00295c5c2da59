"""Whether a run's files will fit on the disk, asked before the first step."""

import shutil
from pathlib import Path

from torch import nn
from transformers import Trainer

from ..errors import RecipeError
from ..model.load import trains_adapter
from ..recipe.schema import Recipe

# What the optimizer keeps for each trained weight, in its size; two where not named, as Adam does.
_STATES = {"sgd": 0, "adafactor": 1, "adagrad": 1, "rmsprop": 1}


def checkpoint_bytes(trainer: Trainer) -> int:
    """What one checkpoint takes: the weights it holds, and the optimizer's state."""
    trained = _bytes(trainer.model, trained=True)
    weights = trained if trains_adapter(trainer.model) else _bytes(trainer.model)
    optimizer = trainer.args.optim
    states = 0 if trainer.args.save_only_model else _STATES.get(getattr(optimizer, "value", optimizer), 2)
    return weights + states * trained


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


def is_full(folder: Path, checkpoint: int) -> bool:
    """Whether there is less room left than one checkpoint takes."""
    return shutil.disk_usage(folder).free < checkpoint


def _bytes(model: nn.Module, trained: bool = False) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad or not trained)
