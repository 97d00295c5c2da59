"""Decoding by absorbed latent attention gives the tokens and logits of the expanded form, in every way to decode."""

import pytest
import torch
from machines import pretend
from reference_flash import flash_by_name  # noqa: F401
from tiny import tiny_config, tiny_ids, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, LogitsProcessorList, StaticCache
from two_forms import (  # noqa: F401
    ABSORBED,
    ATOL,
    EXPANDED,
    PAD,
    assert_same_generation,
    forms,
    generated,
    padded,
    shared_model,
)

from modeling_deepseek_moe.absorption import mix_latents, score_latents

LINEAGES = ["v2", "v3"]
MODES = {
    "greedy": {},
    "prompt in chunks": {"prefill_chunk_size": 4},
    "static cache": {"cache_implementation": "static"},
    "static cache, prompt in chunks": {"cache_implementation": "static", "prefill_chunk_size": 3},
    "sampling": {"do_sample": True, "top_k": 20, "num_return_sequences": 2},
    "beam search": {"num_beams": 3},
    "beam sampling": {"num_beams": 2, "do_sample": True},
    "guidance": {"guidance_scale": 1.5},
}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("lineage", LINEAGES)
def test_every_way_to_generate_gives_the_tokens_of_the_expanded_form(lineage, mode, forms):  # noqa: F811
    model = shared_model(lineage)
    model.set_attn_implementation("sdpa" if lineage == "v3" else "eager")
    ids, mask = padded(model.config)
    assert_same_generation(forms, lambda: generated(model, ids, mask, **mode))


SPECULATION = {
    "assistant": lambda: {"assistant_model": shared_model("v2", seed=1)},
    "assistant that is always right": lambda: {"assistant_model": shared_model("v3")},
    "prompt lookup": lambda: {"prompt_lookup_num_tokens": 3},
    "early exit": lambda: {"assistant_early_exit": 2},
    "mtp": lambda: {"use_mtp": True},
}


@pytest.mark.parametrize("options", SPECULATION.values(), ids=SPECULATION)
def test_drafted_tokens_are_checked_alike_in_both_forms(options, forms):  # noqa: F811
    """Checking a draft runs a few query tokens on a filled cache, and rejecting one shortens the cache."""
    model = shared_model("v3")
    model.set_attn_implementation("sdpa")
    ids = tiny_ids(model.config, batch=1, length=5).repeat(1, 3)
    assert_same_generation(forms, lambda: generated(model, ids, steps=16, **options()))
    assert torch.equal(
        generated(model, ids, steps=16, **options()).sequences, generated(model, ids, steps=16).sequences
    )


@pytest.mark.parametrize("tokens", [1, 2, 7, 16])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("lineage", LINEAGES)
@torch.no_grad()
def test_a_chunk_on_a_filled_cache_has_the_same_logits_in_both_forms(lineage, implementation, cache, tokens, forms):  # noqa: F811
    model = shared_model(lineage)
    model.set_attn_implementation(implementation)
    ids, mask = padded(model.config)
    chunk = tiny_ids(model.config, batch=len(ids), length=tokens, seed=1)
    whole_mask = torch.cat([mask, torch.ones_like(chunk)], dim=1)
    logits = []
    for form in (ABSORBED, EXPANDED):
        past = DynamicCache() if cache == "dynamic" else StaticCache(config=model.config, max_cache_len=40)
        with forms(EXPANDED):
            model(ids, attention_mask=mask, past_key_values=past)
        with forms(form):
            logits.append(model(chunk, attention_mask=whole_mask, past_key_values=past).logits)
    torch.testing.assert_close(*logits, rtol=0, atol=ATOL)


