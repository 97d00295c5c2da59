"""What the absorbed form of latent attention needs besides the attention itself (FACTS 2.2).

In the absorbed form `kv_b_proj` is moved to the query and output side, so attention reads the latent cache as it is:
one key-value head of width kv_lora_rank + rope for all query heads.
"""

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_mask

from .cpu_rules import FEW_SIZES, holds
from .half_products import product

_BLOCK = 32  # tokens


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


def score_latents(queries: torch.Tensor, cached: torch.Tensor) -> torch.Tensor:
    """Products of the rows of queries `[B, R, width]` with the cached tokens `[B, L, width]`: `[B, R, L]`."""
    if queries.device.type != "cpu":
        return queries @ cached.mT
    # A batched product copies a transposed or narrowed operand first, here the whole cache at every token.
    return torch.stack([_score(rows, tokens) for rows, tokens in zip(queries, cached, strict=True)])


def mix_latents(weights: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """Sums of the latents `[B, L, rank]`, weighted by `[B, R, L]`: `[B, R, rank]`."""
    if weights.device.type != "cpu":
        return weights @ latents
    return torch.stack([_mix(rows, tokens) for rows, tokens in zip(weights, latents, strict=True)])


def _score(rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    missing = _missing_tokens(tokens)
    if not missing:
        return product(tokens, rows.mT).mT
    blocks, rest = tokens.split([len(tokens) + missing - _BLOCK, _BLOCK - missing])
    of_rest = F.pad(rest, (0, 0, 0, missing)) @ rows.mT
    return torch.cat((blocks @ rows.mT, of_rest[: len(rest)])).mT


def _mix(rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    missing = _missing_tokens(tokens)
    if not missing:
        return product(rows, tokens)
    sizes = [len(tokens) + missing - _BLOCK, _BLOCK - missing]
    (blocks, rest), (of_blocks, of_rest) = tokens.split(sizes), rows.split(sizes, dim=-1)
    mixed_rest = F.pad(of_rest, (0, missing)) @ F.pad(rest, (0, 0, 0, missing))
    return of_blocks.contiguous() @ blocks + mixed_rest


def _missing_tokens(tokens: torch.Tensor) -> int:
    """How many are missing in the last block, 0 where blocks are of no use.

    Decoding makes the cache longer at every token: whole blocks and a filled last one change their size once a block.
    """
    is_prepared = not torch.compiler.is_compiling() and holds(FEW_SIZES, tokens.dtype)
    return -len(tokens) % _BLOCK if is_prepared else 0


def visible_keys(
    attention_mask: torch.Tensor | BlockMask | None, query_length: int, keys: torch.Tensor, is_flash: bool
) -> torch.Tensor | None:
    """Which keys each query may see, as a mask that broadcasts to `[B, heads, T, L]`; None if all of them.

    Args:
        attention_mask: what transformers made for the attention implementation in use: a 4-D mask (bool or
            additive), a flex `BlockMask`, a padding mask `[B, tokens]` (flash attention), or None for plain causal.
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
    # A static cache is longer than the mask: its end is still empty.
    padding = None if attention_mask is None else attention_mask[:, -length:].bool()
    seen = length if padding is None else padding.shape[1]
    causal = None
    if query_length > 1:
        offset = seen - query_length if is_flash else 0
        causal = torch.ones(query_length, length, dtype=torch.bool, device=keys.device).tril(offset)
    if padding is None:
        return causal
    padding = F.pad(padding, (0, length - seen))[:, None, None]
    return padding if causal is None else padding & causal
