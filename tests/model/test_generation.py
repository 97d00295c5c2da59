"""Inference through transformers: padding, packing, caches, and every way of `generate`.

All models are float32 with logits of order one to ten. Two orders of the same sums differ by a few float32 roundings
a layer, so logits are compared within 2e-5, the bound golden parity uses too; generated tokens exactly.
"""

import functools

import pytest
import torch
from tiny import tiny_config, tiny_ids, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import DynamicCache, PreTrainedTokenizerFast, StaticCache, pipeline

from modeling_deepseek_moe.absorption import absorbed_is_cheaper

ATOL = 2e-5
PAD = 2
LINEAGES = ["v1", "v2", "v3"]
# A wide latent space: a chunk of a prompt is cheaper to expand, a single token cheaper to absorb.
WIDE_LATENT = {"kv_lora_rank": 64, "qk_nope_head_dim": 8, "v_head_dim": 8}


@functools.cache
def model_of(lineage: str, attention: str = "sdpa", seed: int = 0, wide: bool = False):
    """A shared tiny model without an end token, so that all generations have the length asked for."""
    overrides = WIDE_LATENT if wide else {}
    model = tiny_model(tiny_config(lineage, eos_token_id=None, pad_token_id=PAD, **overrides), seed)
    model.set_attn_implementation(attention)
    return model


def left_padded(config, lengths=(7, 11)) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(lengths)
    ids = tiny_ids(config, batch=len(lengths), length=width)
    mask = torch.stack([(torch.arange(width) >= width - length).long() for length in lengths])
    return ids.masked_fill(mask == 0, PAD), mask


def positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(-1) - 1).clamp_min(0)


@torch.no_grad()
def recomputed_greedy(model, ids: torch.Tensor, mask: torch.Tensor, steps: int) -> torch.Tensor:
    """Greedy decoding that runs the whole sequence again for every token, without a cache."""
    for _ in range(steps):
        logits = model(ids, attention_mask=mask, position_ids=positions(mask), use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return ids


def greedy(model, ids, mask=None, steps: int = 12, **options) -> torch.Tensor:
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, max_new_tokens=steps, do_sample=False, **options)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("lineage", LINEAGES)
def test_greedy_generation_with_left_padding_equals_recomputing_without_cache(lineage, attention):
    model = model_of(lineage, attention)
    ids, mask = left_padded(model.config)
    assert torch.equal(greedy(model, ids, mask), recomputed_greedy(model, ids, mask, 12))


@pytest.mark.parametrize("lineage", LINEAGES)
def test_a_left_padded_row_generates_what_it_generates_alone(lineage):
    model = model_of(lineage)
    ids, mask = left_padded(model.config)
    together = greedy(model, ids, mask)
    for row in range(len(ids)):
        prompt = ids[row, mask[row].bool()].unsqueeze(0)
        assert torch.equal(together[row, ids.shape[1] :], greedy(model, prompt)[0, prompt.shape[1] :])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("lineage", LINEAGES)
@torch.no_grad()
def test_padding_on_either_side_leaves_the_logits_of_real_tokens_alone(lineage, side, attention):
    model = model_of(lineage, attention)
    ids, mask = left_padded(model.config)
    if side == "right":
        ids, mask = ids.flip(1), mask.flip(1)
    together = model(ids, attention_mask=mask, position_ids=positions(mask)).logits
    for row in range(len(ids)):
        real = mask[row].bool()
        alone = model(ids[row, real].unsqueeze(0)).logits[0]
        torch.testing.assert_close(together[row, real], alone, atol=ATOL, rtol=0)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("lineage", LINEAGES)
@torch.no_grad()
def test_packed_sequences_do_not_see_each_other(lineage, attention):
    model = model_of(lineage, attention)
    lengths = (5, 1, 7)
    ids = tiny_ids(model.config, batch=1, length=sum(lengths))
    position_ids = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
    packed = model(ids, position_ids=position_ids, use_cache=False).logits
    alone = [model(part).logits for part in ids.split(lengths, dim=1)]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), atol=ATOL, rtol=0)


