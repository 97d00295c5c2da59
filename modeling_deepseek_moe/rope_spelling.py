"""The two spellings of the rotary settings: `rope_parameters`, and the older `rope_theta` with `rope_scaling`."""

from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Fields of a config beside `rope_parameters` that mean a part of it.
OLDER_FIELDS = ("rope_theta", "rope_scaling", "original_max_position_embeddings", "partial_rotary_factor")
_WINDOW = "original_max_position_embeddings"
_BETA = "llama_4_scaling_beta"  # of the factor on queries, as Mistral 4 has it
_OTHER_NAMES = {"deepseek_yarn": "yarn"}  # Sarvam's
# What each rope type reads, besides `rope_theta`. A type that somebody else has registered may read anything.
_KEYS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", _WINDOW, _BETA, "attention_factor", "beta_fast", "beta_slow", "mscale", "truncate"),
    "longrope": ("factor", _WINDOW, _BETA, "attention_factor", "short_factor", "long_factor"),
    "llama3": ("factor", _WINDOW, _BETA, "low_freq_factor", "high_freq_factor"),
    "proportional": ("factor",),
}
_REQUIRED = {
    **dict.fromkeys(("linear", "dynamic", "yarn"), ("factor",)),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}
# Other programs read these with YaRN and transformers' classes do not; so they are kept, and said.
READ_ELSEWHERE = ("attn_factor", "extrapolation_factor")


def join_rope_spellings(rope_parameters: dict | None, older: dict) -> dict:
    """The rotary settings in the newer spelling, always with a `rope_type`, and without those that are None.

    Args:
        rope_parameters: the newer spelling, or None.
        older: those of `OLDER_FIELDS` that are there.

    Raises:
        ValueError: the spellings contradict each other, or say what no model can do or does not read.
    """
    scaling = older.get("rope_scaling")
    for field, value in (("rope_parameters", rope_parameters), ("rope_scaling", scaling)):
        if value is not None and not isinstance(value, dict):
            raise ValueError(f"{field}={value!r} is not an object")
    joined = _with_type(rope_parameters or scaling or {})
    beside = {field: older[field] for field in OLDER_FIELDS if field in older and field != "rope_scaling"}
    for field, value in beside.items():
        if value is not None:
            joined.setdefault(field, value)
    contradicted = [field for field in OLDER_FIELDS if field in older and not _agrees(joined, field, older[field])]
    if contradicted:
        field = contradicted[0]
        name, settings = ("rope_parameters", rope_parameters) if rope_parameters else ("rope_scaling", scaling)
        raise ValueError(f"{field}={older[field]} contradicts {name}={settings}; keep one of them")
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
        merged = {field: value for field, value in merged.items() if field not in OLDER_FIELDS}
    elif merged.get("rope_parameters") and not overrides.keys().isdisjoint(OLDER_FIELDS):
        merged |= older_rope_spelling(merged.pop("rope_parameters"))
    return merged | overrides


def _with_type(rope: dict) -> dict:
    rope = {name: value for name, value in rope.items() if value is not None}
    rope_type = rope.pop("type", None)
    rope_type = rope.pop("rope_type", None) or rope_type
    if rope_type is None and "factor" in rope:
        raise ValueError(f"rope_scaling={rope} has no type; choices: {', '.join(ROPE_INIT_FUNCTIONS)}")
    return {**rope, "rope_type": _OTHER_NAMES.get(rope_type, rope_type) or "default"}


def _agrees(joined: dict, field: str, value) -> bool:
    if field != "rope_scaling":
        return value is None or value == joined[field]
    return {**joined, **_with_type(value or {})} == joined


