"""Runs whose checkpoints are cut into many files: resumed, restored to the best, refused where a file lost tensors."""

import functools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_run import stopped_at, tiny_values

from modeling_deepseek_moe import DeepseekMoeForCausalLM
from modeling_deepseek_moe.finetune.errors import UserError
from modeling_deepseek_moe.finetune.recipe.load import make_recipe
from modeling_deepseek_moe.finetune.runs.seals import COMPLETE, seal
from modeling_deepseek_moe.finetune.train import one_run as train

KINDS = {
    "whole model, best checkpoint": {
        "training.load_best_model_at_end": True,
        "training.eval_strategy": "steps",
        "training.eval_steps": 2,
    },
    "esft": {"esft.sample_tokens": 64, "esft.top_p": 0.5},
}


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    """Everything is saved in files of 21 KB at most, some 25 a model."""
    save = functools.partialmethod(DeepseekMoeForCausalLM.save_pretrained, max_shard_size="21KB")
    monkeypatch.setattr(DeepseekMoeForCausalLM, "save_pretrained", save)


def recipe(folder, base, **overrides):
    folder.mkdir(exist_ok=True)
    values = tiny_values(folder, base, **overrides)
    return make_recipe({key: value for key, value in values.items() if not key.startswith("lora.")})


def weights(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("kind", ["whole model, best checkpoint", pytest.param("esft", marks=pytest.mark.slow)])
def test_a_run_goes_on_from_many_files_as_if_it_had_not_stopped(kind, tmp_path, base, caplog):
    at_once = train.run(recipe(tmp_path / "a", base, **KINDS[kind]))
    with stopped_at(5, "checkpoint-4 is saved"):
        train.run(recipe(tmp_path / "b", base, **KINDS[kind]))
    checkpoint = tmp_path / "b" / "run" / "checkpoint-4"
    assert len(list(checkpoint.glob("*.safetensors"))) > 1
    in_two = train.run(recipe(tmp_path / "b", base, **KINDS[kind]))
    assert in_two["resumed_from"] == "checkpoint-4"
    result = "adapter" if kind == "esft" else "model"
    one, other = (weights(tmp_path / run / "run" / result) for run in "ab")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert at_once["eval_loss_after"] == in_two["eval_loss_after"]
    # transformers compares names of files with those of the model, and would warn of every expert.
    assert "keys in the checkpoint model loaded" not in caplog.text


def test_a_checkpoint_that_lost_an_expert_is_refused_by_its_name(tmp_path, base):
    with stopped_at(3, "checkpoint-2 is saved"):
        train.run(recipe(tmp_path / "a", base))
    checkpoint = tmp_path / "a" / "run" / "checkpoint-2"
    lost = "model.layers.2.mlp.experts.6.down_proj.weight"
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    file = checkpoint / index["weight_map"].pop(lost)
    save_file({name: tensor for name, tensor in load_file(file).items() if name != lost}, file)
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    (checkpoint / COMPLETE).unlink()
    seal(checkpoint)  # as if it had been written so: a file that changed later is found by its digest before
    with pytest.raises(UserError, match=rf"run lacks {lost}: remove the newest checkpoint") as caught:
        train.run(recipe(tmp_path / "a", base))
    assert "\n" not in str(caught.value)
