"""Against transformers' own DeepSeek classes on random weights, where those are right (FACTS 8.3)."""

import pytest
import torch
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

from modeling_deepseek_moe import DeepseekMoeForCausalLM

COMMON = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 72,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
LATENT = {"kv_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 32,
}
V3 = {"n_group": 4, "topk_group": 2, "num_mtp_layers": 0, "n_shared_experts": 1}
CASES = {
    "v2 lite": (DeepseekV2Config, {"q_lora_rank": None, "num_attention_heads": 4}),
    "v2 compressed queries, groups": (
        DeepseekV2Config,
        {
            "q_lora_rank": 20,
            "num_attention_heads": 3,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 16.0,
        },
    ),
    "v2 yarn, bias": (
        DeepseekV2Config,
        {"q_lora_rank": 20, "num_attention_heads": 4, "attention_bias": True, "rope_parameters": YARN},
    ),
    "v3": (DeepseekV3Config, {**V3, "q_lora_rank": 20, "num_attention_heads": 4}),
    "v3 yarn, odd heads": (
        DeepseekV3Config,
        {**V3, "q_lora_rank": 20, "num_attention_heads": 5, "rope_parameters": YARN},
    ),
    "v3 plain queries, one group, wide values": (
        DeepseekV3Config,
        {**V3, "q_lora_rank": None, "num_attention_heads": 4, "n_group": 1, "topk_group": 1, "v_head_dim": 32},
    ),
    "v3 half-split rotary": (
        DeepseekV3Config,
        {**V3, "q_lora_rank": 20, "num_attention_heads": 4, "rope_interleave": False},
    ),
}


@pytest.fixture(params=CASES, ids=list(CASES))
def pair(request, tmp_path):
    """transformers' model and ours, loaded from what it saved."""
    config_class, fields = CASES[request.param]
    model_class = DeepseekV2ForCausalLM if config_class is DeepseekV2Config else DeepseekV3ForCausalLM
    torch.manual_seed(len(request.param))
    heads = fields["num_attention_heads"]
    native = model_class(config_class(**COMMON, num_key_value_heads=heads, **{**LATENT, **fields})).eval()
    for name, buffer in native.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.2)
    native.save_pretrained(tmp_path)
    return native, DeepseekMoeForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_float32_logits_agree_with_left_padding(pair, implementation):
    native, ours = pair
    native.set_attn_implementation(implementation)
    ours.set_attn_implementation(implementation)
    input_ids = torch.randint(2, 101, (3, 37))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, :9] = 0
    expected = native(input_ids, attention_mask=attention_mask).logits
    actual = ours(input_ids, attention_mask=attention_mask).logits
    # float32 and three layers; the same bound as against DeepSeek's own programs.
    torch.testing.assert_close(actual[attention_mask.bool()], expected[attention_mask.bool()], rtol=0, atol=2e-5)


@torch.no_grad()
def test_bfloat16_logits_are_as_close_to_float32_as_those_of_transformers(pair):
    native, ours = pair
    input_ids = torch.randint(2, 101, (2, 64))
    exact = native(input_ids).logits
    native_error = native.bfloat16()(input_ids).logits.float() - exact
    our_error = ours.bfloat16()(input_ids).logits.float() - exact
    # Near ties route differently in half precision, so single logits may differ; their typical error must not.
    assert our_error.abs().median() <= 1.25 * native_error.abs().median()
    assert our_error.square().mean() <= 2 * native_error.square().mean()


def test_float32_gradients_agree(pair):
    native, ours = pair
    ours.config.aux_loss_alpha = 0.0
    input_ids = torch.randint(2, 101, (2, 20))
    for model in pair:
        model(input_ids, labels=input_ids).loss.backward()
    ours_by_name = dict(ours.named_parameters())
    for name, parameter in native.named_parameters():
        gradient = ours_by_name[name].grad
        # float32 sums over 40 tokens in another order.
        assert (gradient - parameter.grad).norm() <= 1e-4 * parameter.grad.norm() + 1e-7, name


@torch.no_grad()
def test_greedy_generation_agrees(pair):
    native, ours = pair
    prompt = torch.randint(2, 101, (2, 9))
    options = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(prompt)
    assert torch.equal(ours.generate(prompt, **options), native.generate(prompt, **options))
