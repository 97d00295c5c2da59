"""Resuming a Trainer's run on a model that `DistributedConfig` spread over processes.

Trainer saves the weights of such a model, the adapter alone of a `PeftModel`, and asks for `save_only_model=True`. A
callback adds what it leaves out:

    args = TrainingArguments("run", save_only_model=True, ...)
    trainer = Trainer(model, args, callbacks=[SaveSharded()], ...)
    trainer.train(resume_from_checkpoint=...)  # as ever
"""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed
from transformers import TrainerCallback

from ..errors import UserError
from .spread_state import load_moments, save_moments

_FOLDER = "sharded_state"
_COMPLETE = "complete"


class SaveSharded(TrainerCallback):
    """Saves and restores optimizer, learning rate and random numbers beside the weights, each rank its share.

    The same command on the same number of processes goes on bit for bit. A checkpoint whose state is not whole is
    refused by name: this writes its last file when every rank is done.
    """

    def __init__(self):
        self._random: dict[str, Any] | None = None

    def on_save(self, args, state, control, model=None, optimizer=None, lr_scheduler=None, **kwargs: Any) -> None:
        """Writes `checkpoint-STEP/sharded_state`."""
        folder = _folder(args, state)
        if args.process_index == 0:
            (folder / _COMPLETE).unlink(missing_ok=True)
        distributed.barrier()
        save_moments(model, _inner(optimizer), folder)
        own = {"lr_scheduler": lr_scheduler.state_dict(), "random": _random_state()}
        torch.save(own, folder / f"rank_{args.process_index}.pt")
        distributed.barrier()
        if args.process_index == 0:
            (folder / _COMPLETE).touch()

    def on_train_begin(
        self, args, state, control, model=None, optimizer=None, lr_scheduler=None, **kwargs: Any
    ) -> None:
        """Restores them where the Trainer has gone on from a checkpoint.

        Raises:
            UserError: the checkpoint has no whole state of so many processes.
        """
        if not state.global_step:
            return
        folder = _folder(args, state)
        own = folder / f"rank_{args.process_index}.pt"
        if not (folder / _COMPLETE).exists() or not own.exists():
            raise UserError(
                f"{folder.parent}: its {_FOLDER} is not whole or of fewer processes than the {args.world_size} of "
                "now; resume from an older checkpoint"
            )
        load_moments(model, _inner(optimizer), folder)
        saved = torch.load(own, weights_only=True)
        lr_scheduler.load_state_dict(saved["lr_scheduler"])
        for group, rate in zip(optimizer.param_groups, saved["lr_scheduler"]["_last_lr"], strict=True):
            group["lr"] = rate
        self._random = saved["random"]

    def on_step_begin(self, args, state, control, **kwargs: Any) -> None:
        """Restores the random numbers, of which the Trainer draws some for itself before the first step."""
        if self._random is not None:
            _set_random(self._random)
            self._random = None


def _folder(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}" / _FOLDER


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    return getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it


def _random_state() -> dict[str, Any]:
    name, keys, *rest = np.random.get_state()
    state = {"cpu": torch.get_rng_state(), "python": random.getstate(), "numpy": (name, keys.tolist(), *rest)}
    return {**state, "cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else state


def _set_random(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
