"""Every rope type and every key of it: as transformers' own classes compute it, kept when saved, or refused."""

import json
from copy import deepcopy

import pytest
import torch
import transformers
from checkpoint_folders import tensors_of, written
from tiny import JSON_OF_LINEAGE, tiny_config, tiny_ids, tiny_model

from modeling_deepseek_moe import CheckpointError, DeepseekMoeConfig, DeepseekMoeForCausalLM
from modeling_deepseek_moe.conversion import convert

WINDOW = {"original_max_position_embeddings": 48}
YARN = {"type": "yarn", "factor": 4.0, **WINDOW}
LONGROPE = {"type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.5], "long_factor": [1.0, 2.0, 3.5, 6.0], **WINDOW}
LLAMA3 = {"type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **WINDOW}

SETTINGS = {
    "default": {"type": "default"},
    "linear": {"type": "linear", "factor": 2.5},
    "linear, scores scaled": {"type": "linear", "factor": 2.5, "mscale_all_dim": 0.7},
    "dynamic": {"type": "dynamic", "factor": 2.0},
    "yarn": YARN,
    "yarn, mscales": {**YARN, "mscale": 0.9, "mscale_all_dim": 0.7},
    "yarn, betas": {**YARN, "beta_fast": 8, "beta_slow": 2},
    "yarn, attention_factor": {**YARN, "attention_factor": 1.3},
    "yarn, attention_factor and mscales": {**YARN, "attention_factor": 0.8, "mscale": 0.9, "mscale_all_dim": 0.7},
    "yarn, whole attention_factor": {**YARN, "attention_factor": 2},
    "yarn, no truncation": {**YARN, "truncate": False},
    "yarn, truncation": {**YARN, "truncate": True},
    "yarn, window too small for a ramp": {**YARN, "original_max_position_embeddings": 4},
    "yarn, window too small for a ramp, no truncation": {
        **YARN,
        "original_max_position_embeddings": 4,
        "truncate": False,
    },
    "yarn, nulls": {**YARN, "attention_factor": None, "beta_fast": None, "mscale": None, "truncate": True},
    "longrope": LONGROPE,
    "longrope, factor": {**LONGROPE, "factor": 3.0},
    "longrope, attention_factor": {**LONGROPE, "attention_factor": 1.2},
    "longrope, scores scaled": {**LONGROPE, "factor": 3.0, "mscale_all_dim": 0.7},
    "llama3": LLAMA3,
    "llama3, scores scaled": {**LLAMA3, "mscale_all_dim": 0.7},
    "proportional": {"type": "proportional", "partial_rotary_factor": 0.5},
    "proportional, factor": {"type": "proportional", "partial_rotary_factor": 0.75, "factor": 2.0},
}
OLD = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23)
NATIVE = {"v2": "DeepseekV2ForCausalLM", "v3": "DeepseekV3ForCausalLM"}
# Two lengths: within the window of 48 and beyond all 96 positions, where dynamic and LongRoPE change.
LENGTHS = (40, 120)


@pytest.fixture(scope="module", params=NATIVE)
def lineage(request, tmp_path_factory):
    """A lineage, its json without rotary settings, and tensors under published names."""
    base = JSON_OF_LINEAGE[request.param] | {"max_position_embeddings": 96}
    fields = {name: value for name, value in base.items() if name not in ("rope_scaling", "num_nextn_predict_layers")}
    fields |= {"num_key_value_heads": 4, **({"num_nextn_predict_layers": 0} if request.param == "v3" else {})}
    folder = tmp_path_factory.mktemp(request.param)
    tiny_model(DeepseekMoeConfig.from_dict(fields)).save_pretrained(folder)
    return request.param, fields, tensors_of(folder)


@torch.no_grad()
def logits(model_class, folder):
    model = model_class.from_pretrained(folder).eval()
    config = tiny_config("v3")
    return [model(tiny_ids(config, batch=1, length=length)).logits for length in LENGTHS]


def assert_same(found, expected, bound=2e-5):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=bound)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SETTINGS)
def test_logits_are_those_of_transformers_own_class_and_survive_saving(name, lineage, tmp_path):
    kind, fields, tensors = lineage
    rope = SETTINGS[name]
    if "factor" not in rope and rope["type"] in ("longrope", "proportional") and OLD:
        pytest.skip("transformers' own class needs a factor there")
    # Copied: transformers' classes write into the dictionaries they are given.
    folder = written(tmp_path / "source", fields | {"rope_theta": 5000.0, "rope_scaling": deepcopy(rope)}, tensors)
    found = logits(DeepseekMoeForCausalLM, folder)
    # The bound of test_transformers_parity: float32 and three layers.
    assert_same(found, logits(getattr(transformers, NATIVE[kind]), folder))
    # Not those of another type: what has no effect could not be compared. Some have none within the window.
    plain = written(tmp_path / "plain", fields | {"rope_theta": 5000.0}, tensors)
    same = torch.allclose(found[1], logits(DeepseekMoeForCausalLM, plain)[1], atol=1e-3)
    assert same == (name == "default")

    DeepseekMoeForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    assert_same(logits(DeepseekMoeForCausalLM, tmp_path / "saved"), found, bound=0)
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())["rope_parameters"]
    kept = {key: value for key, value in rope.items() if value is not None and key != "type"}
    assert kept.items() <= saved.items() and saved["rope_type"] == rope["type"]

    native = json.loads((folder / "config.json").read_text())["model_type"]
    if rope["type"] not in ("default", "linear", "dynamic", "yarn"):
        with pytest.raises(CheckpointError, match=f"rope_type='{rope['type']}' cannot be expressed as {native}"):
            convert(tmp_path / "saved", tmp_path / "native", native)
        return
    report = convert(tmp_path / "saved", tmp_path / "native", native)
    assert_same(logits(getattr(transformers, NATIVE[kind]), tmp_path / "native"), found)
    scaling = json.loads((tmp_path / "native" / "config.json").read_text())["rope_scaling"]
    assert (scaling is None) == (name == "default") and kept.items() <= (scaling or {}).items()
    said = [word for word in ("attention_factor=", "truncate=False") if word in " ".join(report.lines())]
    is_set = [
        word
        for word, value in (
            ("attention_factor=", kept.get("attention_factor")),
            ("truncate=False", not kept.get("truncate", True)),
        )
        if value
    ]
    assert said == is_set


