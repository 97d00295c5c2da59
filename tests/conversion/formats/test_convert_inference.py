"""DeepSeek's own model-parallel files and ModelArgs: there and back, slices, configs, kills."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_folders import assert_bit_equal, tensors_of
from convert_folders import (
    QUANTIZATION,
    bf16_tensors,
    contents,
    plainly_dequantized,
    ragged_json,
    random_fp8,
    sharded,
)
from places import GOLDEN_FOLDERS
from safetensors.torch import load_file, save_file
from tiny import tiny_config, tiny_ids, tiny_model
from typer.testing import CliRunner

from modeling_deepseek_moe import CheckpointError, DeepseekMoeConfig, DeepseekMoeForCausalLM
from modeling_deepseek_moe.cli.main import app
from modeling_deepseek_moe.conversion import convert
from modeling_deepseek_moe.conversion.formats.inference_config import config_json_of, model_args, read_model_args

INFERENCE = "deepseek-inference"
# Every width that four ranks share is four FP8 blocks or more; the others have cut-off blocks.
SIZES = {
    "num_attention_heads": 8,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
}
# What DeepSeek publishes beside its inference program (FACTS 7, 9): fields at their defaults are left out.
PUBLISHED_ARGS = {
    "deepseek-v3": {
        "vocab_size": 129280,
        "dim": 7168,
        "inter_dim": 18432,
        "moe_inter_dim": 2048,
        "n_layers": 61,
        "n_dense_layers": 3,
        "n_heads": 128,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "n_activated_experts": 8,
        "n_expert_groups": 8,
        "n_limited_groups": 4,
        "route_scale": 2.5,
        "score_func": "sigmoid",
        "q_lora_rank": 1536,
        "dtype": "fp8",
    },
    "deepseek-v2": {
        "dim": 5120,
        "inter_dim": 12288,
        "moe_inter_dim": 1536,
        "n_layers": 60,
        "n_heads": 128,
        "n_routed_experts": 160,
        "n_expert_groups": 8,
        "n_limited_groups": 3,
        "route_scale": 16.0,
        "q_lora_rank": 1536,
        "mscale": 0.707,
    },
    "deepseek-v2-lite": {"mscale": 0.707},
}


def source_folder(folder: Path, lineage: str, precision: str) -> Path:
    config_json = ragged_json(lineage, **SIZES)
    tensors = bf16_tensors(config_json, folder.with_name(f"{folder.name}-saved"))
    if precision == "fp8":
        tensors, config_json = random_fp8(tensors), {**config_json, "quantization_config": QUANTIZATION}
    return sharded(folder, config_json, tensors)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[tuple[str, str], Path]:
    root = tmp_path_factory.mktemp("sources")
    return {
        (lineage, precision): source_folder(root / f"{lineage}-{precision}", lineage, precision)
        for lineage in ("v2", "v3")
        for precision in ("bf16", "fp8")
    }


def json_of(folder: Path, name: str = "config.json") -> dict:
    return json.loads((folder / name).read_text())


def edit(folder: Path, **fields) -> None:
    """Changes fields of the ModelArgs; None takes one away."""
    args = {**json_of(folder, "model_args.json"), **fields}
    (folder / "model_args.json").write_text(json.dumps({name: args[name] for name in args if args[name] is not None}))


def logits_of(folder: Path) -> torch.Tensor:
    model = DeepseekMoeForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        return model(tiny_ids(model.config)).logits


@pytest.mark.parametrize("mp", [1, 2, 4])
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("lineage", ["v2", "v3"])
def test_a_checkpoint_comes_back_bit_for_bit_with_its_config(lineage, precision, mp, sources, tmp_path):
    source = sources[lineage, precision]
    before = contents(source)
    report = convert(source, tmp_path / "ranks", INFERENCE, mp=mp, verify=mp == 2)
    assert mp != 2 or report.verification.logits == 0
    files = {f"model{rank}-mp{mp}.safetensors" for rank in range(mp)}
    assert {path.name for path in (tmp_path / "ranks").glob("*.safetensors")} - {"mtp.safetensors"} == files
    # The model type only spells the config out; values and tensors are those of the source.
    back = convert(tmp_path / "ranks", tmp_path / "back", f"deepseek_{lineage}", verify=mp == 2)
    assert mp != 2 or back.verification.tensors == len(tensors_of(source))
    assert_as_bytes(tensors_of(tmp_path / "back"), tensors_of(source))
    assert json_of(tmp_path / "back").items() >= json_of(source).items()
    assert json_of(tmp_path / "ranks", "config.json") == json_of(source)
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert not (tmp_path / "back" / "model_args.json").exists()
    assert contents(source) == before


def assert_as_bytes(tensors: dict, expected: dict) -> None:
    assert {name: tensor.dtype for name, tensor in tensors.items()} == {n: t.dtype for n, t in expected.items()}
    as_bytes = [{name: tensor.view(torch.uint8) for name, tensor in side.items()} for side in (tensors, expected)]
    assert_bit_equal(*as_bytes)


ATTENTION = {
    "attn.wq_a.weight": ("self_attn.q_a_proj.weight", None),
    "attn.q_norm.weight": ("self_attn.q_a_layernorm.weight", None),
    "attn.wq_b.weight": ("self_attn.q_b_proj.weight", 0),
    "attn.wkv_a.weight": ("self_attn.kv_a_proj_with_mqa.weight", None),
    "attn.kv_norm.weight": ("self_attn.kv_a_layernorm.weight", None),
    "attn.wkv_b.weight": ("self_attn.kv_b_proj.weight", 0),
    "attn.wo.weight": ("self_attn.o_proj.weight", 1),
    "attn_norm.weight": ("input_layernorm.weight", None),
    "ffn_norm.weight": ("post_attention_layernorm.weight", None),
}
MLP = {"w1.weight": ("gate_proj.weight", 0), "w2.weight": ("down_proj.weight", 1), "w3.weight": ("up_proj.weight", 0)}
MODEL = {
    "embed.weight": ("model.embed_tokens.weight", 0),
    "norm.weight": ("model.norm.weight", None),
    "head.weight": ("lm_head.weight", 0),
    **{
        f"layers.{layer}.{name}": (f"model.layers.{layer}.{theirs}", dim)
        for layer in (0, 1)
        for name, (theirs, dim) in ATTENTION.items()
    },
    **{f"layers.0.ffn.{name}": (f"model.layers.0.mlp.{theirs}", dim) for name, (theirs, dim) in MLP.items()},
    "layers.1.ffn.gate.weight": ("model.layers.1.mlp.gate.weight", None),
    "layers.1.ffn.gate.bias": ("model.layers.1.mlp.gate.e_score_correction_bias", None),
    **{
        f"layers.1.ffn.shared_experts.{name}": (f"model.layers.1.mlp.shared_experts.{theirs}", dim)
        for name, (theirs, dim) in MLP.items()
    },
}


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_every_rank_holds_the_names_and_slices_that_deepseeks_program_loads(precision, sources, tmp_path):
    """The whole of FACTS 9's table, spelled out: 4 experts, 2 ranks."""
    source = sources["v3", precision]
    tensors = tensors_of(source)
    convert(source, tmp_path / "ranks", INFERENCE, mp=2)
    for rank in range(2):
        expected = {}
        experts = {
            f"layers.1.ffn.experts.{expert}.{name}": (f"model.layers.1.mlp.experts.{expert}.{theirs}", None)
            for expert in (2 * rank, 2 * rank + 1)
            for name, (theirs, _) in MLP.items()
        }
        for name, (theirs, dim) in {**MODEL, **experts}.items():
            pairs = [(name, theirs), (name.replace(".weight", ".scale"), f"{theirs}_scale_inv")]
            for own, published in pairs:
                if published in tensors:
                    values = tensors[published].float()
                    expected[own] = values if dim is None else values.chunk(2, dim)[rank]
        found = load_file(tmp_path / "ranks" / f"model{rank}-mp2.safetensors")
        assert_bit_equal({name: tensor.float() for name, tensor in found.items()}, expected)
        assert found["layers.1.ffn.gate.bias"].dtype == torch.float32
    mtp = {name: tensor for name, tensor in tensors.items() if name.startswith("model.layers.2.")}
    assert_as_bytes(load_file(tmp_path / "ranks" / "mtp.safetensors"), mtp)


