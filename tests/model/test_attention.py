"""The two forms of latent attention, how one is chosen, and what a missing mask means to each implementation."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import StaticCache

from modeling_deepseek_moe import DeepseekMoeConfig, DeepseekMoeForCausalLM, attention
from modeling_deepseek_moe.absorbed_matrix import matrix_of
from modeling_deepseek_moe.absorption import absorbed_is_cheaper, visible_keys

SIZES = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "n_routed_experts": None,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "initializer_range": 0.2,
}


def make_model(**overrides) -> DeepseekMoeForCausalLM:
    torch.manual_seed(0)
    return DeepseekMoeForCausalLM(DeepseekMoeConfig(**SIZES, **overrides)).eval()


@pytest.fixture
def prompt() -> tuple[torch.Tensor, torch.Tensor]:
    input_ids = torch.randint(0, 67, (2, 13), generator=torch.Generator().manual_seed(1))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, :5] = 0
    return input_ids, attention_mask


def force(monkeypatch, absorbed: bool) -> None:
    monkeypatch.setattr(attention, "absorbed_is_cheaper", lambda *_: absorbed)


@pytest.mark.parametrize(
    ("name", "cached", "first_expanded"), [("deepseek-v2-lite", 8192, 172), ("deepseek-v3", 8192, 172)]
)
def test_decoding_is_absorbed_long_chunks_and_prefill_are_expanded(name, cached, first_expanded):
    config = DeepseekMoeConfig.preset(name)
    assert absorbed_is_cheaper(config, 1, cached)
    assert not absorbed_is_cheaper(config, 4096, 4096)
    assert not absorbed_is_cheaper(config, 1, 1)
    # 512 * 256 * (L - T) = 768 * T * L at the break-even point: T = 167 for L = 8192, a little less than 170.67.
    crossing = next(t for t in range(1, cached) if not absorbed_is_cheaper(config, t, cached))
    assert 160 < crossing < first_expanded


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("pieces", [(13,), (6, 4, 1, 1, 1)], ids=["one pass", "in pieces"])
@torch.no_grad()
def test_both_forms_agree_under_left_padding(implementation, pieces, prompt, monkeypatch):
    input_ids, attention_mask = prompt
    model = make_model(attn_implementation=implementation)
    logits = {}
    for absorbed in (True, False):
        force(monkeypatch, absorbed)
        cache, parts, end = None, [], 0
        for piece in input_ids.split(pieces, dim=1):
            end += piece.shape[1]
            outputs = model(piece, attention_mask=attention_mask[:, :end], past_key_values=cache, use_cache=True)
            cache = outputs.past_key_values
            parts.append(outputs.logits)
        logits[absorbed] = torch.cat(parts, dim=1)[attention_mask.bool()]
    # The same sums in another order, float32, widths of 20.
    torch.testing.assert_close(logits[True], logits[False], rtol=0, atol=1e-5)


def test_both_forms_have_the_same_gradients(prompt, monkeypatch):
    gradients = []
    for absorbed in (True, False):
        force(monkeypatch, absorbed)
        model = make_model()
        model(prompt[0], labels=prompt[0], use_cache=False).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for absorbed, expanded in zip(*gradients, strict=True):
        assert (absorbed - expanded).norm() <= 1e-5 * expanded.norm() + 1e-8


@torch.no_grad()
def test_absorbed_attention_weights_equal_the_expanded_ones(prompt, monkeypatch):
    model = make_model(attn_implementation="eager")
    weights = []
    for absorbed in (True, False):
        force(monkeypatch, absorbed)
        weights.append(model(prompt[0], output_attentions=True).attentions)
    for absorbed, expanded in zip(*weights, strict=True):
        torch.testing.assert_close(absorbed, expanded, rtol=0, atol=1e-6)


@pytest.mark.parametrize("absorbed", [True, False], ids=["absorbed", "expanded"])
@torch.no_grad()
def test_a_prompt_in_a_static_cache_is_causal_from_its_first_token(absorbed, prompt, monkeypatch):
    force(monkeypatch, absorbed)
    model = make_model()
    cache = StaticCache(config=model.config, max_cache_len=32)
    in_cache = model(prompt[0], past_key_values=cache).logits
    torch.testing.assert_close(in_cache, model(prompt[0], use_cache=False).logits, rtol=0, atol=1e-5)
    following = torch.tensor([[3], [4]])
    whole = model(torch.cat((prompt[0], following), dim=1), use_cache=False).logits[:, -1:]
    torch.testing.assert_close(model(following, past_key_values=cache).logits, whole, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_four_dimensional_mask_is_used_as_it_is(prompt, monkeypatch):
    input_ids = prompt[0][:1]
    allowed = torch.ones(13, 13, dtype=torch.bool).tril() & torch.rand(13, 13).gt(0.3) | torch.eye(
        13, dtype=torch.bool
    )
    model = make_model()
    results = []
    for absorbed in (True, False):
        force(monkeypatch, absorbed)
        results.append(model(input_ids, attention_mask=allowed[None, None]).logits)
    torch.testing.assert_close(*results, rtol=0, atol=1e-5)
    assert (results[0] - model(input_ids).logits).abs().max() > 1e-3


def test_without_a_mask_flash_aligns_the_last_query_and_sdpa_the_first():
    keys = torch.zeros(1, 1, 5, 4)
    assert visible_keys(None, 1, keys, is_flash=True) is None
    assert visible_keys(None, 2, keys, is_flash=True).tolist() == [[True] * 4 + [False], [True] * 5]
    assert visible_keys(None, 2, keys, is_flash=False).tolist() == [[True] + [False] * 4, [True] * 2 + [False] * 3]
    padding = torch.tensor([[0, 1, 1, 1, 1]])
    mask = visible_keys(padding, 2, keys, is_flash=True)
    assert mask.tolist() == [[[[False, True, True, True, False], [False, True, True, True, True]]]]


@pytest.mark.parametrize("use_cache", [None, False], ids=["cache by default", "no cache"])
@torch.no_grad()
def test_packed_sequences_do_not_see_each_other(use_cache):
    model = make_model()
    first, second = torch.randint(0, 67, (1, 6)), torch.randint(0, 67, (1, 7))
    position_ids = torch.cat((torch.arange(6), torch.arange(7))).unsqueeze(0)
    packed = model(torch.cat((first, second), dim=1), position_ids=position_ids, use_cache=use_cache).logits
    alone = torch.cat((model(first).logits, model(second).logits), dim=1)
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-5)


class Doubled(nn.Module):
    """Some other linear map, as a quantised layer is one."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.inner, self.in_features = linear, linear.in_features

    def forward(self, x):
        return 2 * self.inner(x)


def test_the_effective_weight_of_any_linear_map_is_what_it_multiplies_with():
    linear = nn.Linear(5, 7, bias=False)
    inputs = torch.randn(2, 3, 5)
    assert matrix_of(linear, inputs) is linear.weight
    torch.testing.assert_close(matrix_of(Doubled(linear), inputs), 2 * linear.weight)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"])
@torch.no_grad()
def test_an_adapter_on_kv_b_proj_acts_in_the_absorbed_form_merged_or_not(options, prompt, monkeypatch):
    base = make_model()
    plain = base(prompt[0]).logits
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["kv_b_proj"], **options)).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.3)
    results = []
    for absorbed in (True, False):
        force(monkeypatch, absorbed)
        results.append(model(prompt[0]).logits)
    torch.testing.assert_close(*results, rtol=0, atol=2e-5)
    assert (results[0] - plain).abs().max() > 1e-2
    force(monkeypatch, True)
    with model.disable_adapter():
        torch.testing.assert_close(model(prompt[0]).logits, plain, rtol=0, atol=1e-5)
    torch.testing.assert_close(model.merge_and_unload()(prompt[0]).logits, results[1], rtol=0, atol=2e-5)
