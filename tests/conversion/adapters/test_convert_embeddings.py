"""LoRA on embedding and head, whole copies of them, and tied weights: merged as PEFT computes with them."""

import json

import pytest
import torch
from adapted_pair import randomize
from adapter_folders import edit_json, edit_tensors, json_of
from checkpoint_folders import assert_bit_equal, tensors_of
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import tiny_ids, tiny_model, v3_config

from modeling_deepseek_moe import CheckpointError, DeepseekMoeForCausalLM
from modeling_deepseek_moe.conversion import convert

# float32: the same sums in another order, through three layers; relative to the largest logit.
SAME = 1e-5
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
MTP_EMBEDDING, MTP_HEAD = "model.layers.3.embed_tokens.weight", "model.layers.3.shared_head.head.weight"
pytestmark = pytest.mark.filterwarnings("ignore")

CASES = {
    "both": {"target_modules": ["embed_tokens", "lm_head", "q_b_proj"]},
    "head": {"target_modules": ["lm_head", "o_proj"]},
    "embedding": {"target_modules": ["embed_tokens", "o_proj"]},
    "embedding, patterns": {
        "target_modules": ["embed_tokens", "lm_head"],
        "rank_pattern": {"embed_tokens": 2},
        "alpha_pattern": {"lm_head": 5},
        "use_rslora": True,
    },
    "embedding as a copy": {"target_modules": ["o_proj"], "modules_to_save": ["embed_tokens"]},
    "head as a copy": {"target_modules": ["o_proj"], "modules_to_save": ["lm_head"]},
    "both as copies": {"target_modules": ["o_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "embedding, head as a copy": {"target_modules": ["embed_tokens"], "modules_to_save": ["lm_head"]},
}
TYING = {"ensure_weight_tying": True}
TIED_CASES = CASES | {
    "embedding, kept tied": CASES["embedding"] | TYING,
    "head, kept tied": CASES["head"] | TYING,
    "both, kept tied": CASES["both"] | TYING,
    "embedding as a copy, kept tied": CASES["embedding as a copy"] | TYING,
    "both as copies, kept tied": CASES["both as copies"] | TYING,
}


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def base(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_model(v3_config(tie_word_embeddings=request.param)).save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(model):
    return model.eval()(tiny_ids(model.config)).logits


def load(folder, **options):
    return DeepseekMoeForCausalLM.from_pretrained(folder, **options)


def is_tied(folder) -> bool:
    return json.loads((folder / "config.json").read_text())["tie_word_embeddings"]


def adapted(base, dtype=torch.float32, **options):
    model = load(base, dtype=dtype)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **options))
    randomize(model, seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(1.5)
    return model


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=SAME * float(expected.abs().max()))


@pytest.mark.parametrize("with_base", ["auto", False], ids=["with base layers", "bare"])
@pytest.mark.parametrize("name", TIED_CASES)
def test_a_merged_checkpoint_computes_what_the_adapted_model_does(name, with_base, base, tmp_path):
    if name not in CASES and not is_tied(base):
        pytest.skip("there is nothing to keep tied")
    model = adapted(base, **TIED_CASES[name])
    expected = logits(model)
    assert not torch.allclose(expected, logits(load(base)), atol=0.1)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=with_base)
    assert_same(logits(PeftModel.from_pretrained(load(base), tmp_path / "adapter")), expected)
    for to in ("plain", "deepseek_v3"):
        convert(base, tmp_path / to, to, adapter=tmp_path / "adapter", verify=True)
        assert_same(logits(load(tmp_path / to)), expected)
    # Where both are changed alike they stay one weight; PEFT adds to it twice.
    stays = is_tied(base) and "kept tied" in name and "cop" not in name
    assert is_tied(tmp_path / "plain") == stays
    tensors = tensors_of(tmp_path / "plain")
    assert (HEAD in tensors) == (not stays)
    assert torch.equal(tensors[MTP_EMBEDDING], tensors[EMBEDDING])
    assert torch.equal(tensors[MTP_HEAD], tensors.get(HEAD, tensors[EMBEDDING]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_merged_weights_are_those_of_merge_and_unload_to_the_bit(name, dtype, base, tmp_path):
    tied = is_tied(base)
    if tied and set(CASES[name]["target_modules"]) & {"embed_tokens", "lm_head"}:
        pytest.skip("merge_and_unload changes both ends of a tied weight, and warns of it")
    adapted(base, dtype, **CASES[name]).save_pretrained(tmp_path / "adapter")
    stock = PeftModel.from_pretrained(load(base, dtype=dtype), tmp_path / "adapter").merge_and_unload()
    stock.save_pretrained(tmp_path / "stock")
    convert(base, tmp_path / "base", "deepseek_v3", dtype=str(dtype).removeprefix("torch."))
    convert(tmp_path / "base", tmp_path / "merged", "plain", adapter=tmp_path / "adapter", verify=True)
    assert_bit_equal(tensors_of(tmp_path / "merged"), tensors_of(tmp_path / "stock"))


def test_what_was_saved_in_a_wider_type_is_rounded_to_that_of_the_base(tmp_path):
    """As PEFT does: it loads whole tensors into the model, in the model's type."""
    folder = tmp_path / "half"
    tiny_model(v3_config()).to(torch.bfloat16).save_pretrained(folder)
    options = {"target_modules": ["embed_tokens"], "modules_to_save": ["lm_head"]}
    adapted(folder, torch.float32, **options).save_pretrained(tmp_path / "adapter")
    stock = PeftModel.from_pretrained(load(folder, dtype="auto"), tmp_path / "adapter").merge_and_unload()
    stock.save_pretrained(tmp_path / "stock")
    convert(folder, tmp_path / "merged", "plain", adapter=tmp_path / "adapter", verify=True)
    assert_bit_equal(tensors_of(tmp_path / "merged"), tensors_of(tmp_path / "stock"))
    convert(folder, tmp_path / "wide", "deepseek_v3", dtype="float32", adapter=tmp_path / "adapter", verify=True)
    saved = tensors_of(tmp_path / "adapter")["base_model.model.lm_head.weight"]
    assert torch.equal(tensors_of(tmp_path / "wide")[HEAD], saved)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_base_that_was_changed_before_the_adapter_is_taken_along(tied, tmp_path):
    """PEFT saves the embedding and the head that it adapts, and loads them into the model first."""
    tiny_model(v3_config(tie_word_embeddings=tied)).save_pretrained(tmp_path / "base")
    model = adapted(tmp_path / "base", target_modules=["embed_tokens", "o_proj"])
    with torch.no_grad():
        model.get_input_embeddings().base_layer.weight.mul_(1.2)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "adapter")
    assert_same(logits(again), logits(model))
    convert(tmp_path / "base", tmp_path / "merged", "plain", adapter=tmp_path / "adapter", verify=True)
    assert_same(logits(load(tmp_path / "merged")), logits(model))


def test_an_embedding_that_is_saved_though_nothing_adapts_it_replaces_the_bases(base, tmp_path):
    model = adapted(base, target_modules=["o_proj"])
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.2)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    convert(base, tmp_path / "merged", "plain", adapter=tmp_path / "adapter", verify=True)
    assert is_tied(tmp_path / "merged") == is_tied(base)
    assert_same(logits(load(tmp_path / "merged")), logits(model))


