"""What a forward pass returns on request: chosen logits, attentions, hidden states, router logits; their dtypes."""

import functools

import pytest
import torch
from tiny import tiny_config, tiny_ids, tiny_model
from transformers import DynamicCache

LINEAGES = ["v1", "v2", "v3"]


@functools.cache
def model_of(lineage: str, attention: str = "sdpa"):
    """A shared tiny model without an end token, so that generations have the length asked for."""
    model = tiny_model(tiny_config(lineage, eos_token_id=None))
    model.set_attn_implementation(attention)
    return model


@torch.no_grad()
def test_logits_to_keep_gives_the_chosen_positions_only():
    model = model_of("v3")
    ids = tiny_ids(model.config)
    every = model(ids).logits
    # The head multiplies other rows beside these, in another blocking: last-bit differences.
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, every[:, -3:], atol=1e-6, rtol=1e-6)
    chosen = torch.tensor([0, 4, 11])
    torch.testing.assert_close(model(ids, logits_to_keep=chosen).logits, every[:, chosen], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("lineage", LINEAGES)
@torch.no_grad()
def test_output_attentions_are_causal_distributions_of_every_layer(lineage):
    model = model_of(lineage, "eager")
    config, ids = model.config, tiny_ids(model.config, length=9)
    cache = DynamicCache(config=config)
    prefill = model(ids[:, :8], past_key_values=cache, output_attentions=True).attentions
    step = model(ids[:, 8:], past_key_values=cache, output_attentions=True).attentions
    whole = model(ids, output_attentions=True).attentions
    assert len(prefill) == len(step) == len(whole) == config.num_hidden_layers
    for layer in range(config.num_hidden_layers):
        assert prefill[layer].shape == (2, config.num_attention_heads, 8, 8)
        assert step[layer].shape == (2, config.num_attention_heads, 1, 9)
        # A softmax of at most 9 float32 numbers sums to 1 within a few roundings.
        torch.testing.assert_close(
            whole[layer].sum(-1), torch.ones(2, config.num_attention_heads, 9), atol=1e-6, rtol=0
        )
        assert not whole[layer].triu(1).any(), "no token sees a later one"
        torch.testing.assert_close(step[layer], whole[layer][:, :, 8:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("lineage", LINEAGES)
@torch.no_grad()
def test_output_hidden_states_are_embeddings_layers_and_the_normed_end(lineage):
    model = model_of(lineage)
    ids = tiny_ids(model.config)
    outputs = model(ids, output_hidden_states=True)
    states = outputs.hidden_states
    assert len(states) == model.config.num_hidden_layers + 1
    assert torch.equal(states[0], model.get_input_embeddings()(ids))
    assert torch.equal(states[-1], model.model(ids).last_hidden_state)
    assert torch.equal(outputs.logits, model.lm_head(states[-1]))
    assert not torch.equal(states[1], states[2])


@pytest.mark.parametrize("lineage", LINEAGES)
@torch.no_grad()
def test_output_router_logits_are_the_gates_own_in_layer_order(lineage):
    model = model_of(lineage)
    config, ids = model.config, tiny_ids(model.config)
    gate_inputs = []
    gates = [layer.mlp.gate for layer in model.model.layers[: config.num_hidden_layers] if layer.is_moe]
    handles = [gate.register_forward_pre_hook(lambda _, args: gate_inputs.append(args[0])) for gate in gates]
    outputs = model(ids, output_router_logits=True)
    for handle in handles:
        handle.remove()
    assert len(outputs.router_logits) == len(gates) == 2
    for logits, gate, seen in zip(outputs.router_logits, gates, gate_inputs, strict=True):
        assert logits.shape == (ids.numel(), config.n_routed_experts) and logits.dtype == torch.float32
        torch.testing.assert_close(logits, seen.flatten(0, 1) @ gate.weight.T, atol=1e-6, rtol=1e-5)
    assert model(ids).router_logits is None
    assert outputs.loss is None and outputs.aux_loss is None


@torch.no_grad()
def test_generate_returns_scores_hidden_states_and_attentions_of_each_step():
    model = model_of("v3", "eager")
    outputs = model.generate(
        tiny_ids(model.config, length=11),
        max_new_tokens=3,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        output_hidden_states=True,
        output_attentions=True,
    )
    assert len(outputs.logits) == len(outputs.hidden_states) == len(outputs.attentions) == 3
    assert [step[0].shape[-1] for step in outputs.attentions] == [11, 12, 13]
    assert [step[-1].shape[1] for step in outputs.hidden_states] == [11, 1, 1]


@pytest.mark.parametrize("lineage", LINEAGES)
@torch.no_grad()
def test_t29_logits_keep_the_models_dtype_and_the_loss_is_float32(lineage):
    model = tiny_model(tiny_config(lineage)).to(torch.bfloat16)
    ids = tiny_ids(model.config)
    outputs = model(ids, labels=ids)
    assert outputs.logits.dtype == torch.bfloat16 and outputs.loss.dtype == torch.float32
    expected = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(outputs.loss, expected, atol=1e-6, rtol=1e-6)
