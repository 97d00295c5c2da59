"""The rows of the GPU benchmark: what is measured, the goal of each, and the operations and bytes counted for it."""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import Any, NamedTuple

from gpu_counts import (
    HALF,
    V2_LITE,
    V3,
    ExpertSize,
    LatentSize,
    Launch,
    Work,
    causal_attention,
    expert_backward,
    expert_forward,
    grouped_mm_backward,
    grouped_mm_forward,
    latent_attention,
    tile_padding,
    torch_latent_attention,
)
from routing import ZipfRouting
from workbench import SIZES as MODEL_SIZES

from modeling_deepseek_moe import DeepseekMoeConfig
from modeling_deepseek_moe.presets import released_json

RANK = 16  # of LoRA
OTHER_TILE = 128  # rows of a tile in the other sides' products


class Sizes(NamedTuple):
    """What the rows are made of; `model` are the fields of the config.json of the model of the whole steps."""

    experts: tuple[ExpertSize, ...]
    tokens: tuple[int, ...]
    heads: tuple[int, ...]
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    rank: int
    attention: tuple[tuple[int, int], ...]  # tokens and heads
    decode_context: int
    step_tokens: int
    model: dict[str, Any]

    @property
    def model_experts(self) -> ExpertSize:
        """Of the model of the whole steps."""
        config = DeepseekMoeConfig.from_dict(self.model)
        width, routed = config.moe_intermediate_size, config.n_routed_experts
        return ExpertSize("the model's", config.hidden_size, width, routed, config.num_experts_per_tok)


RELEASED = Sizes(
    experts=(V2_LITE, V3),
    tokens=(16384, 8192, 4096),
    heads=(16, 128),
    batches=(64, 8, 1),
    contexts=(65536, 8192, 2048),
    rank=512,
    attention=((4096, 16), (16384, 16), (4096, 128)),
    decode_context=8192,
    step_tokens=4096,
    model=released_json("deepseek-v2-lite"),
)
QUICK = RELEASED._replace(tokens=(4096,), batches=(8,), contexts=(8192,), attention=((4096, 16),))
TINY = Sizes(
    experts=(ExpertSize("tiny", 64, 32, 8, 2),),
    tokens=(16,),
    heads=(2,),
    batches=(1,),
    contexts=(40,),
    rank=32,
    attention=((64, 2),),
    decode_context=24,
    step_tokens=12,
    model={
        **released_json("deepseek-v2-lite"),
        **MODEL_SIZES["tiny"].overrides,
        "num_hidden_layers": 2,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
    },
)
SIZES = {"released": RELEASED, "quick": QUICK, "tiny": TINY}


class Row(NamedTuple):
    """One comparison.

    `others` are the counted sides besides ours; `ratios` the goals, ("at least", x) for other / ours and
    ("at most", x) for ours / other; `share` the goal of a measured roof: ("product" or "copy", share of it).
    """

    section: str
    work: str
    ours: Work
    others: dict[str, Work]
    ratios: dict[str, tuple[str, float]]
    share: tuple[str, float] | None
    facts: dict[str, Any]


def rows_of(section: str, sizes: Sizes = RELEASED) -> list[Row]:
    """In the order in which they are measured."""
    return _ROWS[section](sizes)


def _experts(sizes: Sizes) -> list[Row]:
    found = []
    for size, tokens in product(sizes.experts, sizes.tokens):
        ours, other = _padding(size, tokens), _padding(size, tokens, OTHER_TILE)
        for backward in (False, True):
            work, others = expert_forward(size, tokens, ours, save=backward), grouped_mm_forward(size, tokens, other)
            if backward:
                work += expert_backward(size, tokens, ours)
                others += grouped_mm_backward(size, tokens, other)
            found.append(
                Row(
                    "experts",
                    f"{size.name} experts, {tokens} tokens, forward{' + backward' * backward}",
                    work,
                    {"grouped_mm": others},
                    {"grouped_mm": ("at least", 1.15)},
                    ("product", 0.65) if size is V3 else None,
                    {"size": size, "tokens": tokens, "backward": backward},
                )
            )
    return found


