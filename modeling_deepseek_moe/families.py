"""What a `config.json` of each family of the DeepSeekMoE block means: one entry a `model_type`.

A family is data: the names it gives our fields, the values its own configuration class fills in for what a json
omits (never ours), its semantics as values of our fields, and how its checkpoints are named and saved. Sources:
FACTS 7 (released configs) and 8.3 (where implementations differ) for DeepSeek's own; transformers' configuration
classes for the siblings.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from .rope_spelling import join_rope_spellings

_V1 = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "moe_intermediate_size": 1407,
    "num_hidden_layers": 30,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "vocab_size": 102400,
    "n_shared_experts": None,
    "n_routed_experts": None,
    "num_experts_per_tok": None,
    "first_k_dense_replace": 0,
    "moe_layer_freq": 1,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "norm_topk_semantics": "deepseek_v2",
    "routed_scaling_factor": 1.0,
    "aux_loss_alpha": 0.001,
    "seq_aux": True,
    "attention_bias": False,
    "rms_norm_eps": 1e-6,
    "kv_lora_rank": None,
    "q_lora_rank": None,
    "qk_nope_head_dim": None,
    "qk_rope_head_dim": None,
    "v_head_dim": None,
    "rope_interleave": False,
    "max_position_embeddings": 2048,
    "num_nextn_predict_layers": 0,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
}

_V2 = {
    **_V1,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "rope_interleave": True,
}

_V3 = {
    **_V2,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "vocab_size": 129280,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "n_group": 8,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "norm_topk_semantics": "deepseek_v3",
    "routed_scaling_factor": 2.5,
    # The json of V3 and V3-Base has no such field; 0.0001 is the paper's alpha (FACTS 3.2).
    "aux_loss_alpha": 0.0001,
    "max_position_embeddings": 4096,
    "num_nextn_predict_layers": 1,
    "bos_token_id": 0,
    "eos_token_id": 1,
}

_GLM4_MOE_LITE = {
    **_V3,
    "vocab_size": 154880,
    "hidden_size": 2048,
    "intermediate_size": 10240,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 47,
    "num_attention_heads": 20,
    "num_key_value_heads": 20,
    "n_routed_experts": 64,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.8,
    "q_lora_rank": 768,
    "qk_nope_head_dim": 192,
    "v_head_dim": 256,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 202752,
    "num_nextn_predict_layers": 0,
}

_GLM4_MOE = {
    **_V3,
    "vocab_size": 151552,
    "hidden_size": 4096,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 46,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "n_routed_experts": 128,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "kv_lora_rank": None,
    "q_lora_rank": None,
    "qk_nope_head_dim": None,
    "qk_rope_head_dim": None,
    "v_head_dim": None,
    "rope_interleave": False,
    "partial_rotary_factor": 0.5,
    "attention_output_bias": False,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "bos_token_id": None,
    "eos_token_id": None,
}

_SARVAM_MLA = {
    **_V3,
    "vocab_size": 262144,
    "hidden_size": 4096,
    "intermediate_size": 16384,
    "num_hidden_layers": 32,
    "num_attention_heads": 64,
    "n_routed_experts": 128,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": None,
    "num_nextn_predict_layers": 0,
    "initializer_range": 0.006,
}

_MISTRAL4 = {
    **_V3,
    "vocab_size": 131072,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "n_routed_experts": 128,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 0,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "group_limited_top2",
    "scoring_func": "softmax",
    "routed_scaling_factor": 1.0,
    "router_dtype": "model",
    "kv_lora_rank": 256,
    "q_lora_rank": 1024,
    "qk_nope_head_dim": 64,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 128.0,
        "original_max_position_embeddings": 8192,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale_all_dim": 1.0,
        "mscale": 1.0,
        "llama_4_scaling_beta": 0.1,
    },
    "max_position_embeddings": 1048576,
    "num_nextn_predict_layers": 0,
    "pad_token_id": 11,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_DOTS1 = {
    **_GLM4_MOE,
    "vocab_size": 152064,
    "hidden_size": 4608,
    "num_hidden_layers": 62,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "use_qk_norm": True,
    "n_routed_experts": None,
    "n_shared_experts": None,
    "num_experts_per_tok": None,
    "first_k_dense_replace": 0,
    "norm_topk_prob": False,
    "partial_rotary_factor": None,
    "attention_output_bias": None,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "num_nextn_predict_layers": 0,
}

_DEEPSEEK_V32 = {
    **_V3,
    "max_position_embeddings": 163840,
    "num_nextn_predict_layers": 0,
    "index_topk": 2048,
    "index_head_dim": 128,
    "index_n_heads": 64,
}


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
    """

    defaults: Mapping[str, object]
    class_prefixes: tuple[str, ...]
    renamed: Mapping[str, str] = field(default_factory=dict)
    only: Mapping[str, tuple | None] = field(default_factory=dict)
    fixed: tuple[str, ...] = ()
    keeps_type: bool = True
    stacks_experts: bool = False
    states_rotary_share: bool = False


