"""Which recipe keys about data, preferences and adapters go together."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from .values import RecipeError

if TYPE_CHECKING:
    from .load import Recipe

_STARTS = re.compile(r"gaussian|orthogonal|olora|pissa(?:_niter_[1-9]\d*)?|mica")
_OTHER_STARTS = {
    **dict.fromkeys(("eva", "corda", "lora_ga"), "needs a pass over data before the first step, which no run makes"),
    "loftq": "replaces the base's weights by quantised ones, which no run saves",
}


def check_lora(recipe: Recipe) -> None:
    """Raise a RecipeError for `lora` keys that no run can follow, or that contradict other keys."""
    start = recipe.lora.get("init_lora_weights")
    if isinstance(start, str):
        if not _STARTS.fullmatch(start):
            reason = _OTHER_STARTS.get(start, "PEFT does not know")
            raise RecipeError(
                f"`lora.init_lora_weights` is {start!r}, which {reason}: choose one of true, gaussian, orthogonal, "
                "olora, pissa, pissa_niter_[number], mica"
            )
        from modeling_deepseek_moe.expert_lora_start import changes_base

        if recipe.dpo and changes_base(start):
            raise RecipeError(
                f"`lora.init_lora_weights: {start}` changes the base weights, which are the reference of the `dpo` "
                "keys: leave it out"
            )
    if recipe.merge and recipe.lora.get("layer_replication"):
        raise RecipeError(
            "`lora.layer_replication` shares weights between layers, so a layer's adapters cannot be merged into its "
            "own weights: set merge: false"
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
    if recipe.losses:
        raise RecipeError(
            f"`losses.{next(iter(recipe.losses))}` has no effect with the `dpo` keys, whose loss is of preferences "
            "alone: remove it"
        )
    if recipe.quantization and recipe.dpo.get("precompute_ref_log_probs"):
        raise RecipeError("`dpo.precompute_ref_log_probs: true` does not work with `quantization`: remove it")
