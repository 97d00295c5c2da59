"""What `generate(use_mtp=True)` cannot do is said in one line that names the way out."""

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from tiny import tiny_ids, tiny_model, v3_config
from transformers import DynamicCache

from modeling_deepseek_moe.transformers_names import IS_RENAMED


@pytest.fixture
def model():
    return tiny_model(v3_config(eos_token_id=None, pad_token_id=2))


def refused(model, message: str, batch: int = 1, **options) -> None:
    ids = tiny_ids(model.config, batch=batch)
    inputs = {} if "inputs_embeds" in options else {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    options = {"max_new_tokens": 4, "do_sample": False, **inputs, **options}
    with pytest.raises((ValueError, RuntimeError), match=message) as raised:
        model.generate(use_mtp=True, **options)
    assert "\n" not in str(raised.value)


def test_a_model_without_mtp_modules(model):
    model.remove_mtp_layers()
    refused(model, "num_nextn_predict_layers=0.*generate without use_mtp")


def test_a_batch(model):
    refused(model, "one sequence at a time, got a batch of 3.*once a sequence", batch=3)


def test_embeddings_instead_of_ids(model):
    embeds = model.get_input_embeddings()(tiny_ids(model.config, batch=1))
    refused(model, "pass them instead of inputs_embeds$", inputs_embeds=embeds)


def test_a_cache_that_is_not_empty(model):
    """transformers' assisted decoding would run the whole prompt on top of it."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tiny_ids(model.config, batch=1)[:, :8], past_key_values=cache)
    refused(model, "the one given holds 8 tokens: pass the whole sequence without it", past_key_values=cache)


def test_a_virtual_prompt(model):
    peft_model = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    refused(peft_model, r"made 17 for 12 tokens: virtual tokens \(prompt tuning\)")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"use_cache": False}, "requires `use_cache=True`|requires a cache"),
        ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences has to be 1"),
    ],
    ids=["no cache", "two sequences"],
)
def test_what_transformers_refuses_in_assisted_decoding(model, options, message):
    refused(model, message, **options)


def test_a_static_cache_before_transformers_could_shorten_it(model):
    """5.24 can, and then it drafts as with a growing one."""
    if not IS_RENAMED:
        refused(model, "not supported with Static cache", cache_implementation="static")
        return
    ids = tiny_ids(model.config, batch=1)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    drafted = model.generate(ids, use_mtp=True, cache_implementation="static", **options)
    assert torch.equal(drafted, model.generate(ids, **options))