REFUSED_GOLDEN = {
    "v1_batch_aux_gqa": "kv_lora_rank=None",
    "v1_moe16b_style": "kv_lora_rank=None",
    "v2_mscale_mix": "rope_parameters=",
    "v2_norm_topk": "norm_topk_prob=True",
}


@pytest.mark.parametrize("kept", [True, False], ids=["with config.json", "from ModelArgs alone"])
@pytest.mark.parametrize("folder", GOLDEN_FOLDERS, ids=lambda folder: folder.name)
def test_golden_checkpoints_go_there_and_back_and_compute_the_same(folder, kept, tmp_path):
    if folder.name in REFUSED_GOLDEN:
        field = REFUSED_GOLDEN[folder.name]
        with pytest.raises(CheckpointError, match=f"{field}.*cannot be expressed as {INFERENCE}"):
            convert(folder, tmp_path / "ranks", INFERENCE)
        return
    source = Path(shutil.copytree(folder, tmp_path / "source"))
    (source / "expected.safetensors").unlink(missing_ok=True)
    convert(source, tmp_path / "ranks", INFERENCE)  # 61 tokens and odd widths: one rank
    if not kept:
        (tmp_path / "ranks" / "config.json").unlink()
    convert(tmp_path / "ranks", tmp_path / "back", json_of(folder)["model_type"])
    assert_bit_equal(tensors_of(tmp_path / "back"), tensors_of(source))
    assert torch.equal(logits_of(tmp_path / "back"), logits_of(folder))


