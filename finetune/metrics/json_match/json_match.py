"""Share of the answers that are the same JSON value as the reference: neither spaces nor the order of keys matter."""

import json

import datasets
import evaluate

_TEXT = {"predictions": datasets.Value("string"), "references": datasets.Value("string")}


class JsonMatch(evaluate.Metric):
    """`json_match`: share of right answers; `valid_json`: share of answers that are JSON at all."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__, citation="", inputs_description="", features=datasets.Features(_TEXT)
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        answers = [_normal(answer) for answer in predictions]
        wanted = [_normal(reference) for reference in references]
        if None in wanted:
            raise ValueError(f"a reference is not JSON: {references[wanted.index(None)][:60]!r}")
        right = [answer == reference for answer, reference in zip(answers, wanted, strict=True)]
        valid = [answer is not None for answer in answers]
        return {"json_match": sum(right) / len(right), "valid_json": sum(valid) / len(valid)}


def _normal(text: str) -> str | None:
    """One spelling of a JSON value, in which 1 and 1.0 are the same but 1 and true are not; None for other text."""
    try:
        return json.dumps(json.loads(text, parse_float=_number), sort_keys=True)
    except (ValueError, RecursionError):
        return None


def _number(text: str) -> float | int:
    number = float(text)
    return int(number) if number.is_integer() else number
