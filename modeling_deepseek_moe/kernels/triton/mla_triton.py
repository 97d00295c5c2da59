"""`attn_implementation="mla_triton"`: "sdpa", with decoding by latent attention in a Triton kernel.

In the expanded form it is transformers' "sdpa", torch's best kernel for these heads. In the absorbed form a few query
tokens attend to the latent cache in `latent_decode`. What that does not do stays with torch: gradients, dropout, many
query tokens, ranks that do not fit, other or mixed dtypes, and masks that add or that differ between heads.

The model's files do not import from here. They find `attend_latents` and `refusal` as attributes of the registered
function.
"""

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward


def mla_triton_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The expanded form, in the interface of transformers' attention functions."""
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def attend_latents(
    module: nn.Module, queries: torch.Tensor, cached: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor | None:
    """The absorbed form: sums of latents `[B, h, T, r]`, or None where torch is to compute them.

    Args:
        module: a DeepseekMoeLatentAttention.
        queries: `[B, h, T, r + rope]`.
        cached: `[B, L, r + rope]`.
        mask: what `visible_keys` gives.

    Raises:
        ValueError: Triton cannot run on the tensors' device.
    """
    # Triton is imported where it is used: not every platform has it.
    from .latent_decode import DTYPES, MOST_TOKENS, WIDEST_RANK, latent_attention

    (batch, _, tokens, _), length, rank = queries.shape, cached.shape[1], module.kv_lora_rank
    drops = module.training and module.config.attention_dropout > 0
    is_one_dtype = queries.dtype in DTYPES and cached.dtype == queries.dtype
    if drops or not is_one_dtype or tokens > MOST_TOKENS or rank > WIDEST_RANK or rank % 16:
        return None
    if torch.is_grad_enabled() and (queries.requires_grad or cached.requires_grad):
        return None
    if mask is not None:
        differs = mask.dim() == 4 and mask.shape[1] != 1
        if mask.dtype != torch.bool or differs:
            return None
        mask = (mask.squeeze(1) if mask.dim() == 4 else mask).expand(batch, tokens, length)
    return latent_attention(queries, cached, rank, module.scaling, mask)


def _refusal(config, device: torch.device) -> str | None:
    """Why a model cannot run by this name on `device`; None if it can."""
    if config.kv_lora_rank is None:
        return "it decodes latent attention, and this model's is plain"
    from .launch import refusal

    return refusal(device)


mla_triton_attention.attend_latents = attend_latents
mla_triton_attention.refusal = _refusal
