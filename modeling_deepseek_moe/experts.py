"""The routed experts as two stacked tensors. The eager body here is the reference every faster one is tested against.

N tokens, K chosen experts a token, E experts, H hidden size, I width of one expert.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation

# The published tensors that make one expert's matrix in a stack, one below the other.
STACKED_PROJECTIONS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


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

    def published_parts(self, stacked: str) -> dict[str, tuple[int, slice]]:
        """Each tensor that checkpoints have of a stacked weight, and where it lies there: its expert and its rows."""
        rows = self.hidden_dim if stacked == "down_proj" else self.intermediate_dim
        return {
            f"{expert}.{projection}.weight": (expert, slice(place * rows, (place + 1) * rows))
            for expert in range(self.num_experts)
            for place, projection in enumerate(STACKED_PROJECTIONS[stacked])
        }

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        # `load_state_dict` gets a saved checkpoint's per-expert names where a Trainer resumes or restores the best,
        # and of a checkpoint in several files those of one file a call.
        lost = {}
        for stacked in STACKED_PROJECTIONS:
            if prefix + stacked in state_dict:
                continue
            parts = {prefix + name: place for name, place in self.published_parts(stacked).items()}
            found = {name: state_dict.pop(name) for name in parts if name in state_dict}
            if len(found) == len(parts) and len({tensor.shape for tensor in found.values()}) == 1:
                state_dict[prefix + stacked] = (
                    torch.stack(list(found.values())).unflatten(0, (self.num_experts, -1)).flatten(1, 2)
                )
            elif found:
                lost[prefix + stacked] = [name for name in parts if name not in found]
                is_assigned = local_metadata.get("assign_to_params_buffers", False)
                error_msgs += _write_parts(getattr(self, stacked), found, parts, is_assigned)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        missing_keys[:] = [name for key in missing_keys for name in lost.get(key, [key])]

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}, hidden={self.hidden_dim}, width={self.intermediate_dim}"


@torch.no_grad()
def _write_parts(weight: torch.Tensor, found: dict, parts: dict[str, tuple[int, slice]], is_assigned) -> list[str]:
    """Copies some of the published tensors of a stacked weight to their places; says what cannot be copied."""
    if is_assigned or weight.is_meta or type(weight) not in (torch.Tensor, nn.Parameter):
        reason = "assign=True" if is_assigned else f"a weight of kind {type(weight.data).__name__} on {weight.device}"
        return [
            f"{next(iter(found))} and {len(found) - 1} more are some of the {len(parts)} tensors of a stacked weight, "
            f"and {reason} takes all of them in one call."
        ]
    errors = []
    for name, tensor in found.items():
        expert, rows = parts[name]
        place = weight[expert, rows]
        if tensor.shape == place.shape:
            place.copy_(tensor)
        else:
            errors.append(
                f"size mismatch for {name}: copying a param with shape {tensor.shape} from checkpoint, the shape in "
                f"current model is {place.shape}."
            )
    return errors
