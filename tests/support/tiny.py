"""Tiny random models of every generation, small enough to run in milliseconds and shaped so that nothing is trivial.

The configurations are written like DeepSeek's own `config.json` files (`JSON_OF_LINEAGE`) and read the same way.
Widths are multiples of 16 bytes in bfloat16, as `grouped_mm` asks; weights are large, so that logits differ visibly.
"""

import torch

from modeling_deepseek_moe import DeepseekMoeConfig, DeepseekMoeForCausalLM

_SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "float32",
}
_LATENT = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
_YARN = {"type": "yarn", "factor": 4, "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 64}
_GROUPS = {"n_group": 4, "topk_group": 2}

JSON_OF_LINEAGE = {
    "v1": {**_SIZES, "model_type": "deepseek", "architectures": ["DeepseekForCausalLM"], "num_key_value_heads": 2},
    "v2_lite": {
        **_SIZES,
        **_LATENT,
        "model_type": "deepseek_v2",
        "architectures": ["DeepseekV2ForCausalLM"],
        "q_lora_rank": None,
        "topk_method": "greedy",
        "rope_scaling": {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    },
    "v2": {
        **_SIZES,
        **_LATENT,
        **_GROUPS,
        "model_type": "deepseek_v2",
        "architectures": ["DeepseekV2ForCausalLM"],
        "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 4.0,
        "rope_scaling": {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    },
    "v3": {
        **_SIZES,
        **_LATENT,
        **_GROUPS,
        "model_type": "deepseek_v3",
        "architectures": ["DeepseekV3ForCausalLM"],
        "num_nextn_predict_layers": 1,
        "rope_scaling": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    },
    "moonlight": {
        **_SIZES,
        **_LATENT,
        "model_type": "deepseek_v3",
        "architectures": ["DeepseekV3ForCausalLM"],
        "q_lora_rank": None,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 2.446,
        "rms_norm_eps": 1e-5,
        "rope_theta": 50000.0,
        "num_nextn_predict_layers": 0,
    },
    "kimi": {
        **_SIZES,
        **_LATENT,
        "model_type": "kimi_k2",
        "architectures": ["DeepseekV3ForCausalLM"],
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 2.827,
        "rope_theta": 50000.0,
        "rope_scaling": {**_YARN, "beta_fast": 1.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0},
        "num_nextn_predict_layers": 0,
    },
}


def tiny_config(lineage: str, **overrides) -> DeepseekMoeConfig:
    """The tiny configuration of a lineage (a key of `JSON_OF_LINEAGE`), with fields set differently."""
    return DeepseekMoeConfig.from_dict({**JSON_OF_LINEAGE[lineage], **overrides})


def v1_config(**overrides) -> DeepseekMoeConfig:
    """DeepSeekMoE 16B: grouped-query attention, softmax scores, greedy choice."""
    return tiny_config("v1", **overrides)


def v2_lite_config(**overrides) -> DeepseekMoeConfig:
    """DeepSeek-V2-Lite: latent attention without query compression, greedy choice, YaRN."""
    return tiny_config("v2_lite", **overrides)


def v2_config(**overrides) -> DeepseekMoeConfig:
    """DeepSeek-V2: compressed queries, choice limited to 2 of 4 groups by their best expert, YaRN."""
    return tiny_config("v2", **overrides)


def v3_config(**overrides) -> DeepseekMoeConfig:
    """DeepSeek-V3: sigmoid scores with a bias, 2 of 4 groups by their two best, one MTP module, YaRN."""
    return tiny_config("v3", **overrides)


def moonlight_config(**overrides) -> DeepseekMoeConfig:
    """Moonlight: V3's routing without groups, queries uncompressed, no YaRN."""
    return tiny_config("moonlight", **overrides)


def kimi_config(**overrides) -> DeepseekMoeConfig:
    """Kimi-K2: V3's routing without groups, a YaRN ramp that is a step."""
    return tiny_config("kimi", **overrides)


CONFIG_OF_LINEAGE = {
    "v1": v1_config,
    "v2_lite": v2_lite_config,
    "v2": v2_config,
    "v3": v3_config,
    "moonlight": moonlight_config,
    "kimi": kimi_config,
}


def tiny_model(config: DeepseekMoeConfig, seed: int = 0, model_class=DeepseekMoeForCausalLM):
    """A random model in eval mode, the same for the same seed; routing biases are random too, so that they matter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.2)
    return model.eval()


def tiny_ids(config: DeepseekMoeConfig, batch: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    """Random token ids `[batch, length]`, the same for the same seed."""
    return torch.randint(config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))
