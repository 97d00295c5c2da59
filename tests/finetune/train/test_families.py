"""Every family from a recipe to files: LoRA, ESFT, four bits, all weights with balance and MTP, converted, planned."""

import json
from pathlib import Path

import pytest
import torch
from checkpoint_folders import tensors_of
from places import SIBLINGS
from safetensors.torch import load_file
from text_parts import write_kimi
from tiny import tiny_ids
from tiny_run import full, tiny_tokenizer, tiny_values

from modeling_deepseek_moe import CheckpointError, DeepseekMoeConfig, DeepseekMoeForCausalLM
from modeling_deepseek_moe.conversion import convert
from modeling_deepseek_moe.expert_lora import load_adapter
from modeling_deepseek_moe.finetune.errors import UserError
from modeling_deepseek_moe.finetune.experts.score_data import score_data, select_from
from modeling_deepseek_moe.finetune.model.use import load_for_use
from modeling_deepseek_moe.finetune.plan.fit import MemoryPlan
from modeling_deepseek_moe.finetune.recipe.load import make_recipe
from modeling_deepseek_moe.finetune.train import one_run

FAMILIES = sorted(path.name for path in SIBLINGS.iterdir() if path.is_dir())
WITH_MTP = [name for name in FAMILIES if name.startswith(("glm", "deepseek"))]


def family_base(folder, name: str, **overrides):
    """A random model of a family with the tiny tokenizer's words."""
    config = DeepseekMoeConfig.from_pretrained(
        SIBLINGS / name, vocab_size=90, pad_token_id=2, eos_token_id=1, **overrides
    )
    torch.manual_seed(0)
    DeepseekMoeForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(params=FAMILIES)
def base(request, tmp_path):
    return family_base(tmp_path / "base", request.param)


def run(tmp_path, base, change=lambda values: values, **overrides):
    values = {"training.max_steps": 2, "training.save_steps": 2, **overrides}
    return one_run.run(make_recipe(change(tiny_values(tmp_path, base, **values))))


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    model = model.eval()
    return model(tiny_ids(model.config, length=24)).logits


def test_lora_on_all_parts_trains_and_its_adapter_loads_on_the_family(base, tmp_path):
    run(tmp_path, base, **{"losses.aux_loss_alpha": 0.01})
    files = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert any("mlp.experts" in name for name in files) and not any("indexer" in name for name in files)
    plain = DeepseekMoeForCausalLM.from_pretrained(base)
    before = logits_of(plain)
    adapted = load_adapter(DeepseekMoeForCausalLM.from_pretrained(base), tmp_path / "run" / "adapter")
    assert not torch.allclose(logits_of(adapted), before)


def test_a_merged_run_is_saved_and_pushed_as_the_familys_own_model(base, tmp_path, push, api):
    run(tmp_path, base, merge=True)
    own = json.loads((base / "config.json").read_text())["model_type"]
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["model_type"] == own
    original = load_file(base / "model.safetensors")
    merged = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert merged.keys() == original.keys()
    seen = json.loads((tmp_path / "run" / "experts.json").read_text())
    config = DeepseekMoeConfig.from_pretrained(base)
    assert len(seen["layers"]) == sum(map(config.is_moe_layer, range(config.num_hidden_layers)))
    push(tmp_path / "run", "me/tuned", base="me/base")
    back = Path(api.snapshot_download("me/tuned", local_dir=tmp_path / "back"))
    assert json.loads((back / "config.json").read_text())["model_type"] == own
    card = (back / "README.md").read_text()
    assert "vllm serve me/tuned" in card and 'DeepseekMoeForCausalLM.from_pretrained("me/tuned"' in card
    with torch.no_grad():
        pair = [logits_of(DeepseekMoeForCausalLM.from_pretrained(at)) for at in (back, tmp_path / "run" / "model")]
    assert torch.equal(*pair)


