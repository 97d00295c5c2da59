"""One fine-tuning run, from a recipe to a saved model."""

import errno
import importlib.util
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, Trainer, TrainingArguments, set_seed

from .._compat import checkpointing_argument
from ..data.batches import Collator
from ..data.rows import recipe_rows
from ..errors import RecipeError, UserError, first_line, raised_by
from ..experts.choose import specialize
from ..experts.plots import loss_curve
from ..experts.watch import watch_experts
from ..files import replaced, write_text
from ..hub.push import open_repo, push_run
from ..model.balance import BalanceExperts, KeepRouterBiases
from ..model.load import add_adapters, load
from ..model.quantization import leave_out_of_ddp
from ..plan.disk import check_room, checkpoint_bytes, is_full
from ..recipe.schema import Recipe
from ..runs.folder import MarkCheckpoints, forget_run, last_checkpoint, open_run
from .metric import measure_metric, metric_before
from .save import save
from .summary import print_summary, summarize
from .trainer import FineTuner

# A loss that is no number ends the run (`trainer.py`), so the Trainer need not hide it.
_DEFAULTS = {
    "logging_steps": 10,
    "save_total_limit": 2,
    "report_to": "none",
    "eval_strategy": "no",
    "logging_nan_inf_filter": False,
}


def run(recipe: Recipe) -> dict[str, Any]:
    """Fine-tune as the recipe says; the same recipe run again goes on from the last whole checkpoint.

    Returns:
        The summary that is also in `summary.json`: losses before and after, steps, seconds, and where things are.

    Raises:
        UserError: the recipe (then it is a RecipeError), the model or the data it names cannot be used; one line says
            why.
        KeyboardInterrupt: stopped from outside; its message says what is saved and how to go on.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("matplotlib, which draws loss.png, is not installed: pip install 'deepseek-moe[finetune]'")
    arguments = training_arguments(recipe)
    with arguments.main_process_first(local=False):
        folder, is_new = open_run(recipe)
    try:
        trainer = prepare(recipe, arguments, folder)
    except BaseException:
        if is_new and arguments.process_index == 0:
            forget_run(folder)
        raise

    started = time.monotonic()
    checkpoint = last_checkpoint(folder)
    before = eval_loss_before(trainer, folder)
    first_scores = metric_before(trainer, recipe, folder / "metric_before.json", is_fresh=checkpoint is None)
    # Measuring drew random numbers, which a run that finds the measurement in the folder does not.
    set_seed(recipe.seed)
    train_from(trainer, checkpoint, folder)
    after = trainer.evaluate()["eval_loss"] if trainer.eval_dataset else None

    last_scores = measure_metric(trainer, recipe)
    summary = summarize(trainer, recipe, folder, checkpoint) | {
        "eval_loss_before": before,
        "eval_loss_after": after,
        "metric_before": first_scores,
        "metric_after": last_scores,
        "seconds": round(time.monotonic() - started, 1),
    }
    if recipe.dpo:
        from .preferences import preference_metrics

        summary |= preference_metrics(trainer.state.log_history)
    if not trainer.is_world_process_zero():
        return summary
    summary |= save(trainer, trainer.processing_class, recipe, folder)
    loss_curve(trainer.state.log_history, folder / "loss.png", before)
    with replaced(folder / "trainer_state.json") as path:
        trainer.state.save_to_json(os.fspath(path))
    write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    if recipe.hub_id:
        summary["hub"] = push_run(folder, recipe.hub_id, private=recipe.hub_private)
        write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    print_summary(summary, folder)
    return summary


def train_from(trainer: "FineTuner", checkpoint: Path | None, folder: Path) -> None:
    """Train to the end; whatever stops it, say what is saved."""
    size = checkpoint_bytes(trainer)
    try:
        trainer.train_from(checkpoint)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped: {_kept(folder)}; the same command goes on from there") from None
    except (OSError, RuntimeError, SafetensorError) as error:
        if not _is_of_a_full_disk(error, trainer, folder, size):
            raise
        raise UserError(
            f"the disk of {folder} is full ({first_line(error)}): {_kept(folder)}; free about {size / 1e9:.2f} GB, "
            "and the same command goes on from there"
        ) from error


def _is_of_a_full_disk(error: Exception, trainer: "FineTuner", folder: Path, size: int) -> bool:
    if number := getattr(error, "errno", None):
        return number in (errno.ENOSPC, errno.EDQUOT)
    # torch and safetensors do not pass on the number of the error. Nor does a device say that it failed in a save.
    of_a_device = isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError)
    return trainer.control.should_save and not of_a_device and is_full(folder, size)


def _kept(folder: Path) -> str:
    saved = last_checkpoint(folder)
    return f"{saved} is saved" if saved else "no checkpoint was written yet"


def prepare(recipe: Recipe, arguments: TrainingArguments, folder: Path) -> "FineTuner":
    """Model, adapters and rows as the recipe says, ready to train."""
    if recipe.hub_id and arguments.process_index == 0:
        open_repo(recipe, folder)
    set_seed(recipe.seed)
    model, tokenizer = load(recipe)
    if not recipe.dpo:  # TRL adds them itself, and takes the model without them for the reference
        model = add_adapters(model, recipe)
    with arguments.main_process_first():
        rows = recipe_rows(recipe, tokenizer, folder)
    if recipe.esft:
        specialize(model, recipe, rows.train, arguments, folder)
    callbacks = []
    if recipe.bias_update_speed:
        keep = [KeepRouterBiases()] if recipe.lora else []  # else they are among the weights
        callbacks = [_balance(model, recipe), *keep]
    callbacks += [*rows.callbacks, MarkCheckpoints()]
    try:
        if recipe.dpo:
            from .preferences import preference_tuner  # only these runs need TRL

            trainer = preference_tuner(recipe, arguments, model, tokenizer, rows, callbacks)
        else:
            trainer = FineTuner(
                model=model,
                args=arguments,
                train_dataset=rows.train,
                eval_dataset=rows.eval,
                data_collator=Collator(tokenizer),
                processing_class=tokenizer,
                callbacks=callbacks,
            )
    except ValueError as error:
        if not raised_by(error, "transformers", "trl", "accelerate"):
            raise
        raise RecipeError(f"these settings do not go together: {first_line(error)}") from error
    if recipe.quantization:
        leave_out_of_ddp(trainer.model)
    if recipe.watch and model.config.has_experts:
        watch_experts(trainer, folder)
    check_room(trainer, recipe, folder)
    return trainer


def _balance(model: PreTrainedModel, recipe: Recipe) -> BalanceExperts:
    try:
        return BalanceExperts(model, recipe.bias_update_speed)
    except ValueError as error:
        raise RecipeError(f"`bias_update_speed`: {first_line(error)}") from error


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """The Trainer's arguments: the recipe's `training.*`, and what its own keys decide."""
    given = {**_DEFAULTS, "dataloader_pin_memory": torch.cuda.is_available()}
    checkpointing = checkpointing_argument()
    given[checkpointing] = recipe.gradient_checkpointing  # TRL's default is another
    if recipe.gradient_checkpointing:
        given[f"{checkpointing}_kwargs"] = {"use_reentrant": False}
    if recipe.streaming:
        given["accelerator_config"] = {"dispatch_batches": False}  # batches of unlike shapes cannot be dispatched
    given |= {"output_dir": recipe.output_dir, "seed": recipe.seed, **recipe.training}
    try:
        if recipe.dpo:
            from .preferences import preference_arguments

            return preference_arguments(recipe, **given)
        return TrainingArguments(**given)
    except (ValueError, TypeError, ImportError) as error:
        raise RecipeError(f"`training.*`: {first_line(error)}") from error


def eval_loss_before(trainer: Trainer, folder: Path) -> float | None:
    """Loss on the held-out rows before the first step; a resumed run finds it in the folder."""
    if trainer.eval_dataset is None:
        return None
    path = folder / "before.json"
    if not path.is_file():
        loss = trainer.evaluate()["eval_loss"]
        if trainer.is_world_process_zero():
            write_text(path, json.dumps({"eval_loss": loss}))
        return loss
    return json.loads(path.read_text(encoding="utf-8"))["eval_loss"]
