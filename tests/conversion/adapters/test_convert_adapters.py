"""Adapters: stacked and per-expert names, merging into a checkpoint, held to stock PEFT on transformers' own class."""

import json
from pathlib import Path

import pytest
import torch
from adapted_pair import EXPERTS, randomize
from adapter_folders import ATTENTION, STACK, edit_tensors, json_of, native_base, save_adapter
from checkpoint_folders import assert_bit_equal, tensors_of, written
from convert_folders import contents, fp8_folder
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import tiny_ids
from transformers import DeepseekV3ForCausalLM
from typer.testing import CliRunner

from modeling_deepseek_moe import CheckpointError, DeepseekMoeForCausalLM
from modeling_deepseek_moe.cli.main import app
from modeling_deepseek_moe.conversion import ConversionError, convert
from modeling_deepseek_moe.finetune.model.lora import lora_config

# float32: the same sums in another order, through three layers; relative to the largest logit.
SAME = 1e-5
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

ADAPTERS = {
    "plain": {},
    "use_rslora": {"use_rslora": True},
    "rank_pattern": {"rank_pattern": {"down_proj": 6, "o_proj": 2}, "alpha_pattern": {"gate_up_proj": 12}},
    "rank_pattern_rslora": {"rank_pattern": {"layers.1.mlp.experts.gate_up_proj": 2}, "use_rslora": True},
    "down_proj_alone": {"target_parameters": ["mlp.experts.down_proj"]},
    "router_too": {"target_parameters": [*EXPERTS, "mlp.gate.weight"], "target_modules": []},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return native_base(tmp_path_factory.mktemp("base"))


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(tiny_ids(model.config)).logits


def stock(base: Path, adapter: Path | None = None, dtype=torch.float32):
    model = DeepseekV3ForCausalLM.from_pretrained(base, dtype=dtype)
    return PeftModel.from_pretrained(model, adapter) if adapter else model


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=SAME * float(expected.abs().max()))


def added_by_hand(base: Path, adapter: Path, folder: Path) -> Path:
    """`W + alpha / r * B A` of every pair in a per-expert adapter, whose config has no pattern."""
    weights, factors, config_json = tensors_of(base), tensors_of(adapter), json_of(adapter)
    assert not config_json["rank_pattern"] and not config_json["alpha_pattern"] and not config_json["use_rslora"]
    scaling = config_json["lora_alpha"] / config_json["r"]
    for key, a in factors.items():
        if ".lora_A." in key:
            name = key.removeprefix("base_model.model.").replace(".lora_A", "")
            weights[name] += scaling * factors[key.replace("lora_A", "lora_B")] @ a
    return written(folder, json.loads((base / "config.json").read_text()), weights)


