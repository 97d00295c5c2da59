"""The recipe's own metric: answers to the held-out rows of a run, before its first step and after its last."""

from pathlib import Path
from typing import Any

from accelerate import PartialState
from rich.console import Console
from rich.text import Text
from transformers import Trainer

from ..errors import RecipeError, UserError
from ..evaluate.answers import Question, generate_answers, question_of, text_of
from ..evaluate.metrics import score_answers
from ..recipe.schema import Recipe
from ..runs.folder import read_kept, write_kept


def metric_before(trainer: Trainer, recipe: Recipe, path: Path, is_fresh: bool) -> dict[str, float] | None:
    """What `measure_metric` gives before the first step, kept in the file `path`, where a resumed run finds it.

    Args:
        is_fresh: nothing was trained yet. A metric that a recipe gets later has no `before`.
    """
    asked = [recipe.metric, recipe.metric_rows]
    kept = kept_before(path, is_fresh, not trainer.shards)
    if kept is not None and (kept["asked"] == asked or not is_fresh):
        return kept["scores"] if kept["asked"] == asked else None
    if trainer.shards and not is_fresh:
        return None
    scores = measure_metric(trainer, recipe, "answers before")
    if trainer.is_world_process_zero():
        write_kept(path, {"asked": asked, "scores": scores})
    return scores


def kept_before(path: Path, is_fresh: bool, can_measure: bool) -> Any:
    """What a file of `write_kept` says was measured before the first step; None if that cannot be read.

    Args:
        path: the file.
        is_fresh: nothing was trained yet.
        can_measure: it can be measured now, as whole weights can at any time before a checkpoint is loaded.
    """
    if is_fresh and not path.exists():
        return None
    try:
        return read_kept(path)
    except UserError as problem:
        if PartialState().is_main_process:
            lost = "is measured again" if can_measure or is_fresh else "cannot be measured again"
            Console().print(Text(f"{problem}; what was measured before the first step {lost}"), soft_wrap=True)
        return None


def measure_metric(trainer: Trainer, recipe: Recipe, title: str = "answers after") -> dict[str, float] | None:
    """What the recipe's `metric` says of the model's answers; None without a metric or held-out rows.

    Every process of a run generates all answers, for a model whose weights are spread over them needs all.

    Raises:
        UserError: no held-out row has both a question and a whole answer, or the metric refuses the answers.
    """
    if recipe.metric is None or not trainer.eval_dataset:
        return None
    tokenizer = trainer.processing_class
    questions = held_out_questions(trainer, recipe)
    model = trainer.accelerator.unwrap_model(trainer.model)
    batch_size = trainer.args.per_device_eval_batch_size
    answers = generate_answers(model, tokenizer, questions, batch_size=batch_size, title=title)
    return score_answers(recipe.metric, answers, [text_of(question.reference, tokenizer) for question in questions])


def held_out_questions(trainer: Trainer, recipe: Recipe) -> list[Question]:
    """Questions of `metric_rows` held-out rows at most, evenly spread; rows that may be cut are left out."""
    bos = trainer.processing_class.bos_token_id
    rows = (row for row in trainer.eval_dataset if len(row["input_ids"]) < recipe.max_length)
    questions = [question for row in rows if (question := question_of(row["input_ids"], row["labels"], bos))]
    if not questions:
        raise RecipeError(
            f"`metric` is {recipe.metric!r}, but no held-out row shorter than max_length={recipe.max_length} has a "
            "question and an answer: leave `metric` out, or hold out rows with `messages` or `prompt`"
        )
    most = min(recipe.metric_rows, len(questions))
    return [questions[number * len(questions) // most] for number in range(most)]
