"""One fine-tuning run, from a recipe to a saved model."""

import contextlib
import copy
import dataclasses
import importlib.util
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import ParallelismConfig
from accelerate.utils import DistributedType
from datasets.exceptions import DatasetGenerationError
from rich.console import Console
from rich.text import Text
from safetensors import SafetensorError
from transformers import PreTrainedModel, Trainer, TrainingArguments, set_seed

from modeling_deepseek_moe.distribution import install

from .._compat import checkpointing_argument
from ..data.batches import Collator
from ..data.rows import recipe_rows
from ..data.sources import check_source
from ..errors import RecipeError, UserError, first_line, raised_by
from ..experts.choose import specialize
from ..experts.plots import loss_curve
from ..experts.watch import watch_experts
from ..files import remove, replaced, write_text
from ..hub.push import open_repo, push_run
from ..model.balance import BalanceExperts, KeepRouterBiases
from ..model.gather import gather_experts_as_one
from ..model.load import add_adapters, load
from ..model.quantization import leave_out_of_ddp
from ..model.spread import accumulation_steps
from ..plan.disk import check_room, checkpoint_bytes, is_full
from ..recipe.schema import Recipe
from ..recipe.sections import DEFAULTS
from ..runs.checkpoints import MarkCheckpoints, last_checkpoint
from ..runs.folder import ROWS, SUMMARY, OpenRun, SettleRun, is_replacing, open_run, write_kept
from ..runs.named import named_model
from ..runs.seals import damage, is_sealed, seal
from ..runs.together import ended_together
from .held_out import MeasureFirst
from .lines import shown_in_lines
from .metric import kept_before, measure_metric, metric_before
from .save import save
from .stop import StopAtSigterm, stopped_by_sigterm
from .summary import print_summary, summarize
from .trainer import FineTuner

# Of a summary, what a run that only had to be saved again knows no better than before.
_OF_TRAINING = ("resumed_from", "seconds", "seconds_per_step", "device", "peak_memory", "versions", "hub")


