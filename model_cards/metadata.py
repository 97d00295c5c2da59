"""What the Hub asks of the header of a model card: fields, their types, their spelling.

The real Hub has lists of licences and tasks; this refuses what can be told from the header alone.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

_REPOSITORY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}(?:/[A-Za-z0-9_][A-Za-z0-9._-]{0,95})?")
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_LANGUAGE = re.compile(r"[a-z]{2,3}|code|multilingual")
_TAG = re.compile(r"[^\n]{1,96}")
_RELATIONS = ("adapter", "finetune", "merge", "quantized")


def problems(fields: Any) -> list[str]:
    """What is wrong with the header of a model card, one line each; nothing if it is sound.

    Args:
        fields: the header, parsed.
    """
    if not isinstance(fields, dict):
        return [f"the header of README.md is not a YAML mapping: {fields}"]
    found = [
        f"{name}: {value!r} {complaint}"
        for name, check in _FIELDS.items()
        for value, complaint in check(fields.get(name))
    ]
    return [*found, *_model_index(fields.get("model-index"))]


def is_repository(name: Any) -> bool:
    """Whether this could be the name of a repository on the Hub: `user/name`, or one of the oldest without a user."""
    return isinstance(name, str) and bool(_REPOSITORY.fullmatch(name)) and ".." not in name and "--" not in name


Complaints = Iterator[tuple[Any, str]]


def _texts(accepts: Callable[[str], Any], complaint: str, many: bool = True) -> Callable[[Any], Complaints]:
    """A check of a text, or of a list of texts if there may be `many`."""

    def check(value: Any) -> Complaints:
        values = value if many and isinstance(value, list) else [] if value is None else [value]
        yield from ((item, complaint) for item in values if not isinstance(item, str) or not accepts(item))

    return check


def _list_of(accepts: Callable[[str], Any], complaint: str) -> Callable[[Any], Complaints]:
    def check(value: Any) -> Complaints:
        if value is None:
            return
        if not isinstance(value, list):
            yield value, "is not a list"
            return
        yield from _texts(accepts, complaint)(value)

    return check


_FIELDS: dict[str, Callable[[Any], Complaints]] = {
    "license": _texts(_LICENCE.fullmatch, "is not a licence id such as apache-2.0", many=False),
    "license_name": _texts(_LICENCE.fullmatch, "is not a name in small letters", many=False),
    "license_link": _texts(str.strip, "is not a link or a file name", many=False),
    "language": _texts(_LANGUAGE.fullmatch, "is not a language code such as en"),
    "library_name": _texts(str.strip, "is not a name", many=False),
    "pipeline_tag": _texts(re.compile(r"[a-z0-9-]+").fullmatch, "is not a task such as text-generation", many=False),
    "base_model": _texts(is_repository, "is not the name of a repository on the Hub"),
    "base_model_relation": _texts(_RELATIONS.__contains__, f"is none of {', '.join(_RELATIONS)}", many=False),
    "datasets": _texts(is_repository, "is not the name of a data set on the Hub"),
    "tags": _list_of(_TAG.fullmatch, "is not a tag"),
    "metrics": _list_of(_TAG.fullmatch, "is not the name of a metric"),
}


def _model_index(index: Any) -> Iterator[str]:
    if index is None:
        return
    if not isinstance(index, list) or not all(isinstance(model, dict) for model in index):
        yield "model-index: is not a list of models"
        return
    for model in index:
        if not _is_text(model.get("name")):
            yield "model-index: a model has no name"
        results = model.get("results")
        if not isinstance(results, list):
            yield "model-index: a model has no list of results"
            continue
        for result in results:
            yield from _result(result)


def _result(result: Any) -> Iterator[str]:
    needed = {"task": ("type",), "dataset": ("type", "name")}
    for part, names in needed.items():
        values = result.get(part) if isinstance(result, dict) else None
        for name in names:
            if not isinstance(values, dict) or not _is_text(values.get(name)):
                yield f"model-index: a result lacks {part}.{name}"
    metrics = result.get("metrics") if isinstance(result, dict) else None
    if not isinstance(metrics, list) or not metrics:
        yield "model-index: a result has no list of metrics"
        return
    for metric in metrics:
        value = metric.get("value") if isinstance(metric, dict) else None
        if not isinstance(metric, dict) or not _is_text(metric.get("type")):
            yield "model-index: a metric lacks its type"
        if value is None or isinstance(value, float) and value - value != 0:
            yield f"model-index: a metric has the value {value}"


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())
