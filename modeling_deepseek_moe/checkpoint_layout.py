"""How a checkpoint lies on disk, and how that maps to the model's parameters.

On disk every generation keeps DeepSeek's names: one tensor a projection and expert, MTP modules as the layers after
the last (FACTS 8.1). In memory the experts of a layer are stacked. transformers applies the rows of
`EXPERT_STACKING` while loading and reverses them while saving, bit for bit.
"""

import re
from collections.abc import Iterator

import torch
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from .families import FAMILIES
from .fp8_blocks import SCALE_SUFFIX, scale_shape
from .parts import is_linear_weight, part_of

EXPERT_STACKING = [
    WeightConverter(
        source_patterns=["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"],
        target_patterns="mlp.experts.gate_up_proj",
        operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
    ),
    WeightConverter(
        source_patterns="mlp.experts.*.down_proj.weight",
        target_patterns="mlp.experts.down_proj",
        operations=[MergeModulelist(dim=0)],
    ),
]

register_checkpoint_conversion_mapping("deepseek_moe", EXPERT_STACKING, overwrite=True)

# What each MTP module of a checkpoint repeats, and the main model's tensor that it is a copy of.
MTP_COPIES = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}
# Those, and rotary tables of older exports.
REDUNDANT_TENSORS = [*(rf"layers\.\d+\.{re.escape(name)}$" for name in MTP_COPIES), r"inv_freq$"]
_REDUNDANT = re.compile("|".join(REDUNDANT_TENSORS))
_FP8_OF_INDEXER = re.compile(r"\.self_attn\.indexer\.(?:wq_b|wk)\.weight$")

TensorSpec = tuple[tuple[int, ...], torch.dtype]


