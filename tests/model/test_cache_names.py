"""The cache under its two names: `past_key_values`, and `cache` since transformers 5.24.

Models are float32; two orders of the same sums move logits of order ten by a few roundings a layer, hence 2e-5.
"""

import logging
import warnings

import pytest
import torch
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from tiny import tiny_config, tiny_ids, tiny_model
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig

from modeling_deepseek_moe import (
    DeepseekMoeForCausalLM,
    DeepseekMoeForSequenceClassification,
    DeepseekMoeForTokenClassification,
    DeepseekMoeModel,
)
from modeling_deepseek_moe.attention import DeepseekMoeLatentAttention
from modeling_deepseek_moe.transformers_names import CACHE_NAME, CACHE_NAMES, IS_RENAMED

ATOL = 2e-5
CLASSES = [
    DeepseekMoeModel,
    DeepseekMoeForCausalLM,
    DeepseekMoeForSequenceClassification,
    DeepseekMoeForTokenClassification,
]


def model_of(lineage: str = "v3", model_class=DeepseekMoeForCausalLM, **overrides):
    return tiny_model(tiny_config(lineage, eos_token_id=None, pad_token_id=2, **overrides), model_class=model_class)


def greedy(model, ids: torch.Tensor, steps: int = 10, **options) -> torch.Tensor:
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": steps, "do_sample": False, **options}
    return model.generate(input_ids=ids, **options)


@pytest.mark.parametrize("name", CACHE_NAMES)
@pytest.mark.parametrize("model_class", CLASSES)
@torch.no_grad()
def test_every_class_goes_on_from_a_cache_given_under_either_name(model_class, name):
    model = model_of(model_class=model_class)
    ids = tiny_ids(model.config).clamp_min(3)
    cache = DynamicCache(config=model.config)
    model(ids[:, :8], **{name: cache})
    assert cache.get_seq_length() == 8
    rest = model(ids[:, 8:], **{name: cache})
    assert cache.get_seq_length() == ids.shape[1]
    assert getattr(rest, CACHE_NAME, cache) is cache
    # Logits, or hidden states of the base model; a classified sequence has those of its last token only.
    whole = model(ids, use_cache=False)[0]
    torch.testing.assert_close(rest[0], whole[:, 8:] if whole.dim() == 3 else whole, atol=ATOL, rtol=0)


@pytest.mark.parametrize("model_class", CLASSES)
@torch.no_grad()
def test_a_cache_under_both_names_is_refused(model_class):
    model = model_of(model_class=model_class)
    cache = DynamicCache(config=model.config)
    with pytest.raises(TypeError, match="two names of the same argument: pass one of them"):
        model(tiny_ids(model.config), past_key_values=cache, cache=cache)
    if model_class is DeepseekMoeForCausalLM:
        with pytest.raises(TypeError, match="two names of the same argument"):
            greedy(model, tiny_ids(model.config), past_key_values=cache, cache=cache)
    assert cache.get_seq_length() == 0


