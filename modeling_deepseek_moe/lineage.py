"""What a `config.json` of each DeepSeekMoE generation means: the defaults its own class fills in, and its semantics.

Source: FACTS 7 (released configs) and 8.3 (where the implementations differ). A field the json omits takes the
value of that generation's configuration class, not of ours.
"""

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

LINEAGE_DEFAULTS = {"deepseek": _V1, "deepseek_v2": _V2, "deepseek_v3": _V3, "kimi_k2": _V3}

_FOREIGN_CLASS_PREFIXES = ("DeepseekV2For", "DeepseekV3For", "DeepseekFor", "DeepseekV2Model", "DeepseekV3Model")


def canonical_config_dict(config_dict: dict) -> dict:
    """The same configuration as a `deepseek_moe` one; a dict of that type, or of none, is returned as it is.

    Args:
        config_dict: a parsed `config.json` of type `deepseek`, `deepseek_v2`, `deepseek_v3` or `kimi_k2`.

    Raises:
        ValueError: not an object, or of a type this family does not have.
    """
    if not isinstance(config_dict, dict):
        raise ValueError(f"a configuration is a JSON object, not a {type(config_dict).__name__}")
    model_type = config_dict.get("model_type") or "deepseek_moe"
    if model_type == "deepseek_moe":
        return config_dict
    if model_type not in LINEAGE_DEFAULTS:
        choices = ", ".join(map(repr, [*LINEAGE_DEFAULTS, "deepseek_moe"]))
        raise ValueError(f"model_type={model_type!r} is not one of {choices}")
    defaults = LINEAGE_DEFAULTS[model_type]
    merged = {**defaults, **config_dict, "model_type": "deepseek_moe"}
    # transformers writes the MTP depth of its own DeepSeek classes under either name.
    if "num_mtp_layers" in merged:
        merged["num_nextn_predict_layers"] = merged.pop("num_mtp_layers")
    merged.pop("head_dim", None)  # every one of these models derives it
    # The original's remote code is replaced by this package; pointing at its files would break a saved copy.
    merged.pop("auto_map", None)
    if merged.get("architectures"):
        merged["architectures"] = [_own_class_name(name) for name in merged["architectures"]]
    return merged


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


def _own_class_name(name: str) -> str:
    for prefix in _FOREIGN_CLASS_PREFIXES:
        if name.startswith(prefix):
            kind = "Model" if prefix.endswith("Model") else "For"
            return f"DeepseekMoe{kind}{name[len(prefix) :]}"
    return name
