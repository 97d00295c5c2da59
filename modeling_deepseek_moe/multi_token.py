"""Multi-token prediction: modules after the main layers that predict one token further each (FACTS 3.3)."""

import torch
from torch import nn

from .attention import DeepseekMoeRMSNorm
from .balancing import sum_losses
from .checkpoint_layout import MTP_COPIES
from .decoder_layer import DeepseekMoeDecoderLayer
from .linear import call_linear


class DeepseekMoeSharedHead(nn.Module):
    """The norm in front of the output head; the head itself is the main model's."""

    def __init__(self, config):
        super().__init__()
        self.norm = DeepseekMoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class DeepseekMoeMultiTokenLayer(DeepseekMoeDecoderLayer):
    """MTP module: one decoder layer over the joined embedding of a later token and the hidden state so far.

    It is layer `num_hidden_layers + k` of the model, under DeepSeek's own tensor names; embedding and output head are
    the main model's, and only checkpoints carry copies of them.
    """

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.enorm = DeepseekMoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hnorm = DeepseekMoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.shared_head = DeepseekMoeSharedHead(config)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # A saved checkpoint's copies of what is shared here, where a Trainer loads it with `load_state_dict`.
        for name in MTP_COPIES:
            state_dict.pop(f"{prefix}{name}", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(
        self, hidden_states: torch.Tensor, inputs_embeds: torch.Tensor, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Returns the normed state `[B, T, H]`, input of the head and of the next module, balance loss and load.

        Args:
            hidden_states: `[B, T, H]`, the main model's output after its final norm, or the module's before.
            inputs_embeds: `[B, T, H]`, embeddings of the tokens this module looks ahead to.
        """
        # Released weights expect the embedding first; the paper writes the state first (FACTS T14).
        joined = torch.cat((self.enorm(inputs_embeds), self.hnorm(hidden_states)), dim=-1)
        hidden_states, balance_loss, load = super().forward(call_linear(self.eh_proj, joined), **kwargs)
        return self.shared_head.norm(hidden_states), balance_loss, load


class MultiTokenLossMixin:
    """The loss of a causal language model's multi-token prediction modules."""

    def multi_token_loss(
        self, hidden_states, inputs_embeds, labels, attention_mask, position_ids, learned_tokens, num_items
    ):
        """Mean cross-entropy of the MTP modules and the sum of their balance losses (FACTS 3.3).

        Module k at position i sees the state of position i and the embedding of token i + k, and predicts token
        i + k + 1; it runs over the first T - k positions.
        """
        modules = self.model.layers[self.config.num_hidden_layers :]
        losses, balance_losses = [hidden_states.new_zeros((), dtype=torch.float32)], []
        for ahead, layer in enumerate(modules, start=1):
            kept = labels.shape[1] - ahead
            if kept < 2:
                break
            targets = labels[:, ahead + 1 :]
            mask = attention_mask if attention_mask is not None and attention_mask.dim() == 2 else None
            # A position whose token ahead is padding or of another sequence (packing) takes part, but does not count.
            counted = None if mask is None else mask[:, :kept] * mask[:, ahead:]
            if position_ids is not None:
                distance = position_ids[:, ahead:] - position_ids[:, :kept]
                counted = (distance == ahead) * (1 if counted is None else counted)
                distance = position_ids[:, ahead + 1 :] - position_ids[:, : kept - 1]
                targets = targets.masked_fill(distance != ahead + 1, -100)
            hidden_states, ahead_embeds = hidden_states[:, :kept], inputs_embeds[:, ahead:]
            arguments = self.model.layer_arguments(
                hidden_states,
                None if mask is None else mask[:, :kept],
                None if position_ids is None else position_ids[:, :kept],
            )
            learned = None if learned_tokens is None else nn.functional.pad(targets != -100, (0, 1))
            arguments["balance_tokens"] |= {"attention_mask": counted, "learned_tokens": learned}
            hidden_states, balance_loss, load = layer(hidden_states, ahead_embeds, **arguments)
            self.model.keep_load(self.config.num_hidden_layers + ahead - 1, load)
            _, loss = self.logits_and_loss(
                hidden_states[:, :-1],
                labels=None,
                shift_labels=targets.contiguous(),
                num_items_in_batch=(targets != -100).sum().clamp_min(1) if num_items is None else num_items,
            )
            losses.append(loss)
            if balance_loss is not None and learned_tokens is not None:
                # In shares of the main model's targets, more than this module's.
                balance_loss = balance_loss * learned.sum() / learned_tokens.sum().clamp_min(1)
            balance_losses += [] if balance_loss is None else [balance_loss]
        return torch.stack(losses).sum() / len(modules), sum_losses(balance_losses)
