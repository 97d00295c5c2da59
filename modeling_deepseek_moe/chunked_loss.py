"""Cross-entropy of a large vocabulary in chunks: the logits of all tokens never exist at once.

For each chunk of tokens with a target, one pass makes logits, loss and the gradient of the states, then drops the
logits:

    hidden [N, H] --head--> logits [n, V] --softmax - one_hot--> dlogits [n, V] --> dhidden [n, H]

Backward scales that by the gradient that arrives, and goes through the vocabulary in chunks of v entries for the
gradient of the head, with logits computed again: each entry's is one product over all tokens, rounded once, and no
second tensor of the head's size adds them up. In float32, where adding up rounds no more than the product does, the
first pass makes it too.

    dlogits' [v, N] = exp(head[v] hidden' - logsumexp) - one_hot,    dhead[v] = dlogits' hidden

A loss is a sum over tokens; its divisor stays outside.
"""

import math

import torch
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

from .causal_lm_output import DeferredLogits, defer_logits
from .half_products import linear, product, product_dtype
from .large_tensors import empty_like
from .linear import call_linear, is_plain


def chunked_cross_entropy(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    chunk_bytes: int,
    ignore_index: int = -100,
) -> tuple[torch.Tensor, int]:
    """Sum of the tokens' cross-entropies in float32, and how many tokens have a target.

    The head is multiplied for these tokens only, in the dtype that autocast or else the weight says; the softmax is
    float32. The weight's gradient is computed only for a weight that needs one.

    Args:
        hidden_states: `[N, H]`, input of the head.
        weight: `[V, H]`, the head.
        targets: `[N]`, ids below V or `ignore_index`.
        chunk_bytes: size of one chunk's float32 logits, at least one token's or one entry's.

    Raises:
        RuntimeError: in backward with `create_graph=True`, which asks for a second derivative.
    """
    positions = (targets != ignore_index).nonzero().squeeze(1)
    chunks = math.ceil(len(positions) / max(1, chunk_bytes // (4 * weight.shape[0])))
    chunk_rows = math.ceil(len(positions) / max(1, chunks)) or 1
    options = (chunk_rows, product_dtype(weight), torch.is_grad_enabled())
    total = _ChunkedCrossEntropy.apply(hidden_states, weight, positions, targets[positions], *options)
    return total, len(positions)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states, weight, positions, targets, chunk_rows, dtype, grad_enabled):
        needs_hidden, needs_weight = (grad_enabled and needs for needs in ctx.needs_input_grad[:2])
        ctx.chunk_rows, ctx.dtype = chunk_rows, dtype
        ctx.adds_up = needs_weight and dtype == _sum_dtype(weight)
        inputs = (hidden_states, weight, positions, targets)
        loss, logsumexp, ctx.gradients = _loss_and_gradients(*inputs, chunk_rows, dtype, needs_hidden, ctx.adds_up)
        ctx.save_for_backward(*inputs, logsumexp)
        return loss

    @staticmethod
    def backward(ctx, grad_output):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the loss in chunks has no second derivative: set config.loss_chunk_bytes=0 to have one"
            )
        *inputs, logsumexp = ctx.saved_tensors
        hidden_states, weight, positions, _ = inputs
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            # A second pass through a retained graph: the first one gave its gradients away, scaled in place.
            _, _, gradients = _loss_and_gradients(*inputs, ctx.chunk_rows, ctx.dtype, needs_hidden, ctx.adds_up)
        hidden_grad, weight_grad = gradients
        # Without targets the gradients are zero, even where the loss is their mean, 0 / 0.
        scale = grad_output if len(positions) else torch.ones_like(grad_output)
        if hidden_grad is not None:
            hidden_grad = hidden_grad.mul_(scale).to(hidden_states.dtype)
        if ctx.adds_up:
            weight_grad = weight_grad.mul_(scale).to(weight.dtype)
        elif needs_weight:
            weight_grad = _weight_gradient(*inputs, logsumexp, scale, ctx.chunk_rows, ctx.dtype)
        return hidden_grad, weight_grad, None, None, None, None, None


def _sum_dtype(weight: torch.Tensor) -> torch.dtype:
    """Dtype in which the parts of a weight's gradient are summed."""
    return torch.promote_types(weight.dtype, torch.float32)


