"""`from_pretrained` and `save_pretrained`: nothing converted, silently initialised, dropped or renamed."""

import json

import pytest
import torch
from checkpoint_folders import assert_bit_equal, tensors_of, written
from peft import LoraConfig, get_peft_model
from places import GOLDEN_FOLDERS
from safetensors.torch import load_file
from tiny import (
    CONFIG_OF_LINEAGE,
    JSON_OF_LINEAGE,
    kimi_config,
    tiny_config,
    tiny_ids,
    tiny_model,
    v1_config,
    v3_config,
)
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from modeling_deepseek_moe import (
    CheckpointError,
    DeepseekMoeForCausalLM,
    DeepseekMoeForSequenceClassification,
    DeepseekMoeForTokenClassification,
    DeepseekMoeModel,
)

BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


def logits_of(model, seed: int = 0) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny_ids(model.config, seed=seed)).logits


@pytest.mark.parametrize("folder", GOLDEN_FOLDERS, ids=lambda folder: folder.name)
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}], ids=["one file", "shards"])
def test_deepseeks_own_files_load_without_conversion_and_are_written_back_bit_for_bit(folder, options, tmp_path):
    model, info = DeepseekMoeForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert not model.training
    model.save_pretrained(tmp_path, **options)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == bool(options)
    assert_bit_equal(tensors_of(tmp_path), load_file(folder / "model.safetensors"))
    again = DeepseekMoeForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits_of(again), logits_of(model))


@pytest.mark.parametrize("lineage", CONFIG_OF_LINEAGE)
def test_a_loaded_model_computes_what_the_saved_one_did(lineage, tmp_path):
    model = tiny_model(tiny_config(lineage))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(DeepseekMoeForCausalLM.from_pretrained(tmp_path)), logits_of(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", torch.float16, "auto"], ids=str)
def test_the_dtype_argument_is_obeyed_except_by_the_routing_bias(dtype, v3_folder, v3_tensors):
    """FACTS T19."""
    model = DeepseekMoeForCausalLM.from_pretrained(v3_folder, dtype=dtype)
    expected = {"bfloat16": torch.bfloat16, "auto": torch.float32}.get(dtype, dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    bias = model.get_buffer(BIAS)
    assert bias.dtype == torch.float32
    assert torch.equal(bias, v3_tensors[BIAS])


@pytest.mark.parametrize(
    ("cast", "dtype"),
    [
        (lambda model: model.to(torch.bfloat16), torch.bfloat16),
        (lambda model: model.bfloat16(), torch.bfloat16),
        (lambda model: model.half(), torch.float16),
        (lambda model: model.to("cpu", dtype=torch.float16), torch.float16),
    ],
    ids=["to", "bfloat16", "half", "to device and dtype"],
)
def test_the_routing_bias_and_rotary_frequencies_stay_float32_when_a_model_is_cast_and_saved(
    cast, dtype, v3_folder, v3_tensors, tmp_path
):
    """FACTS T19: a rounded bias is another routing."""
    model = DeepseekMoeForCausalLM.from_pretrained(v3_folder)
    frequencies = model.model.rotary_emb.inv_freq.clone()
    cast(model)
    assert model.lm_head.weight.dtype == dtype
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)
    model.save_pretrained(tmp_path / "saved")
    saved = tensors_of(tmp_path / "saved")
    assert torch.equal(saved[BIAS], v3_tensors[BIAS])
    assert saved["lm_head.weight"].dtype == dtype
    again = DeepseekMoeForCausalLM.from_pretrained(tmp_path / "saved")
    assert again.dtype == dtype
    assert torch.equal(again.get_buffer(BIAS), v3_tensors[BIAS])


def test_a_routing_bias_stored_in_bfloat16_is_held_in_float32(v3_tensors, tmp_path):
    """Moonlight's may be (FACTS 11)."""
    bias = v3_tensors[BIAS].bfloat16()
    folder = written(tmp_path, JSON_OF_LINEAGE["v3"], {**v3_tensors, BIAS: bias})
    assert torch.equal(DeepseekMoeForCausalLM.from_pretrained(folder).get_buffer(BIAS), bias.float())


def test_the_routing_bias_is_no_parameter(v3_folder):
    """FACTS T27: neither gradient nor weight decay may move it."""
    model = DeepseekMoeForCausalLM.from_pretrained(v3_folder)
    assert not any("e_score_correction_bias" in name for name, _ in model.named_parameters())
    assert BIAS in model.state_dict()


def test_stray_rotary_tables_are_ignored(v3_tensors, tmp_path):
    """FACTS T20: some exports carry one a layer; neither an unexpected key nor written again."""
    tables = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.full((4,), 7.0) for i in range(3)}
    folder = written(tmp_path / "in", JSON_OF_LINEAGE["v3"], {**v3_tensors, **tables})
    model, info = DeepseekMoeForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert not torch.equal(model.model.rotary_emb.inv_freq, torch.full((4,), 7.0))
    model.save_pretrained(tmp_path / "out")
    assert_bit_equal(tensors_of(tmp_path / "out"), v3_tensors)


