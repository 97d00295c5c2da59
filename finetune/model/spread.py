"""A model spread over a run's processes while it is read (`parallel` of a recipe), and the rows of its steps."""

import os
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import torch
from packaging.version import Version
from torch import nn

from modeling_deepseek_moe import DeepseekMoeConfig
from modeling_deepseek_moe._compat import distributed_config

from ..errors import RecipeError
from ..recipe.schema import ParallelOptions, Recipe

_NEEDS = "5.24.0"  # of transformers; before, a model that was evaluated first was trained in silence on other weights
_ROWS_OF_A_PROCESS = 8  # what TrainingArguments take where nothing is said


def processes() -> int:
    """How many processes this run has, as its launcher says."""
    return int(os.environ.get("WORLD_SIZE", 1))


def spread_options(recipe: Recipe, config: DeepseekMoeConfig) -> dict[str, Any]:
    """What `from_pretrained` is told so that each process reads its part of the model; empty for all of it.

    Args:
        recipe: of the run, in each of its processes.
        config: of the model.

    Raises:
        RecipeError: `parallel` does not fit the processes, the model or the libraries.
    """
    if not recipe.parallel:
        return {}
    options = ParallelOptions(**recipe.parallel)
    world, others = processes(), options.replicate * options.tp
    shard = world // others if options.shard == "auto" else options.shard
    if shard * others != world:
        product = f"shard {options.shard} x replicate {options.replicate} x tp {options.tp}"
        raise RecipeError(
            f"`parallel`: {product} is not the {world} process{'es' * (world > 1)} of this run: start as many "
            "(`torchrun --nproc-per-node`), or leave `parallel.shard` to auto and choose the others so that their "
            "product divides that"
        )
    for problem in _problems(options, shard, config):
        raise RecipeError(f"`parallel.{problem}")
    if world == 1:
        return {}
    if Version(version("transformers")) < Version(_NEEDS):
        raise RecipeError(
            f"`parallel` needs transformers {_NEEDS}, and {version('transformers')} is installed: install that, or "
            "use `training.fsdp: true`"
        )
    if recipe.training.get("use_cpu") and torch.accelerator.is_available():
        raise RecipeError("`parallel` takes the GPUs that are there: remove `training.use_cpu`, or hide the GPUs")
    from transformers import DistributedConfig  # of releases that have it

    sizes = {"fsdp_size": shard, "dp_replicate_size": options.replicate, "tp_size": options.tp, "ep_size": options.ep}
    return {"distributed_config": DistributedConfig(**sizes)}


def _problems(options: ParallelOptions, shard: int, config: DeepseekMoeConfig) -> Iterator[str]:
    ep, tp = options.ep, options.tp
    if ep > 1:
        experts = config.n_routed_experts if config.has_experts else 0
        if not experts:
            yield f"ep` is {ep}, but the model has no routed experts: leave it out"
        elif experts % ep:
            yield f"ep` is {ep}, which does not divide the {experts} routed experts of the model: choose one that does"
        if (shard * tp) % ep:
            yield f"ep` is {ep}, which does not divide shard x tp = {shard * tp}: choose one that does"
        if ep % tp:
            yield f"ep` is {ep} and no multiple of `parallel.tp`, {tp}: choose one, or leave `parallel.tp` out"
    widths = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "moe_intermediate_size", "vocab_size")
    for name in widths:
        if (width := getattr(config, name, None)) and width % tp:
            yield f"tp` is {tp}, which does not divide {name}={width} of the model: choose one that does"


def ranks_of_a_row(model: nn.Module) -> int:
    """How many processes compute on the same rows: those of tensor parallelism."""
    return getattr(distributed_config(getattr(model, "config", None)), "tp_size", None) or 1


def accumulation_steps(recipe: Recipe) -> int | None:
    """Steps of gradient accumulation by which a step has `global_batch_size` rows; None where nothing is asked.

    Raises:
        RecipeError: no number of them does.
    """
    rows = recipe.global_batch_size
    if rows is None:
        return recipe.training.get("gradient_accumulation_steps")
    of_each = recipe.training.get("per_device_train_batch_size") or _ROWS_OF_A_PROCESS
    readers = processes() // recipe.parallel.get("tp", 1)
    steps, rest = divmod(rows, of_each * readers)
    if rest or not steps:
        raise RecipeError(
            f"`global_batch_size` is {rows}, which is no multiple of {of_each * readers} rows, "
            f"`training.per_device_train_batch_size` {of_each} in each of {readers} processes: choose a multiple, or "
            "fewer rows a process"
        )
    return steps
