"""The true peak of a training step on CPU: every allocation of torch's allocator, and what was there before."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import Trainer, TrainerCallback

from modeling_deepseek_moe import DeepseekMoeConfig, DeepseekMoeForCausalLM
from modeling_deepseek_moe.finetune.model.chosen_experts import train_chosen
from modeling_deepseek_moe.finetune.model.load import add_adapters
from modeling_deepseek_moe.finetune.plan.model import assumed_choice
from modeling_deepseek_moe.finetune.recipe.load import make_recipe
from modeling_deepseek_moe.finetune.recipe.schema import Recipe
from modeling_deepseek_moe.finetune.train.one_run import training_arguments
from modeling_deepseek_moe.quantized.loading import quantize_weights
from modeling_deepseek_moe.quantized.weights import NF4Weight


class StepMemory(TrainerCallback):
    """Follows the allocator through the second optimizer step, when the optimizer has its states."""

    def __init__(self, model: torch.nn.Module):
        self.model = model
        self.before = self.peak = 0

    def on_step_begin(self, args, state, control, **kwargs: Any) -> None:
        if state.global_step == 1:
            self.before = bytes_of_tensors(self.model, kwargs["optimizer"])
            self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self.profile.start()

    def on_step_end(self, args, state, control, **kwargs: Any) -> None:
        if state.global_step == 2:
            self.profile.stop()
            self.peak = self.before + peak_of(self.profile)


def bytes_of_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Of parameters, buffers, gradients and optimizer states, each storage once."""
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [p.grad for p in model.parameters() if p.grad is not None]
    tensors += [part for p in tensors if isinstance(p, NF4Weight) for part in (p.packed, p.magnitudes)]
    tensors = [tensor for tensor in tensors if not isinstance(tensor, NF4Weight)]
    tensors += [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def peak_of(finished: profile) -> int:
    """The most bytes that were allocated at once since the profile began, beyond those before."""
    events = [event for event in finished.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda each: each.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def recipe_of(values: dict[str, Any], folder: str = "out") -> Recipe:
    """A recipe that names no real model and data."""
    return make_recipe({"model": "model", "data": "data", "output_dir": folder, **values})


def measured_step(fields: dict[str, Any], values: dict[str, Any], padded: bool = False) -> int:
    """Peak bytes of the second step of a random model, trained by transformers' Trainer as a recipe says.

    Args:
        fields: of a config.json.
        values: recipe keys; `training.per_device_train_batch_size` rows of `max_length` tokens.
        padded: every second row is shorter.
    """
    with tempfile.TemporaryDirectory() as folder:
        recipe = recipe_of(
            {
                **values,
                "training.max_steps": 2,
                "training.use_cpu": True,
                "training.save_strategy": "no",
                "training.disable_tqdm": True,
            },
            folder,
        )
        config = DeepseekMoeConfig.from_dict({**fields, **recipe.losses})
        dtype = config.dtype if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
        torch.manual_seed(0)
        model = DeepseekMoeForCausalLM(config).to(dtype)
        if recipe.quantization:
            quantize_weights(model)
        if recipe.esft:
            train_chosen(model, assumed_choice(config, recipe))
        model = add_adapters(model, recipe)
        follower = StepMemory(model)
        trainer = Trainer(
            model=model,
            args=training_arguments(recipe),
            train_dataset=_rows(config, recipe, padded),
            callbacks=[follower],
        )
        trainer.train()
        return follower.peak


def _rows(config: DeepseekMoeConfig, recipe: Recipe, padded: bool) -> list[dict[str, torch.Tensor]]:
    rows = []
    for number in range(64):
        ids = torch.randint(config.vocab_size, (recipe.max_length,))
        mask = torch.ones_like(ids)
        if padded and number % 2:
            mask[recipe.max_length // 2 :] = 0
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return rows