def test_full_fine_tuning_moves_the_bias_where_there_is_one_and_leaves_the_indexer(base, tmp_path):
    config = DeepseekMoeConfig.from_pretrained(base)
    has_bias = config.topk_method == "noaux_tc"
    speed = {"bias_update_speed": 0.01} if has_bias else {}
    run(tmp_path, base, full, **{"losses.aux_loss_alpha": 0.01, **speed})
    before = load_file(base / "model.safetensors")
    after = load_file(tmp_path / "run" / "model" / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(".experts." in name for name in changed) and any(".self_attn." in name for name in changed)
    assert any(name.endswith("e_score_correction_bias") for name in changed) == has_bias
    assert not any(".indexer." in name for name in changed)


def test_esft_trains_the_chosen_experts_of_a_family(base, tmp_path):
    run(tmp_path, base, full, **{"esft.score": "token", "esft.top_p": 0.3})
    assert (tmp_path / "run" / "adapter").is_dir()
    score_data(base, tmp_path / "rows.jsonl", tmp_path / "scores.json", sample_tokens=64)
    select_from(tmp_path / "scores.json", tmp_path / "chosen.json", top_p=0.3)
    chosen = json.loads((tmp_path / "chosen.json").read_text())["experts"]
    config = DeepseekMoeConfig.from_pretrained(base)
    assert [int(layer) for layer in chosen] == list(filter(config.is_moe_layer, range(config.num_hidden_layers)))
    assert all(chosen.values())


def test_four_bits_carry_lora_on_a_family(base, tmp_path):
    run(tmp_path, base, quantization="nf4", dtype="float32")
    files = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert any("mlp.experts" in name and tensor.any() for name, tensor in files.items())


def test_the_text_part_of_a_model_that_also_sees_is_trained_and_its_adapter_put_on_it_again(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    write_kimi(base, vocab_size=90, pad_token_id=2)
    tiny_tokenizer().save_pretrained(base)
    with pytest.raises(UserError, match="cannot load model .*holds more than a text model .*`text_only: true`"):
        run(tmp_path, base)
    run(tmp_path, base, text_only=True, merge=True, overwrite=True)
    model, _ = load_for_use(base, adapter=tmp_path / "run" / "adapter", text_only=True)
    plain, _ = load_for_use(base, text_only=True)
    assert not torch.allclose(logits_of(model), logits_of(plain))
    merged = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert merged["model_type"] == "deepseek_moe"
    config = DeepseekMoeConfig.from_pretrained(base)
    recipe = make_recipe({"model": "model", "data": "data", "output_dir": "out", "max_length": 32})
    weights = MemoryPlan(config, recipe, "cpu").memory().weights  # the text part's, without being told
    assert sum(weights.values()) == sum(tensor.nbytes for tensor in (*plain.parameters(), *plain.buffers()))


@pytest.mark.parametrize("name", WITH_MTP)
def test_mtp_modules_of_a_family_train_draft_and_are_saved_under_its_names(name, tmp_path):
    base = family_base(tmp_path / "base", name, num_nextn_predict_layers=1)
    run(tmp_path, base, full, **{"losses.mtp_loss_weight": 0.3})
    model = DeepseekMoeForCausalLM.from_pretrained(tmp_path / "run" / "model").eval()
    prompt = tiny_ids(model.config, batch=1, length=24)
    plain = model.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert torch.equal(
        model.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None, use_mtp=True), plain
    )
    saved = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert any(name.startswith("model.layers.3.eh_proj") for name in saved)


def test_a_plan_holds_the_weights_of_the_model(base):
    config = DeepseekMoeConfig.from_pretrained(base)
    model = DeepseekMoeForCausalLM.from_pretrained(base)
    recipe = make_recipe({"model": "model", "data": "data", "output_dir": "out", "max_length": 32})
    weights = MemoryPlan(config, recipe, "cpu").memory().weights
    assert sum(weights.values()) == sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("to", ["plain", "bf16", "fp8"])
def test_a_converted_copy_is_the_family_with_the_same_tensors(base, to, tmp_path):
    if to == "fp8" and "mistral4" in (base / "config.json").read_text():
        pytest.skip("it is not published in FP8 blocks: refused, see the next test")
    convert(base, tmp_path / "copy", to)
    own = json.loads((base / "config.json").read_text())
    written = json.loads((tmp_path / "copy" / "config.json").read_text())
    assert written["model_type"] == own["model_type"]
    original, copy = load_file(base / "model.safetensors"), {}
    for path in (tmp_path / "copy").glob("*.safetensors"):
        copy |= load_file(path)
    assert {name for name in copy if not name.endswith("_scale_inv")} == original.keys()
    if to == "plain":
        assert all(torch.equal(copy[name], original[name]) for name in original)
    model = DeepseekMoeForCausalLM.from_pretrained(tmp_path / "copy", dtype=torch.float32)
    expected = logits_of(DeepseekMoeForCausalLM.from_pretrained(base))
    # Rounding to bfloat16 and FP8 can choose other experts in a random model: only finite and near on the whole.
    assert (logits_of(model) - expected).abs().mean() < {"plain": 1e-6, "bf16": 0.2, "fp8": 1.0}[to]


def test_fp8_of_a_family_that_is_not_published_in_blocks_is_refused_by_name(tmp_path):
    base = family_base(tmp_path / "base", "mistral4_style")
    with pytest.raises(CheckpointError, match="a mistral4 is published in FP8 with one scale a matrix"):
        convert(base, tmp_path / "copy", "fp8")
    assert not (tmp_path / "copy").exists()


def test_fp8_takes_the_indexers_projections_along_as_the_released_files_do(tmp_path):
    base = family_base(tmp_path / "base", "deepseek_v32_style", dtype="bfloat16")
    convert(base, tmp_path / "fp8", "fp8", verify=True)
    copy = tensors_of(tmp_path / "fp8")
    indexer = "model.layers.0.self_attn.indexer"
    for name in ("wq_b", "wk"):
        assert copy[f"{indexer}.{name}.weight"].dtype == torch.float8_e4m3fn
        assert copy[f"{indexer}.{name}.weight_scale_inv"].dtype == torch.float32
    for name in ("weights_proj.weight", "k_norm.weight", "k_norm.bias"):
        assert copy[f"{indexer}.{name}"].dtype == torch.bfloat16
    convert(tmp_path / "fp8", tmp_path / "bf16", "bf16", verify=True)
    convert(tmp_path / "bf16", tmp_path / "again", "fp8")
    again = tensors_of(tmp_path / "again")
    assert again.keys() == copy.keys()
    same = [name for name in copy if not name.endswith("_scale_inv")]  # a scale is of a weight rounded to bfloat16
    assert all(torch.equal(again[name].float(), copy[name].float()) for name in same)
