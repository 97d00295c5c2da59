"""Broken and malicious checkpoints: one clear error each, and nothing left behind."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file
from tiny import tiny_model, v3_config
from transformers import AutoModelForCausalLM

from modeling_deepseek_moe import CheckpointError, DeepseekMoeForCausalLM, DeepseekMoeModel
from modeling_deepseek_moe.checkpoint_files import INDEX_NAME, read_header

EXPERT = "model.layers.1.mlp.experts.3"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
SMALL_FILE = save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)})


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    tiny_model(v3_config()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    tiny_model(v3_config()).save_pretrained(folder, max_shard_size="50KB")
    return folder


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    """A copy of a sound checkpoint, for a test to break."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


@pytest.fixture
def sharded_folder(sharded, tmp_path) -> Path:
    return Path(shutil.copytree(sharded, tmp_path / "model"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(folder: Path, *expected: str, model_class=DeepseekMoeForCausalLM) -> str:
    """The one-line error of loading `folder`; checks that the folder and its surroundings stay as they were."""
    before = contents(folder.parent)
    with pytest.raises((ValueError, OSError)) as caught:
        model_class.from_pretrained(folder)
    assert contents(folder.parent) == before
    message = str(caught.value)
    assert "\n" not in message.strip()
    for part in expected:
        assert part in message
    return message


def change_tensors(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    tensors = change(load_file(path))
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("kept", [0, 5, 8, 1000, -4096, -1], ids=lambda kept: f"{kept} bytes")
def test_a_truncated_file_is_refused(folder, kept):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    refused(folder, "model.safetensors", "truncated" if kept < 0 else "no whole safetensors file")


def test_a_file_with_bytes_behind_its_tensors_is_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"more")
    refused(folder, "model.safetensors", "padded")


def test_a_truncated_shard_is_refused_before_the_others_are_read(sharded_folder):
    shard = sorted(sharded_folder.glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-1])
    refused(sharded_folder, shard.name, "truncated")


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b"not JSON at all", "not JSON"),
        (b"[1, 2]", "not an object"),
        (b'{"a": 1}', "tensor a is malformed"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}', "tensor a is malformed"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', "tensor a of shape [2] spans 4 bytes"),
        (b'{"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}', "tensor a"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}', "tensor a"),
        (b'{"a": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}}', "tensor a"),
        (b'{"a": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 8]}}', "tensor a is malformed"),
        (b"[" * 100_000, "not JSON"),
        (b"\xff\xfe{}", "not JSON"),
    ],
    ids=[
        "text",
        "list",
        "number",
        "one offset",
        "size",
        "negative",
        "backwards",
        "dtype",
        "infinite",
        "deep nesting",
        "encoding",
    ],
)
def test_a_header_that_is_not_one_is_refused(folder, header, reason):
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    refused(folder, "model.safetensors", reason)


def test_a_header_longer_than_the_file_is_refused_without_being_read(folder):
    (folder / "model.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")
    refused(folder, "no whole safetensors file")


def edit_index(folder: Path, change) -> None:
    path = folder / INDEX_NAME
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def test_an_index_that_names_a_missing_shard_is_refused(sharded_folder):
    shard = sorted(sharded_folder.glob("*.safetensors"))[0]
    shard.unlink()
    refused(sharded_folder, INDEX_NAME, f"names the missing shard {shard.name}")


@pytest.mark.parametrize("place", ["../outside.safetensors", "absolute", "..", "", "sub/../../outside.safetensors"])
def test_an_index_that_points_outside_its_folder_is_refused(sharded_folder, place):
    """Even if the file it points to is a sound shard."""
    outside = sharded_folder.parent / "outside.safetensors"
    first = sorted(sharded_folder.glob("*.safetensors"))[0]
    shutil.copy(first, outside)
    place = str(outside) if place == "absolute" else place

    def change(index):
        index["weight_map"] = {
            name: place if shard == first.name else shard for name, shard in index["weight_map"].items()
        }

    edit_index(sharded_folder, change)
    refused(sharded_folder, INDEX_NAME, "points outside its folder", repr(place))


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": ["b"]}}', "[" * 100_000],
    ids=lambda text: text[:30],
)
def test_an_index_that_is_not_one_is_refused(sharded_folder, text):
    (sharded_folder / INDEX_NAME).write_text(text)
    refused(sharded_folder, INDEX_NAME)


