"""Dense checkpoints made into DeepSeekMoE ones: equal logits with all experts, and what is chosen with fewer."""

import pytest
import torch
from checkpoint_folders import tensors_of
from convert_folders import contents
from dense_folders import DENSE, dense_folder, upcycled
from transformers import AutoModelForCausalLM

from modeling_deepseek_moe import CheckpointError, DeepseekMoeConfig, DeepseekMoeForCausalLM
from modeling_deepseek_moe.checkpoint_layout import expected_tensors
from modeling_deepseek_moe.conversion import UpcycleOptions, convert
from modeling_deepseek_moe.conversion.upcycle.neurons import group_neurons, unit_rows


def ids(length: int = 40) -> torch.Tensor:
    return torch.randint(96, (2, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("kind", DENSE)
def test_with_all_experts_active_the_logits_are_the_dense_models(kind, tmp_path):
    source = dense_folder(tmp_path / "dense", kind)
    before = contents(source)
    report = upcycled(source, tmp_path / "experts", verify=True)
    assert contents(source) == before
    tokens = ids(80 if "dynamic" in kind else 40)  # beyond the window, where that changes the frequencies
    expected = AutoModelForCausalLM.from_pretrained(source)(tokens).logits
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "experts", num_experts_per_tok=8)
    assert isinstance(model, DeepseekMoeForCausalLM)
    # The bound of the format, on logits of up to 20.
    torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=1e-4)
    assert report.verification.absolute <= 1e-4
    assert report.verification.tensors == len(expected_tensors(model.config))
    few = AutoModelForCausalLM.from_pretrained(tmp_path / "experts")
    assert (few(tokens).logits - expected).abs().max() > 0.1
    model.save_pretrained(tmp_path / "again")
    assert tensors_of(tmp_path / "again").keys() == tensors_of(tmp_path / "experts").keys()


def test_every_neuron_is_in_one_expert_bit_for_bit_and_the_rest_is_copied(llama, experts_of_llama):
    dense, result = tensors_of(llama), tensors_of(experts_of_llama)
    for layer in range(2):
        modules = ["shared_experts", *(f"experts.{i}" for i in range(8))]
        parts = [
            [result.pop(f"model.layers.{layer}.mlp.{module}.{name}_proj.weight") for module in modules]
            for name in ("gate", "up", "down")
        ]
        found = torch.cat((torch.cat(parts[0]), torch.cat(parts[1]), torch.cat(parts[2], 1).T), 1)
        gate, up, down = (dense.pop(f"model.layers.{layer}.mlp.{name}_proj.weight") for name in ("gate", "up", "down"))
        expected = torch.cat((gate, up, down.T), 1)
        assert torch.equal(found[found[:, 0].argsort()], expected[expected[:, 0].argsort()])
        assert [len(part) for part in parts[0]] == [16] + [8] * 8
        assert result.pop(f"model.layers.{layer}.mlp.gate.weight").shape == (8, 32)
    assert dense.keys() == result.keys() and all(torch.equal(dense[name], result[name]) for name in dense)


