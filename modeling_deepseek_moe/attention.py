"""Attention: Multi-head Latent Attention in its two forms, and plain multi-head or grouped-query attention.

B sequences, T query tokens, L cached tokens, h heads; r = kv_lora_rank. Source: FACTS 2.1, 2.2.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRMSNorm, eager_attention_forward

from .absorbed_matrix import forget_matrices, matrix_of
from .absorption import absorbed_is_cheaper, mix_latents, score_latents, visible_keys
from .half_products import goes_through_float32, wide_dtype
from .indexer import DeepseekMoeIndexer
from .latent_cache import update_latents
from .linear import call_linear
from .rotary import apply_rotary, softmax_scale
from .transformers_names import one_cache, update_cache

_TAKE_ANY_MASK = ("eager", "sdpa", "sdpa_cudnn", "mla_triton")


class DeepseekMoeRMSNorm(LlamaRMSNorm):
    """Normalises in float32, casts, then multiplies with the weight in the model's dtype."""


class DeepseekMoeLatentAttention(nn.Module):
    """MLA. The cache holds one tensor a layer: the normed latent and the rotated shared key, `[B, 1, L, r + rope]`.

    With an indexer (DeepSeek-V3.2) a second one holds the indexer's keys, `[B, 1, L, index_head_dim]`.
    """

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = True
        self.num_key_value_groups = 1
        self.scaling = softmax_scale(config)
        self.q_lora_rank, self.kv_lora_rank = config.q_lora_rank, config.kv_lora_rank
        self.head_widths = [config.qk_nope_head_dim, config.qk_rope_head_dim]
        self.up_widths = [config.qk_nope_head_dim, config.v_head_dim]
        hidden, bias, heads = config.hidden_size, config.attention_bias, config.num_attention_heads
        query_width = heads * sum(self.head_widths)
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden, query_width, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = DeepseekMoeRMSNorm(config.q_lora_rank, eps=config.latent_norm_eps)
            self.q_b_proj = nn.Linear(config.q_lora_rank, query_width, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, config.kv_lora_rank + config.qk_rope_head_dim, bias=bias)
        self.kv_a_layernorm = DeepseekMoeRMSNorm(config.kv_lora_rank, eps=config.latent_norm_eps)
        self.kv_b_proj = nn.Linear(config.kv_lora_rank, heads * sum(self.up_widths), bias=False)
        self.o_proj = nn.Linear(heads * config.v_head_dim, hidden, bias=config.has_output_bias)
        self.indexer = None if config.index_topk is None else DeepseekMoeIndexer(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values=None,
        cache=None,
        query_scale: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the output `[B, T, H]` and, where the implementation computes them, weights `[B, h, T, L]`.

        Args:
            query_scale: `[B or 1, T]`, a factor on the queries; see `rotary.query_scale`.
        """
        query_input = self.query_input(hidden_states)
        q_nope, q_rope = self.project_queries(query_input, position_embeddings, query_scale)
        cached = self.project_latents(hidden_states, position_embeddings)
        indexed = None if self.indexer is None else self.indexer.keys(hidden_states, position_embeddings)
        cache = one_cache(past_key_values, cache)
        if cache is not None:
            cached, indexed = update_latents(cache, cached, indexed, self.kv_lora_rank, self.layer_idx)
        if self.indexer is not None and cached.shape[2] > self.config.index_topk:
            mask = self.visible_keys(attention_mask, q_nope.shape[2], cached)
            chosen = self.indexer.choose(hidden_states, query_input, position_embeddings, indexed, mask)
            attention_mask = chosen_only(chosen, mask, self.config._attn_implementation, q_nope.dtype)
        inputs, up_weight = (q_nope, q_rope, cached, attention_mask), None
        if absorbed_is_cheaper(self.config, q_nope.shape[2], cached.shape[2]):
            up_weight = matrix_of(self.kv_b_proj, cached[..., : self.kv_lora_rank].squeeze(1))
        if up_weight is None:
            attention_output, weights = self.expanded(*inputs, **kwargs)
        else:
            attention_output, weights = self.absorbed(*inputs, up_weight)
        return call_linear(self.o_proj, attention_output.flatten(2)), weights

    def train(self, mode: bool = True):
        if mode:
            forget_matrices(self.kv_b_proj)
        return super().train(mode)

    def query_input(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """What queries are projected from: the normed latent `[B, T, q_lora_rank]`, or `hidden_states` themselves."""
        if self.q_lora_rank is None:
            return hidden_states
        return self.q_a_layernorm(call_linear(self.q_a_proj, hidden_states))

    def project_queries(self, query_input, position_embeddings, query_scale=None) -> tuple[torch.Tensor, torch.Tensor]:
        """Per-head queries `[B, h, T, nope]` and rotated `[B, h, T, rope]`."""
        queries = call_linear(self.q_proj if self.q_lora_rank is None else self.q_b_proj, query_input)
        queries = queries.unflatten(-1, (-1, sum(self.head_widths))).transpose(1, 2)
        q_nope, q_rope = queries.split(self.head_widths, dim=-1)
        q_rope = apply_rotary(q_rope, *position_embeddings, self.config.rope_interleave)
        if query_scale is None:
            return q_nope, q_rope
        factor = query_scale[:, None, :, None].to(q_nope.dtype)
        return q_nope * factor, q_rope * factor

    def project_latents(self, hidden_states, position_embeddings) -> torch.Tensor:
        """What is cached of each token: `[B, 1, T, r + rope]`. The shared rotary key is not normalised."""
        compressed = call_linear(self.kv_a_proj_with_mqa, hidden_states).unsqueeze(1)
        latent, k_rope = compressed.split([self.kv_lora_rank, self.head_widths[1]], dim=-1)
        k_rope = apply_rotary(k_rope, *position_embeddings, self.config.rope_interleave)
        return torch.cat((self.kv_a_layernorm(latent), k_rope.to(latent.dtype)), dim=-1)

    def expanded(self, q_nope, q_rope, cached, attention_mask, **kwargs):
        """Keys and values per head, through the attention implementation the config names."""
        latent, k_rope = cached.split([self.kv_lora_rank, self.head_widths[1]], dim=-1)
        up = call_linear(self.kv_b_proj, latent.squeeze(1)).unflatten(-1, (-1, sum(self.up_widths))).transpose(1, 2)
        k_nope, values = up.split(self.up_widths, dim=-1)
        keys = torch.cat((k_nope, k_rope.expand(-1, k_nope.shape[1], -1, -1)), dim=-1)
        queries = torch.cat((q_nope, q_rope), dim=-1)
        implementation = self.config._attn_implementation
        missing = keys.shape[-1] - values.shape[-1]
        # The fused CPU kernel of scaled_dot_product_attention wants values as wide as keys.
        pads = implementation == "sdpa" and keys.device.type == "cpu" and missing > 0
        output, weights = attend(
            self,
            queries,
            keys,
            F.pad(values, (0, missing)) if pads else values,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return (output[..., : self.up_widths[1]] if pads else output), weights

    def absorbed(self, q_nope, q_rope, cached, attention_mask, up_weight):
        """Queries moved into the latent space attend to the cache itself; outputs `[B, T, h, v]` and weights.

        `up_weight` is the matrix of `kv_b_proj`, `[h * (nope + v), r]`.
        """
        up_hwr = up_weight.unflatten(0, (-1, sum(self.up_widths)))
        key_up_hnr, value_up_hvr = up_hwr.split(self.up_widths, dim=1)
        dtype, wide = q_nope.dtype, wide_dtype(q_nope)
        latent_queries = torch.einsum("bhtn,hnr->bhtr", q_nope.to(wide), key_up_hnr.to(wide)).to(dtype)
        queries = torch.cat((latent_queries, q_rope), dim=-1)
        implementation = self.config._attn_implementation
        mask = self.visible_keys(attention_mask, queries.shape[2], cached)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        mixed_latent = weights = None
        # An implementation may have a kernel for latents, which leaves to torch what it does not do.
        if attend_latents := getattr(attend, "attend_latents", None):
            mixed_latent = attend_latents(self, queries, cached.squeeze(1), mask)
        if mixed_latent is None:
            mixed_latent, weights = self.attend_latents(queries, cached.squeeze(1), mask)
        # The large operand first, as it lies in memory: einsum would copy it transposed.
        values = (value_up_hvr.to(wide) @ mixed_latent.permute(1, 3, 0, 2).flatten(2).to(wide)).to(dtype)
        return values.unflatten(-1, (len(mixed_latent), -1)).permute(2, 3, 0, 1).contiguous(), weights

    def visible_keys(self, attention_mask, query_length: int, cached: torch.Tensor) -> torch.Tensor | None:
        """`absorption.visible_keys` for the attention implementation in use."""
        return visible_keys(attention_mask, query_length, cached, "flash" in self.config._attn_implementation)

    def attend_latents(self, queries, cached, mask) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums of latents `[B, h, T, r]`, weights; from queries `[B, h, T, r + rope]` and cache `[B, L, r + rope]`."""
        # One key-value head: heads and query tokens are rows of one matrix product a sequence.
        scores = score_latents(queries.flatten(1, 2), cached).float() * self.scaling
        scores = scores.unflatten(1, queries.shape[1:3])
        if mask is not None and mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        elif mask is not None:
            scores = scores + mask
        weights = scores.softmax(dim=-1).to(cached.dtype)
        weights = F.dropout(weights, self.config.attention_dropout, self.training)
        mixed_latent = mix_latents(weights.flatten(1, 2), cached[..., : self.kv_lora_rank])
        return mixed_latent.unflatten(1, queries.shape[1:3]), weights


def attend(module: nn.Module, queries, keys, values, mask, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What the attention implementation that the config names makes of them: output `[B, T, h, v]` and weights."""
    implementation = module.config._attn_implementation
    interface = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
    if implementation not in ("eager", "sdpa") or not goes_through_float32(queries):
        return interface(module, queries, keys, values, mask, **kwargs)
    dtype, tensors = queries.dtype, [tensor.float() for tensor in (queries, keys, values)]
    mask = mask.float() if mask is not None and mask.is_floating_point() else mask
    with torch.autocast("cpu", enabled=False):
        output, weights = interface(module, *tensors, mask, **kwargs)
    return output.to(dtype), weights if weights is None else weights.to(dtype)


def chosen_only(chosen: torch.Tensor, mask: torch.Tensor | None, implementation: str, dtype: torch.dtype):
    """The mask that shows an attention implementation no other keys than `chosen`, bool `[B, 1, T, L]`.

    Args:
        mask: what else the implementation would be given: bool, or additive, whose values stay.

    Raises:
        ValueError: a kernel that takes no such mask.
    """
    if implementation not in _TAKE_ANY_MASK:
        raise ValueError(
            f"attn_implementation={implementation!r} cannot leave out the tokens that the indexer did not choose "
            f"(contexts longer than index_topk); choices: {', '.join(map(repr, _TAKE_ANY_MASK))}"
        )
    is_additive = mask is not None and mask.dtype != torch.bool
    if implementation != "eager" and not is_additive:
        return chosen
    mask = mask if is_additive else torch.zeros((), dtype=dtype, device=chosen.device)
    return mask.masked_fill(~chosen, torch.finfo(mask.dtype).min)


class DeepseekMoeAttention(nn.Module):
    """Plain multi-head or grouped-query attention, as in DeepSeekMoE 16B and in models made of dense ones."""

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = True
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = softmax_scale(config)
        hidden, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(hidden, config.num_attention_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden, config.num_key_value_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden, config.num_key_value_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, hidden, bias=config.has_output_bias)
        if config.use_qk_norm:
            self.q_norm = DeepseekMoeRMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = DeepseekMoeRMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values=None,
        cache=None,
        query_scale: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the output `[B, T, H]` and, where the implementation computes them, weights `[B, h, T, L]`."""
        queries, keys, values = (
            call_linear(projection, hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.config.use_qk_norm:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        queries = apply_rotary(queries, *position_embeddings, self.config.rope_interleave)
        if query_scale is not None:
            queries = queries * query_scale[:, None, :, None].to(queries.dtype)
        keys = apply_rotary(keys, *position_embeddings, self.config.rope_interleave)
        cache = one_cache(past_key_values, cache)
        if cache is not None:
            keys, values = update_cache(cache, keys, values, self.layer_idx, kwargs)
        output, weights = attend(
            self,
            queries,
            keys,
            values,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return call_linear(self.o_proj, output.flatten(2)), weights