def _check(rope: dict) -> None:
    rope_type, choices = rope["rope_type"], ("default", *ROPE_INIT_FUNCTIONS)
    if rope_type not in choices:
        raise ValueError(f"rope type {rope_type!r} is not one of {', '.join(map(repr, choices))}")
    theta = rope.get("rope_theta", 10000.0)
    if not _is_number(theta, at_least=1) or theta == 1:
        raise ValueError(f"rope_theta={theta!r} must be a number larger than 1")
    if rope_type not in _KEYS:
        return
    _check_keys(rope, rope_type)
    for name in _REQUIRED.get(rope_type, ()):
        if name not in rope and name != "factor":
            raise ValueError(f"rope type {rope_type!r} needs {name}")
    needs_factor = "factor" in _REQUIRED.get(rope_type, ()) or "mscale_all_dim" in rope
    if ("factor" in rope or needs_factor) and not _is_number(rope.get("factor"), at_least=1):
        raise ValueError(f"the factor of rope type {rope_type!r} is {rope.get('factor')!r}; it must be at least 1")
    if not _is_number(rope.get(_WINDOW, 1), at_least=1):
        raise ValueError(f"{_WINDOW}={rope[_WINDOW]!r} of the rope settings must be at least 1")
    for name in ("mscale", "mscale_all_dim", "beta_fast", "beta_slow", _BETA):
        if not _is_number(rope.get(name, 0), at_least=0):
            raise ValueError(f"{name}={rope[name]!r} of the rope settings must be a number of at least 0")
    for name in ("attention_factor", "low_freq_factor", "high_freq_factor", "partial_rotary_factor"):
        if not _is_number(rope.get(name, 1), at_least=0) or rope.get(name) == 0:
            raise ValueError(f"{name}={rope[name]!r} of the rope settings must be a number above 0")
    if not isinstance(rope.get("truncate", True), bool):
        raise ValueError(f"truncate={rope['truncate']!r} of the rope settings must be true or false")
    slow, fast = rope.get("beta_slow") or 1, rope.get("beta_fast") or 32  # zero means the default, as in transformers
    if slow > fast:
        raise ValueError(f"beta_slow={slow} of the rope settings is larger than beta_fast={fast}")
    if rope_type == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        raise ValueError(
            f"low_freq_factor={rope['low_freq_factor']} of the rope settings is not smaller than "
            f"high_freq_factor={rope['high_freq_factor']}"
        )
    if rope.get("partial_rotary_factor", 1) > 1:
        raise ValueError(f"partial_rotary_factor={rope['partial_rotary_factor']} of the rope settings is more than 1")


def _check_keys(rope: dict, rope_type: str) -> None:
    # Attention scales by `mscale_all_dim` whatever the type, as DeepSeek's own does.
    known = {"rope_theta", "rope_type", "partial_rotary_factor", "max_position_embeddings", *_KEYS[rope_type]}
    known |= set() if rope_type == "default" else {"mscale_all_dim"}
    for name, value in rope.items():
        if name in known:
            continue
        if rope_type == "yarn" and name in READ_ELSEWHERE:
            logger.warning_once(
                f"{name}={value} of the rope settings is not used, as in transformers' own classes; other programs do "
                "use it: attention_factor says what cos and sin are multiplied by"
            )
            continue
        reads = ", ".join(sorted(known - {"rope_theta", "rope_type", "max_position_embeddings"}))
        raise ValueError(
            f"{name}={value!r} of the rope settings is not read by rope type {rope_type!r} (it reads {reads}): leave "
            "it out, or name the type that it is for"
        )


def check_fit(config) -> None:
    """Raise a ValueError for rotary settings that do not fit the other fields of a `DeepseekMoeConfig`."""
    rope, rotary_dim = config.rope_parameters, config.rotary_dim
    # Mistral 4 may repeat there how many positions there are.
    if rope.get("max_position_embeddings", config.max_position_embeddings) != config.max_position_embeddings:
        raise ValueError(
            f"max_position_embeddings={rope['max_position_embeddings']} of the rope settings contradicts the config's "
            f"max_position_embeddings={config.max_position_embeddings}; keep one of them"
        )
    for name in ("short_factor", "long_factor") if rope["rope_type"] == "longrope" else ():
        values = rope[name]
        if not isinstance(values, list) or not all(_is_number(value, at_least=0) and value for value in values):
            raise ValueError(f"{name} of the rope settings is not a list of numbers above 0")
        if len(values) != rotary_dim // 2:
            raise ValueError(
                f"{name} of the rope settings has {len(values)} numbers, and the rotary width {rotary_dim} has "
                f"{rotary_dim // 2} pairs"
            )


def _is_number(value, at_least: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and at_least <= value < float("inf")