def test_a_tensor_no_model_has_is_reported(v3_tensors, tmp_path):
    folder = written(tmp_path, JSON_OF_LINEAGE["v3"], {**v3_tensors, "model.layers.1.indexer.weight": torch.ones(2)})
    _, info = DeepseekMoeForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert info["unexpected_keys"] == {"model.layers.1.indexer.weight"}


@pytest.mark.parametrize("shared", [1, 3])
def test_shared_experts_are_one_mlp_as_wide_as_all_of_them(shared, tmp_path):
    """FACTS T17."""
    model = tiny_model(v1_config(n_shared_experts=shared))
    assert model.model.layers[1].mlp.shared_experts.down_proj.weight.shape == (32, 16 * shared)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(DeepseekMoeForCausalLM.from_pretrained(tmp_path)), logits_of(model))


CLASSES = [
    DeepseekMoeForCausalLM,
    DeepseekMoeModel,
    DeepseekMoeForSequenceClassification,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
]


@pytest.mark.parametrize("model_class", CLASSES, ids=lambda model_class: model_class.__name__)
def test_missing_and_mis_shaped_tensors_are_one_error_that_names_them(model_class, tmp_path):
    tiny_model(kimi_config()).save_pretrained(tmp_path)
    tensors = tensors_of(tmp_path)
    lost = [name for name in tensors if ".experts.5." in name]
    kept = {name: tensor for name, tensor in tensors.items() if name not in lost}
    kept["model.norm.weight"] = torch.ones(31)
    written(tmp_path, JSON_OF_LINEAGE["kimi"], kept)
    with pytest.raises(CheckpointError) as caught:
        model_class.from_pretrained(tmp_path)
    message = str(caught.value)
    assert str(tmp_path) in message
    assert "6 missing (model.layers.1.mlp.experts.5.gate_proj.weight, " in message and "and 1 more" in message
    assert "1 of the wrong shape (model.norm.weight is [31] instead of [32])" in message


def test_a_checkpoint_without_a_head_is_no_causal_language_model(tmp_path):
    tiny_model(v3_config(), model_class=DeepseekMoeModel).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"1 missing \(lm_head\.weight\)"):
        DeepseekMoeForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("model_class", "head"),
    [
        (DeepseekMoeForSequenceClassification, {"score.weight"}),
        (DeepseekMoeForTokenClassification, {"score.weight", "score.bias"}),
    ],
    ids=["sequence", "token"],
)
@pytest.mark.parametrize("source", [DeepseekMoeForCausalLM, DeepseekMoeModel], ids=["with head", "base only"])
def test_the_new_head_of_a_task_class_is_reported_and_alone_initialised(model_class, head, source, tmp_path, caplog):
    base = tiny_model(v3_config(), model_class=source)
    base.save_pretrained(tmp_path)
    model, info = model_class.from_pretrained(tmp_path, num_labels=5, output_loading_info=True)
    assert info["missing_keys"] == head
    said = [record.message for record in caplog.records if record.name.startswith("modeling_deepseek_moe")]
    assert len(said) == 1 and f"{', '.join(sorted(head))} is new" in said[0]
    assert model.score.weight.shape == (5, 32)
    assert_bit_equal(model.model.state_dict(), base.base_model.state_dict())


def test_a_trained_classification_head_is_loaded_and_not_called_new(tmp_path, caplog):
    model = tiny_model(v1_config(num_labels=3, pad_token_id=2), model_class=DeepseekMoeForSequenceClassification)
    model.save_pretrained(tmp_path)
    again, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and not caplog.records
    assert torch.equal(logits_of(again), logits_of(model))


def test_another_number_of_labels_gives_a_new_head_only_if_asked_for(tmp_path):
    tiny_model(v1_config(num_labels=3), model_class=DeepseekMoeForSequenceClassification).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"score\.weight is \[3, 32\] instead of \[5, 32\]"):
        DeepseekMoeForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
    model = DeepseekMoeForSequenceClassification.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert model.score.weight.shape == (5, 32)


def test_a_mis_shaped_tensor_of_the_body_is_an_error_even_where_a_head_may_differ(v3_tensors, tmp_path):
    broken = {**v3_tensors, "model.norm.weight": torch.ones(31)}
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is \[31\] instead of \[32\]"):
        DeepseekMoeForCausalLM.from_pretrained(
            written(tmp_path, JSON_OF_LINEAGE["v3"], broken), ignore_mismatched_sizes=True
        )


@pytest.mark.parametrize("prefix", ["model.", ""], ids=["with head", "base only"])
def test_the_base_model_loads_from_either_kind_of_checkpoint(prefix, v3_tensors, tmp_path):
    tensors = {
        prefix + name.removeprefix("model."): tensor for name, tensor in v3_tensors.items() if name != "lm_head.weight"
    }
    if prefix:
        tensors["lm_head.weight"] = v3_tensors["lm_head.weight"]
    model = DeepseekMoeModel.from_pretrained(written(tmp_path, JSON_OF_LINEAGE["v3"], tensors))
    assert_bit_equal(model.state_dict(), tiny_model(v3_config()).model.state_dict())