# transformers writes the MTP depth under a name of its own.
_MTP_DEPTH = {"num_mtp_layers": "num_nextn_predict_layers"}
_SARVAM_NAMES = {"num_experts": "n_routed_experts", "num_shared_experts": "n_shared_experts"}

FAMILIES = {
    "deepseek": Family(_V1, ("Deepseek",), _MTP_DEPTH, keeps_type=False),
    "deepseek_v2": Family(_V2, ("DeepseekV2",), _MTP_DEPTH, keeps_type=False),
    "deepseek_v3": Family(_V3, ("DeepseekV3",), _MTP_DEPTH, keeps_type=False),
    "kimi_k2": Family(_V3, ("DeepseekV3",), _MTP_DEPTH, keeps_type=False),
    "glm4_moe_lite": Family(_GLM4_MOE_LITE, ("Glm4MoeLite",), _MTP_DEPTH),
    "glm4_moe": Family(_GLM4_MOE, ("Glm4Moe",), _MTP_DEPTH),
    "sarvam_mla": Family(_SARVAM_MLA, ("SarvamMLA", "DeepseekV3"), _MTP_DEPTH | _SARVAM_NAMES),
    "dots1": Family(
        _DOTS1,
        ("Dots1",),
        {},
        {"layer_types": ("full_attention",), "sliding_window": (None,), "max_window_layers": None},
        fixed=("use_qk_norm",),
    ),
    "mistral4": Family(_MISTRAL4, ("Mistral4",), stacks_experts=True, states_rotary_share=True),
    "deepseek_v32": Family(
        _DEEPSEEK_V32, ("DeepseekV32",), _MTP_DEPTH, {"layer_types": ("indexed_attention",), "mlp_bias": (False,)}
    ),
}

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


def canonical_config_dict(config_dict: dict) -> dict:
    """The same configuration as a `deepseek_moe` one; a dict of that type, or of none, is returned as it is.

    Args:
        config_dict: a parsed `config.json` whose `model_type` is one of `FAMILIES`.

    Raises:
        ValueError: not an object, of a type this package does not have, or with a value that it cannot express.
    """
    if not isinstance(config_dict, dict):
        raise ValueError(f"a configuration is a JSON object, not a {type(config_dict).__name__}")
    model_type = config_dict.get("model_type") or "deepseek_moe"
    if model_type == "deepseek_moe":
        return config_dict
    if model_type not in FAMILIES:
        choices = ", ".join(map(repr, [*FAMILIES, "deepseek_moe"]))
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
    derived = {"family", "qk_head_dim", "partial_rotary_factor", *SEMANTICS, *family.fixed} | (
        {"head_dim"} - own.keys()
    )
    kept = (config.to_diff_dict().keys() | own.keys()) - derived
    written = {name: value for name, value in values.items() if name in kept}
    written |= {"model_type": config.family}
    written |= {"architectures": [name.replace("DeepseekMoe", family.class_prefixes[0]) for name in names]}
    if family.states_rotary_share:
        share = config.qk_rope_head_dim / config.qk_head_dim
        written["rope_parameters"] = {**written["rope_parameters"], "partial_rotary_factor": share}
    return written


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