@pytest.mark.filterwarnings("ignore")
def test_the_window_and_the_partial_factor_beside_the_rope_settings_mean_a_part_of_them(lineage, tmp_path):
    """As some configs have them, and as transformers reads them."""
    kind, fields, tensors = lineage
    native = getattr(transformers, NATIVE[kind])
    beside = {"rope_scaling": {"type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 16}
    folder = written(tmp_path / "window", fields | beside, tensors)
    found = logits(DeepseekMoeForCausalLM, folder)
    assert_same(found, logits(native, folder))
    inside = fields | {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}}
    assert_same(logits(DeepseekMoeForCausalLM, written(tmp_path / "inside", inside, tensors)), found, bound=0)
    partial = {"rope_scaling": {"type": "proportional", "factor": 1.0}, "partial_rotary_factor": 0.5}
    folder = written(tmp_path / "partial", fields | partial, tensors)
    assert_same(logits(DeepseekMoeForCausalLM, folder), logits(native, folder))
    with pytest.raises(ValueError, match="original_max_position_embeddings=16 contradicts rope_scaling="):
        DeepseekMoeConfig.from_dict({**fields, **beside, "rope_scaling": YARN})


REFUSED = {
    "a key of another type": ({**YARN, "low_freq_factor": 1.0}, "low_freq_factor=1.0 .* not read by rope type 'yarn'"),
    "a key of no type": (
        {**YARN, "finetuned": True},
        "finetuned=True .* not read by rope type 'yarn' .it reads atten",
    ),
    "attention_factor": ({"type": "linear", "factor": 2, "attention_factor": 1.3}, "attention_factor=1.3 .* 'linear'"),
    "truncate": ({**LLAMA3, "truncate": False}, "truncate=False .* not read by rope type 'llama3'"),
    "factor": ({"type": "default", "factor": 4.0}, "factor=4.0 .* not read by rope type 'default' .it reads partial"),
    "a part of the width": (
        {**YARN, "partial_rotary_factor": 0.5},
        "partial_rotary_factor=0.5 .* not the share that latent attention rotates",
    ),
    "the width's own part where transformers would take it twice": (
        {**LLAMA3, "partial_rotary_factor": 1 / 3},
        "partial_rotary_factor=0.33.* not the share that latent attention rotates",
    ),
    "width of more than all": ({"type": "proportional", "partial_rotary_factor": 1.5}, "factor=1.5 .* more than 1"),
    "zero": ({**YARN, "attention_factor": 0}, "attention_factor=0 of the rope settings must be a number above 0"),
    "text": ({**YARN, "mscale": "1.0"}, "mscale='1.0' of the rope settings must be a number"),
    "truth": ({**YARN, "truncate": "no"}, "truncate='no' of the rope settings must be true or false"),
    "a number that is a truth": ({**YARN, "factor": True}, "the factor of rope type 'yarn' is True"),
    "betas": ({**YARN, "beta_fast": 1, "beta_slow": 4}, "beta_slow=4 of the rope settings is larger than beta_fast=1"),
    "nothing to scale by": ({**LONGROPE, "mscale_all_dim": 1.0}, "the factor of rope type 'longrope' is None"),
    "llama3 without a bound": ({"type": "llama3", "factor": 4.0}, "rope type 'llama3' needs low_freq_factor"),
    "llama3 with bounds that are one": (
        {**LLAMA3, "low_freq_factor": 4.0},
        "low_freq_factor=4.0 .* high_freq_factor=4",
    ),
    "longrope without a list": (
        {"type": "longrope", "long_factor": [1.0] * 4},
        "rope type 'longrope' needs short_factor",
    ),
    "other positions": ({**YARN, "max_position_embeddings": 4096}, "=4096 of the rope settings contradicts the conf"),
    "too few pairs": (
        {**LONGROPE, "long_factor": [1.0]},
        "long_factor .* 1 numbers, and the rotary width 8 has 4 pairs",
    ),
    "a pair of zero": ({**LONGROPE, "short_factor": [1.0, 0, 1, 1]}, "short_factor .* not a list of numbers above 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_rotary_setting_that_is_not_read_or_cannot_be_is_refused_by_name(case):
    rope, message = REFUSED[case]
    with pytest.raises(ValueError, match=message) as caught:
        tiny_config("v3", rope_scaling=rope)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["attn_factor", "extrapolation_factor"])
def test_what_other_programs_read_is_kept_and_said_and_not_expressed_as_theirs(name, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("modeling_deepseek_moe.rope_spelling.logger.warning_once", said.append)
    config = tiny_config("v3", rope_scaling={**YARN, name: 0.9}, num_nextn_predict_layers=0)
    assert len(set(said)) == 1 and said[0].startswith(f"{name}=0.9 of the rope settings is not used")
    model = tiny_model(config)
    model.save_pretrained(tmp_path / "model")
    assert DeepseekMoeConfig.from_pretrained(tmp_path / "model").rope_parameters[name] == 0.9
    ids = tiny_ids(config)
    with torch.no_grad():
        without = tiny_model(tiny_config("v3", rope_scaling=YARN, num_nextn_predict_layers=0))
        assert torch.equal(model(ids).logits, without(ids).logits)
    with pytest.raises(
        CheckpointError, match=f"cannot be expressed as deepseek_v3: implementations disagree on {name}"
    ):
        convert(tmp_path / "model", tmp_path / "native", "deepseek_v3")


def test_a_type_that_somebody_registered_reads_what_it_likes(monkeypatch):
    functions = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS
    monkeypatch.setitem(functions, "mine", lambda config, *args, **kwargs: (torch.full((4,), 0.5), 1.0))
    config = tiny_config("v3", rope_scaling={"type": "mine", "anything": [1, 2]})
    assert config.rope_parameters["anything"] == [1, 2]
    with torch.no_grad():
        assert torch.isfinite(tiny_model(config)(tiny_ids(config)).logits).all()
