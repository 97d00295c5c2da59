"""The stacked routed experts: every implementation against the eager reference, and both layouts of a state dict."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from modeling_deepseek_moe import DeepseekMoeConfig, DeepseekMoeForCausalLM
from modeling_deepseek_moe.experts import DeepseekMoeExperts

SIZES = {"hidden_size": 32, "num_attention_heads": 2, "moe_intermediate_size": 16, "n_routed_experts": 6}


def make_experts(implementation: str) -> DeepseekMoeExperts:
    config = DeepseekMoeConfig(**SIZES, num_experts_per_tok=2, experts_implementation=implementation)
    experts = DeepseekMoeExperts(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    return experts


ROUTINGS = {
    "uniform": lambda tokens: torch.stack([torch.randperm(6)[:2] for _ in range(tokens)]),
    "one expert empty": lambda tokens: torch.stack([torch.randperm(5)[:2] for _ in range(tokens)]),
    "all tokens to two experts": lambda tokens: torch.tensor([[4, 1]]).expand(tokens, 2),
}


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "sorted_mm"])
@pytest.mark.parametrize("tokens", [1, 13])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_outputs_and_all_gradients_equal_those_of_the_eager_reference(implementation, tokens, routing):
    torch.manual_seed(1)
    hidden_states, index = torch.randn(tokens, 32), ROUTINGS[routing](tokens)
    weights, upstream = torch.rand(tokens, 2), torch.randn(tokens, 32)
    results = []
    for name in ("eager", implementation):
        experts = make_experts(name)
        inputs = (hidden_states.clone().requires_grad_(), weights.clone().requires_grad_())
        output = experts(inputs[0], index, inputs[1])
        output.backward(upstream)
        results.append([output, *(t.grad for t in (*inputs, *experts.parameters()))])
    for reference, actual in zip(*results, strict=True):
        # float32, sums of at most 32 products in another order.
        torch.testing.assert_close(actual, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral"])
def test_sorted_mm_serves_other_models_of_the_experts_interface(model_type):
    sizes = {"num_local_experts": 4} if model_type == "mixtral" else {"num_experts": 4, "moe_intermediate_size": 16}
    common = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    heads = {"num_key_value_heads": 2, "head_dim": 16}
    config = AutoConfig.for_model(model_type, **common, **sizes, **heads, intermediate_size=16, num_experts_per_tok=2)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    ids, results = torch.randint(0, 64, (2, 9)), []
    for name in ("eager", "sorted_mm"):
        model.set_experts_implementation(name)
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        results.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in results[0].items():
        # float32 sums of at most a few hundred products in another order.
        torch.testing.assert_close(results[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_sorted_mm_refuses_experts_of_another_kind_by_name():
    experts = make_experts("sorted_mm")
    experts.has_bias = True
    with pytest.raises(ValueError, match='"sorted_mm": DeepseekMoeExperts has has_bias=True; use "grouped_mm"'):
        experts(torch.randn(1, 32), torch.tensor([[0, 1]]), torch.rand(1, 2))


def test_the_reference_skips_slots_that_another_rank_serves():
    experts = make_experts("eager")
    hidden_states, weights = torch.randn(3, 32), torch.rand(3, 2)
    index = torch.tensor([[0, 6], [6, 6], [2, 3]])
    masked = weights.masked_fill(index == 6, 0.0)
    expected = experts(hidden_states, index.clamp(max=5), masked)
    torch.testing.assert_close(experts(hidden_states, index, weights), expected)


def test_load_state_dict_takes_a_saved_checkpoint_with_one_tensor_an_expert(tmp_path):
    config = DeepseekMoeConfig(
        **SIZES,
        vocab_size=50,
        intermediate_size=40,
        num_hidden_layers=2,
        num_experts_per_tok=2,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
    )
    saved, other = DeepseekMoeForCausalLM(config), DeepseekMoeForCausalLM(config)
    saved.save_pretrained(tmp_path)
    result = other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    assert not result.missing_keys and not result.unexpected_keys
    for name, tensor in saved.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_a_state_dict_that_lacks_an_expert_is_refused(tmp_path):
    experts = make_experts("eager")
    per_expert = {
        f"{expert}.{name}.weight": torch.zeros(*shape)
        for expert in range(5)
        for name, shape in {"gate_proj": (16, 32), "up_proj": (16, 32), "down_proj": (32, 16)}.items()
    }
    with pytest.raises(RuntimeError, match="Missing key"):
        experts.load_state_dict(per_expert)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm", "sorted_mm"])
@torch.no_grad()
def test_t24_bfloat16_experts_are_combined_in_float32_and_rounded_once(implementation):
    torch.manual_seed(2)
    hidden_states, weights = torch.randn(256, 32).bfloat16(), torch.rand(256, 2)
    index = torch.stack([torch.randperm(6)[:2] for _ in range(256)])
    half = make_experts(implementation).bfloat16()
    actual = half(hidden_states, index, weights)
    exact = half.float()(hidden_states.float(), index, weights)
    assert actual.dtype == torch.bfloat16
    # bfloat16 rounds to 2^-9 of a value: three roundings in a row (gate and up, product, output) stay within 2^-7.
    assert (actual.float() - exact).norm() <= 2**-7 * exact.norm()
    singles = [half.bfloat16()(hidden_states, index[:, [slot]], weights[:, [slot]]) for slot in (0, 1)]
    combined = (singles[0].float() + singles[1].float() - exact).norm()
    assert (actual.float() - exact).norm() <= 1.02 * combined
