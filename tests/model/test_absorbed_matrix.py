"""Decoding with a `kv_b_proj` that is not a plain linear layer: its matrix is found by what it does, or not used."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from tiny import tiny_ids, tiny_model, v3_config
from torch import nn
from two_forms import CHOSEN, EXPANDED, PAD, assert_same_generation, forms, generated, padded  # noqa: F401

from modeling_deepseek_moe import absorbed_matrix
from modeling_deepseek_moe.absorbed_matrix import matrix_of

# The matrix of a layer that computes with rounded activations, and a product with it.
ROUNDING = 0.02


class Packed(nn.Module):
    """A frozen layer whose weight is no matrix, as quantised ones are: eight bits and a scale a row."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("scale", weight.abs().amax(dim=1, keepdim=True) / 127)
        self.register_buffer("packed", (weight / self.scale).round().to(torch.int8))
        self.rows = []

    @property
    def values(self) -> torch.Tensor:
        return self.packed * self.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.rows.append(x.shape[:-1].numel())
        return x @ self.values.to(x.dtype).T


class RoundsRows(Packed):
    """Rounds what it gets to eight bits on the scale of each row."""

    def forward(self, x):
        scale = x.abs().amax(dim=-1, keepdim=True).clamp_min(1e-9) / 127
        return super().forward((x / scale).round() * scale)


class RoundsOnOneScale(Packed):
    """Rounds what it gets to eight bits on a scale found beforehand; unit vectors are beyond it."""

    def forward(self, x):
        return super().forward((x / 0.004).round().clamp(-127, 127) * 0.004)


class Shifts(Packed):
    """Adds what no attribute calls a bias."""

    def forward(self, x):
        return super().forward(x) + 0.3


class ChoosesByRow(Packed):
    """Multiplies a row by what is in it."""

    def forward(self, x):
        return super().forward(x) * x.mean(dim=-1, keepdim=True)


def model_with(layer_class, scale: float = 1.0):
    model = tiny_model(v3_config(eos_token_id=None, pad_token_id=PAD, num_nextn_predict_layers=0))
    for layer in model.model.layers:
        layer.self_attn.kv_b_proj = layer_class(layer.self_attn.kv_b_proj).eval()
        layer.self_attn.kv_a_layernorm.weight.data.mul_(scale)
    return model


def projections(model) -> list[nn.Module]:
    return [layer.self_attn.kv_b_proj for layer in model.model.layers]


def test_a_packed_layer_decodes_alike_in_both_forms(forms):  # noqa: F811
    model = model_with(Packed)
    ids, mask = padded(model.config)
    assert_same_generation(forms, lambda: generated(model, ids, mask))


@pytest.mark.parametrize("layer_class", [RoundsRows, RoundsOnOneScale])
def test_a_layer_that_rounds_its_input_is_absorbed_and_near(layer_class, forms):  # noqa: F811
    model = model_with(layer_class, scale=0.1)
    ids, mask = padded(model.config)
    with forms(EXPANDED):
        expected = generated(model, ids, mask, steps=2)
    with forms(CHOSEN) as calls:
        found = generated(model, ids, mask, steps=2)
    assert calls["absorbed"] > 0
    for actual, reference in zip(found.logits, expected.logits, strict=True):
        assert (actual - reference).abs().max() <= ROUNDING * reference.abs().max()


@pytest.mark.parametrize("layer_class", [Shifts, ChoosesByRow])
def test_a_layer_that_is_no_matrix_decodes_in_the_expanded_form(layer_class, forms):  # noqa: F811
    model = model_with(layer_class)
    ids, mask = padded(model.config)
    with forms(EXPANDED):
        expected = generated(model, ids, mask)
    with forms(CHOSEN) as calls:
        found = generated(model, ids, mask)
    assert calls["absorbed"] == 0
    assert torch.equal(found.sequences, expected.sequences)


def _double(module, args, output):
    return 2 * output


def _halve(module, args):
    return args[0] / 2