def _lora(sizes: Sizes) -> list[Row]:
    found = []
    for size, tokens in product(sizes.experts, sizes.tokens):
        ours, other = _padding(size, tokens), _padding(size, tokens, OTHER_TILE)
        forward, backward = grouped_mm_forward, grouped_mm_backward
        work = expert_forward(size, tokens, ours, RANK, save=True)
        frozen = expert_forward(size, tokens, ours, save=True)
        others = {
            "frozen experts without LoRA": frozen + expert_backward(size, tokens, ours, trained=False),
            "PEFT, grouped_mm": forward(size, tokens, other, RANK) + backward(size, tokens, other, False, RANK),
        }
        goals = {"frozen experts without LoRA": ("at most", 1.2), "PEFT, grouped_mm": ("at least", 2.0)}
        found.append(
            Row(
                "lora",
                f"{size.name} experts with LoRA r={RANK}, {tokens} tokens, forward + backward",
                work + expert_backward(size, tokens, ours, RANK, trained=False),
                others,
                goals,
                None,
                {"size": size, "tokens": tokens},
            )
        )
    return found


def _latent(sizes: Sizes) -> list[Row]:
    found = []
    for heads, context, batch, is_fp8 in product(sizes.heads, sizes.contexts, sizes.batches, (False, True)):
        size, name = LatentSize(batch, context, heads, sizes.rank), "FP8" if is_fp8 else "bf16"
        found.append(
            Row(
                "latent",
                f"latent attention, {name}, {heads} heads, batch {batch}, {context} tokens of context",
                latent_attention(size, is_fp8),
                {"torch, bf16": torch_latent_attention(size)},
                {},
                ("product", 0.5) if heads == 128 else ("copy", 0.75),
                {"size": size, "is_fp8": is_fp8},
            )
        )
    return found


