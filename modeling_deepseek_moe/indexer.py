"""DeepSeek-V3.2's indexer: which cached tokens each query of latent attention may see.

B sequences, T query tokens, L cached tokens, h indexer heads of width d. Its keys lie in the cache beside the latents.
"""

import torch
from torch import nn

from .linear import call_linear
from .rotary import apply_rotary

_SCORES = 2**26  # numbers of scores of all heads that are made at once


class DeepseekMoeIndexer(nn.Module):
    """Scores every visible token and keeps the `index_topk` best: `sum over heads of w * relu(q . k / sqrt(d))`.

    The model's makers rotate queries and keys by a Hadamard matrix and score in FP8; the rotation changes no product,
    and the choice here is made in float32. Its parameters get no gradient from the language model loss.
    """

    def __init__(self, config):
        super().__init__()
        self.num_heads, self.head_dim, self.index_topk = config.index_n_heads, config.index_head_dim, config.index_topk
        self.wq_b = nn.Linear(config.q_lora_rank, self.num_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(config.hidden_size, self.head_dim, bias=False)
        self.k_norm = nn.LayerNorm(self.head_dim, eps=1e-6)
        self.weights_proj = nn.Linear(config.hidden_size, self.num_heads, bias=False)
        self.requires_grad_(False)

    @torch.no_grad()
    def keys(
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """What is cached of each token of `hidden_states [B, T, H]`: `[B, 1, T, d]`, its first numbers rotated."""
        keys = self.k_norm(call_linear(self.wk, hidden_states)).unsqueeze(1)
        return apply_rotary(keys, *position_embeddings, interleaved=False)

    @torch.no_grad()
    def choose(
        self,
        hidden_states: torch.Tensor,
        query_latent: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        keys: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Which keys each query sees, bool `[B, 1, T, L]`: of the visible ones the `index_topk` with the best scores.

        Args:
            hidden_states: `[B, T, H]`, what attention reads.
            query_latent: `[B, T, q_lora_rank]`, the normed one.
            position_embeddings: of the queries.
            keys: `[B, 1, L, d]`, all that are cached.
            mask: what is visible (causal, no padding, the same packed sequence), bool or additive, broadcasts to
                `[B, 1, T, L]`; None: everything.
        """
        batch, length = query_latent.shape[:2]
        queries = call_linear(self.wq_b, query_latent).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        queries = apply_rotary(queries, *position_embeddings, interleaved=False).float() * self.head_dim**-0.5
        dtype = self.weights_proj.weight.dtype  # of a quantised layer not that of what it multiplies
        weights = call_linear(self.weights_proj, hidden_states.to(dtype) if dtype.is_floating_point else hidden_states)
        weights = weights.float() * self.num_heads**-0.5
        keys_mT = keys.float().mT
        if mask is None:
            mask = keys.new_ones((), dtype=torch.bool)
        elif mask.dtype != torch.bool:
            mask = mask > torch.finfo(mask.dtype).min / 2
        visible = mask.expand(batch, 1, length, keys.shape[2])
        chosen = torch.zeros_like(visible, memory_format=torch.contiguous_format)
        step = max(1, _SCORES // (batch * self.num_heads * keys.shape[2]))
        for start in range(0, length, step):
            part = slice(start, start + step)
            scores = (queries[:, :, part] @ keys_mT).relu_()
            scores = torch.einsum("bth,bhtl->btl", weights[:, part], scores)
            scores = scores.masked_fill(~visible[:, 0, part], float("-inf"))
            best = scores.topk(self.index_topk, dim=-1, sorted=False).indices
            chosen[:, 0, part].scatter_(-1, best, True)
        return chosen & visible
