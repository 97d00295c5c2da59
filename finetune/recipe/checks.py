"""Which recipe keys about data and preferences go together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .values import RecipeError

if TYPE_CHECKING:
    from .load import Recipe


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
