"""The configuration: every lineage's config.json, impossible values, and what a saved json says."""

import json
import math
import subprocess
import sys
from copy import deepcopy

import pytest
import torch
from tiny import CONFIG_OF_LINEAGE, JSON_OF_LINEAGE, tiny_config, tiny_ids, tiny_model, v1_config, v2_config, v3_config
from transformers import AutoConfig, DeepseekV2Config, DeepseekV3Config, PreTrainedConfig

from modeling_deepseek_moe import DeepseekMoeConfig, DeepseekMoeForCausalLM


def written(folder, **fields) -> str:
    """A folder with a config.json of exactly these fields."""
    (folder / "config.json").write_text(json.dumps(fields))
    return str(folder)


def saved_json(config, folder) -> dict:
    config.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("lineage", JSON_OF_LINEAGE)
def test_the_config_of_every_lineage_is_read_from_its_own_json(lineage, tmp_path):
    fields = JSON_OF_LINEAGE[lineage]
    config = DeepseekMoeConfig.from_pretrained(written(tmp_path, **fields))
    renamed = {"model_type", "architectures", "torch_dtype", "rope_scaling", "rope_theta"}
    assert {name: getattr(config, name) for name in fields.keys() - renamed} == {
        name: value for name, value in fields.items() if name not in renamed
    }
    assert config.model_type == "deepseek_moe"
    assert config.architectures == ["DeepseekMoeForCausalLM"]
    assert config.dtype == torch.float32
    assert config.rope_parameters["rope_theta"] == fields.get("rope_theta", 10000.0)
    assert config.rope_parameters["rope_type"] == ("yarn" if "rope_scaling" in fields else "default")


@pytest.mark.parametrize(
    ("model_type", "defaults"),
    [
        (
            "deepseek",
            {
                "kv_lora_rank": None,
                "topk_method": "greedy",
                "scoring_func": "softmax",
                "norm_topk_prob": False,
                "routed_scaling_factor": 1.0,
                "aux_loss_alpha": 0.001,
                "seq_aux": True,
                "rope_interleave": False,
                "num_nextn_predict_layers": 0,
            },
        ),
        (
            "deepseek_v2",
            {
                "kv_lora_rank": 512,
                "q_lora_rank": 1536,
                "topk_method": "greedy",
                "scoring_func": "softmax",
                "norm_topk_semantics": "deepseek_v2",
                "aux_loss_alpha": 0.001,
                "seq_aux": True,
                "rope_interleave": True,
                "num_nextn_predict_layers": 0,
            },
        ),
        (
            "deepseek_v3",
            {
                "topk_method": "noaux_tc",
                "scoring_func": "sigmoid",
                "norm_topk_prob": True,
                "norm_topk_semantics": "deepseek_v3",
                "n_group": 8,
                "topk_group": 4,
                "routed_scaling_factor": 2.5,
                "aux_loss_alpha": 0.0001,
                "num_nextn_predict_layers": 1,
                "latent_norm_eps": 1e-6,
            },
        ),
    ],
)
def test_fields_a_json_omits_take_the_defaults_of_its_own_generation(model_type, defaults, tmp_path):
    mixture = {"n_routed_experts": 64, "num_experts_per_tok": 6, "moe_intermediate_size": 64}
    config = DeepseekMoeConfig.from_pretrained(written(tmp_path, model_type=model_type, **mixture))
    assert {name: getattr(config, name) for name in defaults} == defaults


def test_a_kimi_json_takes_the_defaults_of_v3(tmp_path):
    kimi = DeepseekMoeConfig.from_pretrained(written(tmp_path, model_type="kimi_k2"))
    v3 = DeepseekMoeConfig.from_pretrained(written(tmp_path, model_type="deepseek_v3"))
    assert kimi.to_dict() == v3.to_dict()


def test_the_latent_norm_epsilon_is_deepseeks_whatever_rms_norm_eps_says():
    """FACTS T9: Moonlight's json says 1e-5, its remote code norms the latents with 1e-6."""
    config = tiny_config("moonlight")
    attention = DeepseekMoeForCausalLM(config).model.layers[0].self_attn
    assert (config.rms_norm_eps, config.latent_norm_eps) == (1e-5, 1e-6)
    assert attention.kv_a_layernorm.variance_epsilon == 1e-6


@pytest.mark.parametrize("lineage", ["v1", "kimi"])
def test_auto_config_knows_the_types_that_transformers_does_not(lineage, tmp_path):
    """FACTS T23; released files also name remote code in `auto_map`, which must not be asked for."""
    remote = {"AutoConfig": "configuration_deepseek.DeepseekConfig"}
    config = AutoConfig.from_pretrained(written(tmp_path, **JSON_OF_LINEAGE[lineage], auto_map=remote))
    assert type(config) is DeepseekMoeConfig
    assert config.to_diff_dict() == tiny_config(lineage).to_diff_dict()
    assert config.auto_map == {}


