"""Conversion to bfloat16 and FP8 blocks and back: values, configs, files, verification, the command."""

import json
import os
import shutil

import pytest
import torch
from checkpoint_folders import assert_bit_equal, tensors_of, written
from convert_folders import (
    QUANTIZATION,
    bf16_tensors,
    contents,
    fp8_folder,
    json_of,
    logits_of,
    plainly_dequantized,
    ragged_json,
    random_fp8,
    sharded,
)
from places import GOLDEN_FOLDERS
from safetensors.torch import load_file, save_file
from tiny import tiny_config, tiny_model
from typer.testing import CliRunner

from modeling_deepseek_moe import CheckpointError, DeepseekMoeConfig
from modeling_deepseek_moe.checkpoint_files import INDEX_NAME
from modeling_deepseek_moe.checkpoint_layout import expected_tensors
from modeling_deepseek_moe.cli.main import app
from modeling_deepseek_moe.conversion import ConversionError, convert

ROUTER = "model.layers.1.mlp.gate.weight"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float8_e8m0fnu], ids=["float32", "ue8m0"])
def test_fp8_becomes_bfloat16_block_by_block(scale_dtype, tmp_path):
    """FACTS 3.4, T21: blocks cut off at both edges; every scale lies in another file than its weight."""
    source = fp8_folder(tmp_path / "fp8", scale_dtype)
    before = contents(source)
    report = convert(source, tmp_path / "bf16", "bf16", verify=True)
    tensors = tensors_of(source)
    assert_bit_equal(tensors_of(tmp_path / "bf16"), plainly_dequantized(tensors))
    assert report.verification.tensors == len(tensors_of(tmp_path / "bf16"))
    assert report.verification.logits == 0 or report.verification.logits < 1e-5
    assert contents(source) == before


def test_config_and_index_of_the_bfloat16_copy_tell_the_truth(fp8, tmp_path):
    convert(fp8, tmp_path / "bf16", "bf16")
    config_json = json_of(tmp_path / "bf16")
    assert config_json == {name: value for name, value in json_of(fp8).items() if name != "quantization_config"}
    index = json.loads((tmp_path / "bf16" / INDEX_NAME).read_text())
    files = {file.name: load_file(file) for file in (tmp_path / "bf16").glob("*.safetensors")}
    assert index["weight_map"] == {name: file for file, tensors in files.items() for name in tensors}
    sizes = [tensor.numel() * tensor.itemsize for tensors in files.values() for tensor in tensors.values()]
    assert index["metadata"] == {"total_size": sum(sizes)}
    assert (tmp_path / "bf16" / "tokenizer.json").read_bytes() == (fp8 / "tokenizer.json").read_bytes()


def test_plain_makes_bfloat16_of_fp8_and_leaves_other_types(fp8, tmp_path):
    convert(fp8, tmp_path / "plain", "plain")
    convert(fp8, tmp_path / "bf16", "bf16")
    assert contents_without_record(tmp_path / "plain") == contents_without_record(tmp_path / "bf16")
    tiny_model(tiny_config("v3")).save_pretrained(tmp_path / "float32")
    report = convert(tmp_path / "float32", tmp_path / "same", "plain")
    assert set(report.actions.values()) == {"linked"}


def contents_without_record(folder):
    return {name: data for name, data in contents(folder).items() if name != "conversion.json"}


def test_written_files_are_those_that_safetensors_itself_would_write(bf16, tmp_path):
    convert(bf16, tmp_path / "fp8", "fp8")
    for file in (tmp_path / "fp8").glob("*.safetensors"):
        save_file(load_file(file), tmp_path / "again.safetensors", metadata={"format": "pt"})
        assert (tmp_path / "again.safetensors").read_bytes() == file.read_bytes()


def test_fp8_weights_are_those_that_deepseek_quantizes(bf16, tmp_path):
    report = convert(bf16, tmp_path / "fp8", "fp8", verify=True)
    config = DeepseekMoeConfig.from_pretrained(bf16)
    specs = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors_of(tmp_path / "fp8").items()}
    assert specs == expected_tensors(config, fp8=True)
    assert specs[ROUTER][1] == specs["model.layers.2.eh_proj.weight"][1] == torch.bfloat16
    assert json_of(tmp_path / "fp8") == {**json_of(bf16), "quantization_config": QUANTIZATION}
    assert set(report.errors) == {"attention", "dense_mlp", "routed_experts", "shared_experts"}
    assert report.errors["routed_experts"].tensors == 2 * 4 * 3
    for error in report.errors.values():
        # e4m3 rounds to 3 mantissa bits: at most 2^-4 of a value, and some 2.6 % of evenly spread mantissas.
        assert 0.02 < error.relative < 0.035 and error.largest <= 2**-4


def test_a_second_round_through_fp8_changes_no_bit(bf16, tmp_path):
    for source, target, to in [("a", "b", "bf16"), ("b", "c", "fp8"), ("c", "d", "bf16")]:
        if source == "a":
            convert(bf16, tmp_path / "a", "fp8")
        convert(tmp_path / source, tmp_path / target, to)
    as_bytes = [
        {name: tensor.view(torch.uint8) for name, tensor in tensors_of(tmp_path / name).items()} for name in "abcd"
    ]
    assert_bit_equal(as_bytes[2], as_bytes[0])
    assert_bit_equal(as_bytes[3], as_bytes[1])


