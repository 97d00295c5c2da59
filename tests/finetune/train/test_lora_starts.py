"""Runs whose adapters start from the base weights: what they save is plain LoRA on the base as it was."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny import tiny_ids
from tiny_run import stopped_at, tiny_values

from modeling_deepseek_moe import DeepseekMoeForCausalLM
from modeling_deepseek_moe.conversion import convert
from modeling_deepseek_moe.finetune.plan.model import meta_model
from modeling_deepseek_moe.finetune.recipe.load import make_recipe
from modeling_deepseek_moe.finetune.recipe.values import RecipeError
from modeling_deepseek_moe.finetune.train import one_run as train


@torch.no_grad()
def logits(model):
    return model.eval()(tiny_ids(model.config)).logits


def fields_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize("start", ["pissa_niter_4", "orthogonal"])
def test_the_adapter_of_a_run_fits_the_base_that_others_have(start, go, base, tmp_path):
    summary = go(**{"lora.init_lora_weights": start, "merge": True, "training.max_steps": 3})
    adapter = tmp_path / "run" / "adapter"
    assert summary["eval_loss_after"] != summary["eval_loss_before"]
    is_changed = start != "orthogonal"
    fields = fields_of(adapter)
    assert (fields["init_lora_weights"], fields["r"]) == (True, 8 if is_changed else 4)
    assert fields_of(tmp_path / "run" / "checkpoint-3")["init_lora_weights"] == start
    plain = DeepseekMoeForCausalLM.from_pretrained(base)
    before = logits(plain)
    found = logits(PeftModel.from_pretrained(plain, adapter))
    merged = logits(DeepseekMoeForCausalLM.from_pretrained(tmp_path / "run" / "model"))
    # W - B_0 A_0 + B A in either order: float32 rounding of weights, through three layers.
    torch.testing.assert_close(found, merged, rtol=0, atol=5e-5 * float(merged.abs().max()))
    assert not torch.allclose(found, before, atol=1e-2)
    convert(base, tmp_path / "converted", "plain", adapter=adapter, verify=True)
    converted = logits(DeepseekMoeForCausalLM.from_pretrained(tmp_path / "converted"))
    torch.testing.assert_close(converted, merged, rtol=0, atol=5e-5 * float(merged.abs().max()))


def test_a_stopped_run_subtracts_the_start_that_it_had(tmp_path, base):
    def recipe(folder):
        (tmp_path / folder).mkdir(exist_ok=True)
        values = {"lora.init_lora_weights": "pissa_niter_2", "lora.targets": ["attention", "routed_experts"]}
        return make_recipe(tiny_values(tmp_path / folder, base, **values, **{"training.max_steps": 4}))

    train.run(recipe("a"))
    with stopped_at(3, "checkpoint-2 is saved"):
        train.run(recipe("b"))
    assert train.run(recipe("b"))["resumed_from"] == "checkpoint-2"
    one, other = (load_file(tmp_path / name / "run/adapter/adapter_model.safetensors") for name in "ab")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_start_that_experts_cannot_have_ends_in_one_line(go, tmp_path):
    with pytest.raises(RecipeError, match="`lora.*`: init_lora_weights='mica' starts .* not of routed_exp") as caught:
        go(**{"lora.init_lora_weights": "mica"})
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_plan_knows_adapters_that_start_from_the_weights_and_refuses_replicated_layers(base, tmp_path):
    config = DeepseekMoeForCausalLM.from_pretrained(base).config
    sizes = []
    for start in (True, "pissa", "olora"):
        recipe = make_recipe(tiny_values(tmp_path, base, **{"lora.init_lora_weights": start}))
        _, model, _ = meta_model(config, recipe)
        sizes.append(sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad))
    assert len(set(sizes)) == 1 and sizes[0] > 0
    recipe = make_recipe(tiny_values(tmp_path, base, **{"lora.layer_replication": [[0, 3]]}))
    with pytest.raises(RecipeError, match="`lora.layer_replication` makes another model"):
        meta_model(config, recipe)
