"""Metrics that judge answers: scripts for the library `evaluate`, by path or by name.

A script defines a class derived from `evaluate.Metric` whose features are `predictions` and `references`, both text;
`metrics/` holds those that can be named without a path. `evaluate` copies a script into Hugging Face's cache of
modules and imports it from there.
"""

import numbers
import os
import tempfile
from typing import Any

from ..errors import UserError, first_line
from ..recipe.metrics import find_metric


def score_answers(metric: str | os.PathLike[str], answers: list[str], references: list[str]) -> dict[str, float]:
    """What a metric says of answers: its numbers by name.

    Args:
        metric: path or name, as `find_metric` takes it.
        answers: what the model said.
        references: the right answers, as many.

    Raises:
        UserError: the metric cannot be loaded, refuses the answers, or gives no number.
    """
    import evaluate

    script = find_metric(metric)
    with tempfile.TemporaryDirectory(prefix="deepseek-moe-metric-") as scratch:
        try:
            scorer = evaluate.load(script, cache_dir=scratch, keep_in_memory=True)
            found = scorer.compute(predictions=answers, references=references)
        except Exception as error:  # a script is a program of its own and can fail in any way
            raise UserError(f"metric {os.fspath(metric)!r} failed: {first_line(error)}") from error
    scores = {name: float(value) for name, value in (found or {}).items() if _is_number(value)}
    if not scores:
        raise UserError(f"metric {os.fspath(metric)!r} gave no number: {str(found)[:80]}")
    return scores


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Number) and not isinstance(value, complex)
