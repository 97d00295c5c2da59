"""What the absorbed form of latent attention needs besides the attention itself (FACTS 2.2).

In the absorbed form `kv_b_proj` is moved to the query and output side, so attention reads the latent cache as it is:
one key-value head of width kv_lora_rank + rope for all query heads.
"""

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_mask


def absorbed_is_cheaper(config, query_length: int, key_length: int) -> bool:
    """Whether the absorbed form takes fewer multiply-adds a head than expanding the whole cache.

    Both move `kv_lora_rank * (nope + v)` numbers through `kv_b_proj`, the expanded form once a cached token, the
    absorbed once a query token; attention itself is narrower when expanded. Without a cached prefix each token is
    expanded exactly once and the fused attention kernels apply, so the expanded form is kept.
    """
    if query_length >= key_length:
        return False
    rank, rope = config.kv_lora_rank, config.qk_rope_head_dim
    up_projection = rank * (config.qk_nope_head_dim + config.v_head_dim)
    pairs = query_length * key_length
    expanded = key_length * up_projection + pairs * (config.qk_head_dim + config.v_head_dim)
    absorbed = query_length * up_projection + pairs * (rank + rope + rank)
    return absorbed < expanded


def effective_weight(linear: nn.Module) -> torch.Tensor:
    """The matrix `[out, in]` that `linear` multiplies with, whatever it is: plain, LoRA-adapted, quantised, offloaded.

    Active, unmerged LoRA adapters are added, so an adapter on `kv_b_proj` acts in the absorbed form as it does in
    the expanded one.
    """
    if type(linear) is nn.Linear and not linear.weight.is_meta:
        return _local(linear.weight)
    delta = _lora_delta(linear)
    if delta is not None:
        weight = effective_weight(linear.base_layer)
        return weight if isinstance(delta, int) else weight + delta.to(weight.dtype)
    # Any other linear map shows its matrix by what it does to the unit vectors.
    reference = next(linear.parameters())
    dtype = reference.dtype if reference.dtype.is_floating_point else torch.get_default_dtype()
    device = getattr(linear, "_hf_hook", None) and linear._hf_hook.execution_device or reference.device
    return linear(torch.eye(linear.in_features, dtype=dtype, device=device)).T


def _local(weight: torch.Tensor) -> torch.Tensor:
    """This rank's rows under tensor parallelism."""
    return weight.to_local() if hasattr(weight, "to_local") else weight


def _lora_delta(linear: nn.Module) -> torch.Tensor | int | None:
    """The sum of a PEFT layer's active low-rank updates, 0 if none acts, None if it is not a plain LoRA layer."""
    if not hasattr(linear, "lora_A") or not hasattr(linear, "get_delta_weight"):
        return None
    if linear.disable_adapters or linear.merged:
        return 0
    active = [name for name in linear.active_adapters if name in linear.lora_A]
    if any(name in getattr(linear, "lora_variant", {}) for name in active):
        return None
    return sum(linear.get_delta_weight(name) for name in active)


def visible_keys(
    attention_mask: torch.Tensor | BlockMask | None, query_length: int, keys: torch.Tensor, is_flash: bool
) -> torch.Tensor | None:
    """Which keys each query may see, as a mask that broadcasts to `[B, heads, T, L]`; None if all of them.

    Args:
        attention_mask: what transformers made for the attention implementation in use: a 4-D mask (bool or
            additive), a flex `BlockMask`, a `[B, L]` padding mask (flash attention), or None for plain causal.
        query_length: T.
        keys: `[B, 1, L, width]`.
        is_flash: a missing or padding mask means what flash attention makes of it: the last query sees all keys.
            For scaled_dot_product_attention no mask means that the first query sees the first key only, as when a
            prompt fills the beginning of a static cache.

    Returns:
        A bool mask, or the additive 4-D mask as it came.
    """
    length = keys.shape[-2]
    if isinstance(attention_mask, BlockMask):
        batch, heads = attention_mask.shape[:2]
        return create_mask(attention_mask.mask_mod, batch, heads, query_length, length, device=keys.device)
    if attention_mask is not None and attention_mask.dim() == 4:
        return attention_mask[..., :length]
    causal = None
    if query_length > 1:
        offset = length - query_length if is_flash else 0
        causal = torch.ones(query_length, length, dtype=torch.bool, device=keys.device).tril(offset)
    if attention_mask is None:
        return causal
    padding = attention_mask[:, None, None, -length:].bool()
    return padding if causal is None else padding & causal
