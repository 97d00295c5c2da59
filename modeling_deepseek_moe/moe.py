"""The DeepSeekMoE block: routed experts chosen by the router, plus shared experts that serve every token."""

import torch
from torch import nn
from transformers.activations import ACT2FN

from .balancing import (
    communication_balance_loss,
    device_balance_loss,
    expert_balance_loss,
    expert_load,
    sequence_balance_loss,
)
from .experts import DeepseekMoeExperts
from .linear import call_linear
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
        gate, up = call_linear(self.gate_proj, hidden_states), call_linear(self.up_proj, hidden_states)
        return call_linear(self.down_proj, self.act_fn(gate) * up)


class DeepseekMoeBlock(nn.Module):
    """Equation 9 of the DeepSeekMoE paper without the residual, which the decoder layer adds."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.gate = DeepseekMoeRouter(config)
        self.experts = DeepseekMoeExperts(config)
        self.shared_experts = None
        if config.n_shared_experts:
            self.shared_experts = DeepseekMoeMLP(config, config.moe_intermediate_size * config.n_shared_experts)

    def forward(
        self,
        hidden_states: torch.Tensor,
        balance_tokens: dict[str, torch.Tensor | None] | None = None,
        counts_load: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Returns the block's output `[B, T, H]`, its balance loss (a scalar in training, else None) and its load.

        Args:
            hidden_states: `[B, T, H]`.
            balance_tokens: which tokens the balance losses count and how, the keyword arguments that `balancing`
                shares; None counts all.
            counts_load: whether to return the tokens that each expert serves, `[E]` int64, without padding; else None.
        """
        router_logits, topk_weights, topk_index = self.gate(hidden_states)
        routed = self.experts(hidden_states.flatten(0, 1), topk_index, topk_weights).view_as(hidden_states)
        output = routed if self.shared_experts is None else routed + self.shared_experts(hidden_states)
        batch, tokens = hidden_states.shape[:2], dict(balance_tokens or {})
        router_logits, topk_index = router_logits.unflatten(0, batch), topk_index.unflatten(0, batch)
        load = None
        if counts_load:
            load = expert_load(topk_index, self.config.n_routed_experts, tokens.get("attention_mask"))
        balance_loss = self.balance_loss(router_logits, topk_index, tokens) if self.training else None
        return output, balance_loss, load

    def balance_loss(self, router_logits, topk_index, tokens) -> torch.Tensor | None:
        """Sum of the balance losses whose coefficient is not zero; None if all are."""
        config = self.config
        tokens["scoring_func"] = config.scoring_func
        if config.aux_loss_counts_padding:
            tokens["attention_mask"] = None
        routed = (router_logits, topk_index)
        num_devices = config.balance_devices or config.n_group
        losses = []
        if config.aux_loss_alpha and config.uses_sequence_loss:
            losses.append(sequence_balance_loss(router_logits, topk_index.shape[-1], config.aux_loss_alpha, **tokens))
        elif config.aux_loss_alpha:
            losses.append(expert_balance_loss(*routed, config.aux_loss_alpha, config.seq_aux, **tokens))
        if config.device_loss_alpha:
            losses.append(
                device_balance_loss(*routed, config.device_loss_alpha, num_devices, config.seq_aux, **tokens)
            )
        if config.communication_loss_alpha:
            devices = (num_devices, config.topk_group)
            losses.append(
                communication_balance_loss(
                    *routed, config.communication_loss_alpha, *devices, config.seq_aux, **tokens
                )
            )
        return sum(losses) if losses else None
