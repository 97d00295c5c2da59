"""The linear layer on few rows, and memory for large tensors."""

import gc
import mmap

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_ids, tiny_model, v3_config
from torch import nn

from modeling_deepseek_moe import large_tensors, linear
from modeling_deepseek_moe.linear import DeepseekMoeLinear


def make_linear(dtype: torch.dtype, bias: bool = False) -> DeepseekMoeLinear:
    torch.manual_seed(0)
    return DeepseekMoeLinear(96, 160, bias=bias).to(dtype)


@pytest.fixture
def few_rows_calls(monkeypatch) -> list[int]:
    """The number of rows of every product that took the way for few rows."""
    calls, original = [], linear.few_rows_linear

    def counted(x, weight):
        calls.append(len(x))
        return original(x, weight)

    monkeypatch.setattr(linear, "few_rows_linear", counted)
    return calls


@pytest.mark.parametrize("shape", [(96,), (1, 96), (1, 1, 96), (3, 96), (2, 8, 96), (4, 5, 96)], ids=str)
def test_outputs_and_gradients_are_those_of_a_linear_layer(shape, few_rows_calls):
    layer, x = make_linear(torch.bfloat16), torch.randn(shape).bfloat16().requires_grad_()
    reference, same_x = nn.Linear(96, 160, bias=False).bfloat16(), x.detach().clone().requires_grad_()
    reference.load_state_dict(layer.state_dict())
    actual, expected = layer(x), reference(same_x)
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
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert not few_rows_calls


def test_under_autocast_a_layer_in_float32_computes_in_bfloat16(few_rows_calls):
    with torch.autocast("cpu", torch.bfloat16):
        assert make_linear(torch.float32)(torch.randn(1, 96)).dtype == torch.bfloat16
    assert not few_rows_calls


def test_adapters_go_on_top_of_it(few_rows_calls):
    model = tiny_model(v3_config()).bfloat16().eval()
    adapted = get_peft_model(model, LoraConfig(target_modules=["o_proj"], init_lora_weights=False))
    ids = tiny_ids(v3_config())[:1, :1]
    with torch.no_grad():
        actual = adapted(ids).logits
        assert few_rows_calls
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
