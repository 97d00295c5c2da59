"""The DeepSeekMoE block: routed experts chosen by the router, plus shared experts that serve every token."""

import torch
from torch import nn
from transformers.activations import ACT2FN

from .balancing import expert_balance_loss, sequence_balance_loss
from .experts import DeepseekMoeExperts
from .router import DeepseekMoeRouter


class DeepseekMoeMLP(nn.Module):
    """SwiGLU feed-forward of a dense layer or of all shared experts at once (FACTS T17)."""

    def __init__(self, config, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class DeepseekMoeBlock(nn.Module):
    """Equation 9 of the DeepSeekMoE paper without the residual, which the decoder layer adds."""

    def __init__(self, config):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.aux_loss_alpha = config.aux_loss_alpha
        self.seq_aux = config.seq_aux
        self.has_biased_router = config.topk_method == "noaux_tc"
        self.gate = DeepseekMoeRouter(config)
        self.experts = DeepseekMoeExperts(config)
        self.shared_experts = None
        if config.n_shared_experts:
            self.shared_experts = DeepseekMoeMLP(config, config.moe_intermediate_size * config.n_shared_experts)

    def forward(
        self, hidden_states: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the block's output `[B, T, H]` and, in training, its balance loss (a scalar, else None).

        Args:
            hidden_states: `[B, T, H]`.
            padding_mask: `[B, T]`, 1 for real tokens; padding does not count in the balance loss.
        """
        router_logits, topk_weights, topk_index = self.gate(hidden_states)
        routed = self.experts(hidden_states.flatten(0, 1), topk_index, topk_weights).view_as(hidden_states)
        output = routed if self.shared_experts is None else routed + self.shared_experts(hidden_states)
        if not self.training or not self.aux_loss_alpha:
            return output, None
        batch = hidden_states.shape[:2]
        logits_BTE, topk_index_BTK = router_logits.unflatten(0, batch), topk_index.unflatten(0, batch)
        return output, self.balance_loss(logits_BTE, topk_index_BTK, padding_mask)

    def balance_loss(self, router_logits, topk_index, padding_mask) -> torch.Tensor:
        """V3's sequence-wise loss where the bias does the balancing, else the expert-level loss of V1 and V2."""
        if self.has_biased_router:
            return sequence_balance_loss(router_logits, self.top_k, self.aux_loss_alpha, padding_mask)
        return expert_balance_loss(
            router_logits, topk_index, self.aux_loss_alpha, per_sequence=self.seq_aux, attention_mask=padding_mask
        )
