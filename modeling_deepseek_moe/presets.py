"""Configurations of the released models by name, as their `config.json` files state them (FACTS 7.1, 7.2).

Each preset is written like the released json: the lineage (`model_type`) supplies what the json leaves out.
"""

_YARN = {"type": "yarn", "beta_fast": 32, "beta_slow": 1, "factor": 40, "original_max_position_embeddings": 4096}
_YARN_V2 = {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707}
_YARN_V3 = {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0}
_YARN_K2 = {**_YARN_V3, "factor": 32, "beta_fast": 1.0, "beta_slow": 1.0}

PRESETS = {
    "deepseek-moe-16b": {
        "model_type": "deepseek",
        "vocab_size": 102400,
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
        "max_position_embeddings": 4096,
        "dtype": "bfloat16",
    },
    "deepseek-v2-lite": {
        "model_type": "deepseek_v2",
        "vocab_size": 102400,
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
        "q_lora_rank": None,
        "rope_scaling": _YARN_V2,
        "max_position_embeddings": 163840,
        "dtype": "bfloat16",
    },
    "deepseek-v2": {
        "model_type": "deepseek_v2",
        "vocab_size": 102400,
        "hidden_size": 5120,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": 60,
        "num_attention_heads": 128,
        "n_routed_experts": 160,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
        "q_lora_rank": 1536,
        "topk_method": "group_limited_greedy",
        "n_group": 8,
        "topk_group": 3,
        "routed_scaling_factor": 16.0,
        "rope_scaling": _YARN_V2,
        "max_position_embeddings": 163840,
        "dtype": "bfloat16",
    },
    "deepseek-v3": {
        "model_type": "deepseek_v3",
        "rope_scaling": _YARN_V3,
        "max_position_embeddings": 163840,
        "dtype": "bfloat16",
    },
    "moonlight-16b-a3b": {
        "model_type": "deepseek_v3",
        "vocab_size": 163840,
        "hidden_size": 2048,
        "intermediate_size": 11264,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
        "q_lora_rank": None,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 2.446,
        "aux_loss_alpha": 0.001,
        "rope_theta": 50000.0,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
        "num_nextn_predict_layers": 0,
        "bos_token_id": 163584,
        "eos_token_id": 163585,
        "dtype": "bfloat16",
    },
    "kimi-k2": {
        "model_type": "kimi_k2",
        "vocab_size": 163840,
        "num_attention_heads": 64,
        "n_routed_experts": 384,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 2.827,
        "aux_loss_alpha": 0.001,
        "rope_theta": 50000.0,
        "rope_scaling": _YARN_K2,
        "max_position_embeddings": 131072,
        "num_nextn_predict_layers": 0,
        "bos_token_id": 163584,
        "eos_token_id": 163585,
        "dtype": "bfloat16",
    },
}

# The siblings' sizes are the defaults of transformers' own configuration classes (5.24), which are those of the
# released models; those of GLM-4.5, GLM-4.5-Air being the default there, are as Megatron's recipes for it state them.
PRESETS |= {
    "glm-4.7-flash": {
        "model_type": "glm4_moe_lite",
        "num_nextn_predict_layers": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "dtype": "bfloat16",
    },
    "glm-4.5-air": {
        "model_type": "glm4_moe",
        "attention_bias": True,
        "num_nextn_predict_layers": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "partial_rotary_factor": 0.5},
        "dtype": "bfloat16",
    },
    "glm-4.5": {
        "model_type": "glm4_moe",
        "hidden_size": 5120,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": 92,
        "n_routed_experts": 160,
        "first_k_dense_replace": 3,
        "routed_scaling_factor": 2.5,
        "use_qk_norm": True,
        "attention_bias": True,
        "num_nextn_predict_layers": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "partial_rotary_factor": 0.5},
        "dtype": "bfloat16",
    },
    "sarvam-105b": {
        "model_type": "sarvam_mla",
        "dtype": "bfloat16",
    },
    "mistral-small-4": {"model_type": "mistral4", "dtype": "bfloat16"},
    "deepseek-v3.2": {
        "model_type": "deepseek_v32",
        "rope_scaling": _YARN_V3,
        "num_nextn_predict_layers": 1,
        "dtype": "bfloat16",
    },
}

# Models of the same shape, and what their own json says differently.
_SIBLINGS = {
    "deepseek-moe-16b": {"deepseek-moe-16b-base": {}, "deepseek-moe-16b-chat": {}},
    "deepseek-v2-lite": {
        "deepseek-v2-lite-chat": {},
        "deepseek-coder-v2-lite": {},
        "deepseek-coder-v2-lite-base": {},
        "deepseek-coder-v2-lite-instruct": {},
    },
    "deepseek-v2": {
        "deepseek-v2-chat": {},
        "deepseek-v2-chat-0628": {},
        "deepseek-v2.5": {},
        "deepseek-v2.5-1210": {},
        "deepseek-coder-v2": {},
        "deepseek-coder-v2-base": {},
        "deepseek-coder-v2-instruct": {},
        "deepseek-coder-v2-instruct-0724": {},
    },
    "deepseek-v3": {
        "deepseek-v3-base": {},
        "deepseek-v3-0324": {},
        "deepseek-v3.1": {},
        "deepseek-v3.1-base": {},
        "deepseek-v3.1-terminus": {},
        "deepseek-r1": {"aux_loss_alpha": 0.001},
        "deepseek-r1-zero": {"aux_loss_alpha": 0.001},
        "deepseek-r1-0528": {"aux_loss_alpha": 0.001},
    },
    "moonlight-16b-a3b": {"moonlight-16b-a3b-instruct": {"eos_token_id": 163586}},
    "kimi-k2": {
        "kimi-k2-base": {},
        "kimi-k2-instruct": {},
        # The text part; FACTS 7.2.
        "kimi-k2.5": {
            "rms_norm_eps": 1e-5,
            "rope_scaling": {**_YARN_V3, "factor": 64},
            "max_position_embeddings": 262144,
            "pad_token_id": 163839,
        },
    },
    "glm-4.5": {"glm-4.5-base": {}, "glm-4.6": {"max_position_embeddings": 202752}},
    "glm-4.5-air": {"glm-4.5-air-base": {}},
    "mistral-small-4": {"mistral-small-4-119b-2603": {}},
    "deepseek-v3.2": {"deepseek-v3.2-exp": {}},
}

PRESET_OF_SIBLING = {sibling: preset for preset, siblings in _SIBLINGS.items() for sibling in siblings}


def released_json(name: str) -> dict | None:
    """What the json of the released model `name`, a preset or a sibling of one, says; None for any other name."""
    preset = PRESET_OF_SIBLING.get(name, name)
    if preset not in PRESETS:
        return None
    return PRESETS[preset] | _SIBLINGS.get(preset, {}).get(name, {})
