"""Keeping experts evenly used: the papers' balance losses, the bias step, and statistics of the load.

Pure functions. B sequences of T tokens, E routed experts, K of them chosen for each token, D devices (groups of E/D
experts). Every loss is `alpha * sum_i f_i P_i`: `f` counts the router's choices and carries no gradient, `P` is the
mean score; perfect balance gives `alpha`. The losses share these keyword arguments:

    attention_mask  `[B, T]`, 0 for tokens that do not count; None counts all, as DeepSeek's own code does.
    sequence_ids    `[B, T]` integers below B * T, for rows with several sequences (packing): tokens with the same
                    number form a sequence. None: every row is one.
    learned_tokens  `[B, T]` bool; sequences weigh as many as they have of these, as in a language model loss. None:
                    sequences weigh alike.
"""

import torch
import torch.nn.functional as F


def expert_balance_loss(
    router_logits: torch.Tensor,
    topk_index: torch.Tensor,
    alpha: float,
    per_sequence: bool = True,
    attention_mask: torch.Tensor | None = None,
    *,
    scoring_func: str = "softmax",
    sequence_ids: torch.Tensor | None = None,
    learned_tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Expert-level balance loss of DeepSeekMoE (equations 12-14) and V2 (23-25; FACTS 1.2, 2.4, 8.2).

    `f_i` is E/K times expert i's share of the tokens, `P_i` the mean score.

    Args:
        router_logits: `[B, T, E]`.
        topk_index: `[B, T, K]`, the experts the router really used.
        alpha: the loss's coefficient.
        per_sequence: count each sequence by itself and average (`seq_aux`), else over all tokens of the batch.
        attention_mask: with `sequence_ids` and `learned_tokens`, see the module's docstring.
        scoring_func: "softmax", or "sigmoid" for sigmoid scores divided by their sum.
    """
    scores = _scores(router_logits, scoring_func)
    load, score, weights = _sequence_means(
        (_chosen(topk_index, scores.shape[-1]), scores), per_sequence, attention_mask, sequence_ids, learned_tokens
    )
    return alpha * scores.shape[-1] * ((load * score).sum(dim=-1) * weights).sum()


def device_balance_loss(
    router_logits: torch.Tensor,
    topk_index: torch.Tensor,
    alpha: float,
    num_devices: int,
    per_sequence: bool = True,
    attention_mask: torch.Tensor | None = None,
    *,
    scoring_func: str = "softmax",
    sequence_ids: torch.Tensor | None = None,
    learned_tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Device-level balance loss of DeepSeekMoE (equations 15-17) and V2 (26-28; FACTS 1.2, 2.4).

    `f'_d` is the mean of `f_i` over device d's experts, `P'_d` the sum of their `P_i`.

    Args:
        num_devices: D; device d holds the experts d * E/D to (d + 1) * E/D - 1.
        router_logits: `[B, T, E]`; this and the rest as for `expert_balance_loss`.
    """
    scores = _scores(router_logits, scoring_func)
    load, score, weights = _sequence_means(
        (_chosen(topk_index, scores.shape[-1]), scores), per_sequence, attention_mask, sequence_ids, learned_tokens
    )
    device_load = load.unflatten(-1, (num_devices, -1)).mean(dim=-1)
    device_score = score.unflatten(-1, (num_devices, -1)).sum(dim=-1)
    return alpha * scores.shape[-1] * ((device_load * device_score).sum(dim=-1) * weights).sum()


def communication_balance_loss(
    router_logits: torch.Tensor,
    topk_index: torch.Tensor,
    alpha: float,
    num_devices: int,
    topk_devices: int,
    per_sequence: bool = True,
    attention_mask: torch.Tensor | None = None,
    *,
    scoring_func: str = "softmax",
    sequence_ids: torch.Tensor | None = None,
    learned_tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """V2's communication balance loss: what every device receives (equations 29-31; FACTS 2.4).

    `f''_d` is D/M times the share of tokens sent to device d, `P''_d` the sum of its experts' `P_i`. It costs `alpha`
    where every token goes to M devices and each device receives as many; tokens on fewer devices cost less.

    Args:
        num_devices: D; device d holds the experts d * E/D to (d + 1) * E/D - 1.
        topk_devices: M, the most devices a token is sent to.
        router_logits: `[B, T, E]`; this and the rest as for `expert_balance_loss`.
    """
    scores = _scores(router_logits, scoring_func)
    sent = _chosen(topk_index, scores.shape[-1]).unflatten(-1, (num_devices, -1)).sum(dim=-1) > 0
    received, score, weights = _sequence_means(
        (sent.float(), scores.unflatten(-1, (num_devices, -1)).sum(dim=-1)),
        per_sequence,
        attention_mask,
        sequence_ids,
        learned_tokens,
    )
    return alpha * num_devices / topk_devices * ((received * score).sum(dim=-1) * weights).sum()


def sequence_balance_loss(
    router_logits: torch.Tensor,
    top_k: int,
    alpha: float,
    attention_mask: torch.Tensor | None = None,
    *,
    scoring_func: str = "sigmoid",
    sequence_ids: torch.Tensor | None = None,
    learned_tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """V3's complementary sequence-wise loss (FACTS 3.2, equations 17-20).

    Counts the top-k of the *unbiased* sigmoid scores without a group limit, and weighs them by the scores
    normalised over all experts.

    Args:
        router_logits: `[B, T, E]`.
        top_k: K.
        alpha: 0.0001 in the paper.
        attention_mask: with `sequence_ids` and `learned_tokens`, see the module's docstring.
        scoring_func: "sigmoid", or "softmax" for a model with a biased softmax router.
    """
    # Sigmoid and softmax keep the order of the logits, which do not saturate.
    unbiased = router_logits.topk(top_k, dim=-1, sorted=False).indices
    tokens = {"attention_mask": attention_mask, "sequence_ids": sequence_ids, "learned_tokens": learned_tokens}
    return expert_balance_loss(router_logits, unbiased, alpha, scoring_func=scoring_func, **tokens)


def sequence_ids(position_ids: torch.Tensor) -> torch.Tensor:
    """Numbers the sequences of `position_ids` `[B, T]`: rows start one, and so do positions that do not go on by 1."""
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids.diff(dim=1) != 1
    return (starts.flatten().cumsum(0) - 1).view_as(position_ids)


def sum_losses(losses: list[torch.Tensor]) -> torch.Tensor | None:
    """Sum of scalars, which may be on several devices; None of none."""
    return torch.stack([loss.to(losses[0].device) for loss in losses]).sum() if losses else None


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


def expert_load(
    topk_index: torch.Tensor, num_experts: int, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Tokens each expert serves: counts `[E]` (int64).

    Args:
        topk_index: expert ids, of any shape; `num_experts` itself stands for an expert elsewhere and is not counted.
        num_experts: E.
        attention_mask: 0 for tokens that do not count, of the shape of `topk_index` without its last dimension.
    """
    ids = topk_index.flatten()
    ones = torch.ones_like(ids)
    if attention_mask is not None:
        ones = attention_mask.bool().unsqueeze(-1).expand_as(topk_index).flatten().to(ids.dtype)
    # Unlike bincount this does not wait for the device.
    return ids.new_zeros(num_experts + 1).scatter_add(0, ids, ones)[:num_experts]


def max_violation(counts: torch.Tensor) -> torch.Tensor:
    """MaxVio, `(max load - mean load) / mean load`, of counts `[..., E]` (FACTS 4); 0 is perfect balance."""
    counts = counts.float()
    mean = counts.mean(dim=-1)
    return (counts.amax(dim=-1) - mean) / mean.clamp_min(torch.finfo(counts.dtype).tiny)


def load_entropy(counts: torch.Tensor) -> torch.Tensor:
    """Entropy of the load of counts `[..., E]` divided by log E: 1 is perfect balance, 0 a single expert."""
    share = counts.float() / counts.float().sum(dim=-1, keepdim=True).clamp_min(1)
    return torch.special.entr(share).sum(dim=-1) / torch.log(torch.tensor(float(counts.shape[-1])))


def unused_share(counts: torch.Tensor) -> torch.Tensor:
    """Share of the experts that no token of counts `[..., E]` used: 0 is best."""
    return (counts == 0).float().mean(dim=-1)


def _scores(router_logits: torch.Tensor, scoring_func: str) -> torch.Tensor:
    """Float32 scores that sum to 1 over the experts."""
    if scoring_func == "softmax":
        return router_logits.float().softmax(dim=-1)
    if scoring_func != "sigmoid":
        raise ValueError(f"scoring_func={scoring_func!r} is not one of 'softmax', 'sigmoid'")
    scores = router_logits.float().sigmoid()
    return scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)


def _chosen(topk_index: torch.Tensor, num_experts: int) -> torch.Tensor:
    """1 where a token uses an expert, divided by K: `[B, T, E]` float32."""
    chosen = torch.zeros(*topk_index.shape[:-1], num_experts, device=topk_index.device)
    return chosen.scatter(-1, topk_index, 1.0 / topk_index.shape[-1])


def _sequence_means(values, per_sequence, attention_mask, sequence_ids, learned_tokens) -> tuple[torch.Tensor, ...]:
    """Means `[S, X]` over the counted tokens of each of S sequences of all `values` `[B, T, X]`, and the sequences'
    weights `[S]`, which sum to 1 (to 0 if nothing counts)."""
    batch, length = values[0].shape[:2]
    counted = values[0].new_ones(batch, length) if attention_mask is None else attention_mask.float()
    learned = counted if learned_tokens is None else learned_tokens.float()
    if not per_sequence:
        values = [value.flatten(0, 1).unsqueeze(0) for value in values]
        counted, learned = counted.flatten().unsqueeze(0), learned.flatten().unsqueeze(0)
    if sequence_ids is None or not per_sequence:
        # Means as one product with weights that sum to 1 (to 0 for an empty sequence).
        share = F.normalize(counted, p=1, dim=1).unsqueeze(1)
        means = [(share @ value).squeeze(1) for value in values]
        tokens, weights = counted.sum(dim=1), learned.sum(dim=1)
    else:
        # As many slots as tokens: the number of sequences stays on the device.
        slots, ids = counted.new_zeros(batch * length), sequence_ids.flatten()
        tokens, weights = slots.index_add(0, ids, counted.flatten()), slots.index_add(0, ids, learned.flatten())
        share = (counted.flatten() / tokens.clamp_min(1)[ids]).unsqueeze(1)
        means = [
            value.new_zeros(batch * length, value.shape[-1]).index_add(0, ids, share * value.flatten(0, 1))
            for value in values
        ]
    weights = (tokens > 0) * (1.0 if learned_tokens is None else weights)
    return *means, F.normalize(weights, p=1, dim=0)
