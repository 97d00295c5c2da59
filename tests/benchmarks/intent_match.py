"""How well answers of ESFT's intent task are right: the whole JSON value, and the intent alone."""

import json
from typing import Any

import datasets
import evaluate

_TEXT = {"predictions": datasets.Value("string"), "references": datasets.Value("string")}


class IntentMatch(evaluate.Metric):
    """`exact_match`: share of answers with the reference's intent and slots; `intent`: with its intent at least."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__, citation="", inputs_description="", features=datasets.Features(_TEXT)
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        pairs = [(_value(one), _value(other)) for one, other in zip(predictions, references, strict=True)]
        whole = sum(one is not None and one == other for one, other in pairs)
        intent = sum(isinstance(one, dict) and one.get("intent") == other["intent"] for one, other in pairs)
        return {"exact_match": whole / len(pairs), "intent": intent / len(pairs)}


def _value(answer: str) -> Any:
    """The JSON value in front of the full stop that ends every answer of these data."""
    try:
        return json.loads(answer.strip().removesuffix("。"))
    except ValueError:
        return None
