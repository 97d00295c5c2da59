"""Converting broken and malicious checkpoints: one line that names file and tensor, and nothing left in the target."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_folders import tensors_of
from convert_folders import contents, fp8_folder, sharded
from safetensors.torch import load_file, save_file
from tiny import tiny_config
from typer.testing import CliRunner

from modeling_deepseek_moe.checkpoint_files import INDEX_NAME
from modeling_deepseek_moe.cli.main import app
from modeling_deepseek_moe.conversion.engine.source import open_source
from modeling_deepseek_moe.conversion.formats.table import plan_conversion

FIRST = "model-00001-of-00003.safetensors"
WEIGHT = "model.layers.1.self_attn.o_proj.weight"
SCALE = f"{WEIGHT}_scale_inv"
NORM = "model.norm.weight"
EXTRA, EXTRA_LAYER = "model.layers.0.extra", "model.layers.9.enorm.weight"


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    return fp8_folder(tmp_path_factory.mktemp("sound") / "fp8")


@pytest.fixture
def folder(sound, tmp_path) -> Path:
    """A copy of a sound checkpoint, for a test to break."""
    return Path(shutil.copytree(sound, tmp_path / "source"))


def refused(folder: Path, *expected: str, to: str = "bf16") -> None:
    """The command ends with exit code 1 and one line; neither source nor target are touched."""
    before = contents(folder.parent)
    result = CliRunner().invoke(app, ["convert", str(folder), str(folder.parent / "target"), "--to", to])
    assert result.exit_code == 1, result.output
    assert len(result.stderr.splitlines()) == 1 and not result.stdout, result.output
    for part in expected:
        assert part in result.stderr
    assert contents(folder.parent) == before
    assert not (folder.parent / "target").exists()


def rewrite(folder: Path, change) -> None:
    """The same folder with its tensors changed by `change`, in three files again."""
    tensors = tensors_of(folder)
    change(tensors)
    sharded(folder, json.loads((folder / "config.json").read_text()), tensors)


def edit_json(path: Path, change) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_header(path: Path, change) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    text = change(header)
    text = (text if isinstance(text, str) else json.dumps(header)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def put_in(folder: Path, name: str, file: str) -> None:
    """Lets the index say that a tensor is in that file."""
    edit_json(folder / INDEX_NAME, lambda index: index["weight_map"].update({name: file}))


@pytest.mark.parametrize("place", ["../outside.safetensors", "absolute", "..", "", "a/b.safetensors", "a\\b", "C:x"])
def test_an_index_that_points_outside_its_folder_is_refused(folder, place):
    shutil.copy(folder / FIRST, folder.parent / "outside.safetensors")
    place = str(folder.parent / "outside.safetensors") if place == "absolute" else place
    put_in(folder, NORM, place)
    refused(folder, INDEX_NAME, "points outside its folder", repr(place))


@pytest.mark.parametrize("name", [FIRST, "config.json", INDEX_NAME, "tokenizer.json"])
def test_a_link_out_of_the_folder_is_refused(folder, name):
    shutil.move(folder / name, folder.parent / "elsewhere")
    (folder / name).symlink_to(folder.parent / "elsewhere")
    refused(folder, name, "is a link out of its folder")


def test_an_index_that_names_a_missing_file_a_pickle_or_a_tensor_twice_is_refused(folder):
    text = (folder / INDEX_NAME).read_text()
    put_in(folder, NORM, "lost.safetensors")
    refused(folder, "names the missing shard lost.safetensors", NORM)
    (folder / "pytorch_model.bin").write_bytes(b"")
    put_in(folder, NORM, "pytorch_model.bin")
    refused(folder, "names pytorch_model.bin, which is no safetensors file")
    (folder / INDEX_NAME).write_text(text.replace('"weight_map": {', f'"weight_map": {{"{NORM}": "{FIRST}", ', 1))
    refused(folder, INDEX_NAME, NORM, "is there twice")


def test_a_tensor_in_two_files_is_refused(folder):
    tensors = load_file(folder / FIRST)
    other = next(name for name in tensors_of(folder) if name not in tensors)
    save_file(tensors | {other: torch.ones(2)}, folder / FIRST)
    put_in(folder, other, FIRST)
    refused(folder, f"tensor {other} is in {FIRST} as well")


def test_an_index_and_files_that_disagree_are_refused(folder):
    index = (folder / INDEX_NAME).read_text()
    file = json.loads(index)["weight_map"][NORM]
    edit_json(folder / INDEX_NAME, lambda value: value["weight_map"].pop(NORM))
    refused(folder, f"{file} has tensor {NORM}, which {INDEX_NAME} does not put there")
    (folder / INDEX_NAME).write_text(index)
    put_in(folder, EXTRA, FIRST)
    refused(folder, f"{FIRST} lacks tensor {EXTRA}, which {INDEX_NAME} puts there")


HEADERS = {
    "overlap": (lambda header: header[NAMES[1]].update(data_offsets=header[NAMES[0]]["data_offsets"]), "overlaps"),
    "gap": (lambda header: header.pop(NAMES[0]), "leaves a gap behind"),
    "oversized": (lambda header: header[NAMES[0]].update(data_offsets=[0, 2**62]), "spans"),
    "shape of huge numbers": (lambda header: header[NAMES[0]].update(shape=[2**62, 2**62]), "spans"),
    "negative shape": (lambda header: header[NAMES[0]].update(shape=[-1, -1]), "spans"),
    "fraction": (lambda header: header[NAMES[0]].update(shape=[1.5]), "malformed"),
    "true": (lambda header: header[NAMES[0]].update(shape=[True]), "malformed"),
    "many dimensions": (lambda header: header[NAMES[0]].update(shape=[1] * 1000), "malformed"),
    "another dtype of the same width": (lambda header: header[NAMES[0]].update(dtype="I16"), "is I16, not one of"),
    "unknown dtype": (lambda header: header[NAMES[0]].update(dtype="Q7"), "is Q7, not one of"),
    "control characters": (lambda header: header.update({"a\nb": header.pop(NAMES[0])}), r"'a\nb' has characters"),
    "half a character": (lambda header: header.update({"\ud800": header.pop(NAMES[0])}), r"'\ud800' has characters"),
    "twice": (lambda header: json.dumps(header)[:-1] + f', "{NAMES[0]}": {{}}}}', "is there twice"),
}
NAMES = ["lm_head.weight", "model.embed_tokens.weight"]


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_contradicts_itself_is_refused(case, folder):
    """The two tensors lie one behind the other in a file of their own."""
    change, message = HEADERS[case]
    tensors = tensors_of(folder)
    config_json = json.loads((folder / "config.json").read_text())
    for file in folder.glob("*.safetensors"):
        file.unlink()
    sharded(folder, config_json, {name: tensors[name] for name in tensors if name not in NAMES}, shards=2)
    save_file({name: tensors[name] for name in NAMES}, folder / "pair.safetensors")
    for name in NAMES:
        put_in(folder, name, "pair.safetensors")
    edit_header(folder / "pair.safetensors", change)
    refused(folder, "pair.safetensors", message)


@pytest.mark.parametrize("kept", [0, 7, 100, -1], ids=["empty", "7 bytes", "100 bytes", "all but one byte"])
def test_half_a_file_is_refused(kept, folder):
    (folder / FIRST).write_bytes((folder / FIRST).read_bytes()[:kept])
    refused(folder, FIRST, "truncated" if kept < 0 else "no whole safetensors file")


TENSORS = {
    "a missing scale": (lambda t: t.pop(SCALE), f"FP8 tensor {WEIGHT} has no {SCALE}"),
    "a scale of the wrong shape": (
        lambda t: t.update({SCALE: torch.ones(2, 2)}),
        f"{SCALE} is [2, 2], which does not",
    ),
    "a scale that is a number": (lambda t: t.update({SCALE: torch.tensor(1.0)}), f"{SCALE} is [], which does not fit"),
    "a scale of the wrong type": (lambda t: t.update({SCALE: torch.ones(2, 1).bfloat16()}), f"{SCALE} is BF16, not"),
    "a scale without a weight": (lambda t: t.pop(WEIGHT), f"{SCALE} has no weight {WEIGHT}"),
    "a scale of a plain weight": (
        lambda t: t.update({f"{NORM}_scale_inv": torch.ones(1, 1)}),
        f"{NORM}_scale_inv belongs to {NORM}, which is BF16, not FP8",
    ),
    "an unknown name": (
        lambda t: t.update({"model.layers.0.extra": torch.ones(2)}),
        "tensor model.layers.0.extra belongs",
    ),
    "a layer too many": (
        lambda t: t.update({"model.layers.9.enorm.weight": torch.ones(2)}),
        "model.layers.9.enorm.weight",
    ),
    "no prefix": (lambda t: t.update({"norm.weight": t.pop(NORM)}), "tensor norm.weight belongs to no model"),
    "a missing tensor": (lambda t: t.pop(NORM), f"1 missing ({NORM})"),
    "a wrong shape": (lambda t: t.update({NORM: torch.ones(3)}), f"{NORM} is [3] instead of [192]"),
    "a wrong shape of a copy": (
        lambda t: t.update({"model.layers.2.embed_tokens.weight": torch.ones(3)}),
        "model.layers.2.embed_tokens.weight is [3] instead of [96, 192]",
    ),
    "integers": (lambda t: t.update({NORM: torch.ones(192, dtype=torch.int32)}), f"{NORM} is I32, not one of"),
    "another float8": (
        lambda t: t.update({WEIGHT: t[WEIGHT].float().to(torch.float8_e5m2)}),
        f"{SCALE} belongs to {WEIGHT}, which is F8_E5M2, not FP8",
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_make_no_checkpoint_are_refused(case, folder):
    change, message = TENSORS[case]
    rewrite(folder, change)
    refused(folder, message)


CONFIGS = {
    "another quantization": ({"quantization_config": {"quant_method": "awq"}}, "only FP8 blocks are"),
    "blocks of nothing": (
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [0, 128]}},
        "weight_block_size=[0, 128] is not two positive numbers",
    ),
    "other blocks": (
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}},
        "in blocks of 64x64",
    ),
    "a billion layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000 is more than"),
    "a billion experts": ({"n_routed_experts": 10**9}, "n_routed_experts=1000000000 is more than the 16384"),
    "another family": ({"model_type": "llama"}, "model_type='llama' is not one of"),
    "a field of the wrong type": ({"hidden_size": "wide"}, "hidden_size"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_does_not_fit_is_refused(case, folder):
    fields, message = CONFIGS[case]
    edit_json(folder / "config.json", lambda config_json: config_json.update(fields))
    refused(folder, message)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"hidden_size": 1, "hidden_size": 2}', "[" * 100_000, "\x00"],
    ids=["empty", "cut", "list", "a key twice", "deep nesting", "zero byte"],
)
def test_a_config_that_is_no_json_object_is_refused(text, folder):
    (folder / "config.json").write_text(text)
    refused(folder, "config.json")


def test_folders_without_weights_are_refused_and_pickles_named(tmp_path):
    (tmp_path / "source").mkdir()
    refused(tmp_path / "source", "has no config.json")
    (tmp_path / "source" / "config.json").write_text(tiny_config("v3").to_json_string())
    refused(tmp_path / "source", "has neither model.safetensors nor")
    torch.save({}, tmp_path / "source" / "pytorch_model.bin")
    refused(tmp_path / "source", "pytorch_model.bin is a pickle, which can run code")
    refused(tmp_path / "source" / "pytorch_model.bin", "is not a folder; download a model first")


def test_the_unbroken_checkpoint_of_these_tests_is_planned(folder):
    for to in ("bf16", "fp8", "deepseek_v3"):
        assert plan_conversion(open_source(folder), to).tensor_count