def _attention(sizes: Sizes) -> list[Row]:
    return [
        Row(
            "attention",
            f"{heads} heads of (192, 128), {tokens} tokens, {kind}, forward{' + backward' * backward}",
            causal_attention(tokens // documents, heads, backward=backward).times(documents),
            {},
            {},
            None,
            {"tokens": tokens, "heads": heads, "documents": documents, "backward": backward},
        )
        for tokens, heads in sizes.attention
        for documents, kind in ((1, "causal"), (8, "8 packed sequences"))
        for backward in (False, True)
    ]


def _decode(sizes: Sizes) -> list[Row]:
    context = sizes.decode_context
    return [
        Row(
            "decode",
            f"decode step of V2-Lite, {context} tokens of context",
            decode_step(sizes, absorbed=True),
            {"transformers": decode_step(sizes, absorbed=False)},
            {"transformers": ("at least", 3.0)},
            None,
            {"context": context, "model": sizes.model, "size": sizes.model_experts},
        )
    ]


def _step(sizes: Sizes) -> list[Row]:
    layers = DeepseekMoeConfig.from_dict(sizes.model).num_hidden_layers
    return [
        Row(
            "step",
            f"LoRA step of V2-Lite, {layers} layers, {sizes.step_tokens} tokens, gradient checkpointing",
            lora_step(sizes, is_ours=True),
            {"transformers + PEFT": lora_step(sizes, is_ours=False)},
            {"transformers + PEFT": ("at least", 1.8)},
            None,
            {"tokens": sizes.step_tokens, "model": sizes.model, "size": sizes.model_experts},
        )
    ]


_ROWS = {
    "experts": _experts,
    "lora": _lora,
    "latent": _latent,
    "decode": _decode,
    "step": _step,
    "attention": _attention,
}


def decode_step(sizes: Sizes, absorbed: bool) -> Work:
    """One token: every weight that serves it is read once; without absorption the whole cache is expanded."""
    config, context = DeepseekMoeConfig.from_dict(sizes.model), sizes.decode_context
    heads, rank, wide = config.num_attention_heads, config.kv_lora_rank, config.qk_nope_head_dim + config.v_head_dim
    moe_layers = config.num_hidden_layers - config.first_k_dense_replace
    linears = [_linear(1, *shape) for shape in _linears(config)]
    experts = expert_forward(sizes.model_experts._replace(E=config.num_experts_per_tok), 1)
    if absorbed:
        attention = Work((_linear(1, rank, heads * wide),)) + latent_attention(LatentSize(1, context, heads, rank))
    else:
        keys, values = context * heads * config.qk_head_dim, context * heads * config.v_head_dim
        attention = Work(
            (
                _linear(context, rank, heads * wide),
                Launch("keys", 0, 2 * keys * HALF),
                Launch("attention", 2 * (keys + values), (keys + values) * HALF),
            )
        )
    return Work(tuple(linears)) + experts.times(moe_layers) + attention.times(config.num_hidden_layers)


def lora_step(sizes: Sizes, is_ours: bool) -> Work:
    """Every layer forward twice and backward once; norms, rotary embedding and loss are not counted."""
    config, tokens, size = DeepseekMoeConfig.from_dict(sizes.model), sizes.step_tokens, sizes.model_experts
    moe_layers = config.num_hidden_layers - config.first_k_dense_replace
    kv_b = (config.kv_lora_rank, config.num_attention_heads * (config.qk_nope_head_dim + config.v_head_dim))
    *layers, head = _linears(config)
    linears = [_linear(tokens, *head).times(2)]
    for shape in [*layers, *[kv_b] * config.num_hidden_layers]:
        linears.append(_linear(tokens, *shape).times(3))
        # Both factors' products forward twice, then back, and the gradients of both.
        linears += [_linear(tokens, shape[0], RANK).times(4), _linear(tokens, RANK, shape[1]).times(4)]
    heads = config.num_attention_heads
    attention = causal_attention(tokens, heads) + causal_attention(tokens, heads, backward=True)
    padding = _padding(size, tokens, None if is_ours else OTHER_TILE)
    if is_ours:
        experts = expert_backward(size, tokens, padding, RANK, trained=False)
        experts += expert_forward(size, tokens, padding, RANK).times(2)
    else:
        experts = grouped_mm_backward(size, tokens, padding, False, RANK)
        experts += grouped_mm_forward(size, tokens, padding, RANK).times(2)
    return Work(tuple(linears)) + attention.times(config.num_hidden_layers) + experts.times(moe_layers)


@cache
def _padding(size: ExpertSize, tokens: int, tile: int | None = None) -> float:
    from modeling_deepseek_moe.kernels.triton.grouped_gemm import product_tiles

    if tile is None:
        tile = product_tiles(tokens * size.K, size.E, size.H, HALF, 227 * 1024).rows
    counts = ZipfRouting(size.E, size.K).draw(tokens, seed=0).flatten().bincount(minlength=size.E)
    return tile_padding(counts.tolist(), tile)


def _linears(config: DeepseekMoeConfig) -> list[tuple[int, int]]:
    """Inputs and outputs of every linear layer that a token passes once, the head last; `kv_b_proj` is not one."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    found = []
    for layer in range(config.num_hidden_layers):
        found += [
            (hidden, heads * config.qk_head_dim),
            (hidden, config.kv_lora_rank + config.qk_rope_head_dim),
            (heads * config.v_head_dim, hidden),
        ]
        is_dense = layer < config.first_k_dense_replace
        width = config.intermediate_size if is_dense else config.n_shared_experts * config.moe_intermediate_size
        found += [(hidden, 2 * width), (width, hidden)]
        if not is_dense:
            found.append((hidden, config.n_routed_experts))
    return [*found, (hidden, config.vocab_size)]


def _linear(tokens: int, inputs: int, outputs: int) -> Launch:
    numbers = inputs * outputs + tokens * (inputs + outputs)
    return Launch("linear", 2 * tokens * inputs * outputs, numbers * HALF)
