"""Which words a recipe's keys may have (`ranges.py`: numbers), and which keys go together; nothing is loaded."""

import re
from collections.abc import Iterable

from modeling_deepseek_moe.conversion.adapters.patterns import problem_of_patterns
from modeling_deepseek_moe.parts import WORDS

from ..errors import RecipeError, UserError, nearest
from .metrics import find_metric
from .schema import DTYPES, EsftOptions, Recipe


def check_recipe(recipe: Recipe) -> None:
    """Raise a RecipeError for a value that is out of range, or for keys that do not go together."""
    if recipe.dtype not in DTYPES:
        raise RecipeError(f"`dtype` is {recipe.dtype!r}: choose one of {', '.join(DTYPES)}")
    if recipe.lora and not recipe.lora.get("targets"):
        key = next(iter(recipe.lora))
        raise RecipeError(
            f"`lora.{key}` has no effect without `lora.targets`: list its words, or remove the lora keys"
        )
    try:
        check_words(recipe.lora.get("targets", []))
    except ValueError as error:
        raise RecipeError(f"`lora.targets`: {error}") from error
    check_lora(recipe)
    check_quantization(recipe)
    check_layout(recipe)
    check_parallel(recipe)
    check_batch(recipe)
    if recipe.merge and not (recipe.lora or recipe.esft):
        raise RecipeError(
            "`merge` is true but there are no adapters to merge: set `lora.targets` or an `esft` key, or merge: false"
        )
    saves_no_bias = recipe.lora or (recipe.esft and not recipe.esft.get("non_expert_modules"))
    if recipe.bias_update_speed and saves_no_bias and not recipe.merge:
        raise RecipeError(
            "`bias_update_speed` moves the routers' bias, which an adapter does not carry: set it to 0 to freeze the "
            "bias, or set merge: true to save the model that has it"
        )
    check_esft(recipe)
    check_reporters(recipe)
    check_data_keys(recipe)
    check_metric(recipe)


def check_words(targets: Iterable[str]) -> None:
    """Raise a ValueError for a word that is none of `WORDS` or `all`."""
    choices = (*WORDS, "all")
    for word in targets:
        if word not in choices:
            raise ValueError(
                f"unknown word {word!r} (choices: {', '.join(choices)}): did you mean {nearest(str(word), choices)!r}?"
            )


def check_esft(recipe: Recipe) -> None:
    """Raise a RecipeError if the `esft` keys of a recipe cannot be followed or contradict other keys."""
    if not recipe.esft:
        return
    options = EsftOptions(**recipe.esft)
    if recipe.lora:
        raise RecipeError("`lora` and `esft` are two ways to train a part of the model: remove the keys of one")
    for key in ("dpo", "streaming"):
        if getattr(recipe, key) and not options.experts:
            raise RecipeError(
                f"with `{key}` the rows are not scored: choose the experts before (`deepseek-moe esft score`, then "
                "`esft select`), and give the file as `esft.experts`"
            )
    if key := sharded_by(recipe):
        raise RecipeError(f"`training.{key}` cuts up stacks of experts, of which `esft` trains parts: remove it")


def sharded_by(recipe: Recipe) -> str | None:
    """The key of `training` by which several processes hold parts of the weights, if one does."""
    return next((key for key in ("fsdp", "deepspeed") if recipe.training.get(key)), None)


_OWN_RANKS = ("dp_replicate_size", "dp_shard_size")


def check_layout(recipe: Recipe) -> None:
    """Raise a RecipeError if what several processes do to the weights does not go with other keys."""
    training, key = recipe.training, sharded_by(recipe)
    sizes = training.get("parallelism_config") or {}
    for name, size in sizes.items():
        if name not in _OWN_RANKS:
            raise RecipeError(
                f"`training.parallelism_config` has {name}: {size!r}: runs take {' and '.join(_OWN_RANKS)} alone, "
                "which shard and replicate; remove it"
            )
    if sizes and not training.get("fsdp"):
        raise RecipeError("`training.parallelism_config` says how FSDP shards: set `training.fsdp`, too")
    for name in ("fsdp", "deepspeed"):
        if training.get(f"{name}_config") and not training.get(name):
            raise RecipeError(f"`training.{name}_config` has no effect without `training.{name}`: set `{name}: true`")
    if training.get("fsdp") and training.get("deepspeed"):
        raise RecipeError("`training.fsdp` and `training.deepspeed` are two ways to shard the weights: remove one")
    if key is None:
        return
    if recipe.quantization:
        raise RecipeError(
            f"`quantization` is {recipe.quantization}, whose weights are not cut up, but `training.{key}` shards: "
            "remove it, then every GPU holds the four-bit weights and shares the batch; or leave `quantization` out, "
            "and the weights are sharded as they are"
        )
    if recipe.merge:
        raise RecipeError(
            f"`merge` is true, but with `training.{key}` no process holds the weights to merge into: set merge: "
            f"false, and merge afterwards with `deepseek-moe convert {recipe.model} TARGET --to bf16 --adapter "
            "ADAPTER`"
        )


