"""The DeepSeekMoE model family: base model, causal language model, and classification heads."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GenericForSequenceClassification, GenericForTokenClassification
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attached_losses import AttachedLossesMixin
from .attention import DeepseekMoeAttention, DeepseekMoeLatentAttention, DeepseekMoeRMSNorm
from .attention_backends import AttentionNameMixin, check_packed_rows, is_all_ones
from .balancing import sequence_ids, sum_losses
from .causal_lm_output import DeepseekMoeCausalLMOutput, DeepseekMoeDeferredOutput, DeferredLogits
from .chunked_loss import ChunkedLossMixin
from .classification import BalanceLossMixin
from .configuration_deepseek_moe import DeepseekMoeConfig
from .decoder_layer import DeepseekMoeDecoderLayer
from .experts import DeepseekMoeExperts
from .latent_cache import check_cache, use_growing_layers
from .linear import call_linear
from .load_counts import LoadCountsMixin
from .loading import CheckpointMixin
from .mtp_generation import MultiTokenGenerationMixin
from .multi_token import DeepseekMoeMultiTokenLayer, MultiTokenLossMixin
from .rotary import DeepseekMoeRotaryEmbedding, query_scale, rotary_frequencies
from .router import DeepseekMoeRouter
from .transformers_names import CACHE_NAME, CACHE_NAMES, is_paged, one_cache, refuse_unknown


@dataclass
class DeepseekMoeModelOutput(MoeModelOutputWithPast):
    """Adds `aux_loss`, the sum of all layers' balance losses (training with a coefficient above 0, else None).

    It has a gradient only where the caller passed `aux_losses`; else `last_hidden_state` carries that.
    """

    aux_loss: torch.FloatTensor | None = None


class DeepseekMoePreTrainedModel(CheckpointMixin, AttentionNameMixin, PreTrainedModel):
    config_class = DeepseekMoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DeepseekMoeDecoderLayer", "DeepseekMoeMultiTokenLayer"]
    _skip_keys_device_placement = list(CACHE_NAMES)
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # transformers looks for the experts decorator in this file's text; it is in experts.py.
    _can_set_experts_implementation_cached_value = True
    _can_set_attn_implementation_cached_value = True
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]
    _can_record_outputs = {
        "hidden_states": OutputRecorder(DeepseekMoeDecoderLayer, index=0),
        "attentions": [
            OutputRecorder(DeepseekMoeLatentAttention, index=1),
            OutputRecorder(DeepseekMoeAttention, index=1),
        ],
        "router_logits": OutputRecorder(DeepseekMoeRouter, index=0),
    }

    @torch.no_grad()
    def _init_weights(self, module):
        std = self.config.initializer_range
        if isinstance(module, DeepseekMoeRouter):
            init.normal_(module.weight, mean=0.0, std=std)
            if module.topk_method == "noaux_tc":
                init.zeros_(module.e_score_correction_bias)
        elif isinstance(module, DeepseekMoeExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, DeepseekMoeRotaryEmbedding):
            inv_freq, _ = rotary_frequencies(module.config)
            init.copy_(module.inv_freq, inv_freq)
            init.copy_(module.original_inv_freq, inv_freq)
        else:
            super()._init_weights(module)

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        # Code exported to the Hub comes without the package's kernels; transformers' own default serves there.
        if requested_experts is None and "sorted_mm" in ALL_EXPERTS_FUNCTIONS:
            requested_experts = "sorted_mm"
        return super().get_correct_experts_implementation(requested_experts)

    def remove_mtp_layers(self) -> None:
        """Takes the multi-token prediction modules off the model and out of its config."""
        base = self.base_model
        del base.layers[self.config.num_hidden_layers :]
        self.config.num_nextn_predict_layers = 0

    def freeze_idle_mtp(self) -> None:
        """Freezes MTP modules that no loss trains, so that no optimizer or gradient reduction waits for them."""
        if self.config.mtp_loss_weight == 0:
            self.base_model.layers[self.config.num_hidden_layers :].requires_grad_(False)

    def add_model_tags(self, tags: list[str] | str) -> None:
        super().add_model_tags(tags)
        if "trl" in tags:  # its trainers, which say so when they are made, compute their losses themselves
            self.base_model.tell_of_idle_mtp()


class DeepseekMoeModel(AttachedLossesMixin, LoadCountsMixin, DeepseekMoePreTrainedModel):
    """Embedding, decoder layers and final norm. Layers behind `num_hidden_layers` are MTP modules, not run here."""

    def __init__(self, config: DeepseekMoeConfig):
        super().__init__(config)
        config.check_values()
        depth = config.num_hidden_layers
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(DeepseekMoeDecoderLayer(config, layer) for layer in range(depth))
        for layer in range(depth, depth + config.num_nextn_predict_layers):
            self.layers.append(DeepseekMoeMultiTokenLayer(config, layer))
        self.norm = DeepseekMoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = DeepseekMoeRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.freeze_idle_mtp()
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        learned_tokens: torch.Tensor | None = None,
        aux_losses: list[torch.Tensor] | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> DeepseekMoeModelOutput:
        """Hidden states after the final norm, `[B, T, H]`.

        Args:
            input_ids: `[B, T]`; or `inputs_embeds` `[B, T, H]`, exactly one of the two.
            attention_mask: `[B, L]`, 1 for real tokens, on either side; or a 4-D mask used as it is.
            position_ids: `[B, T]`; positions that start again mark packed sequences.
            past_key_values: a `Cache`; latent attention keeps one tensor a layer in it. `cache` is its newer name.
            learned_tokens: `[B, T]` bool, positions with a target; in `aux_loss` sequences weigh as many as they
                have of these. None: they weigh alike.
            aux_losses: a list that gets `aux_loss`, from a caller that adds it to the loss. None: its gradient is
                attached to the hidden states, with the weight that `attach_loss` says.
        """
        refuse_unknown(self, kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        cache = one_cache(past_key_values, cache)
        check_cache(cache, inputs_embeds.device)
        starts_cache = use_cache and cache is None
        cache = use_growing_layers(DynamicCache(config=self.config) if starts_cache else cache)

        # transformers looks for packed sequences only where there is neither cache nor mask. A new cache and a mask
        # of ones change nothing else.
        masked_cache = None if starts_cache or is_paged(cache) else cache
        seen = 0 if masked_cache is None else cache.get_seq_length()
        if position_ids is not None and masked_cache is None:
            if is_all_ones(attention_mask):
                attention_mask = None
            if attention_mask is None and kwargs.get("cu_seq_lens_q") is None:
                check_packed_rows(self.config, position_ids, len(inputs_embeds))
        layer_arguments = self.layer_arguments(
            inputs_embeds, attention_mask, position_ids, masked_cache, seen, learned_tokens
        )
        hidden_states, balance_losses = inputs_embeds, []
        for index, layer in enumerate(self.layers[: self.config.num_hidden_layers]):
            # Gradient checkpointing looks for the cache under this name.
            output = layer(hidden_states, **{CACHE_NAME: cache}, use_cache=use_cache, **layer_arguments, **kwargs)
            # A layer that another pipeline stage holds is replaced by an identity.
            hidden_states, balance_loss, load = output if isinstance(output, tuple) else (output, None, None)
            if balance_loss is not None:
                balance_losses.append(balance_loss)
            self.keep_load(index, load)
        hidden_states, aux_loss = self.join_objective(self.norm(hidden_states), sum_losses(balance_losses), aux_losses)
        return DeepseekMoeModelOutput(last_hidden_state=hidden_states, aux_loss=aux_loss, **{CACHE_NAME: cache})

    def layer_arguments(
        self, inputs_embeds, attention_mask, position_ids, cache=None, seen=0, learned_tokens=None
    ) -> dict:
        """What every layer of a forward pass shares: positions, attention mask, and the tokens that losses count."""
        is_packed = position_ids is not None
        if position_ids is None:
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen).unsqueeze(0)
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE_NAME: cache},
        )
        has_padding_mask = attention_mask is not None and attention_mask.dim() == 2
        batch, length = inputs_embeds.shape[:2]
        return {
            "position_embeddings": self.rotary_emb(inputs_embeds, position_ids),
            "query_scale": query_scale(self.config, position_ids),
            "attention_mask": causal_mask,
            "position_ids": position_ids,
            "balance_tokens": {
                "attention_mask": attention_mask[:, -length:] if has_padding_mask else None,
                "sequence_ids": sequence_ids(position_ids.expand(batch, -1)) if is_packed and self.training else None,
                "learned_tokens": learned_tokens,
            },
            "counts_load": self.counts_load(),
        }


class DeepseekMoeForCausalLM(
    ChunkedLossMixin, MultiTokenLossMixin, DeepseekMoePreTrainedModel, MultiTokenGenerationMixin
):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: DeepseekMoeConfig):
        super().__init__(config)
        self.model = DeepseekMoeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

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
        logits_to_keep: int | torch.Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> DeepseekMoeCausalLMOutput:
        """Logits `[B, T, V]` and, given `labels` `[B, T]` (-100 ignored), the loss.

        In training `loss` is the language model loss plus `aux_loss` (see `aux_loss_alpha`) plus `mtp_loss_weight`
        times `mtp_loss`. Given `num_items_in_batch`, the targets of all micro-batches, each of the three parts is this
        call's share, and their sum over micro-batches does not depend on how the batch was cut (but for balance losses
        with `seq_aux=False`, which are no sums over sequences).

        In training with large logits (`config.loss_chunk_bytes`) the loss is computed without them, and they are
        computed when first read from the output: read them before the optimizer's step.
        """
        refuse_unknown(self, kwargs)
        num_items = kwargs.get("num_items_in_batch")
        # Given labels, the loss below has what this list gets.
        aux_losses = kwargs.pop("aux_losses", None if labels is None else [])
        learned_tokens = None
        if self.training and labels is not None and num_items is not None:
            learned_tokens = nn.functional.pad(labels[:, 1:] != -100, (0, 1))
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=one_cache(past_key_values, cache),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            learned_tokens=learned_tokens,
            aux_losses=aux_losses,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden_states = outputs.last_hidden_state[:, kept]
        loss = mtp_loss = None
        aux_loss = outputs.aux_loss
        if labels is None:
            logits = call_linear(self.lm_head, hidden_states)
        else:
            logits, loss = self.logits_and_loss(hidden_states, labels, **kwargs)
            if self.training and self.config.mtp_loss_weight and self.config.num_nextn_predict_layers:
                embeddings = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
                mtp_loss, mtp_balance = self.multi_token_loss(
                    outputs.last_hidden_state,
                    embeddings,
                    labels,
                    attention_mask,
                    position_ids,
                    learned_tokens,
                    num_items,
                )
                loss = loss + self.config.mtp_loss_weight * mtp_loss
                aux_loss = sum_losses([part for part in (aux_loss, mtp_balance) if part is not None])
            if aux_loss is not None:
                loss = loss + (aux_loss if num_items is None else aux_loss * learned_tokens.sum() / num_items)
        is_deferred = isinstance(logits, DeferredLogits)
        output_class = DeepseekMoeDeferredOutput if is_deferred else DeepseekMoeCausalLMOutput
        return output_class(
            loss=loss,
            aux_loss=aux_loss,
            mtp_loss=mtp_loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
        )


class DeepseekMoeForSequenceClassification(
    BalanceLossMixin, GenericForSequenceClassification, DeepseekMoePreTrainedModel
):
    def __init__(self, config: DeepseekMoeConfig):
        DeepseekMoePreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = DeepseekMoeModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class DeepseekMoeForTokenClassification(BalanceLossMixin, GenericForTokenClassification, DeepseekMoePreTrainedModel):
    def __init__(self, config: DeepseekMoeConfig):
        DeepseekMoePreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = DeepseekMoeModel(config)
        self.dropout = nn.Dropout(getattr(config, "classifier_dropout", 0.0) or 0.0)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


__all__ = [
    "DeepseekMoeForCausalLM",
    "DeepseekMoeForSequenceClassification",
    "DeepseekMoeForTokenClassification",
    "DeepseekMoeModel",
    "DeepseekMoePreTrainedModel",
]
