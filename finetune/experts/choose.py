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
from ..runs.checkpoints import last_checkpoint
from .score_data import print_choice, score_rows
from .scores import CONFIG, SCORES, expert_cfg, read_choice, read_scores


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
    options, is_main = EsftOptions(**recipe.esft), arguments.process_index == 0
    top_p, choice = options.share, None
    if is_main:
        if options.experts:  # whose file is as it was when the run began: `open_run` has seen to that
            choice = read_choice(options.experts, model.config, recipe.model)
            for part in ("shared_experts", "non_expert_modules"):
                choice[part] |= getattr(options, part)
        else:
            choice = _kept_choice(model, recipe, options, folder)
        if choice:
            write_text(folder / CONFIG, json.dumps(choice) + "\n")
    choice = broadcast_object_list([choice])[0]
    if choice is None:
        model.to(arguments.device)
        scores = score_rows(model, rows, options.sample_tokens, arguments.per_device_eval_batch_size)
        choice = expert_cfg(scores, options.score, top_p, options.shared_experts, options.non_expert_modules)
        choice = broadcast_object_list([choice])[0]
        if is_main:
            print_choice(choice, scores[f"{options.score}_scores"], f"{options.score} scores sum up to {top_p}")
            write_text(folder / SCORES, json.dumps(scores) + "\n")
            write_text(folder / CONFIG, json.dumps(choice) + "\n")
    train_chosen(model, choice)


def _kept_choice(model: PreTrainedModel, recipe: Recipe, options: EsftOptions, folder: Path) -> dict[str, Any] | None:
    """What a run chose by scores when it began; None if it begins now."""
    config, scores = folder / CONFIG, folder / SCORES
    choice = read_choice(config, model.config, recipe.model) if config.is_file() else None
    chosen = None
    if scores.is_file():
        parts = options.shared_experts, options.non_expert_modules
        chosen = expert_cfg(read_scores(scores), options.score, options.share, *parts)
    if choice and chosen and choice != chosen:
        raise RecipeError(f"{config} does not follow from {scores}, so one of them is damaged: put back what it was")
    if not (choice or chosen) and (checkpoint := last_checkpoint(folder)):
        raise RecipeError(f"{config} is missing, by which {checkpoint} was trained: put it back")
    return choice or chosen
