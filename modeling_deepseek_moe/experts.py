"""The routed experts as two stacked tensors. The eager body here is the reference every faster one is tested against.

N tokens, K chosen experts a token, E experts, H hidden size, I width of one expert.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation


@use_experts_implementation
class DeepseekMoeExperts(nn.Module):
    """SwiGLU experts; `experts_implementation` ("sorted_mm", "grouped_mm", "eager", ...) picks the body by name."""

    def __init__(self, config):
        super().__init__()
        self.num_experts = config.n_routed_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * self.intermediate_dim, self.hidden_dim))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Weighted sum of each token's experts, accumulated in the weights' dtype.

        Args:
            hidden_states: `[N, H]`.
            top_k_index: `[N, K]` expert ids; `num_experts` marks a slot another rank serves.
            top_k_weights: `[N, K]`, usually float32.

        Returns:
            `[N, H]` in the dtype of `hidden_states`.
        """
        # Indexing a stacked parameter once an expert makes autograd build a whole-stack gradient for each.
        gate_up_EIH, down_EHI = self.gate_up_proj.unbind(0), self.down_proj.unbind(0)
        output = torch.zeros_like(hidden_states, dtype=torch.promote_types(hidden_states.dtype, top_k_weights.dtype))
        for expert in top_k_index.unique().tolist():
            if expert >= self.num_experts:
                continue
            token, slot = (top_k_index == expert).nonzero(as_tuple=True)
            gate, up = F.linear(hidden_states[token], gate_up_EIH[expert]).chunk(2, dim=-1)
            expert_output = F.linear(self.act_fn(gate) * up, down_EHI[expert])
            output = output.index_add(0, token, (expert_output * top_k_weights[token, slot, None]).to(output.dtype))
        return output.to(hidden_states.dtype)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # `load_state_dict` gets a saved checkpoint's per-expert names where a Trainer resumes or restores the best.
        parts = {
            projection: [f"{prefix}{expert}.{projection}.weight" for expert in range(self.num_experts)]
            for projection in ("gate_proj", "up_proj", "down_proj")
        }
        if all(name in state_dict for names in parts.values() for name in names):
            gate, up, down = (torch.stack([state_dict.pop(name) for name in names]) for names in parts.values())
            state_dict |= {f"{prefix}gate_up_proj": torch.cat((gate, up), dim=1), f"{prefix}down_proj": down}
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}, hidden={self.hidden_dim}, width={self.intermediate_dim}"
