"""The growing cache layer: what it stores, that appending does not copy, and every cache operation on it."""

import copy

import pytest
import torch
from tiny import tiny_config, tiny_ids, tiny_model, v1_config, v3_config
from transformers import DynamicCache

from modeling_deepseek_moe.latent_cache import GrowingLayer, use_growing_layers

# Logits of float32 models of order ten: the bound of golden parity, see test_generation.py.
ATOL = 2e-5


def filled_layer(batch: int = 2, length: int = 5) -> tuple[GrowingLayer, torch.Tensor, torch.Tensor]:
    layer = GrowingLayer()
    keys, values = torch.randn(batch, 2, length, 4), torch.randn(batch, 2, length, 3)
    layer.update(keys, values)
    return layer, keys, values


def tokens(batch: int = 2, length: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, 2, length, 4), torch.randn(batch, 2, length, 3)


@pytest.fixture(autouse=True)
def _no_grad_and_fixed_seed():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.mark.parametrize("lineage", ["v2_lite", "v2", "v3"])
def test_latent_attention_stores_latent_and_rotary_key_of_each_token_and_nothing_else(lineage):
    model = tiny_model(tiny_config(lineage))
    config, ids = model.config, tiny_ids(model.config, batch=2, length=9)
    cache = model(ids, use_cache=True).past_key_values
    assert isinstance(cache, DynamicCache) and len(cache.layers) == config.num_hidden_layers
    assert all(type(layer) is GrowingLayer for layer in cache.layers)
    per_token = config.kv_lora_rank + config.qk_rope_head_dim
    stored = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert stored == 2 * 9 * config.num_hidden_layers * per_token
    assert cache.layers[0].keys.shape == (2, 1, 9, per_token)


def test_plain_attention_stores_keys_and_values_of_its_groups():
    model = tiny_model(v1_config())
    config, ids = model.config, tiny_ids(model.config, batch=2, length=9)
    cache = model(ids, use_cache=True).past_key_values
    stored = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert stored == 2 * 9 * config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim


def test_appending_writes_in_place_until_the_room_is_used_up():
    layer, keys, values = filled_layer()
    capacity = layer._buffers[0].shape[-2]
    begin = layer.keys.data_ptr(), layer.values.data_ptr()
    for _ in range(capacity - layer.get_seq_length()):
        new_keys, new_values = tokens()
        keys, values = torch.cat([keys, new_keys], 2), torch.cat([values, new_values], 2)
        layer.update(new_keys, new_values)
        assert (layer.keys.data_ptr(), layer.values.data_ptr()) == begin
    assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)
    layer.update(*tokens())
    assert layer.keys.data_ptr() != begin[0]
    assert torch.equal(layer.keys[:, :, :-1], keys) and torch.equal(layer.values[:, :, :-1], values)


def test_a_thousand_tokens_are_copied_a_bounded_number_of_times():
    """Growing by a quarter moves each token at most sum(0.8^k) = 4 times beyond its writing."""
    layer = GrowingLayer()
    reallocations, copied, begin = 0, 0, None
    for length in range(1, 1001):
        layer.update(*tokens(batch=1))
        if layer.keys.data_ptr() != begin:
            begin, reallocations, copied = layer.keys.data_ptr(), reallocations + 1, copied + length - 1
    assert layer.get_seq_length() == 1000
    # From 65 up by at least 64 tokens and then by a quarter: 65, 129, 193, 257, 322, 403, 505, 632, 791, 990, 1238.
    assert reallocations <= 11
    assert copied <= 5 * 1000
    assert layer._buffers[0].shape[-2] <= 1000 * 1.25 + 64


def test_the_values_handed_out_earlier_stay_what_they_were():
    layer, *_ = filled_layer()
    earlier, _ = layer.update(*tokens())
    remembered = earlier.clone()
    for _ in range(100):
        layer.update(*tokens())
    assert torch.equal(earlier, remembered)


