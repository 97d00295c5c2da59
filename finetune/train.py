"""One fine-tuning run, from a recipe to a saved model."""

import importlib.util
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Trainer,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from .callbacks import BalanceExperts, MarkCheckpoints
from .data import collator, recipe_rows
from .plots import loss_curve
from .publish import make_repo, push
from .recipe import Recipe
from .recipe_values import RecipeError, first_line
from .results import print_summary, save
from .router_biases import KeepRouterBiases, restore_router_biases
from .run_folder import aside, forget_run, last_checkpoint, open_run, write_text
from .tuned_model import add_adapters, load
from .watch_experts import watch_experts

_DEFAULTS = {"logging_steps": 10, "save_total_limit": 2, "report_to": "none", "eval_strategy": "no"}


def run(recipe: Recipe) -> dict[str, Any]:
    """Fine-tune as the recipe says; the same recipe run again goes on from the last whole checkpoint.

    Returns:
        The summary that is also in `summary.json`: losses before and after, steps, seconds, and where things are.

    Raises:
        RecipeError: the recipe, the model or the data it names cannot be used; one line says why.
        KeyboardInterrupt: stopped from outside; its message says what is saved and how to go on.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise RecipeError("matplotlib, which draws loss.png, is not installed: pip install 'deepseek-moe[finetune]'")
    arguments = training_arguments(recipe)
    with arguments.main_process_first(local=False):
        folder, is_new = open_run(recipe)
    try:
        trainer = prepare(recipe, arguments, folder)
    except BaseException:
        if is_new and arguments.process_index == 0:
            forget_run(folder)
        raise
    model, tokenizer = trainer.model, trainer.processing_class
    train_data, eval_data = trainer.train_dataset, trainer.eval_dataset

    started = time.monotonic()
    checkpoint = last_checkpoint(folder)
    before = eval_loss_before(trainer, folder)
    try:
        trainer.train_from(checkpoint)
    except KeyboardInterrupt:
        saved = last_checkpoint(folder)
        kept = f"{saved} is saved" if saved else "no checkpoint was written yet"
        raise KeyboardInterrupt(f"stopped: {kept}; the same command goes on from there") from None
    after = trainer.evaluate()["eval_loss"] if eval_data else None

    summary = {
        "model": recipe.model,
        "lora": recipe.lora.get("targets", []),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_rows": len(train_data),
        "eval_rows": len(eval_data) if eval_data else 0,
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "resumed_from": checkpoint.name if checkpoint else None,
        "train_loss": next((row["loss"] for row in reversed(trainer.state.log_history) if "loss" in row), None),
        "eval_loss_before": before,
        "eval_loss_after": after,
        "seconds": round(time.monotonic() - started, 1),
    }
    if not trainer.is_world_process_zero():
        return summary
    summary |= save(trainer, tokenizer, recipe, folder)
    loss_curve(trainer.state.log_history, folder / "loss.png", before)
    with aside(folder / "trainer_state.json") as path:
        trainer.state.save_to_json(os.fspath(path))
    if recipe.hub_id:
        summary["hub"] = push(Path(summary["saved_model"] or summary["saved_adapter"]), recipe.hub_id)
    write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    print_summary(summary, folder)
    return summary


def prepare(recipe: Recipe, arguments: TrainingArguments, folder: Path) -> "FineTuner":
    """Model, adapters and rows as the recipe says, ready to train."""
    if recipe.hub_id and arguments.process_index == 0:
        make_repo(recipe.hub_id, recipe.hub_private)
    set_seed(recipe.seed)
    model, tokenizer = load(recipe)
    model = add_adapters(model, recipe)
    with arguments.main_process_first():
        train_data, eval_data = recipe_rows(recipe, tokenizer, folder)
    try:
        callbacks = []
        if recipe.bias_update_speed:
            keep = [KeepRouterBiases()] if recipe.lora else []  # else they are among the weights
            callbacks = [BalanceExperts(model, recipe.bias_update_speed), *keep]
        trainer = FineTuner(
            model=model,
            args=arguments,
            train_dataset=train_data,
            eval_dataset=eval_data,
            data_collator=collator(tokenizer),
            processing_class=tokenizer,
            callbacks=[*callbacks, MarkCheckpoints()],
        )
        if model.config.has_experts:
            watch_experts(trainer, folder)
        return trainer
    except ValueError as error:
        raise RecipeError(f"these settings do not go together: {first_line(error)}") from error


class FineTuner(Trainer):
    """The Trainer, able to be told to finish what it already has finished."""

    def train_from(self, checkpoint: Path | None) -> None:
        """Train to the end; from a checkpoint that is already there, only restore it."""
        if checkpoint is None:
            self.train()
            return
        state = TrainerState.load_from_json(os.fspath(checkpoint / "trainer_state.json"))
        if state.global_step < state.max_steps:
            self.train(resume_from_checkpoint=os.fspath(checkpoint))
            return
        self.state = state
        best = state.best_model_checkpoint if self.args.load_best_model_at_end else None
        self._load_from_checkpoint(best or os.fspath(checkpoint))
        restore_router_biases(self.model, Path(best or checkpoint))


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """The Trainer's arguments: the recipe's `training.*`, and what its own keys decide."""
    given = {**_DEFAULTS, "dataloader_pin_memory": torch.cuda.is_available()}
    if recipe.gradient_checkpointing:
        # transformers 5.23 renamed it.
        name = "activation" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient"
        given |= {f"{name}_checkpointing": True, f"{name}_checkpointing_kwargs": {"use_reentrant": False}}
    try:
        return TrainingArguments(output_dir=recipe.output_dir, seed=recipe.seed, **{**given, **recipe.training})
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
