"""Metrics that judge answers: scripts for the library `evaluate`, by path or by name.

A script defines a class derived from `evaluate.Metric` whose features are `predictions` and `references`, both text;
`metrics/` holds those that can be named without a path. `evaluate` copies a script into Hugging Face's cache of
modules and imports it from there.
"""

import numbers
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..recipe.values import RecipeError, first_line

if TYPE_CHECKING:
    from ..recipe.load import Recipe

SHIPPED_METRICS = {path.parent.name: path for path in sorted((Path(__file__).parents[1] / "metrics").glob("*/*.py"))}


def find_metric(name: str | os.PathLike[str]) -> str:
    """The path of a metric's script; a name that is none of ours and no path is a Hub name and stays as it is.

    Args:
        name: path of a script, of a folder with a script of the folder's name, a shipped metric, or a Hub name.

    Raises:
        RecipeError: a path where there is no script.
    """
    name = os.fspath(name)
    path = Path(name).expanduser()
    if path.is_file():
        return os.fspath(path)
    if name in SHIPPED_METRICS:
        return os.fspath(SHIPPED_METRICS[name])
    if (path / f"{path.name}.py").is_file():
        return os.fspath(path / f"{path.name}.py")
    if path.exists() or path.suffix == ".py" or name.startswith((".", "/", "~")):
        what = f"has no script {path.name}.py" if path.is_dir() else "does not exist"
        raise RecipeError(
            f"metric {name!r} {what}: give the path of a metric script, or one of {', '.join(SHIPPED_METRICS)}"
        )
    return name


def check_metric(recipe: "Recipe") -> None:
    """Raise a RecipeError if a recipe's `metric` cannot be measured."""
    if recipe.metric is None:
        return
    find_metric(recipe.metric)
    if recipe.metric_rows < 1:
        raise RecipeError(f"`metric_rows` is {recipe.metric_rows}: it is 1 at least")
    if recipe.dpo:
        raise RecipeError("`metric` judges answers, and rows of preferences have none: leave `metric` or `dpo` out")
    if not (recipe.eval_data or recipe.eval_fraction):
        raise RecipeError("`metric` is measured on held-out rows: set `eval_data`, or `eval_fraction` above 0")


def score_answers(metric: str | os.PathLike[str], answers: list[str], references: list[str]) -> dict[str, float]:
    """What a metric says of answers: its numbers by name.

    Args:
        metric: as in `find_metric`.
        answers: what the model said.
        references: the right answers, as many.

    Raises:
        RecipeError: the metric cannot be loaded, refuses the answers, or gives no number.
    """
    import evaluate

    script = find_metric(metric)
    with tempfile.TemporaryDirectory(prefix="deepseek-moe-metric-") as scratch:
        try:
            scorer = evaluate.load(script, cache_dir=scratch, keep_in_memory=True)
            found = scorer.compute(predictions=answers, references=references)
        except Exception as error:  # a script is a program of its own and can fail in any way
            raise RecipeError(f"metric {os.fspath(metric)!r} failed: {first_line(error)}") from error
    scores = {name: float(value) for name, value in (found or {}).items() if _is_number(value)}
    if not scores:
        raise RecipeError(f"metric {os.fspath(metric)!r} gave no number: {str(found)[:80]}")
    return scores


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Number) and not isinstance(value, complex)