def test_a_folder_made_by_deepseeks_own_script_is_read(sources, tmp_path):
    """Only ModelArgs that differ from their defaults, no MTP module; the token ids come from the generation config."""
    convert(sources["v3", "fp8"], tmp_path / "ranks", INFERENCE, mp=2)
    for name in ("mtp.safetensors", "config.json", "conversion.json"):
        (tmp_path / "ranks" / name).unlink()
    edit(tmp_path / "ranks", max_batch_size=None, beta_fast=None, beta_slow=None, mscale=None, kv_lora_rank=136)
    (tmp_path / "ranks" / "model_args.json").rename(tmp_path / "ranks" / "config.json")
    (tmp_path / "ranks" / "generation_config.json").write_text('{"bos_token_id": 5, "eos_token_id": [6, 7]}')
    report = convert(tmp_path / "ranks", tmp_path / "back", "bf16", verify=True)
    assert "bos_token_id=5, eos_token_id=[6, 7] of generation_config.json" in "\n".join(report.lines())
    found, source = tensors_of(tmp_path / "back"), tensors_of(sources["v3", "fp8"])
    main = {name: tensor for name, tensor in plainly_dequantized(source).items() if ".layers.2." not in name}
    assert_bit_equal(found, main)
    before, after = json_of(sources["v3", "fp8"]), json_of(tmp_path / "back")
    # Training and ids have no place in ModelArgs, and the MTP module is not there.
    lost = {"num_nextn_predict_layers", "bos_token_id", "eos_token_id", "initializer_range", "quantization_config"}
    assert {name for name in before if after.get(name) != before[name]} == lost
    assert (after["model_type"], after["num_nextn_predict_layers"]) == ("deepseek_v3", 0)


@pytest.mark.parametrize("name", PUBLISHED_ARGS)
def test_published_model_args_mean_the_released_model(name, tmp_path):
    released = DeepseekMoeConfig.preset(name)
    args = read_model_args(PUBLISHED_ARGS[name], tmp_path)
    config_json = config_json_of(
        args,
        has_bias=name == "deepseek-v3",
        mtp_layers=released.num_nextn_predict_layers,
        dtype="bfloat16",
        ids={},
    )
    config = DeepseekMoeConfig.from_dict(config_json)
    own = {name: getattr(config, name) for name in vars(released) if not name.startswith("_")}
    theirs = {name: value for name, value in vars(released).items() if not name.startswith("_")}
    assert {name for name in theirs if own[name] != theirs[name]} <= {"architectures", "aux_loss_alpha"}
    written = model_args(released, args["dtype"])
    assert {name: written[name] for name in args if name in written and name != "max_batch_size"} == {
        name: args[name] for name in args if name in written and name != "max_batch_size"
    }


def test_ranks_are_cut_again_for_another_number_of_ranks(sources, tmp_path):
    source = sources["v3", "fp8"]
    convert(source, tmp_path / "two", INFERENCE, mp=2)
    convert(source, tmp_path / "four", INFERENCE, mp=4)
    convert(tmp_path / "two", tmp_path / "again", INFERENCE, mp=4, verify=True)
    expected = contents(tmp_path / "four")
    found = contents(tmp_path / "again")
    assert found.pop("conversion.json") and expected.pop("conversion.json")
    assert found == expected


def test_precision_changes_on_the_way_in_and_on_the_way_out(sources, tmp_path):
    source = sources["v3", "fp8"]
    plain = plainly_dequantized(tensors_of(source))
    convert(source, tmp_path / "ranks", INFERENCE, mp=4)
    convert(tmp_path / "ranks", tmp_path / "out", "bf16")
    assert_bit_equal(tensors_of(tmp_path / "out"), plain)
    assert "quantization_config" not in json_of(tmp_path / "out")
    convert(source, tmp_path / "plain ranks", INFERENCE, mp=4, dtype="bfloat16")
    assert json_of(tmp_path / "plain ranks", "model_args.json")["dtype"] == "bf16"
    convert(tmp_path / "plain ranks", tmp_path / "in", "bf16")
    assert_bit_equal(tensors_of(tmp_path / "in"), plain)
    report = convert(tmp_path / "plain ranks", tmp_path / "fp8", "fp8", verify=True)
    convert(tmp_path / "in", tmp_path / "fp8 of whole", "fp8")
    assert_as_bytes(tensors_of(tmp_path / "fp8"), tensors_of(tmp_path / "fp8 of whole"))
    assert set(report.errors) == {"attention", "dense_mlp", "routed_experts", "shared_experts"}


