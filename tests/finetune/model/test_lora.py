"""LoRA words: which weights they adapt, and that stock PEFT saves, loads and merges the result."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import tiny_config, tiny_ids, tiny_model

from modeling_deepseek_moe import DeepseekMoeForSequenceClassification, DeepseekMoeModel
from modeling_deepseek_moe.finetune.model.lora import WORDS, lora_config

ATTENTION = {
    "v1": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "v2": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
    "v3": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
}
MLP = ["gate_proj", "up_proj", "down_proj"]
LINEAGES = list(ATTENTION)

# Both ways of adding B A x, to the output and to the weight, round differently in float32: a few units in the last of
# 24 bits, for logits of about 10 after three layers.
MERGE_TOLERANCE = 1e-4


def expected_weights(lineage: str, word: str, dense=(0,), sparse=(1, 2)) -> set[str]:
    """Base weights a word adapts, written out by hand for the tiny models: one dense layer, then two with experts."""
    leaves = {
        "attention": ([*dense, *sparse], [f"self_attn.{name}.weight" for name in ATTENTION[lineage]]),
        "shared_experts": (sparse, [f"mlp.shared_experts.{name}.weight" for name in MLP]),
        "routed_experts": (sparse, ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
        "dense_mlp": (dense, [f"mlp.{name}.weight" for name in MLP]),
        "router": (sparse, ["mlp.gate.weight"]),
    }
    layers, names = leaves[word]
    return {f"model.layers.{layer}.{name}" for layer in layers for name in names}


def adapted(model, targets, **options) -> PeftModel:
    """`model` with adapters that do something: PEFT starts B at zero."""
    torch.manual_seed(1)
    model = get_peft_model(model, lora_config(model, targets, r=4, lora_alpha=8, **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.05)
    return model.eval()


def changed_by_merging(model, targets, **options) -> set[str]:
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    after = adapted(model, targets, **options).merge_and_unload().state_dict()
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("lineage", LINEAGES)
def test_a_word_adapts_its_weights_and_no_others(lineage, word):
    model = tiny_model(tiny_config(lineage))
    assert changed_by_merging(model, [word]) == expected_weights(lineage, word)


def test_words_add_up_and_all_means_every_word():
    model = tiny_model(tiny_config("v3"))
    several = changed_by_merging(copy.deepcopy(model), ["router", "attention"])
    assert several == expected_weights("v3", "router") | expected_weights("v3", "attention")
    everything = set().union(*(expected_weights("v3", word) for word in WORDS))
    assert changed_by_merging(model, ["all"]) == everything


def test_shared_experts_get_adapters_of_their_own():
    """PEFT rewrites this target to the routed experts for transformers' own DeepSeek classes (peft issue 3711)."""
    model = adapted(tiny_model(tiny_config("v3")), ["shared_experts"])
    shared = model.get_submodule("base_model.model.model.layers.1.mlp.shared_experts")
    assert {"default"} == set(shared.up_proj.lora_A)
    assert not any("mlp.experts" in name for name, _ in model.named_parameters() if "lora_" in name)
    with torch.no_grad():
        tokens = torch.randn(5, model.config.hidden_size)
        on = shared(tokens)
        with model.disable_adapter():
            assert not torch.allclose(on, shared(tokens), atol=1e-3)


def test_every_routed_expert_has_its_own_factors():
    config = tiny_config("v3")
    model = adapted(tiny_model(config), ["routed_experts"])
    experts = model.get_submodule("base_model.model.model.layers.1.mlp.experts")
    assert experts.lora_A["default"].weight.shape == (4 * config.n_routed_experts, config.moe_intermediate_size)
    delta = experts.get_delta_weight("default")
    assert delta.shape == (config.n_routed_experts, config.hidden_size, config.moe_intermediate_size)
    assert (delta.flatten(1).norm(dim=1) > 0).all()


@pytest.mark.parametrize("lineage", LINEAGES)
def test_a_saved_adapter_loads_with_stock_peft(lineage, tmp_path):
    config = tiny_config(lineage)
    model, ids = adapted(tiny_model(config), ["all"]), tiny_ids(config)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model(config), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, atol=MERGE_TOLERANCE, rtol=MERGE_TOLERANCE)
        assert not torch.allclose(again(ids).logits, tiny_model(config)(ids).logits, atol=1e-2)