def test_every_expert_gets_its_factors_and_the_way_back_gives_the_same_bits(base, tmp_path):
    adapter = save_adapter(base, tmp_path / "adapter")
    before = contents(adapter)
    convert(adapter, tmp_path / "experts", "peft-per-expert", verify=True)
    stacked, single = tensors_of(adapter), tensors_of(tmp_path / "experts")
    for e in range(8):
        for projection, part, rows in [("gate", ".base_layer", slice(16)), ("up", ".base_layer", slice(16, 32))] + [
            ("down", "", slice(32))
        ]:
            a, b = (stacked.get(f"{STACK}{part}.lora_{factor}.weight") for factor in "AB")
            assert torch.equal(single[f"{STACK}.{e}.{projection}_proj.lora_A.weight"], a[4 * e : 4 * e + 4])
            assert torch.equal(single[f"{STACK}.{e}.{projection}_proj.lora_B.weight"], b[rows, e::8])
    assert len(single) == 2 * 2 * 3 * 8 + 3 * 3 * 2
    fields = json_of(tmp_path / "experts")
    modules = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in single}
    assert set(fields["target_modules"]) == modules and fields["target_parameters"] is None
    assert (fields["r"], fields["lora_alpha"]) == (4, 8)

    convert(tmp_path / "experts", tmp_path / "back", "peft", verify=True)
    assert_bit_equal(tensors_of(tmp_path / "back"), stacked)
    names = [f"model.layers.{layer}.{name}" for layer in (1, 2) for name in EXPERTS]
    assert json_of(tmp_path / "back")["target_parameters"] == sorted(names)
    assert contents(adapter) == before


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_form_of_an_adapter_means_the_same_to_stock_peft(name, base, tmp_path):
    """Patterns become one rank and one scaling, since servers read no patterns."""
    adapter = save_adapter(base, tmp_path / "adapter", **ADAPTERS[name])
    expected = logits(stock(base, adapter))
    assert not torch.allclose(expected, logits(stock(base)), atol=0.1)
    convert(adapter, tmp_path / "experts", "peft-per-expert", verify=True)
    assert bool(json_of(tmp_path / "experts")["target_parameters"]) == (name == "router_too")
    convert(tmp_path / "experts", tmp_path / "back", "peft", verify=True)
    for form in ("experts", "back"):
        assert_same(logits(stock(base, tmp_path / form)), expected)
    assert_same(logits(stock(added_by_hand(base, tmp_path / "experts", tmp_path / "added"))), expected)
    for form in ("adapter", "experts"):
        convert(base, tmp_path / f"{form}_merged", "deepseek_v3", adapter=tmp_path / form, verify=True)
        assert_same(logits(stock(tmp_path / f"{form}_merged")), expected)
    assert_same(logits(DeepseekMoeForCausalLM.from_pretrained(tmp_path / "adapter_merged")), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_merged_weights_are_those_of_merge_and_unload_to_the_bit(dtype, base, tmp_path):
    options = {"target_parameters": [*EXPERTS, "mlp.gate.weight"], "modules_to_save": ["lm_head"]}
    adapter = save_adapter(base, tmp_path / "adapter", dtype, **options)
    stock(base, adapter, dtype).merge_and_unload().save_pretrained(tmp_path / "stock")
    name = str(dtype).removeprefix("torch.")
    convert(base, tmp_path / "base", "deepseek_v3", dtype=name)
    convert(tmp_path / "base", tmp_path / "merged", "deepseek_v3", adapter=adapter, verify=True)
    merged, before = tensors_of(tmp_path / "merged"), tensors_of(tmp_path / "base")
    of_mtp = {name for name in merged if name.startswith("model.layers.3.")}
    expected = tensors_of(tmp_path / "stock")
    # transformers keeps routers in float32 from 5.24 on: there they are merged before they are rounded, here after.
    routers = {name for name in expected if name.endswith("mlp.gate.weight") and expected[name].dtype != dtype}
    for name in routers:
        torch.testing.assert_close(
            merged.pop(name).float(), expected.pop(name), rtol=2 * torch.finfo(dtype).eps, atol=1e-3
        )
    for name in expected:  # stock PEFT loads the routing bias in the model's type
        expected[name] = expected[name].to(merged[name].dtype)
    assert_bit_equal({name: merged[name] for name in merged.keys() - of_mtp}, expected)
    before["model.layers.3.shared_head.head.weight"] = merged["lm_head.weight"]  # the MTP module repeats it
    assert_bit_equal({name: merged[name] for name in of_mtp}, {name: before[name] for name in of_mtp})
    assert not torch.equal(merged["lm_head.weight"], before["lm_head.weight"])


def test_adapters_trained_here_are_merged_and_exported(base, tmp_path):
    """Words of this package: target_modules is one regular expression there."""
    model = DeepseekMoeForCausalLM.from_pretrained(base)
    model = get_peft_model(model, lora_config(model, ["all"], r=3, lora_alpha=5))
    randomize(model, seed=2)
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model)
    arguments = [
        "convert",
        str(base),
        str(tmp_path / "merged"),
        "--to",
        "bf16",
        "--adapter",
        str(tmp_path / "adapter"),
    ]
    result = CliRunner().invoke(app, [*arguments, "--dry-run"])
    assert result.exit_code == 0 and "<- merge model.layers.1.mlp.experts.0.gate_proj.weight" in result.output
    convert(base, tmp_path / "merged", "deepseek_v3", adapter=tmp_path / "adapter")
    assert_same(logits(DeepseekMoeForCausalLM.from_pretrained(tmp_path / "merged")), expected)
    convert(tmp_path / "adapter", tmp_path / "experts", "peft-per-expert", kv_b_proj="keep")
    convert(base, tmp_path / "again", "deepseek_v3", adapter=tmp_path / "experts")
    assert_bit_equal(tensors_of(tmp_path / "again"), tensors_of(tmp_path / "merged"))