def test_powers_of_two_as_scales_are_named_in_the_model_args(tmp_path):
    config_json = ragged_json(**SIZES)
    quantization = {**QUANTIZATION, "scale_fmt": "ue8m0"}
    tensors = random_fp8(bf16_tensors(config_json, tmp_path / "saved"), torch.float8_e8m0fnu)
    source = sharded(tmp_path / "source", {**config_json, "quantization_config": quantization}, tensors)
    convert(source, tmp_path / "ranks", INFERENCE, mp=2, verify=True)
    assert json_of(tmp_path / "ranks", "model_args.json")["scale_fmt"] == "ue8m0"
    (tmp_path / "ranks" / "config.json").unlink()
    convert(tmp_path / "ranks", tmp_path / "back", "deepseek_v3")
    assert_as_bytes(tensors_of(tmp_path / "back"), tensors)
    assert json_of(tmp_path / "back")["quantization_config"] == quantization


def test_what_the_program_does_not_load_is_said_and_nothing_is_lost_in_silence(sources, tmp_path):
    tables = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.rand(32) for i in range(2)}
    tensors = tensors_of(sources["v3", "bf16"])
    source = sharded(tmp_path / "source", json_of(sources["v3", "bf16"]), {**tensors, **tables})
    lines = "\n".join(convert(source, tmp_path / "ranks", INFERENCE).lines())
    mtp = [name for name in tensors if name.startswith("model.layers.2.")]
    assert f"the {len(mtp)} tensors of the MTP modules are in mtp.safetensors" in lines
    assert "left out: 2 rotary tables such as model.layers.0.self_attn.rotary_emb.inv_freq" in lines
    assert "gives its Gate a bias where dim is 7168, and here it is 192" in lines
    (tmp_path / "ranks" / "mtp.safetensors").unlink()
    report = convert(tmp_path / "ranks", tmp_path / "back", "bf16")
    assert "no mtp.safetensors: the MTP modules that config.json announces are left out" in report.lines()
    assert json_of(tmp_path / "back")["num_nextn_predict_layers"] == 0
    assert tensors_of(tmp_path / "back").keys() == tensors.keys() - set(mtp)