@pytest.mark.parametrize("change", ["hook", "pre-hook", "own forward"])
def test_what_is_hung_on_a_plain_layer_acts_in_every_step(change, forms):  # noqa: F811
    model = tiny_model(v3_config(eos_token_id=None, pad_token_id=PAD, num_nextn_predict_layers=0))
    ids, mask = padded(model.config)
    plain = generated(model, ids, mask)
    for layer in projections(model):
        if change == "hook":
            layer.register_forward_hook(_double)
        elif change == "pre-hook":
            layer.register_forward_pre_hook(_halve)
        else:
            layer.forward = lambda x, weight=layer.weight: 2 * nn.functional.linear(x, weight)
    with forms(EXPANDED):
        expected = generated(model, ids, mask)
    with forms(CHOSEN):
        found = generated(model, ids, mask)
    assert torch.equal(torch.stack(found.logits), torch.stack(expected.logits))
    assert not torch.equal(torch.stack(found.logits), torch.stack(plain.logits))


def test_a_layer_that_accelerate_keeps_in_its_place_is_absorbed(forms):  # noqa: F811
    model = tiny_model(v3_config(eos_token_id=None, pad_token_id=PAD, num_nextn_predict_layers=0))
    for layer in projections(model):
        add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu"))
    ids, mask = padded(model.config)
    assert_same_generation(forms, lambda: generated(model, ids, mask))


def finds(model) -> int:
    """How often the unit vectors go through the layers in a generation."""
    ids, width = tiny_ids(model.config, length=8), model.config.kv_lora_rank
    for layer in projections(model):
        layer.rows.clear()
    generated(model, ids, steps=6)
    rows = [rows for layer in projections(model) for rows in layer.rows]
    return sum(each > width for each in rows if each != ids.numel())


def kept_matrices(model) -> int:
    return sum(layer in absorbed_matrix._matrices for layer in projections(model))


def test_the_matrix_is_found_once_and_again_after_a_change():
    model = model_with(Packed)
    first, second, _ = projections(model)
    assert finds(model) == 3
    assert finds(model) == 0
    first.scale.mul_(1.5)
    assert finds(model) == 1
    second.packed = second.packed.clone()
    assert finds(model) == 1
    second.packed.data = second.packed.data.clone()
    assert finds(model) == 1


def test_what_is_kept_goes_with_training_and_with_the_model_and_is_no_part_of_it():
    model = model_with(Packed)
    generated(model, tiny_ids(model.config, length=8))
    assert kept_matrices(model) == 3
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert kept_matrices(other) == 0
    model.train()
    assert kept_matrices(model) == 0
    assert finds(model.eval()) == 3
    layers = [weakref.ref(layer) for layer in projections(model)]
    del model, other
    gc.collect()
    assert not any(layer() for layer in layers)


def test_the_matrix_has_the_dtype_of_the_activations_and_no_gradient():
    layer = Packed(nn.Linear(6, 10, bias=False)).eval()
    inputs = torch.randn(3, 6)
    with torch.inference_mode():
        found = matrix_of(layer, inputs)
    torch.testing.assert_close(found, layer.values)
    assert found is matrix_of(layer, inputs) and found.is_contiguous()
    assert not found.is_inference() and not found.requires_grad
    half = matrix_of(layer, inputs.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half, layer.values.bfloat16())


def test_a_matrix_that_is_not_kept_is_not_worth_finding_for_few_rows():
    layer = nn.Sequential(nn.Linear(6, 10, bias=False))
    assert matrix_of(layer, torch.randn(6, 6)) is None
    torch.testing.assert_close(matrix_of(layer, torch.randn(7, 6)), layer[0].weight)


def test_while_its_weight_is_trained_a_layer_is_asked_every_time():
    layer = nn.Sequential(nn.Linear(6, 10, bias=False))
    matrix = matrix_of(layer, torch.randn(7, 6))
    matrix.sum().backward()
    torch.testing.assert_close(layer[0].weight.grad, torch.ones(10, 6))
    with torch.no_grad():
        layer[0].weight.mul_(2)
    torch.testing.assert_close(matrix_of(layer, torch.randn(7, 6)), layer[0].weight)


def test_the_output_projection_gets_a_contiguous_tensor():
    model = tiny_model(v3_config(num_nextn_predict_layers=0))
    ids, seen = tiny_ids(model.config, batch=3, length=14), []
    model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        cache = model(ids[:, :12], use_cache=True).past_key_values
        for tokens in ids[:, 12:].split(1, dim=1):
            model(tokens, past_key_values=cache)
    assert len(seen) == 3 and all(x.is_contiguous() for x in seen)