# Whose steps are right on weights of which a process has a part.
_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd")


def check_parallel(recipe: Recipe) -> None:
    """Raise a RecipeError for keys that do not go with `parallel`; `model/spread.py` checks its numbers."""
    if not recipe.parallel:
        return
    if key := sharded_by(recipe):
        raise RecipeError(f"`parallel` and `training.{key}` are two ways to spread a model over processes: remove one")
    apart = {
        "quantization": "weights in four bits are not cut up: set `quantization: null`, and they are spread as they "
        "are; or remove `parallel`, and every GPU holds the four-bit weights and shares the batch",
        "esft": "the parts of stacks that it trains are not spread: remove `parallel`, and the processes share the "
        "batch",
        "dpo": "TRL was not tried on a model that is read in parts: set `training.fsdp: true` instead",
    }
    for name, way_out in apart.items():
        if getattr(recipe, name):
            raise RecipeError(f"`{name}` does not go with `parallel`; {way_out}")
    if recipe.merge:
        raise RecipeError(
            "`merge` is true, but with `parallel` no process holds the weights to merge into: set merge: false, and "
            f"merge afterwards with `deepseek-moe convert {recipe.model} TARGET --to bf16 --adapter ADAPTER`"
        )
    if (tp := recipe.parallel.get("tp", 1)) > 1:
        if recipe.lora:
            raise RecipeError(
                f"`parallel.tp` is {tp}, under which PEFT's adapters are wrong: give these processes to "
                "`parallel.shard` and `parallel.ep`, or train all weights"
            )
        if recipe.streaming:
            raise RecipeError(
                f"`streaming` does not go with `parallel.tp: {tp}`: use `parallel.shard` and `parallel.ep`"
            )
    if recipe.training.get("fp16"):
        raise RecipeError(
            "`training.fp16` does not go with `parallel`, whose processes would each scale the loss by what they see "
            "alone: set `training.bf16: true`"
        )
    if (optimizer := recipe.training.get("optim", _OPTIMIZERS[0])) not in _OPTIMIZERS:
        raise RecipeError(
            f"`training.optim` is {optimizer!r}, which was not tried on weights in parts: with `parallel` choose one "
            f"of {', '.join(_OPTIMIZERS)}"
        )


def check_batch(recipe: Recipe) -> None:
    """Raise a RecipeError for keys that contradict `global_batch_size`."""
    if recipe.global_batch_size is None:
        return
    for key in ("gradient_accumulation_steps", "auto_find_batch_size"):
        if value := recipe.training.get(key):
            raise RecipeError(
                f"`global_batch_size` and `training.{key}: {value}` both decide how many rows a step has: remove one "
                f"(`training.{key}=null` on the command line)"
            )


def check_quantization(recipe: Recipe) -> None:
    """Raise a RecipeError for keys that do not go with weights in four bits, which are frozen and not saved."""
    if recipe.quantization is None:
        return
    name = f"`quantization` is {recipe.quantization}"
    if not recipe.lora or recipe.esft:
        way_out = "leave the `esft` keys out" if recipe.lora else "set `lora.targets`, or leave `quantization` out"
        raise RecipeError(f"{name}, whose weights are frozen and carry LoRA: {way_out}")
    if recipe.merge:
        raise RecipeError(
            f"{name}, into which adapters are not merged: set merge: false, and merge the adapter into the model "
            f"itself afterwards with `deepseek-moe convert {recipe.model} TARGET --to bf16 --adapter ADAPTER`"
        )
    if recipe.bias_update_speed:
        raise RecipeError(
            f"{name}, of which only the adapter is saved, but `bias_update_speed` moves the routers' bias: set it to 0"
        )
    if recipe.experts_implementation not in (None, "sorted_mm"):
        raise RecipeError(
            f"{name}, which multiplies expert by expert, but `experts_implementation` is "
            f"{recipe.experts_implementation!r}: leave it out"
        )


_STARTS = re.compile(r"gaussian|orthogonal|olora|pissa(?:_niter_[1-9]\d*)?|mica")
_OTHER_STARTS = {
    **dict.fromkeys(("eva", "corda", "lora_ga"), "needs a pass over data before the first step, which no run makes"),
    "loftq": "replaces the base's weights by quantised ones, which no run saves",
}


