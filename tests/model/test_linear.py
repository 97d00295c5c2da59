"""Linear layers and how they are called on few rows; memory for large tensors."""

import gc
import mmap

import pytest
import torch
from machines import pretend
from peft import LoraConfig, get_peft_model
from tiny import CONFIG_OF_LINEAGE, tiny_config, tiny_ids, tiny_model, v3_config
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from modeling_deepseek_moe import large_tensors, linear
from modeling_deepseek_moe.linear import call_linear


def make_linear(dtype: torch.dtype, bias: bool = False) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(96, 160, bias=bias).to(dtype)


@pytest.fixture
def few_rows_calls(monkeypatch) -> list[int]:
    """The number of rows of every product that took the way for few rows, as on a machine where it is faster."""
    calls, original = [], linear.few_rows_linear

    def counted(x, weight):
        calls.append(len(x))
        return original(x, weight)

    monkeypatch.setattr(linear, "few_rows_linear", counted)
    pretend(monkeypatch, torch.bfloat16, has_tiles=True)
    return calls


@pytest.mark.parametrize("lineage", CONFIG_OF_LINEAGE)
def test_every_linear_layer_has_exactly_the_type_that_quantisers_look_for(lineage):
    model = tiny_model(tiny_config(lineage))
    kinds = {type(module) for module in model.modules() if isinstance(module, nn.Linear)}
    assert kinds == {nn.Linear}


@pytest.mark.parametrize("shape", [(96,), (1, 96), (1, 1, 96), (3, 96), (2, 8, 96), (4, 5, 96)], ids=str)
def test_outputs_and_gradients_are_those_of_the_layer(shape, few_rows_calls):
    layer, x = make_linear(torch.bfloat16), torch.randn(shape).bfloat16().requires_grad_()
    reference, same_x = make_linear(torch.bfloat16), x.detach().clone().requires_grad_()
    actual, expected = call_linear(layer, x), reference(same_x)
    rows = x.numel() // 96
    assert few_rows_calls == ([rows] if rows <= 16 else [])
    assert actual.shape == expected.shape and actual.is_contiguous()
    upstream = torch.randn_like(expected)
    actual.backward(upstream)
    expected.backward(upstream)
    for a, e in ((actual, expected), (x.grad, same_x.grad), (layer.weight.grad, reference.weight.grad)):
        # One bfloat16 rounding of a sum whose order may differ.
        torch.testing.assert_close(a, e, rtol=2**-7, atol=2**-8)


@pytest.mark.parametrize(
    "dtype, bias, rows",
    [(torch.float32, False, 1), (torch.bfloat16, True, 1), (torch.bfloat16, False, 17), (torch.bfloat16, False, 0)],
    ids=["float32", "a bias", "more rows", "no rows"],
)
def test_everything_else_is_a_plain_product(dtype, bias, rows, few_rows_calls):
    layer, x = make_linear(dtype, bias), torch.randn(rows, 96).to(dtype)
    assert torch.equal(call_linear(layer, x), nn.functional.linear(x, layer.weight, layer.bias))
    assert not few_rows_calls


@pytest.mark.parametrize("packs, calls", [(True, 1), (False, 0)])
def test_where_the_library_does_not_pack_the_weight_it_multiplies(packs, calls, few_rows_calls, monkeypatch):
    pretend(monkeypatch, torch.bfloat16, has_tiles=packs, has_dots=True)
    call_linear(make_linear(torch.bfloat16), torch.randn(1, 96).bfloat16())
    assert len(few_rows_calls) == calls


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_the_dtype_is_that_of_the_layer_itself(dtype, autocast, few_rows_calls):
    with torch.autocast("cpu", autocast):
        assert call_linear(make_linear(dtype), torch.randn(1, 96).to(dtype)).dtype == autocast
    assert not few_rows_calls


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def _hooked(layer):
    layer.register_forward_hook(lambda module, args, output: 2 * output)


