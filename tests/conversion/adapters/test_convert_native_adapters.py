"""Adapters trained here, exported for transformers' own classes: stock PEFT computes with them there as here."""

import pytest
import torch
from adapted_pair import randomize
from adapter_folders import json_of
from checkpoint_folders import assert_bit_equal, tensors_of
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import tiny_config, tiny_ids, tiny_model
from transformers import DeepseekV2ForCausalLM, DeepseekV3ForCausalLM

from modeling_deepseek_moe import DeepseekMoeForCausalLM
from modeling_deepseek_moe.conversion import convert
from modeling_deepseek_moe.expert_lora import load_adapter
from modeling_deepseek_moe.finetune.model.lora import WORDS, lora_config

# float32: the same sums in another order, through three layers; relative to the largest logit.
SAME = 1e-5
NATIVE = {"v2": DeepseekV2ForCausalLM, "v3": DeepseekV3ForCausalLM}
PATTERNS = {
    "rank_pattern": {"shared_experts.up_proj": 2, "o_proj": 6, "layers.1.mlp.experts.down_proj": 3},
    "alpha_pattern": {"layers.0.mlp.down_proj": 5},
}
CASES = {
    **{word: ([word], {}) for word in WORDS},
    "all": (["all"], {}),
    "patterns": (["all"], PATTERNS),
    "rslora": (["all"], {"use_rslora": True}),
    "one layer": (["all"], {"layers_to_transform": [1]}),
    "dropout": (["attention", "shared_experts", "dense_mlp"], {"lora_dropout": 0.1}),
    "head as a copy": (["shared_experts"], {"modules_to_save": ["lm_head"]}),
}
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module", params=NATIVE)
def base(request, tmp_path_factory):
    """A lineage's own class and a checkpoint of its type."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny_model(tiny_config(request.param, num_nextn_predict_layers=0)).save_pretrained(folder / "own")
    convert(folder / "own", folder / "native", f"deepseek_{request.param}")
    return NATIVE[request.param], folder / "native"


@torch.no_grad()
def logits(model):
    return model.eval()(tiny_ids(tiny_config("v3"))).logits


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=SAME * float(expected.abs().max()))


def trained(folder, words, **options):
    model = DeepseekMoeForCausalLM.from_pretrained(folder)
    model = get_peft_model(model, lora_config(model, words, r=4, lora_alpha=6, **options))
    randomize(model, seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(1.5)
    return model.eval()


@pytest.mark.parametrize("case", CASES)
def test_an_exported_adapter_computes_the_same_on_transformers_own_class(case, base, tmp_path):
    native, folder = base
    words, options = CASES[case]
    model = trained(folder, words, **options)
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    convert(tmp_path / "adapter", tmp_path / "native", "peft-native", verify=True)
    assert_bit_equal(tensors_of(tmp_path / "native"), tensors_of(tmp_path / "adapter"))
    fields = json_of(tmp_path / "native")
    if fields["target_parameters"]:
        assert (fields["lora_dropout"], fields["init_lora_weights"]) == (0.0, True)

    there = PeftModel.from_pretrained(native.from_pretrained(folder), tmp_path / "native")
    assert_same(logits(there), expected)
    assert_same(logits(there.merge_and_unload()), expected)
    live = native.from_pretrained(folder)
    live.load_adapter(str(tmp_path / "native"))
    if case != "head as a copy":
        assert_same(logits(live), expected)
    for place in (native, DeepseekMoeForCausalLM):
        assert_same(logits(load_adapter(place.from_pretrained(folder), str(tmp_path / "native"))), expected)
    convert(folder, tmp_path / "merged", "plain", adapter=tmp_path / "native", verify=True)
    assert_same(logits(native.from_pretrained(tmp_path / "merged")), expected)


@pytest.mark.parametrize("word", ["shared_experts", "dense_mlp", "all"])
def test_without_the_export_stock_peft_loses_it_there_and_our_loading_says_so(word, base, tmp_path):
    """When PEFT no longer does, the export is needless."""
    native, folder = base
    model = trained(folder, [word])
    model.save_pretrained(tmp_path / "adapter")
    try:
        found = logits(PeftModel.from_pretrained(native.from_pretrained(folder), tmp_path / "adapter"))
    except RuntimeError as error:  # factors of another rank than PEFT made of the targets
        assert "size mismatch" in str(error) and word == "all"
    else:
        assert not torch.allclose(found, logits(model), atol=0.1) and word != "all"
        with pytest.raises(ValueError, match=r"no place for .*_proj.lora_A.weight .PEFT takes .* --to peft-native"):
            load_adapter(native.from_pretrained(folder), str(tmp_path / "adapter"))


def test_adapters_with_a_pair_for_every_expert_are_stacked_on_the_way(base, tmp_path):
    native, folder = base
    model = trained(folder, ["shared_experts", "routed_experts"])
    model.save_pretrained(tmp_path / "adapter")
    convert(tmp_path / "adapter", tmp_path / "experts", "peft-per-expert")
    convert(tmp_path / "experts", tmp_path / "native", "peft-native", verify=True)
    assert_same(logits(PeftModel.from_pretrained(native.from_pretrained(folder), tmp_path / "native")), logits(model))


def test_adapters_by_plain_names_are_exported_too(base, tmp_path):
    """Those of a `LoraConfig` of the user's own, without words."""
    native, folder = base
    model = DeepseekMoeForCausalLM.from_pretrained(folder)
    names = ["gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"]
    model = get_peft_model(model, LoraConfig(r=4, target_modules=names))
    randomize(model, seed=1)
    model.save_pretrained(tmp_path / "adapter")
    convert(tmp_path / "adapter", tmp_path / "native", "peft-native", verify=True)
    assert_same(logits(PeftModel.from_pretrained(native.from_pretrained(folder), tmp_path / "native")), logits(model))
