"""Every `cache_implementation` gives the text of no cache, near logits where it rounds, or is refused in one line."""

import contextlib

import pytest
import torch
from tiny import tiny_config, tiny_ids, tiny_model
from transformers import Cache, DynamicCache, StaticCache, cache_utils
from transformers.cache_utils import DynamicLayer, QuantizedLayer
from two_forms import ABSORBED, EXPANDED, forms  # noqa: F401

from modeling_deepseek_moe import modeling_deepseek_moe
from modeling_deepseek_moe.latent_cache import use_growing_layers

# Every token goes to every expert: a rounding cannot choose another one. Rotary width and rank are multiples of 16.
STEADY = {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 8, "qk_rope_head_dim": 16, "eos_token_id": None}


def steady_model(lineage: str):
    config = tiny_config(lineage, pad_token_id=2, num_nextn_predict_layers=0, **STEADY)
    return tiny_model(config)


def generated(model, length: int = 12, steps: int = 6, **options):
    ids = tiny_ids(model.config, length=length)
    return model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=steps,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=options.get("num_beams", 1) == 1,
        **options,
    )


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("implementation", ["dynamic", "static", "hybrid"])
@pytest.mark.parametrize("lineage", ["v1", "v2", "v3"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_caches_that_keep_values_as_they_are_give_the_text_of_no_cache(lineage, implementation, beams):
    model = steady_model(lineage)
    expected = generated(model, num_beams=beams, use_cache=False)
    found = generated(model, num_beams=beams, cache_implementation=implementation)
    assert torch.equal(found.sequences, expected.sequences)


needs_fp8 = pytest.mark.skipif(not hasattr(cache_utils, "Fp8QuantizedLayer"), reason="transformers has no FP8 cache")
BACKENDS = {
    "fp8": ({"backend": "fp8"}, None, 0.1),
    "quanto, 4 bits": ({"backend": "quanto", "q_group_size": 16}, "optimum.quanto", 0.3),
    "hqq, 8 bits": ({"backend": "hqq", "nbits": 8, "q_group_size": 16, "axis_key": 1, "axis_value": 1}, "hqq", 0.02),
}


@needs_fp8
@pytest.mark.parametrize("config, library, rounding", BACKENDS.values(), ids=BACKENDS)
@pytest.mark.parametrize("lineage", ["v1", "v3"])
def test_a_quantised_cache_gives_near_logits(lineage, config, library, rounding):
    if library is not None:
        pytest.importorskip(library, reason="optional: tests/model/test_quantisers.py says how it is installed")
    model = steady_model(lineage)
    whole = generated(model, use_cache=False)
    found = generated(model, cache_implementation="quantized", cache_config=config)
    assert found.sequences.shape == whole.sequences.shape
    assert all(logits.isfinite().all() for logits in found.logits)
    # The first step reads the prompt as it is. The second is the first that sees rounded values, of the same text.
    assert (found.logits[0] - whole.logits[0]).abs().max() <= 1e-5 * whole.logits[0].abs().max()
    same = found.sequences[:, 12] == whole.sequences[:, 12]
    gap = (found.logits[1] - whole.logits[1])[same].abs().max()
    assert same.any() and 0 < gap <= rounding * whole.logits[1].abs().max()


class RoundedLayer(QuantizedLayer):
    """The kind of layer that every backend makes, with a rounding of its own: eight bits, a scale a tensor."""

    def _quantize(self, tensor, axis):
        scale = tensor.abs().amax() / 127
        return (tensor / scale).round().to(torch.int8), scale

    def _dequantize(self, quantized):
        return quantized[0] * quantized[1]


def rounded_cache(model, residual_length: int) -> Cache:
    layers = [
        RoundedLayer(residual_length=residual_length, q_group_size=16) for _ in range(model.config.num_hidden_layers)
    ]
    return Cache(layers=layers)


@pytest.mark.parametrize("residual_length", [1, 4, 128])
@pytest.mark.parametrize("form", [ABSORBED, EXPANDED])
@torch.no_grad()
def test_a_layer_that_rounds_holds_latents_and_rotary_keys_apart(form, residual_length, forms):  # noqa: F811
    model = steady_model("v3")
    ids = tiny_ids(model.config, length=18)
    whole = model(ids, use_cache=False).logits[:, 12:]
    cache, logits = rounded_cache(model, residual_length), []
    with forms(form):
        model(ids[:, :12], past_key_values=cache)
        for token in ids[:, 12:].split(1, dim=1):
            logits.append(model(token, past_key_values=cache).logits)
    keys, values = cache.layers[0]._quantized_keys[0], cache.layers[0]._quantized_values[0]
    assert keys.shape[-1] == model.config.kv_lora_rank and values.shape[-1] == model.config.qk_rope_head_dim
    gap = (torch.cat(logits, dim=1) - whole).abs().max()
    assert 0 < gap <= 0.02 * whole.abs().max()  # eight bits


def test_beams_are_reordered_in_a_quantised_cache():
    model = steady_model("v3")
    plain = generated(model, num_beams=3)
    found = generated(model, num_beams=3, past_key_values=rounded_cache(model, residual_length=4))
    assert torch.equal(found.sequences, plain.sequences)


def test_groups_that_do_not_divide_the_widths_are_refused_in_one_line():
    model = tiny_model(tiny_config("v3"))
    cache = Cache(layers=[RoundedLayer(q_group_size=64) for _ in range(3)])
    with pytest.raises(ValueError) as raised, torch.no_grad():
        model(tiny_ids(model.config), past_key_values=cache)
    assert str(raised.value) == (
        "the quantised cache's q_group_size=64 does not divide the widths 16 and 8 of what latent attention keeps "
        "(kv_lora_rank=16): pass cache_config={'q_group_size': 8}"
    )


@pytest.mark.parametrize("implementation", ["offloaded", "offloaded_static"])
def test_an_offloaded_cache_is_refused_in_one_line_where_there_is_nothing_to_offload_from(implementation):
    with pytest.raises(ValueError, match="beside a CUDA device, and the model is on cpu: leave it out$") as raised:
        generated(steady_model("v3"), cache_implementation=implementation)
    assert "\n" not in str(raised.value)


class NoStream(contextlib.nullcontext):
    """Stands for the streams of CUDA, on which an offloaded cache copies its layers."""

    def wait_stream(self, other):
        pass


@pytest.mark.parametrize("lineage", ["v1", "v3"])
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_an_offloaded_cache_keeps_plain_layers_and_gives_the_same_text(kind, lineage, monkeypatch):
    monkeypatch.setattr(torch.cuda, "default_stream", lambda *_: NoStream())
    monkeypatch.setattr(modeling_deepseek_moe, "check_cache", lambda *_: None)
    model = steady_model(lineage)
    options = {} if kind is DynamicCache else {"max_cache_len": 24}
    cache = kind(config=model.config, offloading=True, **options)
    cache.prefetch_stream = NoStream()
    found = generated(model, past_key_values=cache)
    assert torch.equal(found.sequences, generated(model, use_cache=False).sequences)
    if kind is DynamicCache:
        assert all(type(layer) is DynamicLayer for layer in use_growing_layers(cache).layers)


@needs_fp8
@pytest.mark.parametrize("drafts", [{"use_mtp": True}, {"prompt_lookup_num_tokens": 3}], ids=str)
def test_drafts_are_refused_in_one_line_with_a_cache_that_cannot_forget(drafts):
    model = tiny_model(tiny_config("v3", pad_token_id=2, **STEADY))
    ids = tiny_ids(model.config, batch=1)
    message = "cache_implementation='quantized' cannot: generate without drafts"
    with pytest.raises(ValueError, match=message) as raised:
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=4,
            cache_implementation="quantized",
            cache_config={"backend": "fp8"},
            **drafts,
        )
    assert "\n" not in str(raised.value)
