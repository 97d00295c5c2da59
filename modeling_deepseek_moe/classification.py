"""What the classification heads add to transformers' own: the balance losses, and the cache under either name."""

import torch
from transformers.cache_utils import Cache
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .attached_losses import attach_loss
from .transformers_names import CACHE_NAME, one_cache, refuse_unknown


class BalanceLossMixin:
    """A classification head whose `loss` in training is the head's plus the model's balance losses.

    Without labels these are attached to its logits.
    """

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ):
        refuse_unknown(self, kwargs)
        aux_losses = []
        outputs = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            aux_losses=aux_losses,
            return_dict=True,
            **{CACHE_NAME: one_cache(past_key_values, cache)},
            **kwargs,
        )
        if self.training and torch.is_grad_enabled():
            self.model.tell_of_idle_mtp()
        if outputs.loss is not None:
            outputs.loss = outputs.loss + sum(aux_losses)
        elif aux_losses and aux_losses[0].requires_grad:
            outputs.logits = attach_loss(outputs.logits, aux_losses[0])
        return outputs
