"""Folders of DeepSeek's inference program that are broken or malicious: one line that names file and tensor."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from convert_folders import QUANTIZATION, bf16_tensors, contents, ragged_json, random_fp8, sharded
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from json_edits import EDITS, edited
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from modeling_deepseek_moe import CheckpointError
from modeling_deepseek_moe.cli.main import app
from modeling_deepseek_moe.conversion import convert
from modeling_deepseek_moe.conversion.formats.table import open_checkpoint, plan_conversion

FIRST, SECOND = "model0-mp2.safetensors", "model1-mp2.safetensors"
NORM, QUERY, ROUTER = "norm.weight", "layers.0.attn.wq_b.weight", "layers.1.ffn.gate.weight"
EXPERT = "layers.1.ffn.experts.2.w1.weight"  # the second rank's
SIZES = {"intermediate_size": 256, "moe_intermediate_size": 128, "num_attention_heads": 8}
SIZES |= dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 32)


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """Two ranks of a V3-style model in FP8."""
    root = tmp_path_factory.mktemp("sound")
    config_json = ragged_json(**SIZES)
    tensors = random_fp8(bf16_tensors(config_json, root / "saved"))
    source = sharded(root / "source", {**config_json, "quantization_config": QUANTIZATION}, tensors)
    convert(source, root / "ranks", "deepseek-inference", mp=2)
    return root / "ranks"


@pytest.fixture
def folder(sound, tmp_path) -> Path:
    """A copy of it, for a test to break."""
    return Path(shutil.copytree(sound, tmp_path / "source"))


def refused(folder: Path, *expected: str) -> None:
    """The command ends with exit code 1 and one line, below its bar if it began; source and target are not touched."""
    before = contents(folder.parent)
    result = CliRunner().invoke(app, ["convert", str(folder), str(folder.parent / "target"), "--to", "bf16"])
    assert result.exit_code == 1, result.output
    *bar, line = result.stderr.splitlines()
    assert all("MB/s" in text for text in bar), result.output
    for part in expected:
        assert part in line
    assert contents(folder.parent) == before
    assert not (folder.parent / "target").exists()


def rewrite(folder: Path, change, file: str = SECOND) -> None:
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})


def edit(folder: Path, name: str = "model_args.json", **fields) -> None:
    value = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(value | fields))


FILES = {
    "a missing rank": (lambda f: (f / FIRST).unlink(), f"lacks {FIRST}"),
    "a missing last rank": (lambda f: (f / SECOND).unlink(), f"lacks {SECOND}"),
    "a rank too many": (
        lambda f: shutil.copy(f / FIRST, f / "model2-mp2.safetensors"),
        "model2-mp2.safetensors is the file of a rank beyond mp=2",
    ),
    "two sets": (
        lambda f: shutil.copy(f / FIRST, f / "model0-mp4.safetensors"),
        "has files for mp=2 and for mp=4; keep those of one",
    ),
    "half a file": (
        lambda f: (f / SECOND).write_bytes((f / SECOND).read_bytes()[:5000]),
        f"{SECOND} is no whole safetensors file",
    ),
    "no ModelArgs": (
        lambda f: (f / "model_args.json").unlink(),
        "config.json is the config of a transformers model, not ModelArgs",
    ),
    "no config at all": (
        lambda f: ((f / "model_args.json").unlink(), (f / "config.json").unlink()),
        "has no model_args.json; the file that DeepSeek's generate.py takes",
    ),
    "a link out": (
        lambda f: (shutil.move(f / SECOND, f.parent / "x"), (f / SECOND).symlink_to(f.parent / "x")),
        f"{SECOND} is a link out of its folder",
    ),
    "a file that is read instead": (
        lambda f: (f / "model.safetensors").write_bytes((f / FIRST).read_bytes()),
        "FP8 tensor layers.0.attn.wkv_a.weight has no layers.0.attn.wkv_a.weight_scale_inv",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_ranks_that_are_not_all_there_are_refused(case, folder):
    change, message = FILES[case]
    change(folder)
    refused(folder, message)


TENSORS = {
    "copies that differ": (
        lambda t: t.update({NORM: t[NORM] + 1}),
        (FIRST, f"tensor rank0:{NORM} is not the same in {FIRST} and {SECOND}"),
    ),
    "a router that differs in a bit": (
        lambda t: t[ROUTER].view(torch.int16)[3, 5].bitwise_xor_(1),
        (f"rank0:{ROUTER} is not the same in {FIRST} and {SECOND}",),
    ),
    "a missing slice": (lambda t: t.pop(QUERY), (SECOND, f"lacks tensor {QUERY}, which {FIRST} has")),
    "a slice of another shape": (
        lambda t: t.update({QUERY: t[QUERY][:64].contiguous()}),
        (FIRST, f"tensor {QUERY} is F8_E4M3 [256, 24], but F8_E4M3 [64, 24] in {SECOND}"),
    ),
    "a slice of another type": (
        lambda t: t.update({QUERY: t[QUERY].float()}),
        (f"tensor {QUERY} is F8_E4M3 [256, 24], but F32 [256, 24] in {SECOND}",),
    ),
    "an expert that no rank has": (lambda t: t.pop(EXPERT), ("has no weight", "experts.2.gate_proj.weight")),
    "an expert of another rank": (
        lambda t: t.update({"layers.1.ffn.experts.0.w1.weight": t[EXPERT].clone()}),
        (f"experts.0.w1.weight of n_routed_experts=4 belongs to {FIRST} only, but is in {SECOND}",),
    ),
    "an unknown name": (
        lambda t: t.update({"layers.1.attn.indexer.wk.weight": torch.ones(2)}),
        (SECOND, "tensor layers.1.attn.indexer.wk.weight is not one of DeepSeek's inference program"),
    ),
    "a published name": (
        lambda t: t.update({"model.norm.weight": torch.ones(2)}),
        ("tensor model.norm.weight is not one of DeepSeek's inference program",),
    ),
    "a layer that is no number": (
        lambda t: t.update({"layers.².attn.wo.weight": torch.ones(2)}),
        ("layers.².attn.wo.weight is not one of",),
    ),
    "an expert beyond them": (
        lambda t: t.update({"layers.1.ffn.experts.9.w1.weight": torch.ones(2, 2)}),
        ("experts.9.gate_proj.weight belongs to no model",),
    ),
    "a scale without its weight": (
        lambda t: t.update({"layers.1.ffn.experts.3.w1.weight": t["layers.1.ffn.experts.3.w1.weight"].float()}),
        ("experts.3.gate_proj.weight, which is F32, not FP8",),
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_do_not_fit_together_are_refused_by_name(case, folder):
    change, messages = TENSORS[case]
    rewrite(folder, change)
    refused(folder, *messages)


def test_slices_that_end_within_an_fp8_block_are_refused(folder):
    """DeepSeek's own script cuts them so, and gives their scales to the wrong rows."""
    for file in (FIRST, SECOND):
        rewrite(folder, lambda t: t.update({QUERY: t[QUERY][:96].contiguous()}), file)
    refused(folder, f"{FIRST}: tensor {QUERY} [96, 24] ends within an FP8 block of 128")


