"""What PEFT does with adapters of routed experts, done with this package's layer: files, several at once, merging."""

import copy

import pytest
import torch
from adapted_pair import (
    assert_same,
    assert_same_gradients,
    base_model,
    logits,
    make_config,
    pair,
    randomize,
    wrappers,
)
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from modeling_deepseek_moe.expert_lora import load_adapter
from modeling_deepseek_moe.finetune.model.lora import lora_config

pytestmark = pytest.mark.filterwarnings("error:LoRA on routed experts builds")


def test_ours_is_saved_as_peft_saves_and_each_loads_the_others_file(tmp_path):
    ours, stock = pair()
    files = {}
    for name, model in {"ours": ours, "stock": stock}.items():
        model.save_pretrained(tmp_path / name)
        files[name] = load_file(tmp_path / name / "adapter_model.safetensors")
    assert files["ours"].keys() == files["stock"].keys()
    assert all(torch.equal(tensor, files["stock"][name]) for name, tensor in files["ours"].items())
    experts = "base_model.model.model.layers.1.mlp.experts"
    assert {f"{experts}.base_layer.lora_A.weight", f"{experts}.lora_B.weight"} <= files["ours"].keys()

    base = base_model()
    with_stock = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    with_ours = load_adapter(copy.deepcopy(base), tmp_path / "stock").eval()
    assert wrappers(with_ours) and not wrappers(with_stock)
    assert not any(parameter.requires_grad for parameter in with_ours.parameters())
    assert torch.equal(logits(with_stock), logits(stock))
    assert torch.equal(logits(with_ours), logits(ours))


@pytest.mark.parametrize("is_trainable", [True, False])
def test_an_adapter_goes_onto_a_model_that_has_others(is_trainable, tmp_path):
    ours, _ = pair()
    ours.save_pretrained(tmp_path)
    model = base_model()
    model = get_peft_model(model, lora_config(model, ["attention"]), adapter_name="first")
    again = load_adapter(model, tmp_path, adapter_name="second", is_trainable=is_trainable)
    assert again is model and wrappers(model)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert any(".second." in name for name in trained) == is_trainable
    assert model.peft_config["second"].inference_mode == (not is_trainable)
    model.set_adapter("second")
    assert_same(logits(model.eval()), logits(ours), tolerance=0)


def test_adapters_are_switched_added_up_and_disabled():
    ours, stock = pair()
    for model in (ours, stock):
        model.add_adapter("second", make_config(r=2, lora_alpha=3))
        randomize(model, seed=2)
    seen = []
    for active in ("default", "second", ["default", "second"]):
        for model in (ours, stock):
            model.base_model.set_adapter(active)
        assert_same(logits(ours), logits(stock))
        assert_same_gradients(ours.eval(), stock.eval())
        seen.append(logits(ours.eval()))
    with ours.disable_adapter():
        seen.append(logits(ours))
    assert torch.equal(seen[-1], logits(base_model()))
    assert all(not torch.allclose(a, b, atol=0.01) for i, a in enumerate(seen) for b in seen[:i])
    ours.delete_adapter("second")
    assert_same(logits(ours), seen[0], tolerance=0)


def test_weighted_combinations_are_refused_as_by_peft():
    """PEFT would concatenate A of all experts in the wrong order, and knows it."""
    for model in pair():
        model.add_adapter("second", make_config())
        with pytest.raises(ValueError, match="add_weighted_adapter does not support targeting nn.Parameter"):
            model.add_weighted_adapter(["default", "second"], [0.7, -0.4], "mixed", combination_type="cat")


def test_merging_gives_the_weights_that_peft_gives_and_is_undone():
    ours, stock = pair()
    unmerged = logits(ours)
    for model in (ours, stock):
        model.merge_adapter()
    assert torch.equal(logits(ours), logits(stock))
    # The other way of adding: rounding of W + B A, through three layers.
    assert_same(logits(ours), unmerged)
    ours.unmerge_adapter()
    assert_same(logits(ours), unmerged)
    stock.unmerge_adapter()
    merged = [model.merge_and_unload().state_dict() for model in (ours, stock)]
    assert merged[0].keys() == merged[1].keys() == base_model().state_dict().keys()
    assert all(torch.equal(tensor, merged[1][name]) for name, tensor in merged[0].items())


def test_disabling_a_merged_adapter_unmerges_it():
    ours, _ = pair()
    ours.merge_adapter()
    with ours.disable_adapter():
        # Taking B A off again rounds W once more.
        assert_same(logits(ours), logits(base_model()))
