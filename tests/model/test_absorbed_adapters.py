"""Adapters on `kv_b_proj`, and gradients, do in the absorbed form what they do in the expanded one."""

import pytest
import torch
from peft import LoraConfig, OFTConfig, get_peft_model
from tiny import tiny_config, tiny_ids, tiny_model
from torch import nn
from transformers import StaticCache
from two_forms import (  # noqa: F401
    ABSORBED,
    ATOL,
    CHOSEN,
    EXPANDED,
    PAD,
    assert_same_generation,
    forms,
    generated,
    padded,
)

from modeling_deepseek_moe.absorbed_matrix import matrix_of

TARGET = {"target_modules": ["kv_b_proj"]}
KINDS = {
    "lora": LoraConfig(r=4, **TARGET),
    "dora": LoraConfig(r=4, use_dora=True, **TARGET),
    "oft": OFTConfig(r=0, oft_block_size=4, **TARGET),
    "whole module": LoraConfig(r=4, target_modules=["o_proj"], modules_to_save=["kv_b_proj"]),
}


def base_model(**overrides):
    return tiny_model(tiny_config("v3", num_hidden_layers=2, eos_token_id=None, pad_token_id=PAD, **overrides))


def adapted(model, config, *others):
    """`model` with adapters that do something, where they would begin as the identity: "default", "other"."""
    torch.manual_seed(1)
    model = get_peft_model(model, config)
    names = ["default", "other"][: 1 + len(others)]
    for name, other in zip(names[1:], others, strict=True):
        model.add_adapter(name, other)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(adapter in name.split(".") for adapter in names):
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model.eval()


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_an_adapter_on_kv_b_proj_decodes_alike_in_both_forms_on_off_and_merged(config, forms):  # noqa: F811
    base = base_model()
    ids, mask = padded(base.config)
    plain = generated(base, ids, mask)
    model = adapted(base, config)
    assert_same_generation(forms, lambda: generated(model, ids, mask))
    found = generated(model, ids, mask)
    assert (torch.stack(found.logits) - torch.stack(plain.logits)).abs().max() > 0.1, "the adapter does nothing"
    if config.peft_type != "LORA" or not config.modules_to_save:
        with model.disable_adapter():
            assert_same_generation(forms, lambda: generated(model, ids, mask))
            assert torch.equal(generated(model, ids, mask).sequences, plain.sequences)
        model.merge_adapter()
        assert_same_generation(forms, lambda: generated(model, ids, mask))
        model.unmerge_adapter()
    merged = model.merge_and_unload()
    assert_same_generation(forms, lambda: generated(merged, ids, mask))
    assert torch.equal(generated(merged, ids, mask).sequences, found.sequences)


def two_adapters():
    return adapted(base_model(), LoraConfig(r=4, **TARGET), LoraConfig(r=8, lora_alpha=4, **TARGET))


def test_of_two_adapters_the_active_ones_act(forms):  # noqa: F811
    model = two_adapters()
    ids, mask = padded(model.config)
    logits = []
    for active in ("default", "other", ["default", "other"]):
        model.base_model.set_adapter(active)
        assert_same_generation(forms, lambda: generated(model, ids, mask))
        logits.append(torch.stack(generated(model, ids, mask, steps=1).logits))
    assert min((a - b).abs().max() for a, b in zip(logits, [*logits[1:], logits[0]], strict=True)) > 0.1


def test_adapters_chosen_by_row_act_on_their_rows_in_every_step(forms):  # noqa: F811
    model = two_adapters()
    ids, mask = padded(model.config)
    names = ["other", "default", "__base__"]
    with forms(CHOSEN):
        together = generated(model, ids, mask, adapter_names=names)
    for row, name in enumerate(names):
        prompt = ids[row, mask[row].bool()][None]
        with forms(EXPANDED):
            alone = generated(model, prompt, adapter_names=[name])
        for mixed, own in zip(together.logits, alone.logits, strict=True):
            torch.testing.assert_close(mixed[row], own[0], rtol=0, atol=ATOL)


def test_an_adapter_with_a_bias_acts_in_every_step(forms):  # noqa: F811
    with pytest.warns(UserWarning, match="lora_bias=True"):
        model = adapted(base_model(), LoraConfig(r=4, lora_bias=True, **TARGET))
    ids, mask = padded(model.config)
    with forms(EXPANDED):
        expected = generated(model, ids, mask)
    with forms(CHOSEN):
        found = generated(model, ids, mask)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=0, atol=ATOL)