@pytest.mark.parametrize("order", [[1, 0], [0, 0], [1, 1]], ids=str)
def test_reordering_beams_then_appending_keeps_the_chosen_rows(order):
    layer, keys, values = filled_layer()
    layer.reorder_cache(torch.tensor(order))
    new_keys, new_values = tokens()
    layer.update(new_keys, new_values)
    assert torch.equal(layer.keys, torch.cat([keys[order], new_keys], 2))
    assert torch.equal(layer.values, torch.cat([values[order], new_values], 2))


def test_selecting_and_repeating_rows_then_appending():
    layer, keys, values = filled_layer()
    layer.batch_select_indices(torch.tensor([1]))
    layer.batch_repeat_interleave(3)
    new_keys, new_values = tokens(batch=3)
    layer.update(new_keys, new_values)
    assert torch.equal(layer.keys, torch.cat([keys[[1, 1, 1]], new_keys], 2))
    assert torch.equal(layer.values, torch.cat([values[[1, 1, 1]], new_values], 2))


def test_crop_forgets_the_last_tokens_and_keeps_the_room():
    layer, keys, values = filled_layer(length=8)
    begin = layer.keys.data_ptr()
    layer.crop(-3)
    assert layer.get_seq_length() == 5
    new_keys, new_values = tokens(length=2)
    layer.update(new_keys, new_values)
    assert layer.keys.data_ptr() == begin
    assert torch.equal(layer.keys, torch.cat([keys[:, :, :5], new_keys], 2))
    assert torch.equal(layer.values, torch.cat([values[:, :, :5], new_values], 2))


def test_crop_after_a_reorder_and_reorder_after_a_crop():
    layer, keys, _ = filled_layer(length=8)
    layer.reorder_cache(torch.tensor([1, 0]))
    layer.crop(-2)
    layer.reorder_cache(torch.tensor([1, 0]))
    layer.crop(-1)
    new_keys, new_values = tokens()
    layer.update(new_keys, new_values)
    assert torch.equal(layer.keys, torch.cat([keys[:, :, :5], new_keys], 2))


def test_reset_empties_the_layer_and_lets_it_take_another_shape():
    layer, *_ = filled_layer()
    layer.reset()
    assert layer.get_seq_length() == 0
    new_keys, new_values = tokens(batch=3, length=2)
    layer.update(new_keys.double(), new_values.double())
    assert torch.equal(layer.keys, new_keys.double()) and torch.equal(layer.values, new_values.double())


def test_a_deep_copy_goes_its_own_way():
    """The way prompts are cached once and continued many times."""
    layer, keys, _ = filled_layer()
    copied = copy.deepcopy(layer)
    mine, theirs = tokens(), tokens()
    layer.update(*mine)
    copied.update(*theirs)
    assert torch.equal(layer.keys, torch.cat([keys, mine[0]], 2))
    assert torch.equal(copied.keys, torch.cat([keys, theirs[0]], 2))


def test_offloaded_and_prefetched_layers_stay_right():
    layer, keys, _ = filled_layer()
    layer.offload()
    layer.prefetch()
    new_keys, new_values = tokens()
    layer.update(new_keys, new_values)
    assert torch.equal(layer.keys, torch.cat([keys, new_keys], 2))


@pytest.mark.parametrize("lineage", ["v1", "v3"])
@pytest.mark.parametrize("first, then", [("inference_mode", "no_grad"), ("no_grad", "inference_mode")])
def test_a_cache_made_in_one_gradient_free_mode_continues_in_the_other(lineage, first, then):
    model = tiny_model(tiny_config(lineage))
    ids = tiny_ids(model.config, length=8)
    whole = model(ids, use_cache=False).logits
    modes = {"inference_mode": torch.inference_mode, "no_grad": torch.no_grad}
    with modes[first]():
        cache = model(ids[:, :5], use_cache=True).past_key_values
    with modes[then]():
        logits = [model(token, past_key_values=cache).logits.clone() for token in ids[:, 5:].split(1, dim=1)]
    torch.testing.assert_close(torch.cat(logits, dim=1), whole[:, 5:], atol=ATOL, rtol=0)


