"""Conversion to the model types that other software reads as DeepSeek's own."""

import pytest
import torch
import transformers
from checkpoint_folders import assert_bit_equal, tensors_of
from convert_folders import QUANTIZATION, contents, json_of, logits_of
from places import GOLDEN_FOLDERS
from tiny import tiny_config, tiny_model

from modeling_deepseek_moe import CheckpointError, DeepseekMoeForCausalLM
from modeling_deepseek_moe.conversion import convert

REFUSED_GOLDEN = {"v2_norm_topk": "norm_topk_prob=True"}


@pytest.mark.parametrize("folder", GOLDEN_FOLDERS, ids=lambda folder: folder.name)
def test_golden_checkpoints_go_to_their_native_type_and_the_class_of_transformers_agrees(folder, tmp_path):
    model_type = json_of(folder)["model_type"]
    if folder.name in REFUSED_GOLDEN:
        with pytest.raises(CheckpointError, match=REFUSED_GOLDEN[folder.name]):
            convert(folder, tmp_path / "native", model_type)
        return
    own = tmp_path / "own"
    DeepseekMoeForCausalLM.from_pretrained(folder).save_pretrained(own)
    assert json_of(own)["model_type"] == "deepseek_moe"
    convert(own, tmp_path / "native", model_type, verify=True)
    assert json_of(tmp_path / "native")["model_type"] == model_type
    assert_bit_equal(tensors_of(tmp_path / "native"), tensors_of(own))
    expected = logits_of(folder)
    assert torch.equal(logits_of(tmp_path / "native"), expected)
    native_class = {
        "deepseek_v2": transformers.DeepseekV2ForCausalLM,
        "deepseek_v3": transformers.DeepseekV3ForCausalLM,
    }.get(model_type)
    if native_class:
        # float32 and three layers; the bound of test_transformers_parity.
        torch.testing.assert_close(logits_of(tmp_path / "native", native_class), expected, rtol=0, atol=2e-5)


REFUSED = {
    "softmax as V3": ("v3", {"scoring_func": "softmax"}, "deepseek_v3", "scoring_func='softmax'"),
    "greedy as V3": ("v3", {"topk_method": "greedy"}, "deepseek_v3", "topk_method='greedy'"),
    "V2 as V3": ("v2", {}, "deepseek_v3", "scoring_func='softmax'"),
    "V3 as V2": ("v3", {"num_nextn_predict_layers": 0}, "deepseek_v2", "scoring_func='sigmoid'"),
    "V1 as V2": ("v1", {}, "deepseek_v2", "rope_interleave=False"),
    "MLA as V1": ("v2", {}, "deepseek", "kv_lora_rank=16"),
    "normalised V2": ("v2", {"norm_topk_prob": True}, "deepseek_v2", "norm_topk_prob=True"),
    "every second layer": ("v3", {"moe_layer_freq": 2}, "deepseek_v3", "moe_layer_freq=2"),
    "half-split rotary": ("v3", {"rope_interleave": False}, "deepseek_v3", "rope_interleave=False"),
    "router in half precision": ("v3", {"router_dtype": "model"}, "deepseek_v3", "router_dtype='model'"),
    "own epsilon": ("v3", {"latent_norm_eps": 1e-5}, "deepseek_v3", "latent_norm_eps=1e-05"),
    "scaled V1": ("v1", {"routed_scaling_factor": 2.0}, "deepseek", "routed_scaling_factor=2.0"),
    "no shared expert": ("v2_lite", {"n_shared_experts": None}, "deepseek_v2", "n_shared_experts=None"),
    "groups of one": ("v3", {"n_group": 8, "topk_group": 4}, "deepseek_v3", "n_group=8"),
    "mscale alone": (
        "v2",
        {"rope_scaling": {"type": "yarn", "factor": 4, "mscale": 0.707}, "max_position_embeddings": 256},
        "deepseek_v2",
        "rope_parameters=",
    ),
    "V2 normalisation": ("v3", {"norm_topk_semantics": "deepseek_v2"}, "deepseek_v3", "norm_topk_semantics="),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_native_class_cannot_express_is_refused_by_field(case, tmp_path):
    lineage, fields, to, message = REFUSED[case]
    tiny_model(tiny_config(lineage, **fields)).save_pretrained(tmp_path / "source")
    with pytest.raises(CheckpointError, match=rf"{message}.*cannot be expressed as {to}"):
        convert(tmp_path / "source", tmp_path / "target", to)
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    ("lineage", "fields", "to"),
    [
        ("v1", {"n_shared_experts": None, "attention_bias": True, "norm_topk_prob": True}, "deepseek"),
        ("v2_lite", {"attention_bias": True, "tie_word_embeddings": True}, "deepseek_v2"),
        ("v2", {"rope_scaling": None, "rope_theta": 5000.0}, "deepseek_v2"),
        ("moonlight", {"norm_topk_prob": False, "tie_word_embeddings": True}, "deepseek_v3"),
        ("kimi", {}, "deepseek_v3"),
    ],
    ids=["V1 without shared expert, biases", "V2 tied, biases", "V2 without YaRN", "V3 tied, unnormalised", "Kimi"],
)
def test_a_native_copy_is_the_same_model(lineage, fields, to, tmp_path):
    """Verification runs tokens through both, with transformers' own class where it has one."""
    tiny_model(tiny_config(lineage, **fields)).save_pretrained(tmp_path / "source")
    report = convert(tmp_path / "source", tmp_path / "target", to, verify=True)
    assert report.verification.logits < 1e-5
    assert (
        report.verification.reader
        == {
            "deepseek": "DeepseekMoeForCausalLM",
            "deepseek_v2": "DeepseekV2ForCausalLM",
            "deepseek_v3": "DeepseekV3ForCausalLM",
        }[to]
    )
    assert torch.equal(logits_of(tmp_path / "target"), logits_of(tmp_path / "source"))


def test_a_native_config_is_spelled_as_deepseek_spells_it(bf16, tmp_path):
    convert(bf16, tmp_path / "native", "deepseek_v3")
    config_json, published = json_of(tmp_path / "native"), json_of(bf16)
    assert {name: config_json[name] for name in published} == published
    assert config_json["rope_theta"] == 10000.0


def test_fp8_weights_stay_as_they_are_in_a_native_copy_unless_a_dtype_is_given(fp8, tmp_path):
    convert(fp8, tmp_path / "same", "deepseek_v3", verify=True)
    assert json_of(tmp_path / "same")["quantization_config"] == QUANTIZATION
    assert contents(fp8).items() >= {
        (file, data) for file, data in contents(tmp_path / "same").items() if file.endswith(".safetensors")
    }
    convert(fp8, tmp_path / "plain", "deepseek_v3", dtype="float32", verify=True)
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "plain").values()} == {torch.float32}
    assert "quantization_config" not in json_of(tmp_path / "plain")
    assert json_of(tmp_path / "plain")["torch_dtype"] == "float32"