@pytest.mark.parametrize("lineage", LINEAGES)
def test_merged_and_unmerged_logits_agree(lineage):
    config = tiny_config(lineage)
    model, ids = adapted(tiny_model(config), ["all"]), tiny_ids(config)
    with torch.no_grad():
        unmerged = model(ids).logits
        merged = model.merge_and_unload()(ids).logits
    torch.testing.assert_close(merged, unmerged, atol=MERGE_TOLERANCE, rtol=MERGE_TOLERANCE)


def test_decoding_with_adapters_equals_decoding_merged():
    """Decoding absorbs `kv_b_proj` into queries and outputs: its adapter must not be lost there."""
    config = tiny_config("v3")
    model = adapted(tiny_model(config), ["attention", "routed_experts"])
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ids = tiny_ids(config)
    unmerged = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    merged = model.merge_and_unload().generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(unmerged, merged)


@pytest.mark.parametrize("lineage", LINEAGES)
def test_a_training_step_changes_every_adapter_and_nothing_else(lineage):
    config = tiny_config(lineage)
    model, ids = adapted(tiny_model(config), ["all"]).train(), tiny_ids(config, batch=8, length=24)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if ".lora_" in name}


@pytest.mark.parametrize("weight, layers", [(0.0, {0, 1, 2}), (0.3, {0, 1, 2, 3})], ids=["idle", "trained"])
def test_multi_token_layers_get_adapters_only_if_they_are_trained(weight, layers):
    model = adapted(tiny_model(tiny_config("v3", mtp_loss_weight=weight)), ["all"])
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert {int(name.split(".layers.")[1].split(".")[0]) for name in names} == layers
    assert not any("eh_proj" in name or "lm_head" in name for name in names)


def test_chosen_layers_restrict_stacked_weights_too():
    changed = changed_by_merging(tiny_model(tiny_config("v3")), ["all"], layers_to_transform=[2])
    assert changed and all(name.startswith("model.layers.2.") for name in changed)
    with pytest.raises(ValueError, match="names layer 3: adapters can sit on layers 0 to 2"):
        lora_config(tiny_model(tiny_config("v3")), ["all"], layers_to_transform=[3])


def test_layers_beyond_nine_are_not_confused_with_their_first_digit():
    model = tiny_model(tiny_config("v1", num_hidden_layers=13, first_k_dense_replace=12))
    assert changed_by_merging(model, ["routed_experts"]) == expected_weights("v1", "routed_experts", sparse=(12,))
    model = tiny_model(tiny_config("v1", num_hidden_layers=13, first_k_dense_replace=12))
    assert changed_by_merging(model, ["attention"], layers_to_transform=[1]) == expected_weights(
        "v1", "attention", dense=(1,), sparse=()
    )


def test_the_model_without_head_is_adapted_alike():
    config = tiny_config("v3")
    bare = tiny_model(config, model_class=DeepseekMoeModel)
    words, whole = lora_config(bare, ["all"]), lora_config(tiny_model(config), ["all"])
    assert words.task_type == "FEATURE_EXTRACTION"
    assert (words.target_modules, words.target_parameters) == (whole.target_modules, whole.target_parameters)
    expected = set().union(*(expected_weights("v3", word) for word in WORDS))
    assert changed_by_merging(bare, ["all"]) == {name.removeprefix("model.") for name in expected}


def test_a_classifier_keeps_its_head_trainable():
    model = tiny_model(tiny_config("v3", num_labels=3), model_class=DeepseekMoeForSequenceClassification)
    model = get_peft_model(model, lora_config(model, ["attention"]))
    assert any(
        name.endswith("score.modules_to_save.default.weight")
        for name, p in model.named_parameters()
        if p.requires_grad
    )


def test_an_unknown_word_is_refused_with_the_nearest():
    with pytest.raises(
        ValueError, match="unknown word 'experts'.*attention, shared_experts.*did you mean '.*experts'"
    ):
        lora_config(tiny_model(tiny_config("v3")), ["attention", "experts"])
    with pytest.raises(ValueError, match="targets is empty"):
        lora_config(tiny_model(tiny_config("v3")), [])