def _pre_hooked(layer):
    layer.register_forward_pre_hook(lambda module, args: 2 * args[0])


def _replaced(layer):
    layer.forward = lambda x: 2 * nn.functional.linear(x, layer.weight)


def _subclassed(layer):
    layer.__class__ = Doubled


def _parametrized(layer):
    nn.utils.parametrize.register_parametrization(layer, "weight", nn.Hardtanh(-9, 9))
    layer.parametrizations.weight[0].forward = lambda weight: 2 * weight


@pytest.mark.parametrize("change", [_hooked, _pre_hooked, _replaced, _subclassed, _parametrized])
def test_what_is_more_than_a_product_is_called_as_it_is(change, few_rows_calls):
    layer, x = make_linear(torch.bfloat16), torch.randn(1, 96).bfloat16()
    expected = 2 * nn.functional.linear(x, layer.weight)
    change(layer)
    assert torch.equal(call_linear(layer, x), expected)
    assert not few_rows_calls


def test_hooks_on_all_modules_see_every_layer(few_rows_calls):
    seen = []
    handle = register_module_forward_hook(lambda module, args, output: seen.append(module))
    try:
        layer = make_linear(torch.bfloat16)
        call_linear(layer, torch.randn(1, 96).bfloat16())
    finally:
        handle.remove()
    assert seen == [layer] and not few_rows_calls


def test_a_decoded_token_takes_the_way_for_few_rows_in_every_layer(few_rows_calls):
    model = tiny_model(v3_config()).bfloat16()
    calls = []
    for name, module in model.named_modules():
        # Decoding absorbs `kv_b_proj`, and with a hook on it does not.
        if type(module) is nn.Linear and not name.endswith("kv_b_proj"):
            module.register_forward_hook(lambda module, args, output: calls.append(module))
    with torch.no_grad():
        cache = model(tiny_ids(model.config)[:1], use_cache=True).past_key_values
        calls.clear()
        few_rows_calls.clear()
        hooked = model(tiny_ids(model.config)[:1, :1], past_key_values=cache).logits
        assert not few_rows_calls
        for module in model.modules():
            module._forward_hooks.clear()
        cache.crop(-1)
        plain = model(tiny_ids(model.config)[:1, :1], past_key_values=cache).logits
    assert few_rows_calls == [1] * len(calls)
    # bfloat16 sums in another order through three layers.
    assert (plain - hooked).norm() <= 2**-5 * hooked.norm()


def test_adapters_go_on_top_of_a_layer():
    model = tiny_model(v3_config()).bfloat16().eval()
    adapted = get_peft_model(model, LoraConfig(target_modules=["o_proj"], init_lora_weights=False))
    ids = tiny_ids(v3_config())[:1, :1]
    with torch.no_grad():
        actual = adapted(ids).logits
        expected = adapted.merge_and_unload()(ids).logits
    # Merged weights are rounded to bfloat16 once more.
    assert (actual - expected).norm() <= 2**-5 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_tensor_is_a_tensor_like_any_other(dtype, monkeypatch):
    monkeypatch.setattr(large_tensors, "_LARGE", 2**20)
    like = torch.zeros(8, 512, 512, dtype=dtype)
    tensor = large_tensors.empty_like(like)
    assert tensor.shape == like.shape and tensor.dtype == dtype and tensor.is_contiguous()
    tensor.fill_(2)
    view = tensor[7]
    del tensor
    gc.collect()
    assert torch.equal(view, torch.full_like(view, 2))  # the memory lives as long as a view of it


def test_memory_comes_from_torch_where_the_system_refuses_huge_pages(monkeypatch):
    monkeypatch.setattr(large_tensors, "_LARGE", 2**20)
    monkeypatch.setattr(large_tensors, "_HUGE_PAGES", 12345)  # advice that no kernel knows
    with pytest.raises(OSError):
        mmap.mmap(-1, 4096).madvise(12345)
    assert large_tensors.empty_like(torch.zeros(2**20)).fill_(1).sum() == 2**20
