"""One decoded token on a filled cache: the whole step, and the attention of one layer in it.

Every run decodes the next token, as generation does, so a cache grows by as many tokens as there are runs.
"""

from __future__ import annotations

from typing import Any

import torch
from measure import Case, agreement, alternate, compare
from transformers import Cache, DeepseekV2ForCausalLM, DynamicCache
from workbench import LOGIT_BOUND, Side, Workbench

from modeling_deepseek_moe import DeepseekMoeForCausalLM
from modeling_deepseek_moe.latent_cache import use_growing_layers
from modeling_deepseek_moe.transformers_names import CACHE_NAME

STEP_GOALS = {256: 1.0, 2048: 3.0, 8192: 9.0, 32768: 22.0}
ATTENTION_GOALS = {8192: 40.0}
GROWTH_GOAL = {(8192, 32768): 4.5}
BYTES_GOAL = 1 / 0.7  # 70 % of the speed at which one product reads as many bytes


def cases(bench: Workbench) -> list[Case]:
    """For each context, step and attention; then how our attention grows between the two longest contexts."""
    contexts = sorted(set(bench.settings.contexts))
    found = [
        Case(f"{what} at {context} tokens", lambda measure=measure, context=context: measure(bench, context))
        for context in contexts
        for what, measure in (("step", step_rows), ("attention of one layer", attention_rows))
    ]
    if len(contexts) > 1:
        short, long = contexts[-2:]
        found.append(Case(f"growth from {short} to {long} tokens", lambda: growth_rows(bench, short, long)))
    return found


@torch.inference_mode()
def step_rows(bench: Workbench, context: int) -> list[dict[str, Any]]:
    ours, theirs = bench.pair()
    experts = faster_experts(bench, theirs)
    theirs.model.set_experts_implementation(experts)
    try:
        caches = [filled_cache(side, context) for side in (ours, theirs)]
        agrees = agreement(
            f"logits of a decode step at {context} tokens",
            *(_step(bench, side, cache)(0)() for side, cache in zip((ours, theirs), caches, strict=True)),
            LOGIT_BOUND[torch.bfloat16],
        )
        product = _product_of(step_bytes(ours, context), bench.fields["hidden_size"], ours.model.dtype)
        sides = {"ours": _step(bench, ours, caches[0]), "theirs": _step(bench, theirs, caches[1])}
        sides["product"] = lambda seed: product
        seconds = alternate(sides, bench.settings.repeats)
    finally:
        theirs.model.set_experts_implementation("grouped_mm")
    return [
        compare(
            f"decode step, {context} tokens of context",
            (ours.experts, seconds["ours"]),
            (f"transformers, sdpa, {experts}", seconds["theirs"]),
            at_least=STEP_GOALS.get(context),
            agreement=agrees,
            context=context,
            part="step",
        ),
        compare(
            f"decode step, {context} tokens of context, against its bytes",
            (ours.experts, seconds["ours"]),
            ("one matrix-vector product that reads as many bytes", seconds["product"]),
            at_most=BYTES_GOAL,
        ),
    ]


def step_bytes(side: Side, context: int) -> int:
    """What a decoded token has to read: weights, of the routed experts those that serve it, and the cache."""
    model, config = side.model, side.model.config
    found = config.num_hidden_layers * context * (config.kv_lora_rank + config.qk_rope_head_dim) * model.dtype.itemsize
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    for parameter in model.parameters():
        if parameter.dim() == 3:
            found += parameter.nbytes * config.num_experts_per_tok // len(parameter)
        elif parameter is head or parameter is not embedding:  # of which it reads one row
            found += parameter.nbytes
    return found


