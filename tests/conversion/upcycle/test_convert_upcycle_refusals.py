"""Dense checkpoints that cannot be made into experts, or not in that way: one line that names the field."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from dense_folders import dense_folder, upcycled
from safetensors.torch import load_file, save_file

from modeling_deepseek_moe import CheckpointError
from modeling_deepseek_moe.conversion import UpcycleOptions, convert


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return dense_folder(tmp_path_factory.mktemp("dense") / "llama")


IMPOSSIBLE = [
    ({"experts": 7}, r"intermediate_size=80 is not divisible by experts=7 \+ shared_experts=2; experts=6 or 8 would"),
    ({"experts": 0}, "experts=0 must be at least 1"),
    ({"experts": -2, "shared_experts": 2}, "experts=-2 must be at least 1"),
    ({"shared_experts": -1}, "shared_experts=-1 must be at least 0"),
    ({"top_k": 9}, "top_k=9 is more than experts=8"),
    ({"top_k": 0}, "top_k=0 must be at least 1"),
    ({"dense_layers": 2}, "dense_layers=2 leaves none of num_hidden_layers=2 to cut"),
]


@pytest.mark.parametrize(("change", "message"), IMPOSSIBLE, ids=[str(change) for change, _ in IMPOSSIBLE])
def test_a_cut_that_does_not_come_out_even_is_an_error_that_says_what_would(change, message, llama, tmp_path):
    fields = {"experts": 8, "shared_experts": 2, "top_k": 3, **change}
    with pytest.raises(CheckpointError, match=message):
        upcycled(llama, tmp_path / "target", upcycle=UpcycleOptions(**fields))
    assert not (tmp_path / "target").exists()


REFUSED = {
    "another model": ({"model_type": "mistral"}, "model_type='mistral' is not a dense model read here: llama"),
    "no model": ({"model_type": ["llama"]}, r"model_type=\['llama'\] is not a dense model"),
    "a classifier": ({"architectures": ["LlamaForSequenceClassification"]}, "is not ['LlamaForCausalLM']"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act='gelu' cannot be expressed; only 'silu' can"),
    "biases in the MLP": ({"mlp_bias": True}, "mlp_bias=True cannot be expressed; only False can"),
    "sliding windows": ({"use_sliding_window": True}, "use_sliding_window=True cannot be expressed"),
    "window layers": ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types=['full_attention'"),
    "capped logits": ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 cannot be expressed"),
    "quantized weights": ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config={'quant_method'"),
    "long rope": (
        {"rope_parameters": {"rope_type": "longrope", "short_factor": [1] * 4, "long_factor": [1] * 4}},
        "rope_type='longrope' cannot be expressed, only default, linear",
    ),
    "a temperature of YaRN's own": (
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "mscale": 2.0}},
        "mscale=2.0 of the rope settings cannot be expressed with rope_type='yarn'",
    ),
    "partial rotation": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 cannot be expressed; only 1 can"),
    "a field of another type": ({"hidden_size": "32"}, "hidden_size"),
    "no heads": ({"num_attention_heads": 0}, "config.json: "),
    "odd heads": ({"head_dim": 7}, "head_dim"),
    "other sizes": ({"hidden_size": 16}, "tensors 21 of the wrong shape"),
    "more layers": ({"num_hidden_layers": 3}, "tensors 9 missing (model.layers.2."),
    "fewer layers": ({"num_hidden_layers": 1}, "belongs to no model of this config.json"),
    "a head of its own": ({"tie_word_embeddings": True}, "tensor lm_head.weight belongs to no model"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_what_the_result_cannot_express_is_refused_by_field(change, message, llama, tmp_path):
    source = Path(shutil.copytree(llama, tmp_path / "source"))
    config_json = {**json.loads((source / "config.json").read_text()), **change}
    if "rope_parameters" in change:
        config_json.pop("rope_theta", None)
    (source / "config.json").write_text(json.dumps(config_json))
    with pytest.raises(CheckpointError) as caught:
        upcycled(source, tmp_path / "target")
    assert message.replace("\\", "") in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "target").exists()


def test_tensors_that_a_dense_model_does_not_have_are_refused(tmp_path):
    source = dense_folder(tmp_path / "qwen2", "qwen2, tied")
    with pytest.raises(CheckpointError, match=r"model_type='qwen2' is not one of 'deepseek'"):
        convert(source, tmp_path / "target", "bf16")
    file = next(source.glob("*.safetensors"))
    tensors = load_file(file)
    for name, tensor in [
        ("model.layers.0.self_attn.o_proj.bias", torch.zeros(32)),
        ("model.layers.0.mlp.gate_proj.bias", torch.zeros(80)),
    ]:
        save_file({**tensors, name: tensor}, file, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=f"{name}"):
            upcycled(source, tmp_path / "target")
    save_file(tensors, file, metadata={"format": "pt"})
    half = dense_folder(tmp_path / "half", dtype=torch.float16)
    with pytest.raises(CheckpointError, match="would be float16, in which the new router is zero; give --dtype"):
        upcycled(half, tmp_path / "target")
    upcycled(half, tmp_path / "target", dtype="float32", verify=True)
    broken = dense_folder(tmp_path / "broken")
    file = next(f for f in sorted(broken.glob("*.safetensors")) if any("gate_proj" in name for name in load_file(f)))
    tensors = load_file(file)
    name = next(name for name in tensors if "gate_proj" in name)
    tensors[name][3, 3] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{file.name}: tensor {name} holds values that are not finite"):
        upcycled(broken, tmp_path / "none")
    assert not (tmp_path / "none").exists()