REFUSED = {
    "plain attention": ("v1", {}, "kv_lora_rank=None"),
    "half-split rotary": ("v3", {"rope_interleave": False}, "rope_interleave=False"),
    "every second layer": ("v3", {"moe_layer_freq": 2}, "moe_layer_freq=2"),
    "Moonlight's epsilon": ("moonlight", {}, "rms_norm_eps=1e-05"),
    "own epsilon": ("v3", {"latent_norm_eps": 1e-5}, "latent_norm_eps=1e-05"),
    "tied embeddings": ("v2", {"tie_word_embeddings": True}, "tie_word_embeddings=True"),
    "biases": ("v2", {"attention_bias": True}, "attention_bias=True"),
    "another activation": ("v2", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    "no shared expert": ("v2_lite", {"n_shared_experts": None}, "n_shared_experts=None"),
    "normalised softmax": ("v2", {"norm_topk_prob": True}, "norm_topk_prob=True"),
    "raw sigmoid": ("v3", {"norm_topk_prob": False}, "norm_topk_prob=False"),
    "unscaled sigmoid": ("v3", {"norm_topk_semantics": "deepseek_v2"}, "norm_topk_semantics='deepseek_v2'"),
    "groups of one": ("v3", {"n_group": 8, "topk_group": 4}, "n_group=8"),
    "linear rotary": ("v2", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear'"),
    "two mscales": (
        "v2",
        {"rope_scaling": {"type": "yarn", "factor": 4, "mscale": 1.0, "original_max_position_embeddings": 64}},
        "rope_parameters=",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_deepseeks_program_cannot_compute_is_refused_by_field(case, tmp_path):
    lineage, fields, message = REFUSED[case]
    tiny_model(tiny_config(lineage, **fields)).save_pretrained(tmp_path / "source")
    with pytest.raises(CheckpointError, match=rf"{message}.*cannot be expressed as {INFERENCE}"):
        convert(tmp_path / "source", tmp_path / "target", INFERENCE)
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    ("precision", "mp", "message"),
    [
        ("bf16", 3, "num_attention_heads=8 cannot be divided among mp=3 ranks"),
        ("bf16", 8, "n_routed_experts=4 cannot be divided among mp=8 ranks"),
        ("vocabulary", 4, r"(lm_head|model.embed_tokens).weight: 94 rows cannot be divided among mp=4 ranks"),
        ("blocks", 4, r"mlp.down_proj.weight_scale_inv: 2 FP8 blocks of 128 columns cannot be divided among mp=4"),
        ("half blocks", 2, r"mlp.\w+_proj.weight: 192 (rows|columns) among mp=2 ranks would cut FP8 blocks of 128"),
    ],
)
def test_what_cannot_be_divided_among_the_ranks_is_refused_by_name(precision, mp, message, sources, tmp_path):
    source = sources["v3", "bf16"]
    fields = {"vocabulary": {"vocab_size": 94}, "blocks": {"intermediate_size": 256}}
    fields["half blocks"] = {"intermediate_size": 192}
    if precision in fields:
        config_json = ragged_json(**{**SIZES, **fields[precision]})
        tensors = bf16_tensors(config_json, tmp_path / "saved")
        if precision != "vocabulary":
            tensors, config_json = random_fp8(tensors), {**config_json, "quantization_config": QUANTIZATION}
        source = sharded(tmp_path / "source", config_json, tensors, shards=1)
    with pytest.raises(CheckpointError, match=message):
        convert(source, tmp_path / "target", INFERENCE, mp=mp)
    assert not (tmp_path / "target").exists()


def test_a_checkpoint_of_which_some_weights_are_fp8_is_refused_by_name(sources, tmp_path):
    source = sources["v3", "fp8"]
    tensors, name = tensors_of(source), "model.layers.1.self_attn.q_a_proj.weight"
    del tensors[f"{name}_scale_inv"]
    mixed = sharded(tmp_path / "mixed", json_of(source), {**tensors, name: tensors[name].float().bfloat16()})
    with pytest.raises(CheckpointError, match=f"tensor {name} is not FP8, as others are.*--dtype bfloat16"):
        convert(mixed, tmp_path / "target", INFERENCE)
    convert(mixed, tmp_path / "target", INFERENCE, dtype="bfloat16", verify=True)


def test_the_command_plans_converts_and_refuses_options_of_other_formats(sources, tmp_path):
    def run(*arguments: str):
        return CliRunner().invoke(app, ["convert", *map(str, arguments)])

    source = sources["v3", "bf16"]
    planned = run(source, tmp_path / "ranks", "--to", INFERENCE, "--mp", 2, "--dry-run")
    assert planned.exit_code == 0 and not (tmp_path / "ranks").exists()
    assert "    head.weight BF16 [48, 192] 18432 bytes <- copy lm_head.weight[0/2]\n" in planned.stdout
    assert "layers.0.attn.wo.weight BF16 [192, 256] 98304 bytes <- sliced model.layers.0.self_attn.o_proj.weight" in (
        planned.stdout
    )
    assert run(source, tmp_path / "ranks", "--to", INFERENCE, "--mp", 2).exit_code == 0
    planned = run(tmp_path / "ranks", tmp_path / "back", "--to", "bf16", "--dry-run", "--from", INFERENCE)
    assert "lm_head.weight BF16 [96, 192] 36864 bytes <- joined rank0:head.weight rank1:head.weight" in planned.stdout
    for arguments, message in [
        (["--to", "bf16", "--mp", 2], "mp"),
        (["--to", INFERENCE, "--mp", 0], "mp=0 must be at least 1"),
        (["--to", "bf16", "--from", "gguf"], "source format 'gguf' is not 'deepseek-inference'"),
        (["--to", "bf16", "--from", INFERENCE], "has no model0-mp1.safetensors or other file of a rank"),
    ]:
        result = run(source, tmp_path / "target", *arguments)
        assert result.exit_code == 1 and message in result.stderr
        assert not (tmp_path / "target").exists()


def test_written_files_are_those_that_safetensors_itself_would_write(sources, tmp_path):
    convert(sources["v2", "fp8"], tmp_path / "ranks", INFERENCE, mp=2)
    for file in (tmp_path / "ranks").glob("*.safetensors"):
        save_file(load_file(file), tmp_path / "again.safetensors", metadata={"format": "pt"})
        assert (tmp_path / "again.safetensors").read_bytes() == file.read_bytes()