def test_a_file_of_mtp_modules_with_other_tensors_is_refused(folder):
    rewrite(folder, lambda t: t.update({"model.layers.1.input_layernorm.weight": torch.ones(192)}), "mtp.safetensors")
    refused(folder, "mtp.safetensors: tensor model.layers.1.input_layernorm.weight is not one of an MTP module")


CONFIGS = {
    "an unknown field": ({"index_topk": 2048}, "'index_topk' is not a field of ModelArgs"),
    "a config of transformers": ({"model_type": "deepseek_v3"}, "is the config of a transformers model, not"),
    "another width": ({"dim": 128}, "dim=128 contradicts config.json, which means 192"),
    "another choice": ({"route_scale": 1.5}, "route_scale=1.5 contradicts config.json, which means 2.5"),
    "another precision": ({"dtype": "bf16"}, "dtype='bf16', but tensor"),
    "an unknown score": ({"score_func": "relu"}, "score_func='relu' is not one of 'softmax', 'sigmoid'"),
    "text for a number": ({"n_heads": "8"}, "n_heads='8' is not a whole number"),
    "true for a number": ({"n_layers": True}, "n_layers=True is not a whole number"),
    "a billion layers": ({"n_layers": 10**9}, "n_layers=1000000000 is more than the 10000 layers"),
    "a negative scale": ({"route_scale": -1.0}, "route_scale=-1.0 is not a positive number"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_model_args_that_do_not_fit_are_refused(case, folder):
    fields, message = CONFIGS[case]
    edit(folder, **fields)
    refused(folder, "model_args.json", message)


ALONE = {
    "another width": ({"dim": 128}, "of the wrong shape"),
    "more experts": ({"n_routed_experts": 8}, f"of n_routed_experts=8 belongs to {FIRST} only"),
    "experts for no rank": ({"n_routed_experts": 3}, "n_routed_experts=3 cannot be divided among mp=2"),
    "a billion experts": ({"n_routed_experts": 10**9}, "of n_routed_experts=1000000000 belongs to"),
    "uncompressed queries": ({"q_lora_rank": 0}, "missing (model.layers.0.self_attn.q_proj.weight"),
    "no heads": ({"n_heads": 0}, "num_attention_heads=0"),
    "more groups than experts": ({"n_expert_groups": 5}, "n_group=5"),
}


@pytest.mark.parametrize("case", ALONE)
def test_model_args_without_the_published_config_must_fit_the_tensors(case, folder):
    fields, message = ALONE[case]
    (folder / "config.json").unlink()
    edit(folder, **fields)
    refused(folder, message)


def test_a_published_config_of_another_model_is_refused(folder):
    edit(folder, "config.json", rope_scaling=None)
    refused(folder, "model_args.json: max_seq_len=256 beyond original_seq_len=64 means YaRN, but config.json has none")
    edit(folder, "config.json", scoring_func="softmax")
    refused(folder, "norm_topk_prob=True cannot be expressed as deepseek-inference")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(EDITS, st.sampled_from(["model_args.json", "config.json", FIRST, "mtp.safetensors"]), st.booleans())
def test_any_json_for_model_args_or_a_header_is_read_or_refused(sound, tmp_path_factory, edits, name, kept):
    folder = tmp_path_factory.mktemp("broken")
    for path in sound.iterdir():
        (folder / path.name).hardlink_to(path)
    original = (folder / name).read_bytes()
    (folder / name).unlink()
    if name.endswith(".json"):
        (folder / name).write_text(json.dumps(edited(json.loads(original), edits)))
    else:
        length = 8 + int.from_bytes(original[:8], "little")
        text = json.dumps(edited(json.loads(original[8:length]), edits)).encode()
        (folder / name).write_bytes(len(text).to_bytes(8, "little") + text + original[length:])
    if not kept and name != "config.json":
        (folder / "config.json").unlink()
    try:
        source = open_checkpoint(folder)
        for to in ("bf16", "deepseek_v3", "deepseek-inference"):
            plan = plan_conversion(source, to)
            assert plan.size > 0 and json.dumps(plan.config_json)
    except CheckpointError as error:
        str(error).encode()  # half a character would be a crash where the message is printed
    finally:
        shutil.rmtree(folder)
