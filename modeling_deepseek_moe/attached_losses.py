"""Balance losses in an objective that another head than this model's computes, and weights in it that nothing reads.

TRL's trainers, label smoothing and loops of one's own take hidden states or logits and compute their loss themselves.
The balance losses then go along with the hidden states as a gradient, as in DeepSeek's own code:

    forward    hidden_states [B, T, H], unchanged
    backward   d hidden_states, unchanged; d balance_loss = the weight of this forward pass in the objective

What a trainer prints is its own loss, without them.
"""

import sys
import warnings
from collections.abc import Iterable

import torch
from torch.nn.parallel import DistributedDataParallel
from transformers.utils import logging

logger = logging.get_logger(__name__)


class AttachedLossesMixin:
    """The base model's part: what it does where no caller says that it adds the losses itself."""

    has_told_of_idle_mtp = False

    def join_objective(self, hidden_states, aux_loss, aux_losses):
        """The last `hidden_states` and the `aux_loss` to return, once that is on its way into the objective.

        A caller's list `aux_losses` gets the loss. Without one it is attached, and returned without a gradient of its
        own, so that adding it to a loss counts nothing twice.
        """
        trains = self.training and torch.is_grad_enabled()
        if aux_losses is not None:
            aux_losses += [] if aux_loss is None else [aux_loss]
        elif trains:
            self.tell_of_idle_mtp()
            if aux_loss is not None and aux_loss.requires_grad:
                if getattr(self, "_is_replica", False):
                    raise RuntimeError(
                        "balance losses cannot be added to a loss that is computed outside of the model under "
                        "nn.DataParallel: start one process a GPU (torchrun --nproc-per-node "
                        f"{torch.cuda.device_count()} ...), or let this one see a single GPU (CUDA_VISIBLE_DEVICES=0)"
                    )
                hidden_states, aux_loss = attach_loss(hidden_states, aux_loss), aux_loss.detach()
        if trains and DistributedDataParallel._get_active_ddp_module() is not None:
            modules = self.layers[self.config.num_hidden_layers :]
            hidden_states = take_part(hidden_states, modules.parameters())
        return hidden_states, aux_loss

    def tell_of_idle_mtp(self) -> None:
        """Says, once, that the multi-token prediction modules are not trained although their loss has a weight."""
        weight = self.config.mtp_loss_weight if self.config.num_nextn_predict_layers else 0
        if weight and not self.has_told_of_idle_mtp:
            self.has_told_of_idle_mtp = True
            warn_of_idle_mtp(weight)


@torch.compiler.disable
def attach_loss(hidden_states: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
    """`hidden_states`, whose backward pass is that of `loss` too.

    The weight of `loss` is what the objective of a whole batch gives the mean loss of one of its micro-batches: one by
    the number of gradient accumulation steps of the running Trainer or Accelerator, times the loss scale of float16.
    DDP and FSDP average the gradients of processes as they do all others.

    Raises:
        ValueError: the loss scale of float16 is not known here.
    """
    logger.warning_once(
        "The balance losses are in the gradients, not in the loss that is printed, since that is computed outside of "
        "the model; `aux_loss` of the base model's output has them, and `watch_experts` logs them."
    )
    return _Attached.apply(hidden_states, loss, _micro_batch_weight(loss))


def take_part(hidden_states: torch.Tensor, weights: Iterable[torch.nn.Parameter]) -> torch.Tensor:
    """`hidden_states`, in whose backward pass trainable `weights` take part without a gradient.

    DistributedDataParallel waits for each trainable weight in every backward pass; FSDP and DeepSpeed do not, and
    DeepSpeed cannot do without the gradient.
    """
    trained = [weight for weight in weights if weight.requires_grad]
    return _TakesPart.apply(hidden_states, *trained) if trained else hidden_states


@torch.compiler.disable
def warn_of_idle_mtp(weight: float) -> None:
    """Names what the objective lacks, and the way out."""
    warnings.warn(
        f"mtp_loss_weight={weight} has no part in this training: the loss is computed outside of "
        "DeepseekMoeForCausalLM, and its multi-token prediction modules get no gradient. Train them with "
        "transformers' Trainer, which passes labels to the model, or set mtp_loss_weight=0.",
        stacklevel=2,
    )


class _Attached(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states, loss, weight):
        ctx.save_for_backward(weight)
        return hidden_states.view_as(hidden_states)

    @staticmethod
    def backward(ctx, grad_output):
        (weight,) = ctx.saved_tensors
        return grad_output, weight, None


class _TakesPart(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states, *weights):
        ctx.count = len(weights)
        return hidden_states.view_as(hidden_states)

    @staticmethod
    def backward(ctx, grad_output):
        return grad_output, *[None] * ctx.count


def _micro_batch_weight(loss: torch.Tensor) -> torch.Tensor:
    """A scalar of the dtype and device of `loss`."""
    weight = torch.ones_like(loss)
    trainer, device = _running_trainer(), loss.device.type
    if trainer is None:
        if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16:
            raise ValueError(_unknown_loss_scale("outside of a Trainer"))
        state = sys.modules.get("accelerate.state")
        return weight if state is None else weight / state.GradientState().num_steps
    accelerator = trainer.accelerator
    weight = weight / trainer.current_gradient_accumulation_steps
    if accelerator.distributed_type == "DEEPSPEED" and accelerator.mixed_precision == "fp16":
        raise ValueError(_unknown_loss_scale("under DeepSpeed"))
    return weight if accelerator.scaler is None else accelerator.scaler.scale(weight)


def _unknown_loss_scale(where: str) -> str:
    return (
        f"the balance losses cannot be added to a loss that is computed outside of the model in float16 {where}, "
        "where its scale is not known: train in bfloat16, set aux_loss_alpha, device_loss_alpha and "
        "communication_loss_alpha to 0, or pass `aux_losses=[]` to the base model and add what it gets to your loss"
    )


def _running_trainer():
    """The Trainer whose training step this forward pass is part of, or None.

    It alone knows how many micro-batches its batch has: no argument of the forward pass says so.
    """
    module = sys.modules.get("transformers.trainer")
    frame = None if module is None else sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "training_step" and isinstance(frame.f_locals.get("self"), module.Trainer):
            return frame.f_locals["self"]
        frame = frame.f_back
    return None