def test_values_near_the_ends_of_bfloat16_survive_fp8(tmp_path):
    config_json = ragged_json()
    tensors = bf16_tensors(config_json, tmp_path / "saved")
    weight = tensors["model.layers.0.self_attn.o_proj.weight"]
    weight[:128] = 0
    weight[128:, :10] = 3e38
    tensors["model.layers.0.mlp.up_proj.weight"] *= 1e-38
    source = sharded(tmp_path / "bf16", config_json, tensors)
    convert(source, tmp_path / "a", "fp8")
    convert(tmp_path / "a", tmp_path / "b", "bf16")
    back = tensors_of(tmp_path / "b")["model.layers.0.self_attn.o_proj.weight"]
    assert torch.equal(back[128:, :10], weight[128:, :10]) and not back[:128].any()
    convert(tmp_path / "b", tmp_path / "c", "fp8")
    assert_bit_equal(
        {name: tensor.view(torch.uint8) for name, tensor in tensors_of(tmp_path / "c").items()},
        {name: tensor.view(torch.uint8) for name, tensor in tensors_of(tmp_path / "a").items()},
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_have_no_fp8(value, tmp_path):
    config_json, name = ragged_json(), "model.layers.1.self_attn.q_b_proj.weight"
    tensors = bf16_tensors(config_json, tmp_path / "saved")
    tensors[name][3, 3] = value
    source = sharded(tmp_path / "bf16", config_json, tensors)
    with pytest.raises(CheckpointError, match=rf"of-00003\.safetensors: tensor {name} holds .* not finite"):
        convert(source, tmp_path / "fp8", "fp8")
    assert not (tmp_path / "fp8").exists()


@pytest.mark.parametrize("folder", GOLDEN_FOLDERS, ids=lambda folder: folder.name)
def test_golden_checkpoints_survive_fp8_within_its_bound(folder, tmp_path):
    """float32 weights; verification holds each to FP8's own rounding, and the second round to bit equality."""
    convert(folder, tmp_path / "a", "fp8", verify=True)
    convert(tmp_path / "a", tmp_path / "b", "bf16")
    convert(tmp_path / "b", tmp_path / "c", "fp8")
    convert(tmp_path / "c", tmp_path / "d", "bf16")
    convert(tmp_path / "d", tmp_path / "e", "fp8")
    as_bytes = [{n: t.view(torch.uint8) for n, t in tensors_of(tmp_path / name).items()} for name in "ce"]
    assert_bit_equal(as_bytes[1], as_bytes[0])


def test_the_routing_bias_stays_float32_in_every_dtype(bf16, tmp_path):
    """FACTS T19."""
    bias = tensors_of(bf16)[BIAS]
    for to, dtype in [("deepseek_v3", "float16"), ("fp8", "float16"), ("bf16", None)]:
        convert(bf16, tmp_path / to, to, dtype=dtype)
        found = tensors_of(tmp_path / to)
        assert found[BIAS].dtype == torch.float32 and torch.equal(found[BIAS], bias)
        assert found[ROUTER].dtype == (torch.float16 if dtype else torch.bfloat16)


def test_a_weight_too_large_for_float16_is_refused(tmp_path):
    tiny_model(tiny_config("v3")).save_pretrained(tmp_path / "saved")
    tensors = tensors_of(tmp_path / "saved")
    tensors[ROUTER][0, 0] = 1e6
    source = written(tmp_path / "source", json_of(tmp_path / "saved"), tensors)
    with pytest.raises(CheckpointError, match=f"tensor {ROUTER} holds values beyond float16"):
        convert(source, tmp_path / "target", "deepseek_v3", dtype="float16")
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    ("to", "dtype", "message"),
    [
        ("bfloat16", None, "'bfloat16' is not one of bf16, fp8, plain, deepseek, deepseek_v2, deepseek_v3"),
        ("fp8", "bf16", "'bf16' is not one of bfloat16, float16, float32"),
        ("bf16", "float32", "contradicts the format 'bf16'"),
    ],
)
def test_an_unknown_format_or_dtype_is_named_with_the_choices(to, dtype, message, bf16, tmp_path):
    with pytest.raises(ValueError, match=message):
        convert(bf16, tmp_path / "target", to, dtype=dtype)


def test_mtp_modules_that_are_announced_but_absent_are_no_longer_announced(bf16, tmp_path):
    kept = {name: tensor for name, tensor in tensors_of(bf16).items() if not name.startswith("model.layers.2.")}
    source = sharded(tmp_path / "source", json_of(bf16), kept)
    for to in ("bf16", "fp8", "deepseek_v3"):
        convert(source, tmp_path / to, to, verify=True)
        assert json_of(tmp_path / to)["num_nextn_predict_layers"] == 0


