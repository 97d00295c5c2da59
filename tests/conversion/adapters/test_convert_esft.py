"""ESFT adapters out of two checkpoints and into one: bits, names, what the config says, broken folders."""

import json
from pathlib import Path

import pytest
import torch
from checkpoint_folders import assert_bit_equal, tensors_of
from convert_folders import bf16_tensors, contents, fp8_folder, ragged_json, sharded
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from modeling_deepseek_moe import CheckpointError
from modeling_deepseek_moe.cli.main import app
from modeling_deepseek_moe.conversion import ConversionError, convert

V2_LITE = {"n_routed_experts": 4, "num_hidden_layers": 4, "torch_dtype": "bfloat16"}
EXPERT = "model.layers.{}.mlp.experts.{}.{}_proj.weight"
SHARED = "model.layers.2.mlp.shared_experts.up_proj.weight"
ROUTER = "model.layers.3.mlp.gate.weight"
CHOSEN = {"1": [0, 3], "2": [], "3": [2]}
# One projection is enough to have its expert written whole.
TRAINED = {
    "experts": ([EXPERT.format(1, 3, "up"), EXPERT.format(1, 0, "down"), EXPERT.format(3, 2, "gate")], CHOSEN, 9),
    "shared_experts": ([SHARED], {"1": [], "2": [], "3": []}, 9),
    "non_expert_modules": ([EXPERT.format(2, 1, "up"), ROUTER], {"1": [], "2": [1], "3": []}, None),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    config_json = ragged_json("v2_lite", **V2_LITE)
    return sharded(folder / "base", config_json, bf16_tensors(config_json, folder / "saved"))


def tuned_from(base: Path, folder: Path, names: list[str]) -> Path:
    """The checkpoint with the lowest bit of each named tensor flipped."""
    tensors = tensors_of(base)
    for name in names:
        tensors[name].view(torch.int16)[-1, -1] ^= 1
    return sharded(folder, json.loads((base / "config.json").read_text()), tensors, shards=2)


def expert_cfg(folder: Path) -> dict:
    return json.loads((folder / "expert_cfg.json").read_text())


@pytest.mark.parametrize("case", TRAINED)
def test_what_was_trained_is_written_and_merges_to_the_same_bits(case, base, tmp_path):
    names, experts, count = TRAINED[case]
    tuned = tuned_from(base, tmp_path / "tuned", names)
    before = contents(tuned), contents(base)
    convert(tuned, tmp_path / "adapter", "esft", base=base, verify=True)
    expected = {"experts": experts, "shared_experts": False, "non_expert_modules": False}
    assert expert_cfg(tmp_path / "adapter") == expected | ({} if case == "experts" else {case: True})
    assert sorted(contents(tmp_path / "adapter")) == ["conversion.json", "expert_cfg.json", "model.safetensors"]

    found = load_file(tmp_path / "adapter" / "model.safetensors")
    assert len(found) == (count or 3 + sum(".experts." not in n and "shared" not in n for n in tensors_of(base)))
    assert set(names) <= found.keys()
    assert_bit_equal(found, {name: tensors_of(tuned)[name] for name in found})
    convert(base, tmp_path / "merged", "bf16", adapter=tmp_path / "adapter", verify=True)
    assert_bit_equal(tensors_of(tmp_path / "merged"), tensors_of(tuned))
    assert (contents(tuned), contents(base)) == before


def test_files_that_an_adapter_does_not_touch_are_linked(base, tmp_path):
    tuned = tuned_from(base, tmp_path / "tuned", [EXPERT.format(1, 3, "up")])
    convert(tuned, tmp_path / "adapter", "esft", base=base)
    changed = {
        json.loads((base / "model.safetensors.index.json").read_text())["weight_map"][name]
        for name in load_file(tmp_path / "adapter" / "model.safetensors")
    }
    report = convert(base, tmp_path / "merged", "deepseek_v2", adapter=tmp_path / "adapter")
    assert {file for file, action in report.actions.items() if action == "converted"} == changed


def test_legacy_names_and_several_files_are_read(base, tmp_path):
    """DeepSeek's first adapters have the tensors of the inner model, without `model.`; experts by falling score."""
    tensors = {
        EXPERT.format(layer, expert, part): torch.rand(shape).bfloat16()
        for layer, expert in ((1, 3), (1, 0))
        for part, shape in (("gate", (144, 192)), ("up", (144, 192)), ("down", (192, 144)))
    }
    (tmp_path / "adapter").mkdir()
    legacy = [(name.removeprefix("model."), tensor) for name, tensor in tensors.items()]
    save_file(dict(legacy[:2]), tmp_path / "adapter" / "a.safetensors")
    save_file(dict(legacy[2:]), tmp_path / "adapter" / "b.safetensors")
    cfg = {"experts": {"1": [3, 0], "2": [], "3": []}, "shared_experts": False, "non_expert_modules": False}
    (tmp_path / "adapter" / "expert_cfg.json").write_text(json.dumps(cfg))
    arguments = [
        "convert",
        str(base),
        str(tmp_path / "merged"),
        "--to",
        "bf16",
        "--adapter",
        str(tmp_path / "adapter"),
    ]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert_bit_equal(tensors_of(tmp_path / "merged"), tensors_of(base) | tensors)

    run = ["convert", str(tmp_path / "merged"), str(tmp_path / "again"), "--to", "esft", "--base", str(base)]
    assert CliRunner().invoke(app, run).exit_code == 0
    assert expert_cfg(tmp_path / "again")["experts"] == {"1": [0, 3], "2": [], "3": []}
    assert_bit_equal(load_file(tmp_path / "again" / "model.safetensors"), tensors)


def test_fp8_checkpoints_are_compared_and_merged_with_their_scales(tmp_path):
    """A plain adapter on an FP8 base as well, whose scale is then gone."""
    base = fp8_folder(tmp_path / "base")
    tensors, weight = tensors_of(base), EXPERT.format(1, 2, "down")
    tensors[f"{weight}_scale_inv"] *= 2
    tuned = sharded(tmp_path / "tuned", json.loads((base / "config.json").read_text()), tensors)
    convert(tuned, tmp_path / "adapter", "esft", base=base, verify=True)
    assert len(load_file(tmp_path / "adapter" / "model.safetensors")) == 2 * 3
    convert(base, tmp_path / "fp8", "fp8", adapter=tmp_path / "adapter", verify=True)
    convert(base, tmp_path / "bf16", "bf16", adapter=tmp_path / "adapter", verify=True)
    convert(tuned, tmp_path / "expected", "bf16")
    as_bytes = [{name: t.view(torch.uint8) for name, t in tensors_of(f).items()} for f in (tmp_path / "fp8", tuned)]
    assert_bit_equal(*as_bytes)
    expected = tensors_of(tmp_path / "expected")
    assert_bit_equal(tensors_of(tmp_path / "bf16"), expected)

    plain = {
        name: expected[name] for name in load_file(tmp_path / "adapter" / "model.safetensors") if name in expected
    }
    save_file(plain, tmp_path / "adapter" / "model.safetensors")
    for to in ("bf16", "deepseek_v3", "fp8"):
        convert(base, tmp_path / "plain" / to, to, adapter=tmp_path / "adapter", verify=True)
    assert_bit_equal(tensors_of(tmp_path / "plain" / "bf16"), expected)
    assert_bit_equal(tensors_of(tmp_path / "plain" / "deepseek_v3"), expected)
    convert(tmp_path / "plain" / "fp8", tmp_path / "back", "bf16")
    found = tensors_of(tmp_path / "back")
    # 3 mantissa bits, of the largest value of each block.
    torch.testing.assert_close(found[weight].float(), expected[weight].float(), rtol=2**-3, atol=0.01)
    del found[weight], expected[weight]
    same = {name: tensor for name, tensor in found.items() if name not in plain}
    assert_bit_equal(same, {name: expected[name] for name in same})


def test_checkpoints_that_are_equal_or_of_another_format_make_no_adapter(base, tmp_path):
    convert(base, tmp_path / "copy", "bf16")
    with pytest.raises(CheckpointError, match="are equal; there is nothing to write"):
        convert(tmp_path / "copy", tmp_path / "adapter", "esft", base=base)
    convert(base, tmp_path / "float32", "deepseek_v2", dtype="float32")
    with pytest.raises(CheckpointError, match=r"is F32 .* but BF16 .*needs both in the same format"):
        convert(tmp_path / "float32", tmp_path / "adapter", "esft", base=base)
    with pytest.raises(ValueError, match="give --base"):
        convert(base, tmp_path / "adapter", "esft")
    tuned = tuned_from(base, tmp_path / "tuned", [SHARED])
    with pytest.raises(ConversionError, match="which is only read"):
        convert(tuned, base / "adapter", "esft", base=base)
    assert not (tmp_path / "adapter").exists()


def _cfg(**fields):
    return lambda folder: (folder / "expert_cfg.json").write_text(json.dumps({**expert_cfg(folder), **fields}))


def _tensors(change):
    def broken(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return broken


def _half(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def _linked(folder):
    (folder / "model.safetensors").rename(folder.with_name("elsewhere"))
    (folder / "model.safetensors").symlink_to(folder.with_name("elsewhere"))


def _twice(folder):
    (folder / "more.safetensors").write_bytes((folder / "model.safetensors").read_bytes())


UP = EXPERT.format(1, 3, "up")
BROKEN = {
    "no experts": (_cfg(experts=None), "experts=None is not a JSON object"),
    "a flag is a number": (_cfg(shared_experts=1), "shared_experts=1 is not a JSON boolean"),
    "an unknown field": (_cfg(heads=[1]), "heads is none of experts, shared_experts"),
    "an expert of many": (_cfg(experts={"1": [4]}), "layer 1 names expert 4, of 4"),
    "an expert twice": (_cfg(experts={"1": [3, 3]}), r"experts of layer '1' are \[3, 3\]"),
    "a layer without experts": (_cfg(experts={"0": [1]}), "layer 0 of .* has no routed experts"),
    "a layer that is a word": (_cfg(experts={"first": [1]}), "experts of layer 'first'"),
    "an expert less than announced": (
        _cfg(experts={"1": [0, 1, 3], "3": [2]}),
        r"lacks tensor .*experts\.1\.\w+_proj",
    ),
    "an expert more than announced": (
        _cfg(experts={"1": [3], "3": [2]}),
        r"tensor .*experts\.0\.\w+_proj.* is none that",
    ),
    "a flag without its tensors": (_cfg(shared_experts=True), "lacks tensor .*shared_experts"),
    "a tensor of no model": (_tensors(lambda t: t.update({"x": t[UP].clone()})), "tensor x is none that"),
    "another shape": (_tensors(lambda t: t.update({UP: t[UP][:3].clone()})), rf"tensor {UP} is \[3, 192\] instead of"),
    "FP8 without a scale": (
        _tensors(lambda t: t.update({UP: t[UP].to(torch.float8_e4m3fn)})),
        f"{UP} has no {UP}_scale_inv",
    ),
    "integers": (_tensors(lambda t: t.update({UP: t[UP].to(torch.int32)})), f"{UP} is I32, which is not read"),
    "half a file": (_half, "model.safetensors is truncated"),
    "a link out": (_linked, "is a link out of its folder"),
    "a tensor in two files": (_twice, "is in model.safetensors as well"),
    "a pickle": (
        lambda folder: (folder / "model.safetensors").rename(folder / "model.bin"),
        "has no safetensors file",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_adapter_is_refused_by_name(case, base, tmp_path):
    spoil, message = BROKEN[case]
    tuned = tuned_from(base, tmp_path / "tuned", TRAINED["experts"][0])
    convert(tuned, tmp_path / "adapter", "esft", base=base)
    spoil(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=message) as caught:
        convert(base, tmp_path / "merged", "bf16", adapter=tmp_path / "adapter")
    assert "\n" not in str(caught.value) and str(tmp_path / "adapter") in str(caught.value)
    assert not (tmp_path / "merged").exists()