@pytest.mark.parametrize("text", ["{", "", "[1, 2]", "\x00\x01"], ids=["cut", "empty", "list", "bytes"])
@pytest.mark.parametrize("model_class", [DeepseekMoeForCausalLM, AutoModelForCausalLM])
def test_a_config_that_is_not_a_json_object_is_refused(folder, text, model_class):
    (folder / "config.json").write_text(text)
    refused(folder, "config.json", model_class=model_class)


@pytest.mark.parametrize("model_type", ["llama", "deepseek_v4"])
def test_a_config_of_another_family_is_refused(folder, model_type):
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "model_type": model_type}))
    refused(folder, f"model_type='{model_type}' is not one of 'deepseek', ", "'kimi_k2'", "config.json of")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("layer", [1, 3], ids=["main layer", "MTP module"])
def test_a_routing_bias_that_is_not_finite_is_refused(folder, value, layer):
    name = BIAS.replace("layers.1", f"layers.{layer}")

    def change(tensors):
        tensors[name][2] = value
        return tensors

    change_tensors(folder, change)
    refused(folder, name, "not finite")


@pytest.mark.parametrize("model_class", [DeepseekMoeForCausalLM, DeepseekMoeModel, AutoModelForCausalLM])
def test_an_expert_of_the_wrong_shape_is_refused(folder, model_class):
    change_tensors(folder, lambda tensors: {**tensors, f"{EXPERT}.up_proj.weight": torch.zeros(5, 32)})
    refused(folder, f"{EXPERT}.up_proj.weight is [5, 32] instead of [16, 32]", model_class=model_class)


@pytest.mark.parametrize("model_class", [DeepseekMoeForCausalLM, DeepseekMoeModel, AutoModelForCausalLM])
def test_a_missing_expert_is_refused(folder, model_class):
    change_tensors(folder, lambda tensors: {k: v for k, v in tensors.items() if not k.startswith(f"{EXPERT}.")})
    names = [f"{EXPERT}.{projection}.weight" for projection in ("gate_proj", "up_proj", "down_proj")]
    refused(folder, "3 missing", *names, model_class=model_class)


def test_fp8_weights_without_a_quantization_config_are_refused(folder):
    """FACTS T20: their scales would be dropped, and the bare numbers mean something else."""
    name = "model.layers.0.self_attn.o_proj.weight"
    change_tensors(folder, lambda tensors: {**tensors, f"{name}_scale_inv": torch.ones(1, 1)})
    refused(folder, f"{name}_scale_inv", "quantization_config")


@pytest.mark.parametrize("options", [{}, {"use_safetensors": None}, {"use_safetensors": False}])
def test_a_folder_with_only_a_pickle_is_refused(folder, options):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises((CheckpointError, OSError), match="safetensors"):
        DeepseekMoeForCausalLM.from_pretrained(folder, **options)


def test_the_unbroken_checkpoint_of_these_tests_loads(folder):
    assert DeepseekMoeForCausalLM.from_pretrained(folder).config.num_nextn_predict_layers == 1


@settings(max_examples=200, deadline=None)
@given(
    edits=st.lists(st.tuples(st.integers(0, len(SMALL_FILE) - 1), st.integers(0, 255)), max_size=6),
    kept=st.integers(0, len(SMALL_FILE)),
    tail=st.binary(max_size=8),
)
def test_a_header_of_changed_bytes_is_read_or_refused_with_a_checkpoint_error(tmp_path_factory, edits, kept, tail):
    damaged = bytearray(SMALL_FILE)
    for position, value in edits:
        damaged[position] = value
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes(bytes(damaged[:kept]) + tail)
    try:
        shapes = read_header(path)
    except CheckpointError as error:
        assert str(path) in str(error)
    else:
        assert all(isinstance(name, str) and all(width >= 0 for width in shape) for name, shape in shapes.items())
