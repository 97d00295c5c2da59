"""Checkpoints in several files that cut through a layer's experts: saved, loaded, loaded into a model in memory."""

import functools
import itertools
import json
import random

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_ids, tiny_model, v3_config
from tiny_trainer import trainer_of, training_model, whole_rows

from modeling_deepseek_moe import DeepseekMoeForCausalLM

EXPERT_TENSORS = [f"{expert}.{part}_proj.weight" for expert in range(8) for part in ("gate", "up", "down")]


@pytest.fixture(scope="module")
def saved():
    return tiny_model(v3_config(), seed=0)


@pytest.fixture(scope="module")
def folder(saved, tmp_path_factory):
    """Its checkpoint in 25 files."""
    folder = tmp_path_factory.mktemp("saved")
    saved.save_pretrained(folder, max_shard_size="21KB")
    assert len(files_of(folder)) == 25
    return folder


def files_of(folder):
    return sorted(folder.glob("*.safetensors"))


def assert_same_weights(model, other):
    found, expected = model.state_dict(), other.state_dict()
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def test_the_index_names_every_expert_and_files_cut_through_layers(saved, folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    tensors = {name: tensor for file in files_of(folder) for name, tensor in load_file(file).items()}
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    for layer in (1, 2, 3):
        names = {f"model.layers.{layer}.mlp.experts.{name}" for name in EXPERT_TENSORS}
        assert names <= tensors.keys()
        assert len({index["weight_map"][name] for name in names}) > 2
    assert_same_weights(DeepseekMoeForCausalLM.from_pretrained(folder), saved)


@pytest.mark.parametrize("seed", range(3))
def test_files_that_are_loaded_one_after_the_other_give_the_whole_model_in_any_order(saved, folder, seed):
    other, files = tiny_model(v3_config(), seed=1), files_of(folder)
    random.Random(seed).shuffle(files)
    loaded = set()
    for file in files:
        tensors = load_file(file)
        result = other.load_state_dict(tensors, strict=False)
        assert not result.unexpected_keys
        loaded |= tensors.keys()
        for layer in (1, 2, 3):
            prefix = f"model.layers.{layer}.mlp.experts."
            here = {name.removeprefix(prefix) for name in tensors if name.startswith(prefix)}
            for stacked, parts in (("gate_up_proj", ("gate", "up")), ("down_proj", ("down",))):
                lost = [name for name in EXPERT_TENSORS if name.split(".")[1].removesuffix("_proj") in parts]
                found = here.intersection(lost)
                expected = [name for name in lost if name not in found] if found else [stacked]
                missing = {name.removeprefix(prefix) for name in result.missing_keys if name.startswith(prefix)}
                assert missing.intersection([*lost, stacked]) == set(expected)
    assert_same_weights(other, saved)


def test_a_part_of_a_layers_experts_leaves_the_others_as_they_were(saved, folder):
    other, untouched = (tiny_model(v3_config(), seed=1) for _ in range(2))
    name = "model.layers.1.mlp.experts.5.up_proj.weight"
    tensor = next(load_file(file)[name] for file in files_of(folder) if name in load_file(file))
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*layers\.1\.mlp\.experts\.0\.gate_proj\.weight"):
        other.load_state_dict({name: tensor}, strict=True)
    stack = other.model.layers[1].mlp.experts.gate_up_proj
    assert torch.equal(stack[5, 16:], tensor)
    with torch.no_grad():
        stack[5, 16:] = untouched.model.layers[1].mlp.experts.gate_up_proj[5, 16:]
    assert_same_weights(other, untouched)


def test_parts_are_rounded_to_the_dtype_of_the_model(saved, folder):
    half = tiny_model(v3_config(), seed=1).to(torch.bfloat16)
    for file in files_of(folder):
        half.load_state_dict(load_file(file), strict=False)
    stack = half.model.layers[2].mlp.experts.down_proj
    assert stack.dtype == torch.bfloat16
    assert torch.equal(stack, saved.model.layers[2].mlp.experts.down_proj.bfloat16())


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda tensors: {"0.gate_proj.weight": torch.zeros(15, 32)}, r"size mismatch for 0\.gate_proj\.weight"),
        (lambda tensors: {**tensors, "3.up_proj.weight": torch.zeros(16, 1)}, r"size mismatch for 3\.up_proj\.weight"),
        (lambda tensors: {**tensors, "8.up_proj.weight": torch.zeros(16, 32)}, r"Unexpected .*8\.up_proj\.weight"),
    ],
    ids=["one of many", "one among all", "one expert too many"],
)
def test_tensors_that_do_not_fit_are_named(change, problem):
    experts = tiny_model(v3_config()).model.layers[1].mlp.experts
    tensors = {name: torch.zeros(32, 16) if "down" in name else torch.zeros(16, 32) for name in EXPERT_TENSORS}
    with pytest.raises(RuntimeError, match=problem):
        experts.load_state_dict(change(tensors), strict=True)


def test_where_parts_have_no_place_to_be_written_to_that_is_said(folder):
    name = "model.layers.1.mlp.experts.5.up_proj.weight"
    some = {name: torch.zeros(16, 32)}
    with pytest.raises(RuntimeError, match=rf"{name} and 0 more are some of the 16 tensors .*assign=True takes all"):
        tiny_model(v3_config()).load_state_dict(some, strict=False, assign=True)
    with torch.device("meta"):
        empty = DeepseekMoeForCausalLM(v3_config())
    with pytest.raises(RuntimeError, match="kind Tensor on meta takes all of them in one call"):
        empty.load_state_dict(some, strict=False)
    whole = {name: tensor for file in files_of(folder) for name, tensor in load_file(file).items()}
    empty.load_state_dict(whole, strict=True, assign=True)
    assert empty.model.layers[1].mlp.experts.gate_up_proj.device.type == "cpu"


@pytest.mark.filterwarnings("ignore")
def test_transformers_trainer_resumes_from_many_files_as_if_it_had_not_stopped(tmp_path):
    """The Trainer loads one file after the other. Its own warning about names is not about what it has loaded."""
    rows = whole_rows(training_model(), 16)
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 0.05}

    def trainer(model):
        model.save_pretrained = functools.partial(model.save_pretrained, max_shard_size="21KB")
        return trainer_of(model, rows, tmp_path, **options)

    straight = trainer(training_model())
    straight.train()
    checkpoint = tmp_path / "checkpoint-2"
    assert len(files_of(checkpoint)) == 25
    other = training_model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_()
    resumed = trainer(other)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 4
    assert_same_weights(resumed.model, straight.model)


@torch.no_grad()
def test_a_model_with_experts_of_two_files_computes_what_was_saved(saved, folder):
    other = tiny_model(v3_config(), seed=1)
    for first, second in itertools.zip_longest(*[iter(files_of(folder))] * 2):
        other.load_state_dict(load_file(first) | (load_file(second) if second else {}), strict=False)
    ids = tiny_ids(saved.config)
    assert torch.equal(other(ids).logits, saved(ids).logits)