def test_a_word_that_matches_nothing_is_refused_unless_it_came_from_all():
    model = tiny_model(tiny_config("v1", first_k_dense_replace=0))
    with pytest.raises(ValueError, match="'dense_mlp' matches nothing in this model"):
        lora_config(model, ["attention", "dense_mlp"])
    expected = set().union(
        *(expected_weights("v1", word, dense=(), sparse=(0, 1, 2)) for word in WORDS if word != "dense_mlp")
    )
    assert changed_by_merging(model, ["all"]) == expected


@pytest.mark.parametrize("option", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_options_that_stacked_weights_cannot_have_are_refused(option):
    model = tiny_model(tiny_config("v3"))
    with pytest.raises(ValueError, match="does not work with routed_experts, router"):
        lora_config(model, ["all"], **option)
    assert lora_config(model, ["attention", "shared_experts"], **option).target_parameters == []


REPLICATION = [(0, 2), (1, 3), (2, 3)]  # layers 0, 1, 1, 2, 2


def adapted_names(model) -> set[str]:
    return {name.partition(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}


def test_replicated_layers_get_adapters_of_their_own_as_from_a_stock_config():
    def base():
        return tiny_model(tiny_config("v3", num_nextn_predict_layers=0))

    modules, stacks = ["o_proj", "shared_experts.up_proj"], ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    stock = get_peft_model(
        base(), LoraConfig(target_modules=modules, target_parameters=stacks, layer_replication=REPLICATION)
    )
    model = adapted(base(), ["all"], layer_replication=REPLICATION)
    expected = {name for name in adapted_names(model) if name.endswith((*modules, ".experts", ".experts.base_layer"))}
    assert adapted_names(stock) == expected
    sources = dict(enumerate([0, 1, 1, 2, 2]))
    of_source = {}
    for name in adapted_names(model):
        layer, leaf = name.split(".layers.")[1].split(".", 1)
        of_source.setdefault(int(layer), set()).add(leaf)
    plain = {}
    for name in adapted_names(adapted(base(), ["all"])):
        layer, leaf = name.split(".layers.")[1].split(".", 1)
        plain.setdefault(int(layer), set()).add(leaf)
    assert of_source == {layer: plain[source] for layer, source in sources.items()}
    ids = tiny_ids(model.config)
    with torch.no_grad():
        logits = model(ids).logits
        model.get_submodule("base_model.model.model.layers.4.mlp.experts").lora_B["default"].weight.zero_()
        assert not torch.allclose(model(ids).logits, logits, atol=1e-3)


def test_layers_to_transform_counts_replicated_layers_as_they_are_afterwards():
    model = tiny_model(tiny_config("v3", num_nextn_predict_layers=0))
    model = adapted(model, ["attention", "routed_experts"], layer_replication=REPLICATION, layers_to_transform=[0, 3])
    assert {name.split(".layers.")[1].split(".")[0] for name in adapted_names(model)} == {"0", "3"}


@pytest.mark.parametrize(
    ("replication", "fields", "message"),
    [
        ([(0, 4)], {}, r"layer_replication names \[0, 4\]: .* pairs .* of the model's 3 layers"),
        ([(2, 2)], {}, r"layer_replication names \[2, 2\]"),
        ([(0, 1, 2)], {}, r"layer_replication names \[0, 1, 2\]"),
        ([(0, 3)], {"mtp_loss_weight": 0.3}, "drops the layers of multi-token prediction, which mtp_loss_weight=0.3"),
    ],
    ids=["beyond the last", "empty", "no pair", "multi-token"],
)
def test_a_replication_that_cannot_be_is_refused(replication, fields, message):
    with pytest.raises(ValueError, match=message):
        lora_config(tiny_model(tiny_config("v3", **fields)), ["attention"], layer_replication=replication)


def test_a_start_that_changes_shared_weights_is_refused():
    with pytest.raises(ValueError, match="'olora' changes the base weights, and layer_replication shares them"):
        lora_config(
            tiny_model(tiny_config("v3")), ["attention"], layer_replication=[(0, 3)], init_lora_weights="olora"
        )


def test_classes_whose_targets_peft_rewrites_are_refused():
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 8}
    native = DeepseekV3ForCausalLM(DeepseekV3Config(**sizes, num_key_value_heads=2, intermediate_size=16))
    with pytest.raises(ValueError, match="'deepseek_v3'.*DeepseekMoeForCausalLM.from_pretrained"):
        lora_config(native, ["shared_experts"])