def test_modules_are_chosen_among_them_by_name(base, tmp_path):
    adapted(base, **CASES["both"]).save_pretrained(tmp_path / "adapter")
    convert(base, tmp_path / "merged", "plain", adapter=tmp_path / "adapter", only=["q_b_proj"])
    before, after = tensors_of(base), tensors_of(tmp_path / "merged")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and changed
    assert all(name.endswith("q_b_proj.weight") for name in changed)
    convert(base, tmp_path / "head", "plain", adapter=tmp_path / "adapter", only=["lm_head"])
    after = tensors_of(tmp_path / "head")
    assert torch.equal(after[EMBEDDING], before[EMBEDDING])
    assert not torch.equal(after[HEAD], before.get(HEAD, before[EMBEDDING]))


def test_a_stacked_adapter_keeps_them_and_servers_are_not_given_them(base, tmp_path):
    model = adapted(base, **CASES["embedding"])
    model.save_pretrained(tmp_path / "adapter")
    convert(tmp_path / "adapter", tmp_path / "same", "peft", verify=True)
    assert_bit_equal(tensors_of(tmp_path / "same"), tensors_of(tmp_path / "adapter"))
    assert "model.embed_tokens" in json_of(tmp_path / "same")["target_modules"]
    assert_same(logits(PeftModel.from_pretrained(load(base), tmp_path / "same")), logits(model))
    with pytest.raises(CheckpointError, match="embed_tokens.weight is a whole tensor .*merge it into its base"):
        convert(tmp_path / "adapter", tmp_path / "experts", "peft-per-expert")
    model.save_pretrained(tmp_path / "bare", save_embedding_layers=False)
    with pytest.raises(CheckpointError, match="lora_embedding_A adapts the embedding, .*merge it into its base"):
        convert(tmp_path / "bare", tmp_path / "experts", "peft-per-expert")


