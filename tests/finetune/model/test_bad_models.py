"""What comes with a model and is not the caller's wish: kernels of the Hub, numbers that are none, pickles."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_run import tiny_base

from modeling_deepseek_moe import DeepseekMoeConfig
from modeling_deepseek_moe.finetune.errors import UserError
from modeling_deepseek_moe.finetune.model.use import load_for_use
from modeling_deepseek_moe.finite import all_finite


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_kernels_that_a_config_names_on_the_hub_are_not_fetched(key, tmp_path, monkeypatch, caplog):
    base = tiny_base(tmp_path / "base")
    fields = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(fields | {key: "somebody/kernels"}))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("transformers.integrations.hub_kernels.is_kernel", lambda name: "/" in (name or ""))
    network, _ = load_for_use(base)
    assert "somebody" not in json.dumps([str(value) for value in vars(network.config).values()])
    assert DeepseekMoeConfig.from_dict({key: "eager"})._attn_implementation in ("eager", None)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_no_number_is_named_by_every_way_to_load(number, tmp_path):
    base = tiny_base(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.2.mlp.experts.5.down_proj.weight"][3, 3] = number
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model .*: model.layers.2.mlp.experts.down_proj holds values that are not"):
        load_for_use(base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn])
def test_finite_is_what_torch_calls_so(dtype):
    largest = torch.finfo(dtype).max
    values = torch.tensor([0.0, -1.0, 2.0, largest, largest], dtype=torch.float64).to(dtype)
    assert all_finite(values) and all_finite(values[:0])
    spoiled = values.double()
    spoiled[1] = float("nan")
    assert not all_finite(spoiled.to(dtype))
    if dtype != torch.float8_e4m3fn:  # which has no infinity
        assert not all_finite(torch.stack([values[0], values[1] * float("inf")]))


def test_integers_and_weights_without_values_are_finite():
    assert all_finite(torch.arange(3)) and all_finite(torch.empty(3, device="meta"))