def check_lora(recipe: Recipe) -> None:
    """Raise a RecipeError for `lora` keys that no run can follow, or that contradict other keys."""
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = recipe.lora.get(name) or {}
        if wrong := [value for value in patterns.values() if type(value) is not int]:
            raise RecipeError(f"`lora.{name}` holds {wrong[0]!r}: it maps patterns of names to whole numbers")
        _check_patterns(f"lora.{name}", patterns)
    for name in ("exclude_modules", "layers_pattern"):
        if isinstance(pattern := recipe.lora.get(name), str):
            _check_patterns(f"lora.{name}", [pattern])
    start = recipe.lora.get("init_lora_weights")
    if isinstance(start, str):
        if not _STARTS.fullmatch(start):
            reason = _OTHER_STARTS.get(start, "PEFT does not know")
            raise RecipeError(
                f"`lora.init_lora_weights` is {start!r}, which {reason}: choose one of true, gaussian, orthogonal, "
                "olora, pissa, pissa_niter_[number], mica"
            )
        if recipe.dpo and start.startswith(("pissa", "olora")):
            raise RecipeError(
                f"`lora.init_lora_weights: {start}` changes the base weights, which are the reference of the `dpo` "
                "keys: leave it out"
            )
    if recipe.merge and recipe.lora.get("layer_replication"):
        raise RecipeError(
            "`lora.layer_replication` shares weights between layers, so a layer's adapters cannot be merged into its "
            "own weights: set merge: false"
        )


def _check_patterns(key: str, patterns: Iterable[str]) -> None:
    if problem := problem_of_patterns(patterns):
        raise RecipeError(f"`{key}`: {problem}")


def check_reporters(recipe: Recipe) -> None:
    """Raise a RecipeError for log levels that are none, and for programs to be told of a run that are not there."""
    from transformers.utils import logging

    for key in ("log_level", "log_level_replica"):
        if (level := recipe.training.get(key, "passive")) not in (
            levels := [*logging.get_log_levels_dict(), "passive"]
        ):
            raise RecipeError(f"`training.{key}` is {level!r}: choose one of {', '.join(levels)}")
    asked = recipe.training.get("report_to")
    names = [name for name in ([asked] if isinstance(asked, str) else asked or []) if name not in ("none", "all")]
    if not names:
        return
    from .._compat import reporters  # which imports torch

    known, installed = reporters()
    for name in names:
        if name not in known:
            raise RecipeError(
                f"`training.report_to` is {name!r}: did you mean {nearest(name, known)!r}? (choices: "
                f"{', '.join(sorted(known))}, all, none)"
            )
        if name not in installed:
            raise RecipeError(
                f"`training.report_to` is {name!r}, whose library is not installed: install that, or leave "
                "`training.report_to` out"
            )


def check_data_keys(recipe: Recipe) -> None:
    """Raise a RecipeError if these keys contradict each other."""
    if recipe.streaming:
        if not recipe.eval_data and recipe.eval_fraction:
            raise RecipeError(
                "`streaming` cannot hold out a share of rows it has not read: give `eval_data`, or set "
                "`eval_fraction: 0` to measure nothing"
            )
        if recipe.training.get("max_steps", -1) <= 0:
            raise RecipeError("`streaming` does not know how many rows there are: set `training.max_steps`")
        if recipe.training.get("dataloader_num_workers"):
            raise RecipeError(
                "`streaming` counts its rows in the process that trains: remove `training.dataloader_num_workers`"
            )
    if not recipe.dpo:
        return
    for key in ("packing", "streaming"):
        if getattr(recipe, key):
            raise RecipeError(f"`{key}` does not work with the `dpo` keys: set `{key}: false`")
    if recipe.losses.get("mtp_loss_weight"):
        raise RecipeError(
            "`losses.mtp_loss_weight` has no effect with the `dpo` keys, whose objective has no multi-token "
            "prediction: remove it"
        )
    if recipe.quantization and recipe.dpo.get("precompute_ref_log_probs"):
        raise RecipeError("`dpo.precompute_ref_log_probs: true` does not work with `quantization`: remove it")


def check_metric(recipe: Recipe) -> None:
    """Raise a RecipeError if a recipe's `metric` cannot be measured."""
    if recipe.metric is None:
        return
    try:
        find_metric(recipe.metric)
    except UserError as error:
        raise RecipeError(str(error)) from error
    if recipe.dpo:
        raise RecipeError("`metric` judges answers, and rows of preferences have none: leave `metric` or `dpo` out")
    if not (recipe.eval_data or recipe.eval_fraction):
        raise RecipeError("`metric` is measured on held-out rows: set `eval_data`, or `eval_fraction` above 0")