def run(recipe: Recipe) -> dict[str, Any]:
    """Fine-tune as the recipe says; the same recipe run again goes on from the last whole checkpoint.

    Returns:
        The summary that is also in `summary.json`: losses before and after, steps, seconds, and where things are.

    Raises:
        UserError: the recipe (then it is a RecipeError), the model or the data it names cannot be used; one line says
            why.
        KeyboardInterrupt: stopped from outside, also by SIGTERM; its message says what is saved and how to go on.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(f"matplotlib, which draws loss.png, is not installed: {install('matplotlib')}")
    recipe = dataclasses.replace(recipe, model=named_model(recipe.model))
    arguments = training_arguments(recipe)
    with (
        ended_together(),
        stopped_by_sigterm() as stop,
        open_run(recipe) as opened,
        said_if_full(opened.folder),
    ):
        if opened.is_finished:
            return published(recipe, opened, arguments)
        trainer = prepare(recipe, arguments, opened.folder, stop)
        opened.keep()
        try:
            with shown_in_lines(trainer):
                return train(trainer, recipe, opened)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"stopped: {kept(opened.folder)}") from None


def train(trainer: "FineTuner", recipe: Recipe, opened: OpenRun) -> dict[str, Any]:
    """Measure, train, measure and save; returns the summary."""
    folder, checkpoint = opened.folder, opened.checkpoint
    started = time.monotonic()
    measured = {}

    def measure() -> None:
        measured["loss"] = eval_loss_before(trainer, folder / "before.json", is_fresh=checkpoint is None)
        measured["scores"] = metric_before(trainer, recipe, folder / "metric_before.json", is_fresh=checkpoint is None)
        # Measuring drew random numbers, which a run that finds the measurement in the folder does not.
        set_seed(recipe.seed)

    if trainer.shards and checkpoint is None:
        trainer.add_callback(MeasureFirst(measure))
    else:
        measure()
    size = checkpoint_bytes(trainer)
    with said_if_full(folder, size, lambda: trainer.control.should_save):
        trainer.train_from(checkpoint)
    after = trainer.evaluate()["eval_loss"] if trainer.eval_dataset else None

    last_scores = measure_metric(trainer, recipe)
    summary = summarize(trainer, recipe, folder, checkpoint) | {
        "eval_loss_before": measured["loss"],
        "eval_loss_after": after,
        "metric_before": measured["scores"],
        "metric_after": last_scores,
        "seconds": round(time.monotonic() - started, 1),
    }
    if recipe.dpo:
        from .preferences import preference_metrics

        summary |= preference_metrics(trainer.state.log_history)
    if opened.summary and not trainer.step_times.seconds:  # all steps were made before
        summary |= {name: opened.summary[name] for name in _OF_TRAINING if name in opened.summary}
    with said_if_full(folder, size):
        summary |= save(trainer, trainer.processing_class, recipe, folder)
    if not trainer.is_world_process_zero():
        return summary
    loss_curve(trainer.state.log_history, folder / "loss.png", measured["loss"])
    with replaced(folder / "trainer_state.json") as path:
        trainer.state.save_to_json(os.fspath(path))
    write_text(folder / SUMMARY, json.dumps(summary, indent=2) + "\n")
    publish(recipe, summary, folder)
    print_summary(summary, folder)
    return summary


def published(recipe: Recipe, opened: OpenRun, arguments: TrainingArguments) -> dict[str, Any]:
    """The summary of a run that is at its end, which is pushed if it is to be and has not been."""
    summary, folder = opened.summary, opened.folder
    if arguments.process_index == 0:
        Console().print(Text(f"{folder} is finished: nothing is left to train"), soft_wrap=True)
        if not str(summary.get("hub")).endswith(f"/{recipe.hub_id}"):
            publish(recipe, summary, folder)
        print_summary(summary, folder)
    return summary


def publish(recipe: Recipe, summary: dict[str, Any], folder: Path) -> None:
    """Push the results, if the recipe says so; then the summary says where they are."""
    if recipe.hub_id:
        summary["hub"] = push_run(folder, recipe.hub_id, private=recipe.hub_private)
        write_text(folder / SUMMARY, json.dumps(summary, indent=2) + "\n")


@contextlib.contextmanager
def said_if_full(folder: Path, checkpoint: int = 0, is_saving: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Errors because the disk is full as one line that says what is saved.

    Args:
        folder: of the run.
        checkpoint: bytes of one; with less room than that, an error that does not say its reason had this one.
        is_saving: whether something was being written, as an error of a step would not be of the disk.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError, DatasetGenerationError) as error:
        if not is_full(error, folder, checkpoint if is_saving() else 0):
            raise
        need = f"about {checkpoint / 1e9:.2f} GB" if checkpoint else "some room"
        raise UserError(f"the disk of {folder} is full ({first_line(error)}): free {need}; {kept(folder)}") from error


def kept(folder: Path) -> str:
    """What a run that stops now leaves, and what the same command does with it."""
    if is_replacing(folder):
        return "no step was made yet, and the run that was there before is kept"
    saved = last_checkpoint(folder)
    if saved is None:
        return "no checkpoint was written yet; the same command begins with the first step"
    return f"{saved} is saved; the same command goes on from there"


def prepare(recipe: Recipe, arguments: TrainingArguments, folder: Path, stop: StopAtSigterm) -> "FineTuner":
    """Model, adapters and rows as the recipe says, ready to train."""
    if recipe.hub_id and arguments.process_index == 0:
        open_repo(recipe, folder)
    for source in filter(None, (recipe.data, recipe.eval_data)):
        check_source(source)  # before minutes of loading
    set_seed(recipe.seed)
    model, tokenizer = load(recipe)
    if not recipe.dpo:  # TRL adds them itself, and takes the model without them for the reference
        model = add_adapters(model, recipe)
    with arguments.main_process_first():
        if arguments.process_index == 0:
            remove_damaged_rows(folder / ROWS)
        rows = recipe_rows(recipe, tokenizer, folder)
    if recipe.esft:
        specialize(model, recipe, rows.train, arguments, folder)
    callbacks = []
    if recipe.bias_update_speed:
        keep = [KeepRouterBiases()] if recipe.lora else []  # else they are among the weights
        callbacks = [_balance(model, recipe), *keep]
    callbacks += [*rows.callbacks, SettleRun(), MarkCheckpoints(), stop]
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
                is_spread=bool(recipe.parallel),
            )
    except ValueError as error:
        if not raised_by(error, "transformers", "trl", "accelerate"):
            raise
        raise RecipeError(f"these settings do not go together: {first_line(error)}") from error
    if recipe.training.get("fsdp") and trainer.accelerator.distributed_type != DistributedType.FSDP:
        raise RecipeError(
            "`training.fsdp` is set, but accelerate shards on GPUs alone, one for each of several processes; "
            "here each process would hold all weights: remove it"
        )
    if trainer.is_deepspeed_enabled:
        gather_experts_as_one(trainer.model)
    if recipe.quantization:
        leave_out_of_ddp(trainer.model)
    if recipe.watch and model.config.has_experts:
        watch_experts(trainer, folder)
    check_room(trainer, recipe, folder)
    if arguments.process_index == 0 and (folder / ROWS).is_dir():
        seal(folder / ROWS)
    return trainer


def _balance(model: PreTrainedModel, recipe: Recipe) -> BalanceExperts:
    try:
        return BalanceExperts(model, recipe.bias_update_speed)
    except ValueError as error:
        raise RecipeError(f"`bias_update_speed`: {first_line(error)}") from error


def remove_damaged_rows(rows: Path) -> None:
    """Removes the tokenized rows of a run, which then are made again, if they are not as they were written."""
    if is_sealed(rows) and (problem := damage(rows)):
        Console().print(Text(f"{rows} is damaged: {problem}; the rows are tokenized again"), soft_wrap=True)
        remove([rows])


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """The Trainer's arguments: the recipe's `training.*`, and what its own keys decide."""
    given = {**DEFAULTS["training"], "dataloader_pin_memory": torch.cuda.is_available()}
    checkpointing = checkpointing_argument()
    given[checkpointing] = recipe.gradient_checkpointing  # TRL's default is another
    if recipe.gradient_checkpointing:
        given[f"{checkpointing}_kwargs"] = {"use_reentrant": False}
    if recipe.streaming:
        given["accelerator_config"] = {"dispatch_batches": False}  # batches of unlike shapes cannot be dispatched
    # A copy, for some of these objects are filled up.
    given |= {"output_dir": recipe.output_dir, "seed": recipe.seed, **copy.deepcopy(recipe.training)}
    if (steps := accumulation_steps(recipe)) is None:
        given.pop("gradient_accumulation_steps", None)
    else:
        given["gradient_accumulation_steps"] = steps
    try:
        if sizes := given.get("parallelism_config"):
            given["parallelism_config"] = ParallelismConfig(**sizes)
        if recipe.dpo:
            from .preferences import preference_arguments

            return preference_arguments(recipe, **given)
        return TrainingArguments(**given)
    except (ValueError, TypeError, ImportError) as error:
        raise RecipeError(f"`training.*`: {first_line(error)}") from error


def eval_loss_before(trainer: Trainer, path: Path, is_fresh: bool) -> float | None:
    """Loss on the held-out rows before the first step; a resumed run finds it in the file `path`."""
    if trainer.eval_dataset is None:
        return None
    if (known := kept_before(path, is_fresh, not trainer.shards)) is not None:
        return known["eval_loss"]
    if trainer.shards and not is_fresh:
        return None
    loss = trainer.evaluate()["eval_loss"]
    if trainer.is_world_process_zero():
        write_kept(path, {"eval_loss": loss})
    return loss