def _product_of(size: int, width: int, dtype: torch.dtype):
    matrix = torch.ones(-(-size // (width * dtype.itemsize)), width, dtype=dtype)
    vector = torch.ones(1, width, dtype=dtype)
    return lambda: vector @ matrix.mT


@torch.inference_mode()
def attention_rows(bench: Workbench, context: int) -> list[dict[str, Any]]:
    pair = bench.pair()
    sides = {name: _attention(side, context) for name, side in zip(("ours", "theirs"), pair, strict=True)}
    outputs = [prepare(0)() for prepare in sides.values()]
    agrees = agreement(f"attention of one layer at {context} tokens", *outputs, LOGIT_BOUND[torch.bfloat16])
    seconds = alternate(sides, bench.settings.repeats)
    return [
        compare(
            f"attention of one layer in it, {context} tokens",
            ("ours", seconds["ours"]),
            ("transformers, sdpa", seconds["theirs"]),
            at_least=ATTENTION_GOALS.get(context),
            agreement=agrees,
            context=context,
            part="attention",
        )
    ]


@torch.inference_mode()
def growth_rows(bench: Workbench, short: int, long: int) -> list[dict[str, Any]]:
    ours, _ = bench.pair()
    sides = {"long": _attention(ours, long), "short": _attention(ours, short)}
    seconds = alternate(sides, bench.settings.repeats)
    return [
        compare(
            f"growth of our attention of one layer, {short} to {long} tokens",
            (f"{long} tokens", seconds["long"]),
            (f"{short} tokens", seconds["short"]),
            at_most=GROWTH_GOAL.get((short, long)),
            as_multiple=True,
        )
    ]


def filled_cache(side: Side, context: int, layers: int | None = None) -> Cache:
    """A cache of `context` random latents and rotary keys in each of `layers` layers, the same for both sides."""
    config = side.model.config
    cache = DynamicCache(config=config)
    is_ours = isinstance(side.model, DeepseekMoeForCausalLM)
    if is_ours:
        use_growing_layers(cache)
    generator = torch.Generator().manual_seed(context)
    for layer in range(config.num_hidden_layers if layers is None else layers):
        latent, k_rope = (
            torch.randn(1, 1, context, width, generator=generator).to(side.model.dtype)
            for width in (config.kv_lora_rank, config.qk_rope_head_dim)
        )
        if is_ours:
            cached = torch.cat((latent, k_rope), dim=-1)
            cache.update(cached, cached[..., :0], layer)
            continue
        if isinstance(side.model, DeepseekV2ForCausalLM):
            # Pairs that are rotated together are halves of our keys and neighbours in those of this class.
            k_rope = torch.stack(k_rope.chunk(2, dim=-1), dim=-1).flatten(-2)
        cache.update(latent, k_rope, layer)
    return cache


def faster_experts(bench: Workbench, theirs: Side) -> str:
    """The implementation with which transformers decodes faster, found on a short context."""
    if not hasattr(bench, "decode_experts"):
        sides = {}
        for name in ("grouped_mm", "batched_mm"):
            step = _step(bench, theirs, filled_cache(theirs, 64))

            def prepare(seed: int, name=name, step=step):
                theirs.model.set_experts_implementation(name)
                return step(seed)

            sides[name] = prepare
        seconds = alternate(sides, 5)
        bench.decode_experts = min(seconds, key=lambda name: sorted(seconds[name])[2])
    return bench.decode_experts


def _step(bench: Workbench, side: Side, cache: Cache):
    def prepare(seed: int):
        side.route(1, seed)
        ids = bench.ids(1, seed)
        return lambda: side.model(input_ids=ids, use_cache=True, **{CACHE_NAME: cache}).logits

    return prepare


def _attention(side: Side, context: int):
    cache = filled_cache(side, context, layers=1)
    base = side.model.model

    def prepare(seed: int):
        positions = torch.tensor([[cache.get_seq_length()]])
        generator = torch.Generator().manual_seed(seed)
        states = torch.randn(1, 1, base.config.hidden_size, generator=generator).to(side.model.dtype)
        rotary = base.rotary_emb(states, positions)
        attend = base.layers[0].self_attn
        return lambda: attend(
            hidden_states=states, position_embeddings=rotary, attention_mask=None, **{CACHE_NAME: cache}
        )[0]

    return prepare