@pytest.mark.parametrize("lineage", ["v1", "v3"])
def test_tied_embeddings_are_one_tensor_in_memory_and_on_disk(lineage, tmp_path):
    model = tiny_model(tiny_config(lineage, tie_word_embeddings=True))
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in tensors_of(tmp_path)
    again, info = DeepseekMoeForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(logits_of(again), logits_of(model))


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, "auto"], ids=["cpu", "whole", "auto"])
def test_a_device_map_changes_nothing_on_one_device(device_map, v3_folder, v3_tensors, tmp_path):
    model = DeepseekMoeForCausalLM.from_pretrained(v3_folder, device_map=device_map)
    assert torch.equal(logits_of(model), logits_of(tiny_model(v3_config())))
    model.save_pretrained(tmp_path / "out")
    assert_bit_equal(tensors_of(tmp_path / "out"), v3_tensors)


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
@pytest.mark.parametrize("has_mtp", [True, False], ids=["with MTP", "MTP announced but absent"])
def test_layers_offloaded_to_disk_compute_the_same(has_mtp, v3_tensors, tmp_path):
    kept = {name: tensor for name, tensor in v3_tensors.items() if has_mtp or not name.startswith("model.layers.3.")}
    folder = written(tmp_path / "in", JSON_OF_LINEAGE["v3"], kept)
    on_disk = {f"model.layers.{layer}": "disk" for layer in (1, 2, 3)}
    on_cpu = dict.fromkeys(
        ["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"], "cpu"
    )
    model = DeepseekMoeForCausalLM.from_pretrained(
        folder, device_map={**on_cpu, **on_disk}, offload_folder=tmp_path / "offload"
    )
    assert torch.equal(logits_of(model), logits_of(tiny_model(v3_config())))
    model.save_pretrained(tmp_path / "out")
    assert_bit_equal(tensors_of(tmp_path / "out"), kept)


@pytest.mark.parametrize("way", ["from_pretrained", "load_adapter"])
def test_an_adapter_loads_on_top_of_its_base_model(way, v3_folder, tmp_path):
    """An adapter's file is no checkpoint of the model, and must not be checked as one."""
    config = LoraConfig(target_modules=["q_b_proj", "down_proj"], init_lora_weights=False)
    adapted = get_peft_model(DeepseekMoeForCausalLM.from_pretrained(v3_folder), config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    if way == "from_pretrained":
        # The adapter names its base by path, whose json is of a type that only our class reads as ours.
        DeepseekMoeForCausalLM.from_pretrained(v3_folder).save_pretrained(v3_folder)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    else:
        model = DeepseekMoeForCausalLM.from_pretrained(v3_folder)
        model.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits_of(model), logits_of(adapted))


def test_a_state_dict_in_memory_loads_like_a_file(v3_tensors):
    model = DeepseekMoeForCausalLM.from_pretrained(None, config=v3_config(), state_dict=dict(v3_tensors))
    assert torch.equal(logits_of(model), logits_of(tiny_model(v3_config())))


def test_the_experts_implementation_of_fresh_and_loaded_models_is_sorted_mm(v3_folder):
    loaded = [
        DeepseekMoeForCausalLM.from_pretrained(v3_folder),
        DeepseekMoeModel.from_pretrained(v3_folder),
        DeepseekMoeForCausalLM._from_config(v3_config()),
        DeepseekMoeForCausalLM(v3_config()),
    ]
    assert {model.config._experts_implementation for model in loaded} == {"sorted_mm"}


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm", "sorted_mm"])
def test_an_experts_implementation_asked_for_by_name_is_used_and_agrees(implementation, v3_folder):
    model = DeepseekMoeForCausalLM.from_pretrained(v3_folder, experts_implementation=implementation)
    assert model.config._experts_implementation == implementation
    # float32 sums in another order: a few units in the last place of logits around 1.
    torch.testing.assert_close(logits_of(model), logits_of(tiny_model(v3_config())), rtol=0, atol=1e-5)


AUTO_CLASSES = {
    AutoModel: DeepseekMoeModel,
    AutoModelForCausalLM: DeepseekMoeForCausalLM,
    AutoModelForSequenceClassification: DeepseekMoeForSequenceClassification,
    AutoModelForTokenClassification: DeepseekMoeForTokenClassification,
}


@pytest.mark.parametrize("auto_class", AUTO_CLASSES, ids=lambda auto_class: auto_class.__name__)
@pytest.mark.parametrize("lineage", ["v1", "kimi", "own"])
def test_the_auto_classes_load_the_types_that_transformers_does_not_know(auto_class, lineage, tmp_path):
    """FACTS T23, and this package's own type."""
    config = tiny_config("v3" if lineage == "own" else lineage)
    model = tiny_model(config)
    model.save_pretrained(tmp_path)
    if lineage != "own":
        (tmp_path / "config.json").write_text(json.dumps(JSON_OF_LINEAGE[lineage]))
    loaded = auto_class.from_pretrained(tmp_path)
    assert type(loaded) is AUTO_CLASSES[auto_class]
    assert_bit_equal(loaded.base_model.state_dict(), model.model.state_dict())
