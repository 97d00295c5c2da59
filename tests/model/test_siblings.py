"""Float32 parity with transformers' own classes of the sibling families (tests/fixtures/siblings/README.md)."""

import json

import pytest
import torch
import transformers
from peft import get_peft_model
from places import SIBLINGS
from safetensors.torch import load_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from modeling_deepseek_moe import DeepseekMoeForCausalLM, attention
from modeling_deepseek_moe.finetune.model.lora import lora_config
from modeling_deepseek_moe.parts import WORDS, part_of

FOLDERS = sorted(path.name for path in SIBLINGS.iterdir() if path.is_dir())
# Another order of float32 sums; logits reach 4.
TOLERANCE = 2e-5


@pytest.fixture(params=FOLDERS)
def sibling(request):
    folder = SIBLINGS / request.param
    return folder, load_file(folder / "expected.safetensors")


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def native_class_of(folder):
    """Transformers' own model of a folder's type; skips where the installed release has none."""
    fields = json.loads((folder / "config.json").read_text())
    if fields["model_type"] not in CONFIG_MAPPING_NAMES:
        pytest.skip(f"the installed transformers has no {fields['model_type']}")
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(fields["model_type"], fields["architectures"][0])
    return getattr(transformers, name)


@torch.no_grad()
def without_ties(model, expected: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits that decoding has to give; of a model with an indexer, after every second head became another's
    negative.

    All four scores of a token can be cut to exactly 0. Among equal sums `topk` chooses by the length of the row, in
    the family's own class as here; where one of two heads is always positive no sums are equal.
    """
    if model.config.index_topk is None:
        return expected["logits"]
    for layer in model.model.layers:
        heads = layer.self_attn.indexer.wq_b.weight.unflatten(0, (model.config.index_n_heads, -1))
        heads[1::2] = -heads[0::2]
    return model(expected["input_ids"], use_cache=False).logits


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "sorted_mm"])
@torch.no_grad()
def test_logits_and_hidden_states_are_those_of_the_familys_own_class(sibling, implementation, experts):
    folder, expected = sibling
    model = DeepseekMoeForCausalLM.from_pretrained(
        folder, attn_implementation=implementation, experts_implementation=experts
    )
    outputs = model(expected["input_ids"], output_hidden_states=True)
    close(outputs.logits, expected["logits"])
    for index, states in enumerate(outputs.hidden_states):
        close(states, expected[f"hidden_states.{index}"])


@pytest.mark.parametrize("name", ["auto", "flex_attention"])
@torch.no_grad()
def test_other_attention_names_compute_the_same_or_are_refused_where_an_indexer_chooses(sibling, name):
    folder, expected = sibling
    model = DeepseekMoeForCausalLM.from_pretrained(folder, attn_implementation="eager")
    if name == "flex_attention" and model.config.index_topk is not None:
        with pytest.raises(ValueError, match="cannot leave out the tokens that the indexer did not choose"):
            model.set_attn_implementation(name)
            model(expected["input_ids"])
        return
    grouped = model.config.num_key_value_heads != model.config.num_attention_heads
    if name == "flex_attention" and grouped and torch.backends.cpu.get_cpu_capability() == "AVX2":
        pytest.skip("torch 2.13's flex_attention is wrong for grouped queries without AVX-512, in all models")
    model.set_attn_implementation(name)
    close(model(expected["input_ids"]).logits, expected["logits"])


@pytest.mark.parametrize("word", WORDS)
def test_every_word_of_lora_names_its_part_of_a_family_or_says_that_there_is_none(sibling, word):
    folder, _ = sibling
    with torch.device("meta"):
        model = DeepseekMoeForCausalLM(DeepseekMoeForCausalLM.config_class.from_pretrained(folder))
    if word == "dense_mlp" and not any(".mlp.gate_proj" in name for name, _ in model.named_modules()):
        with pytest.raises(ValueError, match="'dense_mlp' matches nothing in this model"):
            lora_config(model, targets=[word])
        return
    adapted = get_peft_model(model, lora_config(model, targets=[word], r=2))
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert trained and {part_of(name) for name in trained} == {word}
    assert not any(".indexer." in name for name in trained)


@pytest.mark.parametrize(
    "split",
    [(1,) * 40, (39, 1), (7, 1, 12, 3, 17), (20, 20)],
    ids=["token by token", "prefill and one", "uneven pieces", "two halves"],
)
@pytest.mark.parametrize("form", ["by_count", "absorbed", "expanded"])
@torch.no_grad()
def test_decoding_in_any_split_equals_the_full_forward_in_either_form(sibling, split, form, monkeypatch):
    folder, expected = sibling
    if form != "by_count":
        monkeypatch.setattr(attention, "absorbed_is_cheaper", lambda *_: form == "absorbed")
    model = DeepseekMoeForCausalLM.from_pretrained(folder)
    wanted = without_ties(model, expected)
    cache, pieces = None, []
    for piece in expected["input_ids"].split(split, dim=1):
        outputs = model(piece, past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        pieces.append(outputs.logits)
    close(torch.cat(pieces, dim=1), wanted)


@pytest.mark.parametrize("cache", ["dynamic", "static", None])
@torch.no_grad()
def test_greedy_tokens_are_those_of_the_familys_own_class(sibling, cache):
    folder, expected = sibling
    model = DeepseekMoeForCausalLM.from_pretrained(folder)
    prompt = expected["input_ids"][:, :20]
    options = {"use_cache": False} if cache is None else {"cache_implementation": cache}
    tokens = model.generate(prompt, max_new_tokens=16, do_sample=False, **options)
    assert torch.equal(tokens[:, 20:], expected["greedy"])


@torch.no_grad()
def test_padding_on_the_left_changes_no_token(sibling):
    folder, expected = sibling
    model = DeepseekMoeForCausalLM.from_pretrained(folder)
    without_ties(model, expected)
    prompt = expected["input_ids"][:, :20]
    plain = model.generate(prompt, max_new_tokens=16, do_sample=False)
    mask = torch.nn.functional.pad(torch.ones_like(prompt), (5, 0))
    padded = torch.nn.functional.pad(prompt, (5, 0))
    tokens = model.generate(padded, attention_mask=mask, max_new_tokens=16, do_sample=False, pad_token_id=0)
    assert torch.equal(tokens[:, 25:], plain[:, 20:])


@torch.no_grad()
def test_packed_documents_do_not_see_each_other(sibling):
    folder, expected = sibling
    model = DeepseekMoeForCausalLM.from_pretrained(folder)
    without_ties(model, expected)
    first, second = expected["input_ids"][0, :30], expected["input_ids"][1, :25]
    packed = torch.cat((first, second))[None]
    positions = torch.cat((torch.arange(30), torch.arange(25)))[None]
    logits = model(packed, position_ids=positions, use_cache=False).logits[0]
    close(logits[:30], model(first[None]).logits[0])
    close(logits[30:], model(second[None]).logits[0])


def test_loss_and_gradients_are_those_of_the_familys_own_class(sibling):
    folder, expected = sibling
    if "train.lm_loss" not in expected:
        pytest.skip("no gradients were computed for this family: its indexer's choice makes them jump")
    model = DeepseekMoeForCausalLM.from_pretrained(folder, aux_loss_alpha=0.0).train()
    outputs = model(expected["input_ids"], labels=expected["input_ids"])
    outputs.loss.backward()
    close(outputs.loss, expected["train.lm_loss"].squeeze(), 1e-6)
    parameters = dict(model.named_parameters())
    names = [name for name in expected if name.startswith("train.grad.")]
    assert names
    for name in names:
        gradient, wanted = parameters[name.removeprefix("train.grad.")].grad, expected[name]
        assert (gradient - wanted).norm() <= 1e-4 * wanted.norm(), name


def test_a_saved_copy_is_the_familys_own_bit_for_bit(sibling, tmp_path):
    folder, _ = sibling
    DeepseekMoeForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    saved, original = load_file(tmp_path / "model.safetensors"), load_file(folder / "model.safetensors")
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[name], original[name]) for name in original)
    ours, theirs = (json.loads((path / "config.json").read_text()) for path in (tmp_path, folder))
    assert ours["model_type"] == theirs["model_type"]
    again = DeepseekMoeForCausalLM.from_pretrained(tmp_path)
    first = DeepseekMoeForCausalLM.from_pretrained(folder)
    differing = {
        name
        for name, value in again.config.to_dict().items()
        if value != first.config.to_dict().get(name) and name not in ("_name_or_path", "transformers_version")
    }
    assert not differing


@torch.no_grad()
def test_the_familys_own_class_reads_what_is_saved_and_gives_the_same_numbers(sibling, tmp_path):
    folder, expected = sibling
    native = native_class_of(folder)
    DeepseekMoeForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    config = CONFIG_MAPPING[json.loads((folder / "config.json").read_text())["model_type"]].from_pretrained(tmp_path)
    model = native.from_pretrained(tmp_path, config=config, attn_implementation="eager")
    close(model(expected["input_ids"]).logits, expected["logits"])


@torch.no_grad()
def test_a_family_of_one_entry_computes_what_its_own_class_does(tmp_path):
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 56, "moe_intermediate_size": 12, "head_dim": 8}
    config = transformers.Dots1Config(
        **sizes,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        n_routed_experts=16,
        n_shared_experts=1,
        num_experts_per_tok=4,
        first_k_dense_replace=1,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        sliding_window=None,
        initializer_range=0.15,
    )
    torch.manual_seed(0)
    native = transformers.Dots1ForCausalLM(config).eval()
    for layer in native.model.layers[1:]:
        layer.mlp.gate.e_score_correction_bias.normal_(std=0.1)
    native.save_pretrained(tmp_path / "native")
    model = DeepseekMoeForCausalLM.from_pretrained(tmp_path / "native")
    input_ids = torch.randint(61, (2, 40), generator=torch.Generator().manual_seed(1))
    close(model(input_ids).logits, native(input_ids).logits)
    model.save_pretrained(tmp_path / "ours")
    close(transformers.Dots1ForCausalLM.from_pretrained(tmp_path / "ours")(input_ids).logits, native(input_ids).logits)
    saved, original = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "native"))
    assert saved.keys() == original.keys() and all(torch.equal(saved[name], original[name]) for name in saved)
    with pytest.raises(ValueError, match="layer_types='sliding_attention' of a dots1 is not 'full_attention'"):
        transformers.Dots1Config(**config.to_dict() | {"layer_types": ["sliding_attention"] * 3}).save_pretrained(
            tmp_path / "sliding"
        )
        DeepseekMoeForCausalLM.config_class.from_pretrained(tmp_path / "sliding")


def test_three_steps_of_adamw_leave_the_weights_of_the_familys_own_class(sibling, tmp_path):
    folder, expected = sibling
    native = native_class_of(folder)
    models = [
        DeepseekMoeForCausalLM.from_pretrained(folder, aux_loss_alpha=0.0, attn_implementation="eager"),
        native.from_pretrained(folder, attn_implementation="eager"),
    ]
    for model in models:
        trained = [p for name, p in model.named_parameters() if ".indexer." not in name]
        # A gradient of rounding alone has any sign, and AdamW makes a whole step of it; a larger eps does not.
        optimizer = torch.optim.AdamW(trained, lr=1e-4, eps=1e-6)
        model.train()
        for _ in range(3):
            optimizer.zero_grad()
            model(expected["input_ids"], labels=expected["input_ids"]).loss.backward()
            optimizer.step()
    ours, theirs = (dict(model.named_parameters()) for model in models)
    for name, weight in ours.items():
        torch.testing.assert_close(
            weight, theirs[name].to(weight.dtype), rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
