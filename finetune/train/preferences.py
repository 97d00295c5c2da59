"""Learning from preferences: TRL's DPOTrainer under a recipe (Direct Preference Optimization, arXiv 2305.18290).

The loss is of the answers' log-probabilities, relative to those of the model before training. These are computed once,
before the first step, and kept with the rows, so that no second model is in memory and no step runs it; only weights
in four bits, of which TRL makes no hash, run in each step without their adapters, too. Balance losses are in the
gradients, not in the loss that is logged; multi-token losses have no part in it.
"""

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl import DPOConfig, DPOTrainer

from .._compat import ReadyRows
from ..data.rows import RunRows
from ..errors import RecipeError, first_line, raised_by
from ..model.load import adapter_config, load
from ..model.lora import known_warnings
from ..recipe.schema import Recipe
from ..recipe.sections import DEFAULTS
from .trainer import RunTrainerMixin


class PreferenceTuner(RunTrainerMixin, ReadyRows, DPOTrainer):
    """The Trainer of a run that learns from preferences; its rows are `preference_rows.py`'s."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().compute_loss(*args, **kwargs)
        except ValueError as error:  # an option that TRL looks at only here
            if not raised_by(error, "trl"):
                raise
            raise RecipeError(f"`dpo.*`: {first_line(error)}") from error

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL would write one into the run's folder at every checkpoint."""


def preference_arguments(recipe: Recipe, **given: Any) -> DPOConfig:
    """The Trainer's arguments for a recipe with a `dpo` section; what it and `given` leave open are TRL's defaults."""
    ours = {**DEFAULTS["dpo"], "bf16": False, "max_length": recipe.max_length}
    if recipe.quantization:
        ours["precompute_ref_log_probs"] = False
    return DPOConfig(**{**ours, **recipe.dpo, **given})


def preference_tuner(
    recipe: Recipe,
    arguments: DPOConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: RunRows,
    callbacks: list[TrainerCallback],
) -> PreferenceTuner:
    """A Trainer for the model, which it gives the recipe's adapters.

    Raises:
        RecipeError: the adapters do not fit the model.
        ValueError: the settings do not go together; its message says how.
    """
    # With adapters the reference is the model without them, and a copy of it else.
    needs_reference = not recipe.lora and not arguments.precompute_ref_log_probs
    with known_warnings():
        return PreferenceTuner(
            model=model,
            ref_model=load(recipe)[0] if needs_reference else None,
            peft_config=adapter_config(model, recipe) if recipe.lora else None,
            args=arguments,
            train_dataset=rows.train,
            eval_dataset=rows.eval,
            processing_class=tokenizer,
            callbacks=callbacks,
        )


def preference_metrics(log_history: list[dict[str, float]]) -> dict[str, float | None]:
    """Share of the held-out pairs (else of the last training pairs) that are preferred rightly, and by what margin."""
    names = {"preference_accuracy": "rewards/accuracies", "preference_margin": "rewards/margins"}
    found = {}
    for name, key in names.items():
        values = [row.get(f"eval_{key}") for row in log_history] or [None]
        values = [value for value in values if value is not None] or [row[key] for row in log_history if key in row]
        found[name] = values[-1] if values else None
    return found
