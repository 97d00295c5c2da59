"""The `esft` section of a recipe: the experts are chosen when a run begins, and kept in its folder."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel, TrainingArguments

from ..errors import RecipeError
from ..files import write_text
from ..model.chosen_experts import train_chosen
from ..recipe.schema import EsftOptions, Recipe
from .score_data import print_choice, score_rows
from .scores import CONFIG, SCORES, expert_cfg, read_choice


def specialize(
    model: PreTrainedModel,
    recipe: Recipe,
    rows: Iterable[Mapping[str, Any]],
    arguments: TrainingArguments,
    folder: Path,
) -> None:
    """Freezes the model but for the experts of the recipe's task and what else its `esft` section names.

    A new run chooses them by the scores on its training rows, or takes them from `esft.experts`, and keeps the choice
    in its folder; a run that goes on finds it there.

    Args:
        model: the model as it was loaded.
        recipe: one with an `esft` section.
        rows: what is trained on, with `input_ids`.
        arguments: the Trainer's; with several processes, all of them come here.
        folder: the run's; gets `expert_cfg.json`, and `expert_scores.json` if rows were scored.

    Raises:
        UserError: the experts cannot be chosen or are not of this model; one line says why.
    """
    options, kept, is_main = EsftOptions(**recipe.esft), folder / CONFIG, arguments.process_index == 0
    top_p, choice = options.share, None
    if is_main:
        choice = read_choice(kept, model.config, recipe.model) if kept.is_file() else None
        if options.experts:
            given = read_choice(options.experts, model.config, recipe.model)
            for part in ("shared_experts", "non_expert_modules"):
                given[part] |= getattr(options, part)
            if choice not in (None, given):
                raise RecipeError(
                    f"`esft.experts` {options.experts} has changed since the run in {folder} began: choose another "
                    "`output_dir`, or set `overwrite: true` to begin anew"
                )
            choice = given
            write_text(kept, json.dumps(choice) + "\n")
    choice = broadcast_object_list([choice])[0]
    if choice is None:
        model.to(arguments.device)
        scores = score_rows(model, rows, options.sample_tokens, arguments.per_device_eval_batch_size)
        choice = expert_cfg(scores, options.score, top_p, options.shared_experts, options.non_expert_modules)
        choice = broadcast_object_list([choice])[0]
        if is_main:
            print_choice(choice, scores[f"{options.score}_scores"], f"{options.score} scores sum up to {top_p}")
            write_text(folder / SCORES, json.dumps(scores) + "\n")
            write_text(kept, json.dumps(choice) + "\n")
    train_chosen(model, choice)
