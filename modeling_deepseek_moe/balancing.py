"""Keeping experts evenly used: the papers' balance losses, the bias step, and statistics of the load.

Pure functions. B sequences of T tokens, E routed experts, K of them chosen for each token.
"""

import torch
import torch.nn.functional as F


def expert_balance_loss(
    router_logits: torch.Tensor,
    topk_index: torch.Tensor,
    alpha: float,
    per_sequence: bool = True,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Expert-level balance loss of DeepSeekMoE and V2: `alpha * sum_i f_i P_i` (FACTS 1.2, 2.4, 8.2).

    `f_i` is E/K times expert i's share of the tokens, `P_i` the mean softmax score; perfect balance gives `alpha`.

    Args:
        router_logits: `[B, T, E]`.
        topk_index: `[B, T, K]`, the experts the router really used.
        alpha: the loss's coefficient.
        per_sequence: count each sequence by itself and average (`seq_aux`), else over all tokens of the batch.
        attention_mask: `[B, T]`, 0 for tokens that do not count; None counts all, as DeepSeek's own code does.
    """
    scores = router_logits.float().softmax(dim=-1)
    return alpha * _load_times_score(_chosen(topk_index, scores.shape[-1]), scores, per_sequence, attention_mask)


def sequence_balance_loss(
    router_logits: torch.Tensor, top_k: int, alpha: float, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """V3's complementary sequence-wise loss (FACTS 3.2, equations 17-20).

    Counts the top-k of the *unbiased* sigmoid scores without a group limit, and weighs them by the scores
    normalised over all experts.

    Args:
        router_logits: `[B, T, E]`.
        top_k: K.
        alpha: 0.0001 in the paper.
        attention_mask: `[B, T]`, 0 for tokens that do not count.
    """
    scores = router_logits.float().sigmoid()
    chosen = _chosen(scores.topk(top_k, dim=-1, sorted=False).indices, scores.shape[-1])
    normalised = scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)
    return alpha * _load_times_score(chosen, normalised, True, attention_mask)


def update_expert_bias(bias: torch.Tensor, counts: torch.Tensor, speed: float, rule: str = "sign") -> torch.Tensor:
    """The routing bias after one optimizer step (FACTS 3.1, 4): raised for idle experts, lowered for busy ones.

    Args:
        bias: `[E]` float32.
        counts: `[E]` tokens each expert served in the whole global batch of the step.
        speed: gamma, 0.001 in the papers.
        rule: "sign" moves every bias by `speed`; "proportional" by `speed` times the relative error of its load.

    Raises:
        ValueError: an unknown rule.
    """
    error = counts.float().mean() - counts.float()
    if rule == "sign":
        step = error.sign()
    elif rule == "proportional":
        step = error / counts.float().mean().clamp_min(1)
    else:
        raise ValueError(f"rule={rule!r} is not one of 'sign', 'proportional'")
    return bias + speed * step.to(bias)


def expert_load(topk_index: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Tokens each expert serves: counts `[E]` (int64) of the ids in `topk_index`, of any shape."""
    return torch.bincount(topk_index.reshape(-1), minlength=num_experts)[:num_experts]


def max_violation(counts: torch.Tensor) -> torch.Tensor:
    """MaxVio, `(max load - mean load) / mean load`, of counts `[..., E]` (FACTS 4); 0 is perfect balance."""
    counts = counts.float()
    mean = counts.mean(dim=-1)
    return (counts.amax(dim=-1) - mean) / mean.clamp_min(torch.finfo(counts.dtype).tiny)


def load_entropy(counts: torch.Tensor) -> torch.Tensor:
    """Entropy of the load of counts `[..., E]` divided by log E: 1 is perfect balance, 0 a single expert."""
    share = counts.float() / counts.float().sum(dim=-1, keepdim=True).clamp_min(1)
    return torch.special.entr(share).sum(dim=-1) / torch.log(torch.tensor(float(counts.shape[-1])))


def _chosen(topk_index: torch.Tensor, num_experts: int) -> torch.Tensor:
    """1 where a token uses an expert, divided by K: `[B, T, E]` float32."""
    chosen = torch.zeros(*topk_index.shape[:-1], num_experts, device=topk_index.device)
    return chosen.scatter(-1, topk_index, 1.0 / topk_index.shape[-1])


def _load_times_score(chosen, scores, per_sequence: bool, attention_mask) -> torch.Tensor:
    """`E * sum_i mean_t(chosen) mean_t(scores)`, per sequence and averaged, or over the whole batch."""
    batch, length, num_experts = scores.shape
    counted = torch.ones(batch, length, device=scores.device) if attention_mask is None else attention_mask.float()
    if not per_sequence:
        chosen, scores, counted = (t.flatten(0, 1).unsqueeze(0) for t in (chosen, scores, counted))
    # Means over the counted tokens, as one product with weights that sum to 1 (to 0 for an empty sequence).
    share = F.normalize(counted, p=1, dim=1).unsqueeze(1)
    per_row = num_experts * ((share @ chosen) * (share @ scores)).sum(dim=(-2, -1))
    filled = (counted.sum(dim=1) > 0).float()
    return (per_row * filled).sum() / filled.sum().clamp_min(1)
