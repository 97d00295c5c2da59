"""Float32 parity with DeepSeek's own programs (tests/fixtures/golden/README.md)."""

import json

import pytest
import torch
from places import GOLDEN
from reference import reference_logits
from safetensors.torch import load_file

from modeling_deepseek_moe import DeepseekMoeForCausalLM, attention

FOLDERS = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
# The originals agree with each other to 1e-5 in every logit; twice that leaves room for another order of sums.
TOLERANCE = 2e-5
# The modeling file fills lost groups with 0, inference/model.py with -inf; the second is right (FACTS 8.4).
FOLLOW_INFERENCE = {"v3_negative_bias"}


@pytest.fixture(params=FOLDERS)
def golden(request):
    folder = GOLDEN / request.param
    expected = load_file(folder / "expected.safetensors")
    if request.param in FOLLOW_INFERENCE:
        expected["logits"] = expected["deepseek_inference.naive.logits"]
        for name in [name for name in expected if "hidden_states" in name or "gate" in name]:
            del expected[name]
    return folder, expected


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_logits_and_hidden_states_equal_those_of_the_original_program(golden, implementation):
    folder, expected = golden
    model = DeepseekMoeForCausalLM.from_pretrained(folder, attn_implementation=implementation)
    outputs = model(expected["input_ids"], output_hidden_states=True)
    for name in [name for name in expected if name.endswith("logits")]:
        close(outputs.logits, expected[name])
    for index, states in enumerate(outputs.hidden_states):
        if f"hidden_states.{index}" in expected:
            close(states, expected[f"hidden_states.{index}"])


@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm", "sorted_mm"])
@torch.no_grad()
def test_every_experts_implementation_gives_the_original_logits(golden, experts):
    folder, expected = golden
    model = DeepseekMoeForCausalLM.from_pretrained(folder, experts_implementation=experts)
    close(model(expected["input_ids"]).logits, expected["logits"])


@torch.no_grad()
def test_routers_choose_the_original_experts_with_the_original_weights(golden):
    folder, expected = golden
    model = DeepseekMoeForCausalLM.from_pretrained(folder)
    routed = {}
    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_hook(lambda _, __, output, name=name: routed.update({name: output[1:]}))
    model(expected["input_ids"])
    for name, (weights, index) in routed.items():
        if f"{name}.topk_idx" not in expected:
            continue
        order = index.argsort(dim=-1)
        assert torch.equal(index.gather(1, order), expected[f"{name}.topk_idx"])
        close(weights.gather(1, order), expected[f"{name}.topk_weight"])
    assert routed


@pytest.mark.parametrize(
    "split",
    [(1,) * 40, (39, 1), (7, 1, 12, 3, 17), (20, 20)],
    ids=["token by token", "prefill and one", "uneven pieces", "two halves"],
)
@pytest.mark.parametrize("form", ["by_count", "absorbed", "expanded"])
@torch.no_grad()
def test_decoding_in_any_split_equals_the_full_forward_in_either_form(golden, split, form, monkeypatch):
    folder, expected = golden
    if form != "by_count":
        monkeypatch.setattr(attention, "absorbed_is_cheaper", lambda *_: form == "absorbed")
    model = DeepseekMoeForCausalLM.from_pretrained(folder)
    cache, pieces = None, []
    for piece in expected["input_ids"].split(split, dim=1):
        outputs = model(piece, past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        pieces.append(outputs.logits)
    close(torch.cat(pieces, dim=1), expected["logits"])


@torch.no_grad()
def test_the_absorbed_form_without_a_cache_equals_the_original(golden, monkeypatch):
    folder, expected = golden
    monkeypatch.setattr(attention, "absorbed_is_cheaper", lambda *_: True)
    for implementation in ("eager", "sdpa"):
        model = DeepseekMoeForCausalLM.from_pretrained(folder, attn_implementation=implementation)
        close(model(expected["input_ids"]).logits, expected["logits"])


def test_training_losses_and_gradients_equal_the_original_with_the_auxiliary_loss(golden):
    folder, expected = golden
    if "train.lm_loss" not in expected:
        pytest.skip("DeepSeek's V3 modeling file cannot train, so it gives no gradients to compare with")
    model = DeepseekMoeForCausalLM.from_pretrained(folder).train()
    outputs = model(expected["input_ids"], labels=expected["input_ids"])
    outputs.loss.backward()
    close(outputs.loss - outputs.aux_loss, expected["train.lm_loss"][0], 1e-5)
    close(outputs.aux_loss, expected["train.aux_loss_per_layer"].sum(), 1e-7)
    parameters = dict(model.named_parameters())
    names = [name for name in expected if name.startswith("train.grad.")]
    assert names
    for name in names:
        gradient, wanted = parameters[name.removeprefix("train.grad.")].grad, expected[name]
        assert (gradient - wanted).norm() <= 1e-4 * wanted.norm(), name


def test_the_reference_itself_equals_the_original_program(golden):
    folder, expected = golden
    config = json.loads((folder / "config.json").read_text())
    logits = reference_logits(config, load_file(folder / "model.safetensors"), expected["input_ids"][:, :12])
    close(logits.float(), expected["logits"][:, :12])