def test_lora_on_kv_b_proj_is_kept_or_merged_into_the_base_by_choice(base, tmp_path):
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=[*ATTENTION, "kv_b_proj"])
    run = ["convert", str(adapter), str(tmp_path / "experts"), "--to", "peft-per-expert"]
    result = CliRunner().invoke(app, run)
    assert result.exit_code == 1 and result.output.count("\n") == 1
    for words in ("--kv-b-proj keep", "--kv-b-proj leave-out", f"--adapter {adapter} --only kv_b_proj"):
        assert words in result.output
    assert not (tmp_path / "experts").exists()

    assert CliRunner().invoke(app, [*run, "--kv-b-proj", "leave-out"]).exit_code == 0
    assert not any("kv_b_proj" in text for text in (*tensors_of(tmp_path / "experts"), *json_of(tmp_path / "experts")))
    merge = ["convert", str(base), str(tmp_path / "base"), "--to", "deepseek_v3", "--adapter", str(adapter)]
    assert CliRunner().invoke(app, [*merge, "--only", "kv_b_proj"]).exit_code == 0
    expected = logits(stock(base, adapter))
    assert_same(logits(stock(tmp_path / "base", tmp_path / "experts")), expected)
    convert(adapter, tmp_path / "kept", "peft-per-expert", kv_b_proj="keep")
    assert_same(logits(stock(base, tmp_path / "kept")), expected)


def test_projections_with_an_a_of_their_own_are_stacked_with_both_ranks(base, tmp_path):
    """As others train experts one by one: up has another A and another rank than gate."""
    convert(save_adapter(base, tmp_path / "adapter"), tmp_path / "experts", "peft-per-expert")

    def widen(tensors):
        generator = torch.Generator().manual_seed(3)
        for key in [key for key in tensors if ".up_proj.lora_" in key]:
            shape = (4, 32) if "lora_A" in key else (16, 4)
            tensors[key] = torch.randn(shape, generator=generator) * 0.1

    edit_tensors(tmp_path / "experts", widen)
    convert(tmp_path / "experts", tmp_path / "stacked", "peft", verify=True)
    fields = json_of(tmp_path / "stacked")
    doubled = {f"model.layers.{layer}.mlp.experts.gate_up_proj" for layer in (1, 2)}
    assert fields["rank_pattern"] == dict.fromkeys(doubled, 8)
    assert fields["alpha_pattern"] == dict.fromkeys(doubled, 16)
    expected = logits(stock(base, tmp_path / "experts"))
    assert_same(logits(stock(base, tmp_path / "stacked")), expected)
    convert(base, tmp_path / "merged", "deepseek_v3", adapter=tmp_path / "stacked", verify=True)
    assert_same(logits(stock(tmp_path / "merged")), expected)


def test_fp8_weights_are_dequantized_merged_and_quantized_again(tmp_path):
    source = fp8_folder(tmp_path / "fp8")
    convert(source, tmp_path / "bf16", "bf16")
    model = get_peft_model(
        DeepseekMoeForCausalLM.from_pretrained(tmp_path / "bf16"),
        LoraConfig(r=4, target_modules=["o_proj"], target_parameters=EXPERTS),
    )
    randomize(model, seed=1)
    model.save_pretrained(tmp_path / "adapter")
    adapter = {"adapter": tmp_path / "adapter", "verify": True}
    convert(tmp_path / "bf16", tmp_path / "expected", "bf16", **adapter)
    expected = tensors_of(tmp_path / "expected")
    convert(tmp_path / "adapter", tmp_path / "experts", "peft-per-expert")
    convert(tmp_path / "bf16", tmp_path / "from_experts", "bf16", adapter=tmp_path / "experts")
    assert_bit_equal(tensors_of(tmp_path / "from_experts"), expected)
    for to in ("bf16", "deepseek_v3"):
        convert(source, tmp_path / to / "merged", to, **adapter)
        assert_bit_equal(tensors_of(tmp_path / to / "merged"), expected)
        assert "quantization_config" not in (tmp_path / to / "merged" / "config.json").read_text()
    convert(source, tmp_path / "fp8_merged", "fp8", **adapter)
    convert(tmp_path / "expected", tmp_path / "expected_fp8", "fp8")
    found, requantized, before = (tensors_of(tmp_path / name) for name in ("fp8_merged", "expected_fp8", "fp8"))
    assert found.keys() == before.keys()
    for name, tensor in found.items():
        is_merged = ".mlp.experts." in name or "o_proj" in name
        same = (requantized if is_merged else before)[name]
        assert torch.equal(tensor.view(torch.uint8), same.view(torch.uint8)), name


