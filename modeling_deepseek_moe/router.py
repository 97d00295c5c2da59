"""Which experts serve a token, and with what weight: scores -> bias -> group limit -> top-k -> weights.

Source: FACTS 1.1, 2.4, 3.1; where implementations differ, 8.3. N tokens, E routed experts, K of them chosen.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils.generic import maybe_autocast

from .float32_buffers import Float32BuffersMixin


class DeepseekMoeRouter(Float32BuffersMixin, nn.Module):
    """The gate of every generation. The correction bias only chooses experts, it never weighs them."""

    float32_buffers = ("e_score_correction_bias",)

    def __init__(self, config):
        super().__init__()
        self.num_experts = config.n_routed_experts
        self.top_k = config.num_experts_per_tok
        self.scoring_func = config.scoring_func
        self.topk_method = config.topk_method
        self.n_group = config.n_group
        self.topk_group = config.topk_group
        self.norm_topk_prob = config.norm_topk_prob
        self.norm_topk_semantics = config.norm_topk_semantics
        self.routed_scaling_factor = config.routed_scaling_factor
        self.router_dtype = config.router_dtype
        self.weight = nn.Parameter(torch.empty(self.num_experts, config.hidden_size))
        if self.topk_method == "noaux_tc":
            # A buffer: balancing moves it, no optimizer may (FACTS T27).
            self.e_score_correction_bias = nn.Buffer(torch.zeros(self.num_experts, dtype=torch.float32))

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns float32 router logits `[N, E]`, float32 weights `[N, K]` and expert ids `[N, K]`, in no order.

        Args:
            hidden_states: `[..., H]`, flattened to `[N, H]`.
        """
        hidden_states = hidden_states.reshape(-1, hidden_states.shape[-1])
        if self.router_dtype == "float32":
            # Autocast would compute the matrix product in half precision whatever the operands are.
            with maybe_autocast(hidden_states.device.type, enabled=False):
                logits = F.linear(hidden_states.float(), self.weight.float())
        else:
            logits = F.linear(hidden_states, self.weight).float()
        scores_NE = logits.sigmoid() if self.scoring_func == "sigmoid" else logits.softmax(dim=-1)
        topk_index_NK = self.choose(scores_NE)
        return logits, self.weigh(scores_NE.gather(1, topk_index_NK)), topk_index_NK

    def choose(self, scores_NE: torch.Tensor) -> torch.Tensor:
        """Expert ids `[N, K]` of the highest scores, biased and within the best groups where the method says so."""
        if self.topk_method == "noaux_tc":
            scores_NE = scores_NE + self.e_score_correction_bias
        if self.topk_method != "greedy" and self.n_group > 1:
            scores_NE = self.keep_best_groups(scores_NE)
        return scores_NE.topk(self.top_k, dim=-1, sorted=False).indices

    def keep_best_groups(self, scores_NE: torch.Tensor) -> torch.Tensor:
        """Sets the scores of all but `topk_group` groups to -inf (0 would win against negative biases, FACTS T2)."""
        grouped = scores_NE.unflatten(1, (self.n_group, -1))
        best = 1 if self.topk_method == "group_limited_greedy" else min(2, grouped.shape[-1])
        group_scores = grouped.topk(best, dim=-1).values.sum(dim=-1)
        kept = group_scores.topk(self.topk_group, dim=-1, sorted=False).indices
        lost = torch.ones_like(group_scores, dtype=torch.bool).scatter(1, kept, False)
        return grouped.masked_fill(lost.unsqueeze(-1), float("-inf")).flatten(1)

    def weigh(self, scores_NK: torch.Tensor) -> torch.Tensor:
        """Weights of the chosen experts from their unbiased scores."""
        if self.norm_topk_semantics == "deepseek_v3":
            if self.norm_topk_prob:
                scores_NK = scores_NK / (scores_NK.sum(dim=-1, keepdim=True) + 1e-20)
            return scores_NK * self.routed_scaling_factor
        if self.norm_topk_prob and self.top_k > 1:
            return scores_NK / (scores_NK.sum(dim=-1, keepdim=True) + 1e-20)
        return scores_NK * self.routed_scaling_factor

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}, top_k={self.top_k}, {self.scoring_func}, {self.topk_method}"
