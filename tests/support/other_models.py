"""Tiny models of transformers' own classes with routed experts."""

import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)


def transformers_model(name: str):
    """A random model of a type of transformers' own, in eval mode."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 96, "initializer_range": 0.1}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2, "pad_token_id": 0}
    moe = {"moe_intermediate_size": 16, "intermediate_size": 48}
    latent = {"kv_lora_rank": 16, "q_lora_rank": None, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    config, model_class = {
        "qwen3_moe": (Qwen3MoeConfig(**sizes, **moe, num_experts=6, head_dim=8), Qwen3MoeForCausalLM),
        "mixtral": (MixtralConfig(**sizes, intermediate_size=16, num_local_experts=6), MixtralForCausalLM),
        "olmoe": (OlmoeConfig(**sizes, intermediate_size=16, num_experts=6), OlmoeForCausalLM),
        "deepseek_v3": (
            DeepseekV3Config(
                **{**sizes, "num_key_value_heads": 4},
                **moe,
                **latent,
                n_routed_experts=8,
                n_group=2,
                topk_group=1,
                first_k_dense_replace=1,
            ),
            DeepseekV3ForCausalLM,
        ),
        "gpt_oss": (
            GptOssConfig(**sizes, intermediate_size=16, num_local_experts=6, head_dim=8, layer_types=None),
            GptOssForCausalLM,
        ),
    }[name]
    torch.manual_seed(0)
    return model_class(config).eval()
