"""Rotary position embeddings: frequencies (RoPE, YaRN), the rotation, and the softmax scale that YaRN changes.

Source: FACTS 2.5 and 8.3. DeepSeek's MLA keeps the two halves of a rotary pair in neighbouring rows of its
projections (interleaved), DeepSeekMoE 16B half a head apart. The rotation reads either order and always writes
half-split, so scores, caches and the absorbed form agree on one order.
"""

import math

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update

from .float32_buffers import Float32BuffersMixin


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's temperature term `0.1 * mscale * ln(factor) + 1`; 1 where the context is not extended."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def yarn_frequencies(rope: dict, dim: int) -> torch.Tensor:
    """Inverse frequencies `[dim / 2]`, float32, of YaRN: a ramp from the original to the stretched frequencies.

    Args:
        rope: `rope_parameters` with `rope_theta`, `factor`, `original_max_position_embeddings` and, optionally,
            `beta_fast` (32), `beta_slow` (1) and `truncate` (true: the ramp begins and ends at whole dimensions).
        dim: rotary width, even.
    """
    theta, window = rope["rope_theta"], rope["original_max_position_embeddings"]

    def dimension_of(rotations: float) -> float:
        return dim * math.log(window / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension_of(rope.get("beta_fast") or 32), dimension_of(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    span = high - low or 0.001  # the implementations step where both are one
    stretched_share = ((torch.arange(dim // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    base = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    return base * (1 - stretched_share) + base / rope["factor"] * stretched_share


def rotary_frequencies(config) -> tuple[torch.Tensor, float]:
    """Inverse frequencies `[head_dim / 2]` and the factor on cos and sin.

    For YaRN the factor is `attention_factor`, or else mscale / mscale_all_dim in the form of `yarn_mscale`, as in
    DeepSeek's modeling files; transformers' own function differs where one of the two is absent (FACTS T6).
    """
    rope, dim = config.rope_parameters, config.rotary_dim
    if rope["rope_type"] == "default":
        return 1.0 / rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim), 1.0
    if rope["rope_type"] != "yarn":
        return ROPE_INIT_FUNCTIONS[rope["rope_type"]](config)
    on_cos_and_sin = rope.get("attention_factor")
    if on_cos_and_sin is None:
        factor, numerator, denominator = rope["factor"], rope.get("mscale", 1.0), rope.get("mscale_all_dim", 0.0)
        on_cos_and_sin = yarn_mscale(factor, numerator) / yarn_mscale(factor, denominator)
    return yarn_frequencies(rope, dim), on_cos_and_sin


def softmax_scale(config) -> float:
    """Factor on the attention scores: the width q and k have when expanded, times YaRN's `mscale_all_dim` squared,
    which counts with every rope type but "default", as in DeepSeek's modeling files."""
    width = config.qk_head_dim or config.head_dim
    rope = config.rope_parameters
    if rope["rope_type"] == "default" or not rope.get("mscale_all_dim"):
        return width**-0.5
    return width**-0.5 * yarn_mscale(rope["factor"], rope["mscale_all_dim"]) ** 2


def query_scale(config, position_ids: torch.Tensor) -> torch.Tensor | None:
    """Factor on the queries `[B or 1, T]` of `position_ids [B or 1, T]`; None where the settings have no beta.

    `1 + llama_4_scaling_beta * ln(1 + floor(position / original_max_position_embeddings))`, as Mistral 4 has it.
    """
    rope = config.rope_parameters
    if not rope.get("llama_4_scaling_beta"):
        return None
    windows = (position_ids.float() / rope["original_max_position_embeddings"]).floor()
    return 1 + rope["llama_4_scaling_beta"] * windows.log1p()


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Rotates pairs of `x [B, heads, T, dim]` by the angles of `cos`, `sin [B or 1, T, r / 2]`, in float32.

    Only the first r of the numbers of a head are rotated where that is fewer than `dim`.

    Args:
        interleaved: pairs are neighbours (2k, 2k + 1) rather than (k, k + dim / 2). The result is half-split.
    """
    width = 2 * cos.shape[-1]
    x, rest = x[..., :width], x[..., width:]
    halves = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    first, second = halves[0].float(), halves[1].float()
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
    return torch.cat((rotated, rest), dim=-1) if rest.shape[-1] else rotated


class DeepseekMoeRotaryEmbedding(Float32BuffersMixin, torch.nn.Module):
    """cos and sin of a model's positions, computed once a forward pass for all layers."""

    float32_buffers = ("inv_freq", "original_inv_freq")

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        inv_freq, self.attention_scaling = rotary_frequencies(config)
        self.inv_freq = torch.nn.Buffer(inv_freq, persistent=False)
        self.original_inv_freq = torch.nn.Buffer(inv_freq.clone(), persistent=False)

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns float32 cos and sin `[B or 1, T, head_dim / 2]` for `position_ids [B or 1, T]` on `x`'s device."""
        angles = position_ids[..., None].float() * self.inv_freq.to(x.device).float()
        return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