def test_rotary_tables_come_along_and_code_and_pickles_do_not(bf16, tmp_path):
    tables = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(4)}
    code = {"auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}}
    source = sharded(tmp_path / "source", {**json_of(bf16), **code}, tensors_of(bf16) | tables)
    (source / "modeling_deepseek.py").write_text("pass")
    (source / "pytorch_model.bin").write_bytes(b"a pickle")
    (source / ".hidden").write_text("")
    convert(source, tmp_path / "fp8", "fp8")
    assert "auto_map" not in json_of(tmp_path / "fp8")
    for name, table in tables.items():
        assert torch.equal(tensors_of(tmp_path / "fp8")[name], table)
    convert(source, tmp_path / "native", "deepseek_v3")
    assert "auto_map" not in json_of(tmp_path / "native")
    files = {to: {path.name for path in (tmp_path / to).iterdir()} for to in ("fp8", "native")}
    assert not {"modeling_deepseek.py", "pytorch_model.bin", ".hidden"} & (files["fp8"] | files["native"])


@pytest.mark.parametrize("copy", [False, True], ids=["linked", "copied"])
def test_files_in_which_nothing_changes_are_linked_or_copied(copy, bf16, tmp_path):
    report = convert(bf16, tmp_path / "native", "deepseek_v3", copy=copy, verify=True)
    assert set(report.actions.values()) == {"copied" if copy else "linked"}
    for file in report.actions:
        assert (tmp_path / "native" / file).samefile(bf16 / file) is not copy
        assert (tmp_path / "native" / file).read_bytes() == (bf16 / file).read_bytes()


def test_links_that_the_file_system_refuses_become_copies(bf16, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    assert set(convert(bf16, tmp_path / "native", "deepseek_v3").actions.values()) == {"copied"}


def test_copying_works_where_the_kernel_cannot_copy_ranges(fp8, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "copy_file_range", refuse, raising=False)
    convert(fp8, tmp_path / "bf16", "bf16", verify=True)
    convert(fp8, tmp_path / "copy", "deepseek_v3", copy=True, verify=True)


@pytest.mark.parametrize("to", ["bf16", "fp8"])
def test_verification_finds_one_changed_bit(to, fp8, bf16, tmp_path, monkeypatch):
    source = fp8 if to == "bf16" else bf16
    convert(source, tmp_path / "target", to)
    file = tmp_path / "target" / "model-00002-of-00003.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 0x60  # a high bit of the exponent
    file.write_bytes(data)
    with pytest.raises(ConversionError, match=r"model-00002-of-00003\.safetensors: tensor model\."):
        convert(source, tmp_path / "target", to, verify=True)


def test_the_command_converts_verifies_and_reports(fp8, tmp_path):
    result = CliRunner().invoke(app, ["convert", str(fp8), str(tmp_path / "bf16"), "--to", "bf16", "--verify"])
    assert result.exit_code == 0, result.output
    assert "(3 converted)" in result.stdout and "verified" in result.stdout
    assert "model-00003-of-00003.safetensors" in result.stderr  # the progress bar


def test_a_dry_run_prints_every_tensor_and_writes_nothing(fp8, tmp_path):
    before = contents(tmp_path)
    result = CliRunner().invoke(app, ["convert", str(fp8), str(tmp_path / "bf16"), "--to", "bf16", "--dry-run"])
    assert result.exit_code == 0, result.output
    assert contents(tmp_path) == before and not (tmp_path / "bf16").exists()
    name = "model.layers.1.self_attn.o_proj.weight"
    assert f"{name} BF16 [192, 64] 24576 bytes <- dequantize {name} {name}_scale_inv" in result.stdout
    names = {line.split()[0] for line in result.stdout.splitlines() if line.startswith("    ")}
    assert names == {name for name in tensors_of(fp8) if not name.endswith("_scale_inv")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "bf17"], "format 'bf17' is not one of"),
        (["--to", "deepseek_v2"], "cannot be expressed as deepseek_v2"),
    ],
)
def test_a_bad_request_is_one_line_and_exit_code_1(arguments, message, fp8, tmp_path):
    result = CliRunner().invoke(app, ["convert", str(fp8), str(tmp_path / "target"), *arguments])
    assert result.exit_code == 1
    assert message in result.stderr.splitlines()[-1]


def test_a_model_of_the_hub_cache_converts_through_its_links(bf16, tmp_path):
    """huggingface_hub keeps files in blobs/ and links to them from snapshots/REVISION/."""
    repository = tmp_path / "models--org--name"
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for file in bf16.iterdir():
        shutil.copy(file, repository / "blobs" / f"hash-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/hash-{file.name}")
    convert(snapshot, tmp_path / "native", "deepseek_v3", verify=True)
    assert not any(path.is_symlink() for path in (tmp_path / "native").iterdir())
    assert_bit_equal(tensors_of(tmp_path / "native"), tensors_of(bf16))


def test_random_fp8_of_these_tests_is_a_checkpoint_that_loads(fp8):
    assert random_fp8({}) == {}
    assert torch.isfinite(logits_of(fp8)).all()
