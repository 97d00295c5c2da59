"""What upcycling did to a model: equal logits with all experts active, and the loss that training has to win back."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers

from modeling_deepseek_moe import CheckpointError, DeepseekMoeForCausalLM

from .engine.plan import Plan
from .engine.source import CONFIG_NAME, SourceCheckpoint
from .engine.target import ConversionError
from .upcycle.dense import DENSE_MODELS
from .verify import TOKENS, Verification, quiet_transformers, too_large, verify_tensors

# Largest difference of logits, relative to the largest one where that is above 1: the router's deviation, and sums in
# another order.
_LOGIT_TOLERANCE = 1e-4


@dataclass(frozen=True)
class UpcycleLosses:
    """Mean loss in nats a token of the three models on the same text.

    Attributes:
        tokens: how many were predicted.
        dense: the source.
        all_experts: the result with every routed expert active.
        top_k: the result as it is, before any training.
        chosen: routed experts that a token has there.
        experts: routed experts that there are.
    """

    tokens: int
    dense: float
    all_experts: float
    top_k: float
    chosen: int
    experts: int

    def lines(self) -> Iterator[str]:
        """A small table."""
        yield f"loss of {self.tokens} tokens before training:"
        yield f"  dense model          {self.dense:.4f}"
        yield f"  {f'all {self.experts} experts':20} {self.all_experts:.4f}"
        yield f"  {f'{self.chosen} of {self.experts} experts':20} {self.top_k:.4f}"


def verify_upcycle(plan: Plan, target: Path) -> Verification:
    """Compares every tensor, and the logits of a few tokens with all experts active where both models fit in memory.

    Raises:
        CheckpointError: the result is not a sound checkpoint.
        ConversionError: a tensor or the logits differ; names file and tensor.
    """
    tensors = verify_tensors(plan, target)
    reason = too_large(plan.source.config)
    if reason:
        return Verification(tensors, skipped=reason)
    ids = torch.randint(plan.source.config.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    with quiet_transformers(), torch.no_grad():
        expected = _dense(plan, getattr(torch, plan.config_json["dtype"]))(ids).logits
        found = _result(plan, target, plan.config_json["n_routed_experts"])(ids).logits
    difference, largest = float((found - expected).abs().max()), float(expected.abs().max())
    if not difference <= _LOGIT_TOLERANCE * max(1.0, largest):
        raise ConversionError(
            f"{target / CONFIG_NAME}: with all experts active, logits are {difference:.2g} off the dense model's"
        )
    return Verification(tensors, difference / largest, "DeepseekMoeForCausalLM", absolute=difference)


Rows = Sequence[tuple[list[int], list[int]]]  # token ids, and labels with -100 where nothing is predicted


def check_rows(rows: Rows, source: SourceCheckpoint) -> None:
    """Raises a CheckpointError for a token that the model of `source` does not have."""
    highest = max((token for ids, _ in rows for token in ids), default=0)
    if highest >= source.config.vocab_size:
        raise CheckpointError(
            f"{source.folder}: the tokenizer gives token {highest}, beyond vocab_size={source.config.vocab_size}"
        )


def measure_losses(plan: Plan, target: Path, rows: Rows) -> UpcycleLosses | str:
    """Loss of the dense model and of the result, or why the models do not fit in memory.

    Args:
        plan: the conversion's.
        target: its finished result.
        rows: the text whose loss is measured.
    """
    reason = too_large(plan.source.config)
    if reason:
        return reason
    experts, chosen = plan.config_json["n_routed_experts"], plan.config_json["num_experts_per_tok"]
    with quiet_transformers(), torch.no_grad():
        tokens, dense = _mean_loss(_dense(plan, torch.float32), rows)
        all_experts, top_k = (_mean_loss(_result(plan, target, count), rows)[1] for count in (experts, chosen))
    return UpcycleLosses(tokens, dense, all_experts, top_k, chosen, experts)


def _dense(plan: Plan, dtype: torch.dtype) -> Any:
    """The source in float32 arithmetic, its weights rounded to `dtype`."""
    model_class = getattr(transformers, DENSE_MODELS[plan.source.config_json["model_type"]].architecture)
    return model_class.from_pretrained(plan.source.folder, dtype=dtype, use_safetensors=True).float().eval()


def _result(plan: Plan, target: Path, chosen: int) -> DeepseekMoeForCausalLM:
    model = DeepseekMoeForCausalLM.from_pretrained(target, dtype=torch.float32, num_experts_per_tok=chosen)
    return model.eval()


def _mean_loss(model, rows: Rows) -> tuple[int, float]:
    count, total = 0, 0.0
    for ids, labels in rows:
        logits = model(torch.tensor([ids])).logits[0, :-1].float()
        target = torch.tensor(labels[1:])
        total += float(F.cross_entropy(logits, target, reduction="sum"))
        count += int((target >= 0).sum())
    return count, total / count