ROOT = "base_model.model."
EMBEDDED = f"{ROOT}model.embed_tokens"
BROKEN = {
    "an embedding called like a linear layer": (
        lambda tensors: tensors.update({f"{EMBEDDED}.lora_A.weight": tensors.pop(f"{EMBEDDED}.lora_embedding_A")}),
        r"embed_tokens.lora_A.weight is not called as an embedding's factors are",
    ),
    "a linear layer called like an embedding": (
        lambda tensors: tensors.update(
            {f"{ROOT}lm_head.lora_embedding_B": tensors.pop(f"{ROOT}lm_head.lora_B.weight")}
        ),
        r"lm_head.lora_embedding_B is not called as a linear layer's",
    ),
    "one whole tensor twice": (
        lambda tensors: tensors.update({f"{EMBEDDED}.weight": tensors[f"{EMBEDDED}.base_layer.weight"].clone()}),
        r"embed_tokens.base_layer.weight and .*embed_tokens.weight are both model.embed_tokens.weight",
    ),
    "no second factor": (lambda tensors: tensors.pop(f"{EMBEDDED}.lora_embedding_B"), "lora_embedding_A has no B"),
    "another vocabulary": (
        lambda tensors: tensors.update({f"{EMBEDDED}.lora_embedding_A": torch.ones(4, 97)}),
        r"make \[97, 32\], but model.embed_tokens.weight is \[96, 32\]",
    ),
    "a base layer of something else": (
        lambda tensors: tensors.update({f"{ROOT}model.norm.base_layer.weight": torch.ones(32)}),
        "norm.base_layer.weight is neither a LoRA factor nor",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_does_not_fit_is_one_line(case, base, tmp_path):
    change, message = BROKEN[case]
    adapted(base, **CASES["both"]).save_pretrained(tmp_path / "adapter")
    edit_tensors(tmp_path / "adapter", change)
    with pytest.raises(CheckpointError, match=message) as caught:
        convert(base, tmp_path / "merged", "plain", adapter=tmp_path / "adapter")
    assert "\n" not in str(caught.value) and not (tmp_path / "merged").exists()


def test_trained_rows_of_an_embedding_are_refused_by_the_field_that_names_them(base, tmp_path):
    adapted(base, **CASES["head"]).save_pretrained(tmp_path / "adapter")
    edit_json(tmp_path / "adapter", trainable_token_indices=[1, 2])
    with pytest.raises(CheckpointError, match=r"trainable_token_indices=\[1, 2\] is not read"):
        convert(base, tmp_path / "merged", "plain", adapter=tmp_path / "adapter")
