"""One transformer layer: attention and feed-forward (dense or DeepSeekMoE), each behind a norm and a residual."""

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import DeepseekMoeAttention, DeepseekMoeLatentAttention, DeepseekMoeRMSNorm
from .moe import DeepseekMoeBlock, DeepseekMoeMLP


class DeepseekMoeDecoderLayer(GradientCheckpointingLayer):
    """Layer `layer_idx` of the model; the config says which attention and whether it routes."""

    recomputes = False

    def __init__(self, config, layer_idx: int):
        super().__init__()
        attention = DeepseekMoeAttention if config.kv_lora_rank is None else DeepseekMoeLatentAttention
        self.self_attn = attention(config, layer_idx)
        self.is_moe = config.is_moe_layer(layer_idx)
        self.mlp = DeepseekMoeBlock(config) if self.is_moe else DeepseekMoeMLP(config, config.intermediate_size)
        self.input_layernorm = DeepseekMoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = DeepseekMoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether this call is recomputed in the backward pass, as transformers asks to be told."""
        # Without gradients nothing is. Before 5.24 transformers took the cache away there too, and text was wrong.
        return self.recomputes and torch.is_grad_enabled()

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enabled: bool) -> None:
        self.recomputes = enabled

    def forward(
        self,
        hidden_states: torch.Tensor,
        balance_tokens: dict[str, torch.Tensor | None] | None = None,
        counts_load: bool = False,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Returns hidden states `[B, T, H]`, and balance loss and load of a `DeepseekMoeBlock`, None without one.

        Args:
            hidden_states: `[B, T, H]`.
            balance_tokens, counts_load: see `DeepseekMoeBlock`.
            **kwargs: what attention takes (position embeddings, mask, cache, arguments of the attention kernel).
        """
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        normed = self.post_attention_layernorm(hidden_states)
        if not self.is_moe:
            return hidden_states + self.mlp(normed), None, None
        output, balance_loss, load = self.mlp(normed, balance_tokens, counts_load)
        return hidden_states + output, balance_loss, load