AUTO_TYPES = """
import sys
from transformers import AutoConfig, AutoModelForCausalLM
from modeling_deepseek_moe import register
names = []
for replace_native in (False, True):
    register(replace_native=replace_native)
    for path in sys.argv[1:]:
        config = AutoConfig.from_pretrained(path)
        names += [type(config).__name__, type(AutoModelForCausalLM.from_config(config)).__name__]
print(*names)
"""


def test_v2_and_v3_stay_transformers_own_until_register_replaces_them(tmp_path):
    folders = []
    for lineage in ("v2", "v3"):
        (tmp_path / lineage).mkdir()
        folders.append(written(tmp_path / lineage, **JSON_OF_LINEAGE[lineage]))
    done = subprocess.run(
        [sys.executable, "-c", AUTO_TYPES, *folders], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    native = ["DeepseekV2Config", "DeepseekV2ForCausalLM", "DeepseekV3Config", "DeepseekV3ForCausalLM"]
    assert done.stdout.split() == native + ["DeepseekMoeConfig", "DeepseekMoeForCausalLM"] * 2


@pytest.mark.parametrize("lineage", ["v1", "v2", "moonlight", "kimi"])
def test_both_rope_spellings_give_equal_models(lineage):
    older = {**JSON_OF_LINEAGE[lineage]}
    scaling = older.pop("rope_scaling", None) or {"type": "default"}
    parameters = {name: value for name, value in scaling.items() if name != "type"}
    parameters |= {"rope_type": scaling["type"], "rope_theta": older.pop("rope_theta", 10000.0)}
    newer_config = DeepseekMoeConfig.from_dict({**older, "rope_parameters": parameters})
    older_config = tiny_config(lineage)
    assert newer_config.to_dict() == older_config.to_dict()
    ids = tiny_ids(older_config)
    with torch.no_grad():
        logits = [tiny_model(config)(ids).logits for config in (older_config, newer_config)]
    assert torch.equal(*logits)


def test_rope_theta_beside_rope_parameters_without_one_is_used():
    config = v3_config(rope_scaling=None, rope_parameters={"rope_type": "default"}, rope_theta=50000)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 50000}


@pytest.mark.parametrize(
    "change",
    [{"rope_theta": 5e5}, {"rope_scaling": None}, {"rope_scaling": {"type": "linear", "factor": 4}}],
    ids=["theta", "no scaling", "other type"],
)
def test_rope_spellings_that_contradict_each_other_are_an_error(change, tmp_path):
    """A saved json has both; editing one of them must not be ignored."""
    fields = saved_json(v3_config(), tmp_path)
    with pytest.raises(ValueError, match=f"{next(iter(change))}=.* contradicts rope_parameters"):
        DeepseekMoeConfig.from_pretrained(written(tmp_path, **{**fields, **change}))


@pytest.mark.parametrize("json_spelling", ["older", "both"])
@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ({"rope_theta": 5e5}, {"rope_theta": 5e5, "rope_type": "yarn"}),
        ({"rope_scaling": None}, {"rope_theta": 10000.0, "rope_type": "default"}),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            {"rope_type": "default", "rope_theta": 5e5},
        ),
    ],
    ids=["rope_theta", "rope_scaling", "rope_parameters"],
)
def test_rope_settings_can_be_overridden_in_either_spelling(json_spelling, override, expected, tmp_path):
    if json_spelling == "older":
        written(tmp_path, **JSON_OF_LINEAGE["v3"])
    else:
        v3_config().save_pretrained(tmp_path)
    rope = DeepseekMoeConfig.from_pretrained(tmp_path, **override).rope_parameters
    assert rope == {**rope, **expected}


def test_an_override_is_checked_and_what_is_derived_from_it_follows(tmp_path):
    v3_config().save_pretrained(tmp_path)
    config = DeepseekMoeConfig.from_pretrained(tmp_path, qk_rope_head_dim=4, num_labels=5)
    assert (config.head_dim, config.qk_head_dim, config.num_labels) == (4, 20, 5)
    with pytest.raises(ValueError, match="topk_group=9 is larger than n_group=4"):
        DeepseekMoeConfig.from_pretrained(tmp_path, topk_group=9)