def _loss_and_gradients(hidden_states, weight, positions, targets, chunk_rows, dtype, needs_hidden, needs_weight):
    """Chunks of tokens: the loss, each token's logsumexp, and both gradients, None where none is asked for."""
    losses, logsumexp = (hidden_states.new_empty(len(positions), dtype=torch.float32) for _ in range(2))
    hidden_grad = torch.zeros_like(hidden_states, dtype=_sum_dtype(weight)) if needs_hidden else None
    weight_grad = torch.zeros_like(weight, dtype=_sum_dtype(weight)) if needs_weight else None
    with torch.autocast(weight.device.type, enabled=False):
        head = weight.to(dtype)
        for start in range(0, len(positions), chunk_rows):
            rows = slice(start, start + chunk_rows)
            chosen, target = positions[rows], targets[rows].unsqueeze(1)
            states = hidden_states[chosen].to(dtype)
            logits = linear(states, head).float()
            largest = logits.amax(-1, keepdim=True)
            logits.sub_(largest)
            target_logits = logits.gather(1, target)
            total = logits.exp_().sum(-1, keepdim=True)
            losses[rows] = (total.log() - target_logits).squeeze(1)
            logsumexp[rows] = (total.log() + largest).squeeze(1)
            if not (needs_hidden or needs_weight):
                continue
            logits.div_(total).scatter_add_(1, target, torch.full_like(total, -1.0))
            dlogits = logits.to(dtype)
            if needs_hidden:
                hidden_grad[chosen] = product(dlogits, head).to(hidden_grad.dtype)
            if needs_weight:
                weight_grad.addmm_(dlogits.T, states)
            del logits, dlogits  # or they would be held while the next chunk's are made
    return losses.sum(), logsumexp, (hidden_grad, weight_grad)


def _weight_gradient(hidden_states, weight, positions, targets, logsumexp, scale, chunk_rows, dtype):
    """Chunks of the vocabulary: the gradient of the weight, in its dtype."""
    gradient = empty_like(weight)
    if len(positions) == 0:
        return gradient.zero_()
    entries = max(1, chunk_rows * len(weight) // len(positions))
    tokens = torch.arange(len(positions), device=positions.device)
    with torch.autocast(weight.device.type, enabled=False):
        states = hidden_states[positions].to(dtype)
        for start in range(0, len(weight), entries):
            part = weight[start : start + entries].to(dtype)
            dlogits = product(part, states.T).float().sub_(logsumexp).exp_()
            of_part = (targets >= start) & (targets < start + len(part))
            dlogits[targets[of_part] - start, tokens[of_part]] -= 1.0
            dlogits = dlogits.mul_(scale).to(dtype)
            if gradient.dtype == dtype:
                product(dlogits, states, out=gradient[start : start + entries])
            else:
                gradient[start : start + entries] = product(dlogits, states)
            del dlogits
    return gradient


class ChunkedLossMixin:
    """The output head of a causal language model and its loss."""

    def logits_and_loss(self, hidden_states, labels, **kwargs) -> tuple[torch.Tensor | DeferredLogits, torch.Tensor]:
        """Logits of `hidden_states` `[B, T, H]` and transformers' causal language model loss.

        In training, logits larger than `config.loss_chunk_bytes` in float32 are not made: the loss goes in chunks
        through the head's weight, and the logits are a `DeferredLogits`. They are made whole, as in evaluation, where
        the head is more than one product with a plain weight (adapters, quantised or sharded weights, hooks, an
        offloaded module), where the user has set `loss_function`, and under `torch.compile`.

        Args:
            labels: `[B, T]`, -100 for none; position i is scored on label i + 1.
            **kwargs: what `loss_function` takes: `shift_labels` `[B, T]`, read in place of `labels`, scores position i
                on entry i; `num_items_in_batch` divides the sum of losses, in place of the number of targets;
                `ignore_index` replaces -100.
        """
        if self._has_chunks(hidden_states):
            ignore_index = kwargs.get("ignore_index", -100)
            targets = kwargs.get("shift_labels")
            if targets is None:
                targets = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
            # Labels of another shape are transformers' to refuse, below.
            if targets.shape == hidden_states.shape[:-1]:
                weight = self.lm_head.weight
                targets = targets.flatten().to(hidden_states.device)
                loss, count = chunked_cross_entropy(
                    hidden_states.flatten(0, 1), weight, targets, self.config.loss_chunk_bytes, ignore_index
                )
                items = kwargs.get("num_items_in_batch")
                items = items.to(loss.device) if torch.is_tensor(items) else items
                loss = loss / (count if items is None else items)
                return defer_logits(hidden_states, weight, product_dtype(weight)), loss
        logits = call_linear(self.lm_head, hidden_states)
        loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return logits, loss

    def _has_chunks(self, hidden_states) -> bool:
        chunk_bytes, vocab_size = self.config.loss_chunk_bytes, self.config.vocab_size
        if not self.training or torch.compiler.is_compiling() or chunk_bytes == 0:
            return False
        if hidden_states.shape[:-1].numel() * vocab_size * 4 <= chunk_bytes:
            return False
        # A subclass of tensor or one without data cannot say which tokens have a target.
        if type(hidden_states) is not torch.Tensor or hidden_states.is_meta:
            return False
        head = self.lm_head
        if self.loss_function is not ForCausalLMLoss or not is_plain_head(head) or head.out_features != vocab_size:
            return False
        # Without autocast a product of two dtypes is an error, which the whole path raises.
        return hidden_states.dtype == head.weight.dtype or torch.is_autocast_enabled(hidden_states.device.type)


def is_plain_head(head: nn.Module) -> bool:
    """Whether calling `head` is one product with a weight that is all here, and nothing else."""
    return is_plain(head) and head.bias is None