def expected_tensors(config, fp8: bool = False, stacked: bool | None = None) -> dict[str, TensorSpec]:
    """Name, shape and dtype of every tensor of a complete causal language model checkpoint, in layer order.

    MTP modules are included with their copies of embedding and head. dtype is the config's (float32 if it has
    none), except for the routing bias, which is always float32.

    Args:
        config: a `DeepseekMoeConfig`.
        fp8: weights that `is_fp8_weight` names are float8_e4m3fn, each followed by its float32 scales (FACTS 3.4).
        stacked: the experts of a layer lie in two tensors; by default as the model's family has it.
    """
    stacked = stacks_experts(config) if stacked is None else stacked
    dtype = config.dtype or torch.float32
    if isinstance(dtype, str):  # save_pretrained leaves a name in the config
        dtype = getattr(torch, dtype)
    specs = {"model.embed_tokens.weight": (config.vocab_size, config.hidden_size)}
    for layer in range(config.num_hidden_layers + config.num_nextn_predict_layers):
        for name, shape in _layer_shapes(config, layer, stacked):
            specs[f"model.layers.{layer}.{name}"] = shape
    specs["model.norm.weight"] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        specs["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    tensors = {}
    for name, shape in specs.items():
        if fp8 and is_fp8_weight(name):
            tensors[name] = (shape, torch.float8_e4m3fn)
            tensors[name + SCALE_SUFFIX] = (scale_shape(shape), torch.float32)
        else:
            tensors[name] = (shape, torch.float32 if name.endswith("e_score_correction_bias") else dtype)
    return tensors


def parameter_counts(config) -> tuple[int, int]:
    """Total parameters and those active for one token, without MTP modules (FACTS 7.3).

    Routing biases count in the total; they take part in no product, so not among the active.
    """
    total = active = 0
    share = config.num_experts_per_tok / config.n_routed_experts if config.n_routed_experts else 1
    for name, (shape, _) in expected_tensors(config).items():
        if is_mtp_tensor(name, config):
            continue
        size = torch.Size(shape).numel()
        total += size
        if part_of(name) == "routed_experts":
            active += size * share
        elif not name.endswith("e_score_correction_bias"):
            active += size
    return total, round(active)


def stacks_experts(config) -> bool:
    """Whether checkpoints of this model hold the experts of a layer in two tensors, as its family does."""
    return config.family is not None and FAMILIES[config.family].stacks_experts


def is_mtp_tensor(name: str, config) -> bool:
    """Whether a tensor or module name belongs to a layer behind the main ones."""
    _, separator, rest = ("." + name).partition(".layers.")
    index = rest.partition(".")[0]
    return bool(separator) and index.isdecimal() and int(index) >= config.num_hidden_layers


def is_fp8_weight(name: str) -> bool:
    """Whether DeepSeek publishes this tensor in FP8 blocks, where a checkpoint is in FP8 at all (FACTS 3.4).

    Router, norms, embedding, head, the MTP modules' eh_proj and the weights of an indexer's heads stay as they are.
    """
    return is_linear_weight(name) or _FP8_OF_INDEXER.search(name) is not None


def is_redundant(name: str) -> bool:
    """Whether a checkpoint may carry or lack this tensor freely."""
    return _REDUNDANT.search(name) is not None


def _layer_shapes(config, layer: int, stacked: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden = config.hidden_size
    for name, shape in _attention_shapes(config):
        yield f"self_attn.{name}", shape
    if config.is_moe_layer(layer):
        experts, width = config.n_routed_experts, config.moe_intermediate_size
        yield "mlp.gate.weight", (experts, hidden)
        if config.topk_method == "noaux_tc":
            yield "mlp.gate.e_score_correction_bias", (experts,)
        if stacked:
            yield "mlp.experts.gate_up_proj", (experts, 2 * width, hidden)
            yield "mlp.experts.down_proj", (experts, hidden, width)
        for expert in range(0 if stacked else experts):
            yield from _mlp_shapes(f"mlp.experts.{expert}", hidden, width)
        if config.n_shared_experts:
            yield from _mlp_shapes("mlp.shared_experts", hidden, width * config.n_shared_experts)
    else:
        yield from _mlp_shapes("mlp", hidden, config.intermediate_size)
    yield "input_layernorm.weight", (hidden,)
    yield "post_attention_layernorm.weight", (hidden,)
    if layer >= config.num_hidden_layers:
        yield "enorm.weight", (hidden,)
        yield "hnorm.weight", (hidden,)
        yield "eh_proj.weight", (hidden, 2 * hidden)
        yield "shared_head.norm.weight", (hidden,)
        yield from ((name, (config.vocab_size, hidden)) for name in MTP_COPIES)


def _mlp_shapes(prefix: str, hidden: int, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{prefix}.gate_proj.weight", (width, hidden)
    yield f"{prefix}.up_proj.weight", (width, hidden)
    yield f"{prefix}.down_proj.weight", (hidden, width)


def _attention_shapes(config) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, heads, bias = config.hidden_size, config.num_attention_heads, config.attention_bias
    if config.kv_lora_rank is None:
        widths = {"q_proj": heads, "k_proj": config.num_key_value_heads, "v_proj": config.num_key_value_heads}
        projections = {name: (count * config.head_dim, hidden, bias) for name, count in widths.items()}
        projections["o_proj"] = (hidden, heads * config.head_dim, config.has_output_bias)
        if config.use_qk_norm:
            yield from ((f"{name}.weight", (config.head_dim,)) for name in ("q_norm", "k_norm"))
    else:
        queries, rank = heads * config.qk_head_dim, config.kv_lora_rank
        if config.q_lora_rank is None:
            projections = {"q_proj": (queries, hidden, False)}
        else:
            projections = {
                "q_a_proj": (config.q_lora_rank, hidden, bias),
                "q_b_proj": (queries, config.q_lora_rank, False),
            }
            yield "q_a_layernorm.weight", (config.q_lora_rank,)
        yield "kv_a_layernorm.weight", (rank,)
        projections["kv_a_proj_with_mqa"] = (rank + config.qk_rope_head_dim, hidden, bias)
        projections["kv_b_proj"] = (heads * (config.qk_nope_head_dim + config.v_head_dim), rank, False)
        projections["o_proj"] = (hidden, heads * config.v_head_dim, config.has_output_bias)
        if config.index_topk is not None:
            count, width = config.index_n_heads, config.index_head_dim
            yield from ((f"indexer.k_norm.{name}", (width,)) for name in ("weight", "bias"))
            projections["indexer.wq_b"] = (count * width, config.q_lora_rank, False)
            projections["indexer.wk"] = (width, hidden, False)
            projections["indexer.weights_proj"] = (count, hidden, False)
    for name, (rows, columns, has_bias) in projections.items():
        yield f"{name}.weight", (rows, columns)
        if has_bias:
            yield f"{name}.bias", (rows,)