def test_neurons_that_look_the_same_way_are_grouped_however_they_are_summed():
    """Six directions, neurons in random order; another order of the hidden units sums in another order."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(6, 200, generator=generator)
    kind = torch.arange(6).repeat_interleave(20)[torch.randperm(120, generator=generator)]
    lengths = torch.rand(120, 1, generator=generator) + 0.1
    norm = torch.rand(200, generator=generator) + 0.5
    gate = (directions[kind] + 0.8 * torch.randn(120, 200, generator=generator)) * lengths
    order = group_neurons(torch.cat((gate[:7], gate)), norm, 7, 6, 20)
    assert order[:7].tolist() == list(range(7)) and order.sort().values.tolist() == list(range(127))
    assert all(len(set(kind[group - 7].tolist())) == 1 for group in order[7:].split(20))
    rows = unit_rows(gate, norm)
    assert torch.equal((rows @ rows.T).double(), rows.double() @ rows.double().T)  # no sum was rounded
    columns = torch.randperm(200, generator=generator)
    assert torch.equal(
        group_neurons(gate[:, columns], norm[columns], 0, 5, 24),
        group_neurons(gate, norm, 0, 5, 24),
    )


def test_neurons_of_zeros_and_equal_neurons_are_dealt_out_evenly():
    gate = torch.zeros(24, 8)
    gate[12:] = torch.arange(8.0)
    order = group_neurons(gate, torch.ones(8), 0, 3, 8)
    assert order.sort().values.tolist() == list(range(24))


@torch.no_grad()
def test_the_choice_of_experts_varies_over_tokens_and_is_that_of_exact_arithmetic(experts_of_llama):
    """Logits are tiny; float32 scores still tell them apart."""
    model = DeepseekMoeForCausalLM.from_pretrained(experts_of_llama)
    for layer in model.model.layers:
        router = layer.mlp.gate
        hidden_states = layer.post_attention_layernorm(
            torch.randn(500, 32, generator=torch.Generator().manual_seed(1))
        )
        logits, weights, chosen = router(hidden_states)
        exact = hidden_states.double() @ router.weight.double().T
        assert 2e-7 < logits.std() < 5e-6
        torch.testing.assert_close(weights, torch.ones(500, 3), rtol=0, atol=2e-5)
        assert len({tuple(sorted(row)) for row in chosen.tolist()}) > 20
        assert chosen.unique().tolist() == list(range(8))
        best = exact.topk(3).indices.sort().values
        # Scores are steps of 6e-8 apart, a tenth of the logits' spread: the narrowest choices are ties.
        assert (chosen.sort().values == best).all(1).float().mean() > 0.8


def test_an_upcycled_model_trains_every_parameter_its_routers_too(experts_of_llama):
    model = DeepseekMoeForCausalLM.from_pretrained(experts_of_llama).train()
    losses = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(5):
        outputs = model(ids(), labels=ids())
        outputs.loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        optimizer.step()
        optimizer.zero_grad()
        losses.append(outputs.loss.item())
    assert losses[-1] < losses[0]
    assert outputs.aux_loss is not None and outputs.aux_loss > 0


def test_dense_layers_stay_as_they_are_and_a_second_type_is_a_cast(llama, tmp_path):
    upcycled(llama, tmp_path / "a", upcycle=UpcycleOptions(10, 0, 2, dense_layers=1), dtype="bfloat16", verify=True)
    dense, result = tensors_of(llama), tensors_of(tmp_path / "a")
    config = DeepseekMoeConfig.from_pretrained(tmp_path / "a")
    assert {name: (tuple(t.shape), t.dtype) for name, t in result.items()} == expected_tensors(config)
    assert [config.is_moe_layer(layer) for layer in range(2)] == [False, True] and config.n_shared_experts == 0
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(result[name], dense[name].bfloat16())


def test_norms_of_queries_and_keys_are_for_plain_attention_and_no_native_type(tmp_path):
    source = dense_folder(tmp_path / "qwen3", "qwen3")
    upcycled(source, tmp_path / "experts")
    for model_type in ("deepseek", "deepseek_v2"):
        with pytest.raises(CheckpointError, match=f"use_qk_norm=True cannot be expressed as {model_type}"):
            convert(tmp_path / "experts", tmp_path / "native", model_type)
    with pytest.raises(ValueError, match="use_qk_norm=True is for plain attention"):
        DeepseekMoeConfig(use_qk_norm=True)


def test_the_width_of_plain_heads_follows_what_it_is_derived_from(tmp_path):
    sizes = {"kv_lora_rank": None, "hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    DeepseekMoeConfig(**sizes).save_pretrained(tmp_path / "derived")
    DeepseekMoeConfig(**sizes, head_dim=20).save_pretrained(tmp_path / "own")
    assert DeepseekMoeConfig.from_pretrained(tmp_path / "derived").head_dim == 12
    assert DeepseekMoeConfig.from_pretrained(tmp_path / "derived", num_attention_heads=2).head_dim == 24
    assert DeepseekMoeConfig.from_pretrained(tmp_path / "own", num_attention_heads=2).head_dim == 20
    assert DeepseekMoeConfig.from_pretrained(tmp_path / "own", hidden_size=50).head_dim == 20