def test_dropout_of_an_adapter_acts_in_a_training_step_on_a_filled_cache(forms):  # noqa: F811
    model = adapted(base_model(), LoraConfig(r=4, lora_dropout=0.5, **TARGET))
    ids = tiny_ids(model.config, length=9)
    losses = []
    for form in (CHOSEN, EXPANDED):
        with forms(form):
            with torch.no_grad():
                cache = model.eval()(ids[:, :-2], use_cache=True).past_key_values
            torch.manual_seed(0)
            losses.append(model.train()(ids[:, -2:], past_key_values=cache).logits.sum())
    torch.testing.assert_close(*losses, rtol=1e-5, atol=ATOL)


@pytest.mark.parametrize("queries", [1, 2, 7])
@pytest.mark.parametrize("trained", ["everything", "lora"])
@pytest.mark.parametrize("lineage", ["v2", "v3"])
def test_a_training_step_on_a_filled_cache_has_the_same_gradients_in_both_forms(
    lineage,
    trained,
    queries,
    forms,  # noqa: F811
):
    gradients = []
    for form in (ABSORBED, EXPANDED):
        model = tiny_model(tiny_config(lineage, num_hidden_layers=2, aux_loss_alpha=0.0))
        if trained == "lora":
            model = adapted(model, LoraConfig(r=4, target_modules=["kv_b_proj", "q_b_proj"]))
        ids = tiny_ids(model.config, length=9 + queries)
        with forms(form) as calls:
            with torch.no_grad():
                cache = model.eval()(ids[:, :9], use_cache=True).past_key_values
            model.train()(ids[:, 9:], past_key_values=cache).logits.logsumexp(-1).mean().backward()
        assert calls["absorbed" if form is ABSORBED else "expanded"] == 4
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert any("kv_b_proj" in name for name in found)
        gradients.append(found)
    absorbed, expanded = gradients
    assert absorbed.keys() == expanded.keys()
    for name, gradient in expanded.items():
        # The same sums in another order: some float32 roundings of the largest entry.
        bound = 1e-5 * gradient.abs().max().item() + 1e-9
        torch.testing.assert_close(absorbed[name], gradient, rtol=0, atol=bound, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_decode_step_over_a_static_cache_has_the_adapter_in_it(forms):  # noqa: F811
    """One graph, traced once."""
    torch.compiler.reset()
    model = adapted(base_model(), LoraConfig(r=4, **TARGET))
    ids = tiny_ids(model.config, length=10)
    cache = StaticCache(config=model.config, max_cache_len=16)
    model(ids[:, :6], past_key_values=cache)
    decode, logits = torch.compile(model, fullgraph=True, backend="eager"), []
    for step, token in enumerate(ids[:, 6:].split(1, dim=1)):
        with torch.compiler.set_stance("fail_on_recompile" if step >= 2 else "default"):
            logits.append(decode(token, past_key_values=cache).logits.clone())
    torch.compiler.reset()
    with forms(EXPANDED):
        expected = model(ids, use_cache=False).logits[:, 6:]
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize("has_lora", [False, True], ids=["plain", "lora"])
def test_weights_that_are_gathered_only_for_a_call_are_gathered(has_lora):
    """What ZeRO-3 of DeepSpeed does: outside of a module's call its parameters are empty."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.kv_b_proj = nn.Linear(6, 10, bias=False)

    model = Layer()
    if has_lora:
        model = adapted(model, LoraConfig(r=4, **TARGET))
    linear = next(module for name, module in model.named_modules() if name.endswith("kv_b_proj"))
    inputs = torch.randn(9, 6)
    expected = matrix_of(linear, inputs).detach().clone()
    for module in [each for each in linear.modules() if isinstance(each, nn.Linear)]:
        whole = module.weight.data
        module.weight.ds_id, module.weight.data = 0, torch.empty(0)
        module.register_forward_pre_hook(lambda m, _, whole=whole: setattr(m.weight, "data", whole))
        module.register_forward_hook(lambda m, *_: setattr(m.weight, "data", torch.empty(0)))
    torch.testing.assert_close(matrix_of(linear, inputs), expected)