@pytest.mark.parametrize("lineage", LINEAGES)
@torch.no_grad()
def test_eager_and_sdpa_attention_agree(lineage):
    eager, sdpa = model_of(lineage, "eager"), model_of(lineage, "sdpa")
    ids, mask = left_padded(eager.config)
    real = mask.bool()
    torch.testing.assert_close(
        eager(ids, attention_mask=mask).logits[real], sdpa(ids, attention_mask=mask).logits[real], atol=ATOL, rtol=0
    )


@pytest.fixture
def fresh_compiler():
    """flex_attention is compiled for each shape; a second shape in one process would ask for dynamic ones."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize("lineage", ["v1", "v3"])
@torch.no_grad()
def test_flex_attention_agrees_with_sdpa_on_padded_prompts(lineage, fresh_compiler):
    flex, sdpa = model_of(lineage, "flex_attention"), model_of(lineage, "sdpa")
    ids, mask = left_padded(flex.config)
    real = mask.bool()
    torch.testing.assert_close(
        flex(ids, attention_mask=mask).logits[real], sdpa(ids, attention_mask=mask).logits[real], atol=ATOL, rtol=0
    )
    # Plain attention decodes through flex_attention, which torch 2.13 cannot compile for growing lengths on CPU.
    if lineage == "v3":
        assert torch.equal(greedy(flex, ids, mask), greedy(sdpa, ids, mask))


@pytest.mark.slow
@torch.no_grad()
def test_flex_attention_keeps_packed_sequences_apart(fresh_compiler):
    flex, sdpa = model_of("v3", "flex_attention"), model_of("v3", "sdpa")
    ids = tiny_ids(flex.config, batch=1, length=13)
    position_ids = torch.cat([torch.arange(length) for length in (5, 1, 7)]).unsqueeze(0)
    packed = [model(ids, position_ids=position_ids, use_cache=False).logits for model in (flex, sdpa)]
    torch.testing.assert_close(*packed, atol=ATOL, rtol=0)


@pytest.mark.parametrize("lineage", LINEAGES)
def test_beam_search_with_the_cache_equals_beam_search_without(lineage):
    model = model_of(lineage)
    ids, mask = left_padded(model.config)
    beams = {"num_beams": 3, "num_return_sequences": 2}
    with_cache = greedy(model, ids, mask, **beams)
    assert with_cache.shape == (4, ids.shape[1] + 12)
    assert torch.equal(with_cache, greedy(model, ids, mask, use_cache=False, **beams))
    assert not torch.equal(with_cache[::2], greedy(model, ids, mask)), "beams that always equal greedy test nothing"


@pytest.mark.parametrize("options", [{"num_return_sequences": 3}, {"num_beams": 2}], ids=["samples", "beam samples"])
@pytest.mark.parametrize("lineage", LINEAGES)
def test_sampling_with_the_cache_equals_sampling_without(lineage, options):
    model = model_of(lineage)
    ids, mask = left_padded(model.config)
    draws = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        draws.append(
            model.generate(
                ids, attention_mask=mask, max_new_tokens=8, do_sample=True, top_k=20, use_cache=use_cache, **options
            )
        )
    assert torch.equal(*draws)


@pytest.mark.parametrize("lineage", LINEAGES)
def test_assisted_decoding_and_prompt_lookup_equal_greedy(lineage):
    model, assistant = model_of(lineage), model_of(lineage, seed=1)
    # A prompt that repeats itself gives prompt lookup something to find.
    ids = tiny_ids(model.config, batch=1, length=5).repeat(1, 3)
    expected = greedy(model, ids, steps=16)
    assert torch.equal(greedy(model, ids, steps=16, assistant_model=assistant), expected)
    assert torch.equal(greedy(model, ids, steps=16, assistant_model=model), expected)
    assert torch.equal(greedy(model, ids, steps=16, prompt_lookup_num_tokens=3), expected)


@pytest.mark.parametrize("lineage", LINEAGES)
def test_a_static_cache_generates_what_a_dynamic_one_does(lineage):
    model = model_of(lineage)
    ids, mask = left_padded(model.config)
    static = greedy(model, ids, mask, cache_implementation="static")
    assert torch.equal(static, greedy(model, ids, mask))


@pytest.mark.parametrize(
    "lineage, wide",
    [("v1", False), ("v2", False), ("v3", False), ("v2", True), ("v3", True)],
    ids=["v1", "v2 absorbs chunks", "v3 absorbs chunks", "v2 expands chunks", "v3 expands chunks"],
)
@torch.no_grad()
def test_t26_any_split_into_prefill_chunks_and_steps_gives_the_logits_of_one_pass(lineage, wide):
    model = model_of(lineage, wide=wide)
    if lineage != "v1":
        assert absorbed_is_cheaper(model.config, 5, 8) is not wide
        assert absorbed_is_cheaper(model.config, 1, 8)
    ids = tiny_ids(model.config, length=12)
    whole = model(ids, use_cache=False).logits
    for split in ([12], [1] * 12, [5, 1, 1, 5], [3, 5, 4], [11, 1], [1, 11], [2, 2, 2, 2, 2, 2]):
        for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=20)):
            parts = [model(part, past_key_values=cache).logits for part in ids.split(split, dim=1)]
            case = f"{type(cache).__name__}, split {split}"
            torch.testing.assert_close(
                torch.cat(parts, dim=1), whole, atol=ATOL, rtol=0, msg=lambda m, case=case: f"{case}: {m}"
            )


@pytest.mark.parametrize("lineage", LINEAGES)
@torch.no_grad()
def test_prefill_in_chunks_with_left_padding_generates_the_same(lineage):
    model = model_of(lineage)
    ids, mask = left_padded(model.config)
    assert torch.equal(greedy(model, ids, mask, prefill_chunk_size=4), greedy(model, ids, mask))


@pytest.mark.parametrize("lineage", LINEAGES)
@torch.no_grad()
def test_a_cropped_cache_continues_like_a_fresh_one(lineage):
    model = model_of(lineage)
    ids, other = tiny_ids(model.config, length=10), tiny_ids(model.config, length=4, seed=1)
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    cache.crop(-3)
    assert cache.get_seq_length() == 7
    continued = [model(part, past_key_values=cache).logits for part in other.split([1, 3], dim=1)]
    fresh = model(torch.cat([ids[:, :7], other], dim=1), use_cache=False).logits[:, 7:]
    torch.testing.assert_close(torch.cat(continued, dim=1), fresh, atol=ATOL, rtol=0)


@pytest.mark.parametrize("lineage", LINEAGES)
def test_inputs_embeds_generate_what_their_ids_do(lineage):
    model = model_of(lineage)
    ids = tiny_ids(model.config)
    from_embeds = model.generate(
        inputs_embeds=model.get_input_embeddings()(ids),
        attention_mask=torch.ones_like(ids),
        max_new_tokens=6,
        do_sample=False,
    )
    assert torch.equal(from_embeds, greedy(model, ids, steps=6)[:, ids.shape[1] :])


def test_passing_ids_and_embeds_or_neither_is_an_error():
    model = model_of("v3")
    ids = tiny_ids(model.config)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(input_ids=ids, inputs_embeds=model.get_input_embeddings()(ids))
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()


@pytest.mark.parametrize("lineage", ["v1", "v3"])
def test_the_text_generation_pipeline_runs_on_a_batch(lineage):
    model = model_of(lineage)
    words = ["[BOS]", "[EOS]", "[PAD]"] + [f"w{i}" for i in range(3, model.config.vocab_size)]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[PAD]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="[BOS]", eos_token="[EOS]", pad_token="[PAD]", padding_side="left"
    )
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    prompts = ["w5 w9 w40", "w7 w8 w21 w33 w4"]
    options = {"max_new_tokens": 5, "do_sample": False, "return_full_text": False}
    answers = generator(prompts, batch_size=2, **options)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        expected = tokenizer.decode(greedy(model, ids, steps=5)[0, ids.shape[1] :], skip_special_tokens=True)
        assert answer[0]["generated_text"].split() == expected.split()