YARN = JSON_OF_LINEAGE["v3"]["rope_scaling"]
IMPOSSIBLE = [
    (
        {"topk_method": "gready"},
        "topk_method='gready' is not one of 'greedy', 'group_limited_greedy', 'group_limited_top2', 'noaux_tc'",
    ),
    ({"scoring_func": "relu"}, "scoring_func='relu' is not one of 'softmax', 'sigmoid'"),
    ({"norm_topk_semantics": "v3"}, "norm_topk_semantics='v3' is not one of 'deepseek_v2', 'deepseek_v3'"),
    ({"router_dtype": "bf16"}, "router_dtype='bf16' is not one of 'float32', 'model'"),
    ({"hidden_act": "silly"}, "hidden_act='silly' is not one of"),
    ({"topk_group": 9}, "topk_group=9 is larger than n_group=4"),
    ({"n_group": 3}, "n_routed_experts=8 is not divisible into n_group=3 groups"),
    ({"n_group": 0}, "n_group=0"),
    ({"topk_group": 1}, "topk_group=1 of n_group=4 groups leaves 2 experts, fewer than num_experts_per_tok=3"),
    ({"num_experts_per_tok": 0}, "num_experts_per_tok=0 must lie between 1 and n_routed_experts=8"),
    ({"num_experts_per_tok": 9}, "num_experts_per_tok=9 must lie between 1 and n_routed_experts=8"),
    ({"num_experts_per_tok": None}, "num_experts_per_tok=None must lie between 1 and n_routed_experts=8"),
    ({"n_routed_experts": 0}, "n_routed_experts=0 must be at least 1"),
    ({"n_shared_experts": -1}, "n_shared_experts=-1"),
    ({"moe_layer_freq": 0}, "moe_layer_freq=0 must be at least 1"),
    ({"moe_intermediate_size": 0}, "moe_intermediate_size=0 must be at least 1"),
    ({"first_k_dense_replace": -1}, "first_k_dense_replace=-1"),
    ({"num_hidden_layers": 0}, "num_hidden_layers=0 must be at least 1"),
    ({"vocab_size": 0}, "vocab_size=0 must be at least 1"),
    ({"pad_token_id": 96}, "pad_token_id=96 is not a token of vocab_size=96"),
    ({"max_position_embeddings": 0}, "max_position_embeddings=0 must be at least 1"),
    ({"qk_rope_head_dim": 7}, "qk_rope_head_dim=7 is odd"),
    ({"kv_lora_rank": 0}, "kv_lora_rank=0 must be at least 1"),
    ({"q_lora_rank": 0}, "q_lora_rank=0 must be at least 1"),
    ({"v_head_dim": None}, "v_head_dim=None must be at least 1"),
    ({"kv_lora_rank": None, "num_key_value_heads": 3}, "num_key_value_heads=3 does not divide num_attention_heads=4"),
    ({"kv_lora_rank": None, "hidden_size": 30}, "hidden_size=30 is not divisible by num_attention_heads=4"),
    ({"kv_lora_rank": None, "hidden_size": 20}, "hidden_size/num_attention_heads=5 is odd"),
    ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers=-1"),
    ({"aux_loss_alpha": -0.1}, "aux_loss_alpha=-0.1"),
    ({"mtp_loss_weight": -0.1}, "mtp_loss_weight=-0.1"),
    ({"routed_scaling_factor": math.nan}, "routed_scaling_factor=nan"),
    ({"attention_dropout": 1.5}, "attention_dropout=1.5 must lie between 0 and 1"),
    ({"hidden_size": "32"}, "'hidden_size' expected int, got str (value: '32')"),
    ({"norm_topk_prob": "yes"}, "'norm_topk_prob' expected bool, got str (value: 'yes')"),
    ({"rope_scaling": "yarn"}, "rope_scaling='yarn' is not an object"),
    ({"rope_scaling": {"factor": 4}}, "rope_scaling={'factor': 4} has no type; choices: "),
    ({"rope_scaling": {"type": "yern", "factor": 4}}, "rope type 'yern' is not one of 'default', 'linear'"),
    ({"rope_scaling": {"type": "yarn"}}, "the factor of rope type 'yarn' is None"),
    ({"rope_scaling": {**YARN, "factor": 0.5}}, "the factor of rope type 'yarn' is 0.5"),
    ({"rope_scaling": {**YARN, "original_max_position_embeddings": 0}}, "original_max_position_embeddings=0"),
    ({"rope_theta": "10000"}, "rope_theta='10000' must be a number"),
]


@pytest.mark.parametrize(("change", "message"), IMPOSSIBLE, ids=[message[:40] for _, message in IMPOSSIBLE])
def test_an_impossible_value_is_one_error_before_any_weight_is_read(change, message, tmp_path):
    """The folder has no weights at all: had they been looked for first, the error would be another one."""
    written(tmp_path, **{**JSON_OF_LINEAGE["v3"], **change})
    with pytest.raises(ValueError) as caught:
        DeepseekMoeForCausalLM.from_pretrained(tmp_path)
    assert message in str(caught.value)
    assert f"config.json of {tmp_path}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_impossible_value_set_after_construction_is_an_error_when_the_model_is_built():
    config = v3_config()
    config.topk_group = 9
    with pytest.raises(ValueError, match="topk_group=9 is larger than n_group=4"):
        DeepseekMoeForCausalLM(config)


