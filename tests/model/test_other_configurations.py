"""Configurations the golden folders do not cover, against the literal reference in tests/support/reference.py."""

import pytest
import torch
from reference import reference_logits
from safetensors.torch import load_file

from modeling_deepseek_moe import DeepseekMoeConfig, DeepseekMoeForCausalLM, attention

SIZES = {
    "vocab_size": 53,
    "hidden_size": 24,
    "intermediate_size": 40,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.2,
    "max_position_embeddings": 512,
}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 20, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}
V1 = {**SIZES, "model_type": "deepseek"}
V2 = {**SIZES, **LATENT, "model_type": "deepseek_v2", "topk_method": "greedy", "n_group": 1, "topk_group": 1}
V3 = {
    **SIZES,
    **LATENT,
    "model_type": "deepseek_v3",
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "n_group": 4,
    "topk_group": 2,
    "num_nextn_predict_layers": 0,
}
YARN = {
    "type": "yarn",
    "factor": 8,
    "beta_fast": 16,
    "beta_slow": 2,
    "mscale": 1.0,
    "mscale_all_dim": 0.6,
    "original_max_position_embeddings": 32,
}
CASES = {
    "v1 odd heads": {**V1, "num_attention_heads": 3},
    "v1 grouped queries, one kv head": {**V1, "num_key_value_heads": 1},
    "v1 attention bias": {**V1, "attention_bias": True},
    "v1 one expert a token, normalised": {**V1, "num_experts_per_tok": 1, "norm_topk_prob": True},
    "v1 every second layer routes": {**V1, "num_hidden_layers": 4, "moe_layer_freq": 2, "first_k_dense_replace": 0},
    "v1 no shared experts": {**V1, "n_shared_experts": None},
    "v2 odd heads": {**V2, "num_attention_heads": 5},
    "v2 attention bias": {**V2, "attention_bias": True},
    "v2 attention bias, plain queries": {**V2, "attention_bias": True, "q_lora_rank": None},
    "v2 one expert a token": {**V2, "num_experts_per_tok": 1, "routed_scaling_factor": 3.0},
    "v2 one expert a token, normalised": {
        **V2,
        "num_experts_per_tok": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 3.0,
    },
    "v2 three dense layers": {**V2, "num_hidden_layers": 4, "first_k_dense_replace": 3},
    "v2 group limited": {**V2, "topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1},
    "v2 yarn": {**V2, "rope_scaling": YARN},
    "v2 yarn, mscale_all_dim absent": {**V2, "rope_scaling": {k: v for k, v in YARN.items() if k != "mscale_all_dim"}},
    "v2 values wider than keys": {**V2, "v_head_dim": 20},
    "v3 odd heads": {**V3, "num_attention_heads": 3},
    "v3 attention bias": {**V3, "attention_bias": True},
    "v3 one expert a token": {**V3, "num_experts_per_tok": 1},
    "v3 not normalised": {**V3, "norm_topk_prob": False},
    "v3 three dense layers": {**V3, "num_hidden_layers": 4, "first_k_dense_replace": 3},
    "v3 all layers route": {**V3, "first_k_dense_replace": 0},
    "v3 yarn, equal betas": {**V3, "rope_scaling": {**YARN, "beta_fast": 1.0, "beta_slow": 1.0}},
    "v3 latent norm epsilon stays 1e-6": {**V3, "rms_norm_eps": 1e-5},
    "v3 narrow latent": {**V3, "kv_lora_rank": 4},
}


@pytest.fixture(params=CASES, ids=list(CASES))
def case(request, tmp_path):
    """A config.json, a random checkpoint under DeepSeek's names with biases of either sign, and the model loaded."""
    config = CASES[request.param]
    torch.manual_seed(len(request.param))
    model = DeepseekMoeForCausalLM(DeepseekMoeConfig.from_dict(config))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith("bias"):
            tensor.data.normal_(std=0.3)
    model.save_pretrained(tmp_path)
    return config, load_file(tmp_path / "model.safetensors"), DeepseekMoeForCausalLM.from_pretrained(tmp_path)


def decode_in_pieces(model, input_ids: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Logits of all positions, the prompt fed through a cache in pieces of these sizes."""
    cache, pieces = None, []
    for piece in input_ids.split(sizes, dim=1):
        outputs = model(piece, past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        pieces.append(outputs.logits)
    return torch.cat(pieces, dim=1)


@torch.no_grad()
def test_logits_equal_the_reference_in_one_pass_and_token_by_token(case, monkeypatch):
    config, tensors, model = case
    input_ids = torch.randint(0, SIZES["vocab_size"], (1, 14))
    expected = reference_logits(config, tensors, input_ids).float()
    # float32 against float64 at widths below 50: rounding stays under 1e-5; twice that as in the golden test.
    torch.testing.assert_close(model(input_ids).logits, expected, rtol=0, atol=2e-5)
    for absorbed in (True, False):
        monkeypatch.setattr(attention, "absorbed_is_cheaper", lambda *_, absorbed=absorbed: absorbed)
        actual = decode_in_pieces(model, input_ids, [6, 1, 4, 1, 2])
        torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)


@torch.no_grad()
def test_a_sequence_far_beyond_the_original_window_equals_the_reference():
    config = {**V3, "rope_scaling": {**YARN, "factor": 40}, "num_hidden_layers": 1, "max_position_embeddings": 1280}
    torch.manual_seed(0)
    model = DeepseekMoeForCausalLM(DeepseekMoeConfig.from_dict(config)).eval()
    input_ids = torch.randint(0, SIZES["vocab_size"], (1, 200))
    # A single dense layer has no experts to unstack: the model's names are the checkpoint's.
    expected = reference_logits(config, model.state_dict(), input_ids).float()
    torch.testing.assert_close(model(input_ids).logits, expected, rtol=0, atol=2e-5)
    actual = decode_in_pieces(model, input_ids, [150, 1, 1, 47, 1])
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)
