"""Multi-token prediction: modules after the main layers that predict one token further each (FACTS 3.3)."""

import torch
from torch import nn

from .attention import DeepseekMoeRMSNorm
from .checkpoint_layout import MTP_COPIES
from .decoder_layer import DeepseekMoeDecoderLayer


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
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the normed state `[B, T, H]`, input of the head and of the next module, and the balance loss.

        Args:
            hidden_states: `[B, T, H]`, the main model's output after its final norm, or the module's before.
            inputs_embeds: `[B, T, H]`, embeddings of the tokens this module looks ahead to.
        """
        # Released weights expect the embedding first; the paper writes the state first (FACTS T14).
        joined = torch.cat((self.enorm(inputs_embeds), self.hnorm(hidden_states)), dim=-1)
        hidden_states, balance_loss = super().forward(self.eh_proj(joined), **kwargs)
        return self.shared_head.norm(hidden_states), balance_loss
