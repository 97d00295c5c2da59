"""Every way to generate, with each kind of cache, for every golden folder: the text is that of no cache at all.

Tokens are compared exactly: the models are float32 and their two best logits lie further apart than its roundings.
"""

import functools

import pytest
import torch
from places import GOLDEN
from tiny import CONFIG_OF_LINEAGE, tiny_config, tiny_ids, tiny_model
from transformers import DynamicCache, StaticCache

from modeling_deepseek_moe import DeepseekMoeForCausalLM
from modeling_deepseek_moe.transformers_names import CACHE_NAME

STEPS = 12
PAD = 2
FOLDERS = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())


@functools.cache
def model_of(name: str) -> DeepseekMoeForCausalLM:
    """A golden folder's model, or a lineage's with MTP modules, which no golden folder has; without an end token."""
    if name in CONFIG_OF_LINEAGE:
        model = tiny_model(tiny_config(name, num_nextn_predict_layers=2))
    else:
        model = DeepseekMoeForCausalLM.from_pretrained(GOLDEN / name)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model.eval()


@functools.cache
def assistant_of(name: str) -> DeepseekMoeForCausalLM:
    assistant = tiny_model(model_of(name).config, seed=1)
    assistant.generation_config = model_of(name).generation_config
    return assistant


def prompt(model, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids that repeat themselves, so that prompt lookup finds something; of two rows the first is padded."""
    ids = tiny_ids(model.config, batch=rows, length=5).clamp_min(3).repeat(1, 2)
    mask = torch.ones_like(ids)
    if rows > 1:
        mask[0, :4] = 0
    return ids.masked_fill(mask == 0, PAD), mask


@functools.cache
@torch.no_grad()
def recomputed(name: str, rows: int) -> torch.Tensor:
    """Greedy text, the whole sequence run again for every token."""
    model = model_of(name)
    ids, mask = prompt(model, rows)
    for _ in range(STEPS):
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        mask = torch.cat([mask, mask.new_ones(rows, 1)], dim=1)
    return ids


def generated(name: str, rows: int, **options) -> torch.Tensor:
    ids, mask = prompt(model_of(name), rows)
    options = {"max_new_tokens": STEPS, "do_sample": False, "attention_mask": mask, **options}
    return model_of(name).generate(**({} if "inputs_embeds" in options else {"input_ids": ids}), **options)


def from_embeds(name: str) -> torch.Tensor:
    model = model_of(name)
    ids, _ = prompt(model, 2)
    return torch.cat([ids, generated(name, 2, inputs_embeds=model.get_input_embeddings()(ids))], dim=1)


def in_two_calls(name: str) -> torch.Tensor:
    cache = {CACHE_NAME: DynamicCache(config=model_of(name).config)}
    ids, mask = prompt(model_of(name), 2)
    half = generated(name, 2, max_new_tokens=STEPS // 2, **cache)
    mask = torch.cat([mask, mask.new_ones(2, STEPS // 2)], dim=1)
    return model_of(name).generate(
        half, attention_mask=mask, max_new_tokens=STEPS - STEPS // 2, do_sample=False, **cache
    )


WAYS = {
    "greedy, left padding": lambda name: generated(name, 2),
    "static cache": lambda name: generated(name, 2, cache_implementation="static"),
    "a static cache that is given": lambda name: generated(
        name, 2, **{CACHE_NAME: StaticCache(config=model_of(name).config, max_cache_len=30)}
    ),
    "prompt in chunks": lambda name: generated(name, 2, prefill_chunk_size=4),
    "inputs_embeds": from_embeds,
    "two calls with one cache": in_two_calls,
    "assisted": lambda name: generated(name, 1, assistant_model=assistant_of(name)),
    "prompt lookup": lambda name: generated(name, 1, prompt_lookup_num_tokens=3),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [*FOLDERS, "kimi"])
def test_greedy_text_is_that_of_running_everything_again(name, way):
    text = WAYS[way](name)
    assert torch.equal(text, recomputed(name, len(text)))


@pytest.mark.parametrize("name", CONFIG_OF_LINEAGE)
def test_text_drafted_by_mtp_modules_is_that_of_running_everything_again(name):
    assert torch.equal(generated(name, 1, use_mtp=True), recomputed(name, 1))


@pytest.mark.parametrize("name", [*FOLDERS, "kimi"])
def test_beams_with_a_cache_are_those_without(name):
    beams = {"num_beams": 3, "num_return_sequences": 2}
    assert torch.equal(generated(name, 2, **beams), generated(name, 2, use_cache=False, **beams))
