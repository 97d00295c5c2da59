"""Share of the answers that are the reference, but for white space around them."""

import datasets
import evaluate

_TEXT = {"predictions": datasets.Value("string"), "references": datasets.Value("string")}


class ExactMatch(evaluate.Metric):
    """`exact_match`: 1 if every answer is right, character by character."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__, citation="", inputs_description="", features=datasets.Features(_TEXT)
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        right = [one.strip() == other.strip() for one, other in zip(predictions, references, strict=True)]
        return {"exact_match": sum(right) / len(right)}
