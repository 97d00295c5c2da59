"""What a `config.json` of each family of the DeepSeekMoE block means: one entry a `model_type`.

A family is data: the names it gives our fields, the values its own configuration class fills in for what a json
omits (never ours), its semantics as values of our fields, and how its checkpoints are named and saved. Sources:
FACTS 7 (released configs) and 8.3 (where implementations differ) for DeepSeek's own; transformers' configuration
classes for the siblings.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from transformers.utils import logging

from .family_defaults import DEEPSEEK_V32, DOTS1, GLM4_MOE, GLM4_MOE_LITE, MISTRAL4, SARVAM_MLA, V1, V2, V3
from .rope_spelling import join_rope_spellings

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Family:
    """One `model_type`.

    Attributes:
        defaults: our fields where its json omits them; semantics that the json never states are among them.
        class_prefixes: what the names of its classes begin with, before `For...` or `Model`.
        renamed: its name of a field -> ours.
        only: keys of its json that we have no field for, and the values that mean what this package does; None: any.
        fixed: fields that its class is written for one value of, besides those that no json states (`SEMANTICS`).
        keeps_type: a model read as this type is saved as it, config and tensor names; else as `deepseek_moe`.
        stacks_experts: its checkpoints hold the experts of a layer in two tensors, as memory does.
        states_rotary_share: its rope settings say which share of a latent head is rotated.
        has_fp8_blocks: in FP8 it has DeepSeek's blocks; else what it has needs more than the weights (FACTS 3.4).
    """

    defaults: Mapping[str, object]
    class_prefixes: tuple[str, ...]
    renamed: Mapping[str, str] = field(default_factory=dict)
    only: Mapping[str, tuple | None] = field(default_factory=dict)
    fixed: tuple[str, ...] = ()
    keeps_type: bool = True
    stacks_experts: bool = False
    states_rotary_share: bool = False
    has_fp8_blocks: bool = True


# transformers writes the MTP depth under a name of its own.
_MTP_DEPTH = {"num_mtp_layers": "num_nextn_predict_layers"}
_SARVAM_NAMES = {"num_experts": "n_routed_experts", "num_shared_experts": "n_shared_experts"}

FAMILIES = {
    "deepseek": Family(V1, ("Deepseek",), _MTP_DEPTH, keeps_type=False),
    "deepseek_v2": Family(V2, ("DeepseekV2",), _MTP_DEPTH, keeps_type=False),
    "deepseek_v3": Family(V3, ("DeepseekV3",), _MTP_DEPTH, keeps_type=False),
    "kimi_k2": Family(V3, ("DeepseekV3",), _MTP_DEPTH, keeps_type=False),
    "glm4_moe_lite": Family(GLM4_MOE_LITE, ("Glm4MoeLite",), _MTP_DEPTH),
    "glm4_moe": Family(GLM4_MOE, ("Glm4Moe",), _MTP_DEPTH),
    "sarvam_mla": Family(SARVAM_MLA, ("SarvamMLA", "DeepseekV3"), _MTP_DEPTH | _SARVAM_NAMES),
    "dots1": Family(
        DOTS1,
        ("Dots1",),
        only={"layer_types": ("full_attention",), "sliding_window": (None,), "max_window_layers": None},
        fixed=("use_qk_norm",),
    ),
    "mistral4": Family(MISTRAL4, ("Mistral4",), stacks_experts=True, states_rotary_share=True, has_fp8_blocks=False),
    "deepseek_v32": Family(
        DEEPSEEK_V32, ("DeepseekV32",), _MTP_DEPTH, {"layer_types": ("indexed_attention",), "mlp_bias": (False,)}
    ),
}

_KERNEL_KEYS = (
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "experts_implementation",
    "_experts_implementation",
    "_experts_implementation_internal",
)


@dataclass(frozen=True)
class Wrapper:
    """A `model_type` of several parts, of which one is a model of ours: its `text_config`, under `TEXT_PREFIX`.

    Attributes:
        text_types: the types of `FAMILIES` that its text part can be.
        other_parts: what the names of all other tensors begin with.
    """

    text_types: tuple[str, ...]
    other_parts: tuple[str, ...]


TEXT_PREFIX = "language_model."
# Names of the released files: FACTS 7.2.
WRAPPERS = {
    "kimi_k25": Wrapper(("kimi_k2", "deepseek_v3"), ("vision_tower.", "mm_projector.")),
    "mistral3": Wrapper(("mistral4",), ("vision_tower.", "multi_modal_projector.")),
}
OTHER_PARTS = tuple(sorted({part for wrapper in WRAPPERS.values() for part in wrapper.other_parts}))
# What the text part takes from around it where it does not say it itself.
_AROUND_TEXT = ("dtype", "torch_dtype", "quantization_config", "tie_word_embeddings")

_ROPE_KEYS = ("rope_parameters", "rope_scaling", "rope_theta")
# What no json states: the family's class is written for one value.
SEMANTICS = (
    "attention_output_bias",
    "aux_loss_counts_padding",
    "latent_norm_eps",
    "moe_layer_freq",
    "norm_topk_semantics",
    "rope_interleave",
    "router_dtype",
    "scoring_func",
    "topk_method",
)


def without_hub_kernels(config_dict: dict) -> dict:
    """The same configuration, without kernels that would be fetched from the Hub: only a caller names these."""
    if not isinstance(config_dict, dict):
        return config_dict
    asked = {name for name in _KERNEL_KEYS if "/" in str(config_dict.get(name))}
    for name in sorted(asked):
        logger.warning_once(
            f"{name}={config_dict[name]!r} of config.json is code on the Hub, which is not run unasked: pass it "
            "yourself if you trust it"
        )
    rest = {name: value for name, value in config_dict.items() if name not in asked}
    return rest | ({"text_config": without_hub_kernels(rest["text_config"])} if "text_config" in rest else {})


def wrapper_of(config_dict: dict) -> Wrapper | None:
    """The wrapper that a parsed `config.json` is of; None for a model of one part."""
    model_type = config_dict.get("model_type")
    return WRAPPERS.get(model_type) if isinstance(model_type, str) else None


def text_config_dict(config_dict: dict) -> dict:
    """What a `config.json` says of the text part: of a wrapper its `text_config`, else all of it.

    Raises:
        ValueError: the text part of a wrapper is missing, or of a type that is none of ours.
    """
    wrapper = wrapper_of(config_dict)
    if wrapper is None:
        return config_dict
    model_type, text = config_dict["model_type"], config_dict.get("text_config")
    if not isinstance(text, dict):
        raise ValueError(f"text_config={text!r} of a {model_type} is not an object")
    if text.get("model_type") not in wrapper.text_types:
        choices = " or ".join(map(repr, wrapper.text_types))
        raise ValueError(f"text_config.model_type={text.get('model_type')!r} of a {model_type} is not {choices}")
    return {name: config_dict[name] for name in _AROUND_TEXT if name in config_dict} | text


def with_text_fields(config_dict: dict, fields: dict) -> dict:
    """A `config.json` with other values of the text part."""
    if wrapper_of(config_dict) is None:
        return config_dict | fields
    return config_dict | {"text_config": config_dict["text_config"] | fields}


def canonical_config_dict(config_dict: dict) -> dict:
    """The same configuration as a `deepseek_moe` one; a dict of that type, or of none, is returned as it is.

    Args:
        config_dict: a parsed `config.json` whose `model_type` is one of `FAMILIES`, or one of `WRAPPERS`, whose text
            part is meant.

    Raises:
        ValueError: not an object, of a type this package does not have, or with a value that it cannot express.
    """
    if not isinstance(config_dict, dict):
        raise ValueError(f"a configuration is a JSON object, not a {type(config_dict).__name__}")
    config_dict = text_config_dict(config_dict)
    model_type = config_dict.get("model_type") or "deepseek_moe"
    if model_type == "deepseek_moe":
        return config_dict
    if model_type not in FAMILIES:
        choices = ", ".join(map(repr, [*FAMILIES, *WRAPPERS, "deepseek_moe"]))
        raise ValueError(f"model_type={model_type!r} is not one of {choices}")
    family = FAMILIES[model_type]
    theirs = {family.renamed.get(name, name): value for name, value in config_dict.items()}
    for name, values in family.only.items():
        found = theirs.pop(name, None)
        for value in found if isinstance(found, list) else () if found is None else (found,):
            if values is not None and value not in values:
                raise ValueError(f"{name}={value!r} of a {model_type} is not {' or '.join(map(repr, values))}")
    has_rope = any(theirs.get(key) is not None for key in _ROPE_KEYS)
    defaults = {name: value for name, value in family.defaults.items() if not (has_rope and name in _ROPE_KEYS)}
    merged = {**defaults, **theirs, "model_type": "deepseek_moe"}
    share = merged.pop("partial_rotary_factor", None)
    if share is not None:  # older releases wrote it beside the rope settings
        older = {name: merged.pop(name) for name in ("rope_theta", "rope_scaling") if name in merged}
        rope = join_rope_spellings(merged.get("rope_parameters"), older)
        merged["rope_parameters"] = {"partial_rotary_factor": share, **rope}
    if family.keeps_type:
        merged["family"] = model_type
    if "head_dim" not in family.defaults:
        merged.pop("head_dim", None)  # the model derives it
    # The original's remote code is replaced by this package; pointing at its files would break a saved copy.
    merged.pop("auto_map", None)
    if merged.get("architectures"):
        merged["architectures"] = [_own_class_name(name, family) for name in merged["architectures"]]
    return merged


def family_config_dict(config) -> dict | None:
    """The `config.json` of the family that a `DeepseekMoeConfig` says it is of; None if of none.

    None, too, where that family's own class would not be the same model: a field that it is written for one value of
    has another, or the model has a head that it does not have. What only this package reads stands beside the family's
    own fields where it is not what a reader fills in, so that a reload with this package is the same model.
    """
    family = FAMILIES.get(config.family)
    if family is None or getattr(config, "auto_map", None):  # code that is exported reads this package's own
        return None
    values, own = config.to_dict(), family.defaults
    if any(values[name] != own[name] for name in (*SEMANTICS, *family.fixed) if name in own):
        return None
    if (values["kv_lora_rank"] is None) != (own["kv_lora_rank"] is None):
        return None
    names = values.get("architectures") or []
    if any(name not in ("DeepseekMoeForCausalLM", "DeepseekMoeModel") for name in names):
        return None
    derived = {"family", "qk_head_dim", "partial_rotary_factor", *SEMANTICS, *family.fixed}
    derived |= {"head_dim"} - own.keys()
    kept = (config.to_diff_dict().keys() | own.keys()) - derived
    written = {name: value for name, value in values.items() if name in kept}
    written |= {"model_type": config.family}
    written |= {"architectures": [name.replace("DeepseekMoe", family.class_prefixes[0]) for name in names]}
    if family.states_rotary_share:
        share = config.qk_rope_head_dim / config.qk_head_dim
        written["rope_parameters"] = {**written["rope_parameters"], "partial_rotary_factor": share}
    return written


class NamesNoCodeMixin:
    """`auto_map`, the code that comes with a checkpoint: an empty one is there, since TRL reads it, and not saved."""

    def __post_init__(self, **kwargs):
        super().__post_init__(**{"auto_map": {}, **kwargs})

    def to_dict(self) -> dict:
        fields = super().to_dict()
        if not fields.get("auto_map"):
            fields.pop("auto_map", None)
        return fields


def without_derived_head_dim(config_dict: dict) -> dict:
    """`config_dict` without a `head_dim` that only repeats `hidden_size / num_attention_heads`."""
    hidden, heads = config_dict.get("hidden_size"), config_dict.get("num_attention_heads")
    repeats = (
        isinstance(hidden, int) and isinstance(heads, int) and config_dict.get("head_dim") == hidden / (heads or 1)
    )
    return {name: value for name, value in config_dict.items() if name != "head_dim" or not repeats}


def _own_class_name(name: str, family: Family) -> str:
    for prefix in sorted(family.class_prefixes, key=len, reverse=True):
        kind = name.removeprefix(prefix)
        if kind != name and kind.startswith(("For", "Model")):
            return f"DeepseekMoe{kind}"
    return name