@torch.no_grad()
def test_the_attention_of_a_layer_takes_either_name():
    model = model_of()
    attention = next(module for module in model.modules() if isinstance(module, DeepseekMoeLatentAttention))
    states = torch.randn(1, 5, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    rotary = model.model.rotary_emb(states, torch.arange(5)[None])
    outputs = [attention(states, rotary, **{name: DynamicCache(config=model.config)})[0] for name in CACHE_NAMES]
    assert torch.equal(*outputs)


def test_an_output_has_the_cache_under_the_installed_name_and_the_older_one():
    outputs = model_of()(tiny_ids(model_of().config), use_cache=True)
    assert isinstance(getattr(outputs, CACHE_NAME), DynamicCache)
    assert outputs.past_key_values is getattr(outputs, CACHE_NAME)
    assert outputs["past_key_values"] is outputs.past_key_values and "past_key_values" in outputs


@pytest.mark.parametrize("name", CACHE_NAMES)
@pytest.mark.parametrize("lineage", ["v1", "v3"])
def test_generate_goes_on_from_a_cache_given_under_either_name(lineage, name):
    model = model_of(lineage)
    ids = tiny_ids(model.config)
    expected = greedy(model, ids, steps=16, use_cache=False)
    cache = DynamicCache(config=model.config)
    half = greedy(model, ids, steps=8, **{name: cache})
    assert cache.get_seq_length() == half.shape[1] - 1
    assert torch.equal(greedy(model, half, steps=8, **{name: cache}), expected)


def test_nothing_here_uses_a_name_that_transformers_deprecates(monkeypatch):
    """Warnings about the cache's name are for the user's own spelling, and the user's is the installed one here."""
    said = []
    monkeypatch.setattr(logging.Logger, "warning_once", lambda self, message, *_: said.append(message), raising=False)
    model = model_of(num_nextn_predict_layers=1, mtp_loss_weight=0.3)
    ids = tiny_ids(model.config, batch=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for options in ({}, {"num_beams": 2}, {"use_mtp": True}, {"prompt_lookup_num_tokens": 2}):
            greedy(model, ids, **options)
        greedy(model, ids, past_key_values=DynamicCache(config=model.config))
        for model_class in CLASSES:
            model_of(model_class=model_class)(ids, **{CACHE_NAME: DynamicCache(config=model.config)})
        model.train()(ids, labels=ids).loss.backward()
        model.gradient_checkpointing_enable()
        model(ids, labels=ids, use_cache=False).loss.backward()
    messages = [*said, *(str(warning.message) for warning in caught)]
    assert not [message for message in messages if "past_key_values" in message or "cache_params" in message]


@pytest.mark.parametrize("lineage", ["v1", "v2", "v3"])
def test_a_training_model_with_gradient_checkpointing_generates_the_same(lineage):
    """Nothing is recomputed there; before 5.24 transformers took the cache away all the same, and text was wrong."""
    model = model_of(lineage)
    ids = tiny_ids(model.config)
    expected = greedy(model, ids, use_cache=False)
    model.train().gradient_checkpointing_enable()
    assert torch.equal(greedy(model, ids), expected)
    if lineage == "v3":
        assert torch.equal(greedy(model, ids[:1], use_mtp=True), expected[:1])
    model.gradient_checkpointing_disable()
    assert not any(layer.gradient_checkpointing for layer in model.model.layers)


@pytest.mark.parametrize("lineage", ["v1", "v3"])
def test_a_step_that_checkpoints_its_gradients_leaves_a_given_cache_alone(lineage):
    """A recomputed layer would write its tokens into it a second time."""
    model = model_of(lineage)
    ids = tiny_ids(model.config)
    losses, grads = [], []
    for checkpoints in (False, True):
        model.train().zero_grad()
        if checkpoints:
            model.gradient_checkpointing_enable()
        cache = DynamicCache(config=model.config)
        loss = model(ids, labels=ids, past_key_values=cache).loss
        loss.backward()
        losses.append(loss.detach())
        grads.append(model.lm_head.weight.grad.clone())
        assert cache.get_seq_length() == (0 if checkpoints else ids.shape[1])
    torch.testing.assert_close(*losses, atol=1e-6, rtol=0)
    torch.testing.assert_close(*grads, atol=1e-5, rtol=0)


@pytest.mark.skipif(not IS_RENAMED, reason="before 5.24 transformers refuses assisted decoding with a static cache")
@pytest.mark.parametrize("lineage", ["v1", "v2", "v3"])
def test_assisted_decoding_shortens_a_static_cache(lineage):
    model, assistant = model_of(lineage), tiny_model(tiny_config(lineage, eos_token_id=None, pad_token_id=2), seed=1)
    ids = tiny_ids(model.config, batch=1, length=5).repeat(1, 3)
    expected = greedy(model, ids, use_cache=False)
    # Prompt lookup drafts beyond the end, for which transformers 5.24.0 leaves no room by itself.
    for options in ({"assistant_model": assistant}, {"prompt_lookup_num_tokens": 3, "max_cache_len": 40}):
        assert torch.equal(greedy(model, ids, cache_implementation="static", **options), expected)


def test_continuous_batching_of_plain_attention_generates_what_generate_does():
    model = model_of("v1")
    prompts = [tiny_ids(model.config, batch=1, length=length, seed=length)[0] for length in (9, 5)]
    answers = model.generate_batch(
        [prompt.tolist() for prompt in prompts],
        generation_config=GenerationConfig(max_new_tokens=6, do_sample=False),
        # By default the cache takes most of the machine's memory.
        continuous_batching_config=ContinuousBatchingConfig(page_size=16, num_blocks=8, max_batch_tokens=32),
        progress_bar=False,
    )
    assert [answer.error for answer in answers.values()] == [None, None]
    for prompt, answer in zip(prompts, answers.values(), strict=True):
        expected = greedy(model, prompt[None], steps=6, use_cache=False)[0, len(prompt) :]
        assert answer.generated_tokens == expected.tolist()


def test_continuous_batching_of_latent_attention_is_refused():
    model = model_of("v3")
    with pytest.raises(ValueError, match="this model has latent attention .*: use generate"):
        model.generate_batch([[3, 4, 5]], GenerationConfig(max_new_tokens=2), progress_bar=False)


@pytest.mark.parametrize(
    "lineage, config",
    [
        ("v1", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)),
        ("v3", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)),
        ("v1", PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)),
    ],
    ids=["prompt, plain attention", "prompt, latent attention", "prefix"],
)
def test_virtual_tokens_of_peft_are_read_once_with_a_cache(lineage, config):
    """PEFT looks for the cache in the inputs of a step, to put its tokens before the first step only."""
    model = get_peft_model(model_of(lineage), config).eval()
    for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
        torch.nn.init.normal_(parameter, std=0.3)
    ids = tiny_ids(model.config)
    expected = ids
    with torch.no_grad():
        for _ in range(8):
            # PEFT's forward puts the virtual tokens in front; a prefix lies in a cache, a prompt among the logits.
            logits = model(input_ids=expected, attention_mask=torch.ones_like(expected)).logits
            expected = torch.cat([expected, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(greedy(model, ids, steps=8), expected)