def test_one_expert_a_group_and_absent_groups_are_possible():
    """FACTS T4: transformers' own class raises for both."""
    for config in (v3_config(n_group=8, topk_group=4), v3_config(n_group=None, topk_group=None)):
        with torch.no_grad():
            assert torch.isfinite(tiny_model(config)(tiny_ids(config)).logits).all()


@pytest.mark.parametrize("lineage", CONFIG_OF_LINEAGE)
def test_t22_a_saved_config_reads_back_equal_and_keeps_its_routing_and_yarn(lineage, tmp_path):
    """transformers' own classes lose these fields, and with them what remote code computes.

    Only one spelling of the rotary settings is saved: with both, the Trainer cannot read the json when it resumes.
    """
    config = tiny_config(lineage, seq_aux=False, moe_layer_freq=2)
    fields = saved_json(config, tmp_path)
    expected = JSON_OF_LINEAGE[lineage]
    scaling = dict(expected.get("rope_scaling") or {"type": "default"})
    saved_rope = {"rope_type": scaling.pop("type"), "rope_theta": expected.get("rope_theta", 10000.0), **scaling}
    assert fields["rope_parameters"] == saved_rope
    assert "rope_scaling" not in fields and "rope_theta" not in fields
    assert PreTrainedConfig.from_json_file(tmp_path / "config.json").transformers_version
    for name in ("topk_method", "scoring_func", "norm_topk_prob", "seq_aux", "moe_layer_freq", "aux_loss_alpha"):
        assert fields[name] == getattr(config, name)
    assert "auto_map" not in fields
    assert DeepseekMoeConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


@pytest.mark.parametrize("native_class", [DeepseekV2Config, DeepseekV3Config])
def test_a_json_that_transformers_own_class_saved_means_the_same_here(native_class, tmp_path):
    lineage = {DeepseekV2Config: "v2", DeepseekV3Config: "v3"}[native_class]
    # Copied: transformers' classes write into the dictionaries they are given.
    known = {name: deepcopy(value) for name, value in JSON_OF_LINEAGE[lineage].items() if name != "model_type"}
    native_class(**known, num_key_value_heads=4).save_pretrained(tmp_path)
    native = json.loads((tmp_path / "config.json").read_text())
    assert "rope_scaling" not in native and "rope_theta" not in native
    ours, direct = DeepseekMoeConfig.from_pretrained(tmp_path).to_dict(), tiny_config(lineage).to_dict()
    assert {name: ours[name] for name in direct} == direct


def test_softmax_and_greedy_in_a_v3_json_are_honoured():
    """FACTS T32: transformers' own class would run such a model with sigmoid scores, a bias and groups."""
    config = v3_config(scoring_func="softmax", topk_method="greedy", norm_topk_prob=False, routed_scaling_factor=1.0)
    router = tiny_model(config).model.layers[1].mlp.gate
    hidden_states = torch.randn(5, config.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, weights, chosen = router(hidden_states)
    best = logits.softmax(dim=-1).topk(config.num_experts_per_tok)
    assert not hasattr(router, "e_score_correction_bias")
    # The order of the chosen experts is free (FACTS T30), so both are compared sorted.
    assert torch.equal(chosen.sort().values, best.indices.sort().values)
    torch.testing.assert_close(weights.sort().values, best.values.sort().values)


def test_moe_layers_follow_both_fields_of_the_rule():
    """FACTS T18: layer i routes if i >= first_k_dense_replace and i % moe_layer_freq == 0; so does an MTP layer."""
    config = v3_config(num_hidden_layers=7, num_nextn_predict_layers=2, first_k_dense_replace=2, moe_layer_freq=2)
    assert [i for i in range(7) if config.is_moe_layer(i)] == [2, 4, 6]
    model = DeepseekMoeForCausalLM(config).model
    assert [i for i, layer in enumerate(model.layers) if hasattr(layer.mlp, "gate")] == [2, 4, 6, 8]


def test_a_model_without_routed_experts_is_dense():
    config = v1_config(n_routed_experts=None, num_experts_per_tok=None)
    assert not any(hasattr(layer.mlp, "gate") for layer in DeepseekMoeForCausalLM(config).model.layers)


def test_group_limited_greedy_reads_its_groups_from_the_json():
    router = tiny_model(v2_config()).model.layers[1].mlp.gate
    assert (router.n_group, router.topk_group, router.topk_method) == (4, 2, "group_limited_greedy")