def test_a_merge_is_not_mixed_with_that_of_a_changed_adapter(base, tmp_path):
    adapter = save_adapter(base, tmp_path / "adapter")
    convert(base, tmp_path / "merged", "bf16", adapter=adapter)
    done = contents(tmp_path / "merged")
    assert convert(base, tmp_path / "merged", "bf16", adapter=adapter).actions == {"model.safetensors": "kept"}
    for options in ({"only": ["o_proj"]}, {}):
        with pytest.raises(ConversionError, match="belongs to another conversion"):
            convert(base, tmp_path / "merged", "bf16", **({"adapter": adapter, **options} if options else {}))
    edit_tensors(adapter, lambda tensors: tensors[f"{STACK}.lora_A.weight"].add_(1))
    with pytest.raises(ConversionError, match="belongs to another conversion"):
        convert(base, tmp_path / "merged", "bf16", adapter=adapter)
    assert contents(tmp_path / "merged") == done
    with pytest.raises(ConversionError, match="only read"):
        convert(base, adapter / "merged", "bf16", adapter=adapter)


def test_a_stopped_call_leaves_no_adapter_and_is_finished_by_the_next(base, tmp_path):
    adapter = save_adapter(base, tmp_path / "adapter")
    convert(adapter, tmp_path / "whole", "peft-per-expert")
    convert(base, tmp_path / "whole_merged", "bf16", adapter=adapter)

    def stop(file, count, total):
        raise KeyboardInterrupt

    calls = [(adapter, "experts", "peft-per-expert", {}), (base, "merged", "bf16", {"adapter": adapter})]
    for source, target, to, options in calls:
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / target, to, on_progress=stop, **options)
        assert set(contents(tmp_path / target)) == {"conversion.json"}
        convert(source, tmp_path / target, to, **options)
    assert contents(tmp_path / "experts") == contents(tmp_path / "whole")
    assert contents(tmp_path / "merged") == contents(tmp_path / "whole_merged")


@pytest.mark.parametrize(
    ("to", "options", "message"),
    [
        ("bf16", {"kv_b_proj": "keep"}, "kv_b_proj=keep belongs to the format peft-per-expert"),
        ("bf16", {"base": "x"}, "base=x belongs to the format esft"),
        ("peft", {"adapter": "x"}, "adapter=x belongs to the format bf16 or fp8"),
        ("peft", {"dtype": "bfloat16"}, "dtype=bfloat16 belongs"),
        ("bf16", {"only": ["o_proj"]}, "give --adapter"),
        ("peft-per-expert", {"kv_b_proj": "drop"}, "drop is not one of keep, leave-out"),
        ("pefft", {}, "'pefft' is not one of bf16, .*peft-per-expert, esft"),
    ],
)
def test_an_option_that_the_format_does_not_take_is_refused_by_name(to, options, message, base, tmp_path):
    with pytest.raises(ValueError, match=message):
        convert(base, tmp_path / "target", to, **options)
    assert not (tmp_path / "target").exists()


def test_whole_tensors_beside_the_factors_are_not_exported_to_servers(base, tmp_path):
    adapter = save_adapter(base, tmp_path / "adapter", modules_to_save=["lm_head"])
    with pytest.raises(CheckpointError, match="lm_head.weight is a whole tensor .*merge it into its base"):
        convert(adapter, tmp_path / "experts", "peft-per-expert")
    convert(adapter, tmp_path / "same", "peft", verify=True)
    assert_bit_equal(tensors_of(tmp_path / "same"), tensors_of(adapter))