@pytest.mark.parametrize("lineage", ["v1", "v3"])
def test_a_prompt_cached_in_inference_mode_can_be_continued_with_gradients(lineage):
    model = tiny_model(tiny_config(lineage))
    ids = tiny_ids(model.config, length=8)
    with torch.inference_mode():
        cache = model(ids[:, :5], use_cache=True).past_key_values
    with torch.enable_grad():
        loss = model(ids[:, 5:], past_key_values=cache).logits.logsumexp(-1).mean()
        loss.backward()
    assert torch.isfinite(model.model.embed_tokens.weight.grad).all()
    expected = model(ids, use_cache=False).logits[:, 5:].logsumexp(-1).mean()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lineage", ["v1", "v2", "v3"])
@pytest.mark.parametrize("split", [[8], [5, 3], [1] * 8], ids=str)
def test_gradients_through_a_cache_equal_those_of_one_pass(lineage, split):
    config = tiny_config(lineage, aux_loss_alpha=0.0)
    ids = tiny_ids(config, length=8)

    def gradients(with_cache: bool) -> dict[str, torch.Tensor]:
        model = tiny_model(config)
        with torch.enable_grad():
            if with_cache:
                cache = DynamicCache(config=config)
                logits = [model(part, past_key_values=cache).logits for part in ids.split(split, dim=1)]
            else:
                logits = [model(ids, use_cache=False).logits]
            torch.cat(logits, dim=1).logsumexp(-1).mean().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    cached, whole = gradients(True), gradients(False)
    for name, gradient in whole.items():
        # The same sums in another order, through both attention forms: some float32 roundings of the largest entry.
        bound = 1e-5 * gradient.abs().max().item() + 1e-9
        torch.testing.assert_close(cached[name], gradient, atol=bound, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    "lineage, trained",
    [("v1", "v_proj"), ("v1", "q_proj"), ("v3", "q_b_proj"), ("v3", "kv_b_proj")],
    ids=lambda value: value,
)
def test_training_one_projection_through_a_cache_gives_its_gradient(lineage, trained):
    """What is cached needs no gradient itself, but backward needs it: it must not be written into."""
    config = tiny_config(lineage, aux_loss_alpha=0.0, num_hidden_layers=1, first_k_dense_replace=0)
    ids = tiny_ids(config, length=6)

    def gradient(split: list[int]) -> torch.Tensor:
        model = tiny_model(config).requires_grad_(False)
        weight = model.get_submodule(f"model.layers.0.self_attn.{trained}").weight.requires_grad_(True)
        with torch.enable_grad():
            cache = DynamicCache(config=config)
            logits = [model(part, past_key_values=cache).logits for part in ids.split(split, dim=1)]
            torch.cat(logits, dim=1).logsumexp(-1).mean().backward()
        return weight.grad

    whole = gradient([6])
    bound = 1e-5 * whole.abs().max().item()
    torch.testing.assert_close(gradient([3, 1, 1, 1]), whole, atol=bound, rtol=1e-5)


def test_only_empty_plain_layers_are_swapped():
    config = v3_config()
    filled = DynamicCache()
    filled.update(*tokens(), layer_idx=0)
    assert type(use_growing_layers(filled).layers[0]) is not GrowingLayer
    assert use_growing_layers(None) is None
    fresh = use_growing_layers(DynamicCache(config=config))
    assert fresh.layers and all(type(layer) is GrowingLayer for layer in fresh.layers)
    unsized = use_growing_layers(DynamicCache())
    unsized.update(*tokens(), layer_idx=0)
    assert type(unsized.layers[0]) is GrowingLayer