@pytest.mark.parametrize("static", [False, True], ids=["growing cache", "static cache"])
@pytest.mark.parametrize("lineage", LINEAGES)
def test_masks_of_flash_attention_mean_the_same_to_the_absorbed_form(lineage, static, forms, flash_by_name):  # noqa: F811
    model = tiny_model(tiny_config(lineage, eos_token_id=None, pad_token_id=PAD))
    ids, mask = padded(model.config)
    expected = generated(model, ids, mask)
    model.config._attn_implementation_internal = flash_by_name
    options = {"cache_implementation": "static"} if static else {}
    for chunk in ({}, {"prefill_chunk_size": 4}):
        assert_same_generation(forms, lambda chunk=chunk: generated(model, ids, mask, **options, **chunk))
        assert torch.equal(generated(model, ids, mask, **options, **chunk).sequences, expected.sequences)


def test_flex_attention_generates_what_sdpa_does(forms):  # noqa: F811
    """Run without its compiler, which takes seconds a shape: what is tested are the masks."""
    model = shared_model("v3")
    ids, mask = padded(model.config)
    model.set_attn_implementation("sdpa")
    expected = generated(model, ids, mask)
    model.set_attn_implementation("flex_attention")
    with torch.compiler.set_stance("force_eager"):
        assert_same_generation(forms, lambda: generated(model, ids, mask))
        assert torch.equal(generated(model, ids, mask).sequences, expected.sequences)


def test_generating_a_thousand_tokens_stores_the_latents_once_and_seldom_moves_them():
    """A buffer that is full grows by a quarter, by 64 tokens at least: a dozen moves, a quarter of spare room."""
    config = tiny_config("v2", eos_token_id=None, num_hidden_layers=1, max_position_embeddings=2048)
    model, cache, places = tiny_model(config), DynamicCache(), []

    def record(input_ids, scores):
        places.append([layer.keys.data_ptr() for layer in cache.layers])
        return scores

    ids = tiny_ids(config, batch=2, length=5)
    generated(
        model,
        ids,
        steps=1000,
        past_key_values=cache,
        logits_processor=LogitsProcessorList([record]),
        output_logits=False,
    )
    for layer, pointers in zip(cache.layers, zip(*places, strict=True), strict=True):
        assert len(pointers) == 1000
        assert sum(now != before for now, before in zip(pointers[1:], pointers, strict=False)) <= 12
        # The last token is chosen and not run.
        values = 2 * (5 + 999) * (config.kv_lora_rank + config.qk_rope_head_dim)
        assert layer.keys.nbytes + layer.values.nbytes == values * 4
        held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in vars_of(layer)}
        assert values * 4 <= sum(held.values()) <= values * 4 * 1.25 + 2 * 64 * 24 * 4


def vars_of(layer) -> list[torch.Tensor]:
    """All tensors that a cache layer holds on to."""
    kept = [each for value in vars(layer).values() for each in (value if isinstance(value, list) else [value])]
    return [each for each in kept if isinstance(each, torch.Tensor)]


@pytest.mark.parametrize("length", [1, 31, 32, 33, 300])
def test_products_with_a_half_precision_cache_go_by_blocks_of_one_size(length, monkeypatch):
    pretend(monkeypatch, torch.bfloat16)
    torch.manual_seed(0)
    queries, weights = torch.randn(2, 3, 24).bfloat16(), torch.rand(2, 3, length).bfloat16()
    cached = torch.randn(2, length, 24).bfloat16()
    # bfloat16 keeps 8 bits: one rounding of each part, one of their sum.
    bound = {"rtol": 2**-7, "atol": 2**-8 * length**0.5}
    scores, mixed = score_latents(queries, cached), mix_latents(weights, cached[..., :16])
    torch.testing.assert_close(scores.double(), queries.double() @ cached.double().mT, **bound)
    torch.testing.assert_close(mixed.double(), weights.double() @ cached[..., :16].double(), **bound)
    sizes = set()

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.mm.default:
                sizes.update(args[0].shape + args[1].shape)
            return function(*args, **(kwargs or {}))

    with Products():
        score_latents(queries, cached)
        mix_latents(weights, cached[..., :16])
    assert {3, 16, 24} < sizes and all(size % 32 == 0 for size in sizes - {3, 16, 24})
