"""The two spellings of the rotary settings: `rope_parameters`, and the older `rope_theta` with `rope_scaling`."""

from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

_OLDER = ("rope_theta", "rope_scaling")
_OTHER_NAMES = {"deepseek_yarn": "yarn"}  # Sarvam's
_TYPES_WITH_FACTOR = ("linear", "dynamic", "yarn", "llama3")


def join_rope_spellings(rope_parameters: dict | None, older: dict) -> dict:
    """The rotary settings in the newer spelling, always with a `rope_type`.

    Args:
        rope_parameters: the newer spelling, or None.
        older: `rope_theta` and `rope_scaling`, either of which may be absent.

    Raises:
        ValueError: the spellings contradict each other, or say what no model can do.
    """
    scaling = older.get("rope_scaling")
    for field, value in (("rope_parameters", rope_parameters), ("rope_scaling", scaling)):
        if value is not None and not isinstance(value, dict):
            raise ValueError(f"{field}={value!r} is not an object")
    joined = _with_type(rope_parameters or scaling or {})
    if older.get("rope_theta") is not None:
        joined.setdefault("rope_theta", older["rope_theta"])
    contradicted = [field for field in _OLDER if field in older and not _agrees(joined, field, older[field])]
    if contradicted:
        field = contradicted[0]
        raise ValueError(f"{field}={older[field]} contradicts rope_parameters={rope_parameters}; keep one of them")
    _check(joined)
    return joined


def older_rope_spelling(rope_parameters: dict) -> dict:
    """`rope_theta` and `rope_scaling` as DeepSeek's own code and most servers read them."""
    scaling = _with_type(rope_parameters)
    theta, rope_type = scaling.pop("rope_theta", None), scaling.pop("rope_type")
    return {"rope_theta": theta, "rope_scaling": None if rope_type == "default" else {**scaling, "type": rope_type}}


def with_overrides(config_dict: dict, overrides: dict) -> dict:
    """`config_dict` with some fields set differently, in whichever spelling."""
    merged = dict(config_dict)
    if "rope_parameters" in overrides:
        merged = {field: value for field, value in merged.items() if field not in _OLDER}
    elif merged.get("rope_parameters") and not overrides.keys().isdisjoint(_OLDER):
        merged |= older_rope_spelling(merged.pop("rope_parameters"))
    return merged | overrides


def _with_type(rope: dict) -> dict:
    rope = dict(rope)
    rope_type = rope.pop("type", None)
    rope_type = rope.pop("rope_type", None) or rope_type
    if rope_type is None and "factor" in rope:
        raise ValueError(f"rope_scaling={rope} has no type; choices: {', '.join(ROPE_INIT_FUNCTIONS)}")
    return {**rope, "rope_type": _OTHER_NAMES.get(rope_type, rope_type) or "default"}


def _agrees(joined: dict, field: str, value) -> bool:
    if field == "rope_theta":
        return value is None or value == joined["rope_theta"]
    return {**joined, **_with_type(value or {})} == joined


def _check(rope: dict) -> None:
    rope_type, choices = rope["rope_type"], ("default", *ROPE_INIT_FUNCTIONS)
    if rope_type not in choices:
        raise ValueError(f"rope type {rope_type!r} is not one of {', '.join(map(repr, choices))}")
    theta = rope.get("rope_theta", 10000.0)
    if not _is_number(theta, at_least=1) or theta == 1:
        raise ValueError(f"rope_theta={theta!r} must be a number larger than 1")
    if rope_type in _TYPES_WITH_FACTOR and not _is_number(rope.get("factor"), at_least=1):
        raise ValueError(f"the factor of rope type {rope_type!r} is {rope.get('factor')!r}; it must be at least 1")
    window = rope.get("original_max_position_embeddings")
    if window is not None and not _is_number(window, at_least=1):
        raise ValueError(f"original_max_position_embeddings={window!r} of the rope settings must be at least 1")


def _is_number(value, at_least: float) -> bool:
    return isinstance(value, int | float) and at_least <= value < float("inf")
