"""`generate(..., use_mtp=True)`: the MTP modules in memory draft tokens, the main model checks them (FACTS 3.3)."""

from functools import wraps

import torch
from transformers.cache_utils import DynamicCache, QuantizedCache
from transformers.generation import CandidateGenerator, GenerationMixin

from .latent_cache import use_growing_layers
from .linear import call_linear
from .transformers_names import CACHE_NAME, PREPARED_CACHE_NAME, name_cache


class MultiTokenGenerationMixin(GenerationMixin):
    """`generate` that drafts with the model's own MTP modules where transformers would read them from a checkpoint."""

    @wraps(GenerationMixin.generate)
    def generate(self, *args, **kwargs):
        name_cache(kwargs)
        return super().generate(*args, **kwargs)

    @wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, *args, **kwargs):
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        if CACHE_NAME in inputs:
            inputs[PREPARED_CACHE_NAME] = inputs.pop(CACHE_NAME)
        return inputs

    @wraps(GenerationMixin.init_continuous_batching)
    def init_continuous_batching(self, *args, **kwargs):
        if self.config.kv_lora_rank is not None:
            raise ValueError(
                f"continuous batching keeps keys and values of every head, and this model has latent attention "
                f"(kv_lora_rank={self.config.kv_lora_rank}): use generate"
            )
        return super().init_continuous_batching(*args, **kwargs)

    def _get_candidate_generator(self, generation_config, input_ids, logits_processor, model_kwargs, **kwargs):
        if any(isinstance(value, QuantizedCache) for value in model_kwargs.values()):
            raise ValueError(
                "drafts that are not taken must be removed from the cache, which cache_implementation='quantized' "
                "cannot: generate without drafts (use_mtp, an assistant, prompt lookup), or with another cache"
            )
        takes_precedence = (generation_config.assistant_early_exit, generation_config.prompt_lookup_num_tokens)
        if not generation_config.use_mtp or any(option is not None for option in takes_precedence):
            return super()._get_candidate_generator(
                generation_config=generation_config,
                input_ids=input_ids,
                logits_processor=logits_processor,
                model_kwargs=model_kwargs,
                **kwargs,
            )
        if not self.config.num_nextn_predict_layers:
            raise ValueError(
                "use_mtp=True needs MTP modules, and this model has num_nextn_predict_layers=0: "
                "load a checkpoint that holds them, or generate without use_mtp"
            )
        if input_ids.shape[0] > 1:
            raise ValueError(
                f"use_mtp=True generates one sequence at a time, got a batch of {input_ids.shape[0]}: "
                "call generate once a sequence, or without use_mtp"
            )
        if model_kwargs.get("inputs_embeds") is not None:
            raise ValueError("use_mtp=True reads the prompt's input_ids: pass them instead of inputs_embeds")
        if seen := model_kwargs[CACHE_NAME].get_seq_length():
            raise ValueError(
                f"use_mtp=True begins with an empty cache, and the one given holds {seen} tokens: "
                "pass the whole sequence without it"
            )
        return MultiTokenCandidateGenerator(self, generation_config, logits_processor)


class MultiTokenCandidateGenerator(CandidateGenerator):
    """Drafts one token with each MTP module.

    The main model has run over tokens 0 to n - 1 and has chosen token n. Module k joins, at each position i up to
    n - 1, the state of the module before it (k = 1: of the main model) with token i + k; at i = n - 1 that is a draft
    for k > 1, and what comes out drafts token n + k. Once the main model has replaced a draft, the positions that saw
    it are computed again; all others stay in the module's cache. So drafts equal those of running everything again.

    Padding is left out: the modules read the real tokens as if they were the whole prompt.
    """

    requires_model_outputs = True

    def __init__(self, model, generation_config, logits_processor):
        self.model = model
        self.modules = [DraftModule(layer) for layer in model.model.layers[model.config.num_hidden_layers :]]
        self.length = 0
        self.do_sample = generation_config.do_sample
        self.max_length = generation_config.max_length
        self.logits_processor = logits_processor
        # -1 asks for the state after the final norm only; who wants the others gets them.
        self.model_kwargs_overrides = {"output_hidden_states": bool(generation_config.output_hidden_states) or -1}

    def get_candidates(
        self, input_ids: torch.LongTensor, model_kwargs, model_outputs, is_first_iteration, n_last_matches, **kwargs
    ) -> tuple[torch.LongTensor, torch.Tensor | None]:
        """`input_ids` `[1, n + 1]` followed by the drafts, and the drafts' logits `[1, drafts, V]` in float32.

        Args:
            model_kwargs: holds the `attention_mask` of `input_ids`, if any.
            model_outputs: the main model's outputs for the tokens before the last; None before its first run.
            is_first_iteration: whether that run is still to come: then nothing is drafted.
            n_last_matches: how many of the drafts before were accepted.
        """
        # The main model adds a token of its own; drafts behind the end would be thrown away.
        depth = min(len(self.modules), self.max_length - input_ids.shape[1] - 1)
        if is_first_iteration or depth < 1:
            return input_ids, None
        states = model_outputs.hidden_states[-1]
        if self.length == 0:
            tokens, states = _real_tokens(input_ids, states, model_kwargs.get("attention_mask"))
        else:
            states = states[:, : n_last_matches + 1]
            tokens = input_ids[:, -states.shape[1] :]
        new = states.shape[1]
        self.length += new
        embed = self.model.get_input_embeddings()
        embeds, logits = embed(tokens), []
        for k, module in enumerate(self.modules[:depth], start=1):
            # Its last positions saw up to k - 1 drafts: those not accepted are other tokens now, or drafted again.
            count = min(max(new, k), self.length)
            module.forget(count - new)
            ahead = embeds[:, -count:]
            arguments = self.model.model.layer_arguments(
                ahead, None, None, cache=module.cache, seen=self.length - count
            )
            states = module(states[:, -count:], ahead, **arguments)
            scores = call_linear(self.model.lm_head, states[:, -1]).to(input_ids.device, torch.float32)
            if self.logits_processor:
                scores = self.logits_processor(input_ids, scores)
            if self.do_sample:
                draft = torch.multinomial(scores.softmax(dim=-1), num_samples=1)
            else:
                draft = scores.argmax(dim=-1, keepdim=True)
            logits.append(scores)
            input_ids = torch.cat((input_ids, draft), dim=1)
            if k < depth:
                embeds = torch.cat((embeds, embed(draft)), dim=1)
        return input_ids, torch.stack(logits, dim=1)


class DraftModule:
    """One MTP module with its cache and its latest states."""

    def __init__(self, layer):
        self.layer = layer
        self.cache = use_growing_layers(ModuleCache())
        self.states = None

    def forget(self, count: int) -> None:
        """Takes the last `count` positions back."""
        self.cache.crop(-count)
        if self.states is not None:
            self.states = self.states[:, : self.states.shape[1] - count]

    def __call__(self, hidden_states: torch.Tensor, inputs_embeds: torch.Tensor, **arguments) -> torch.Tensor:
        """States of the given positions, after that of the position before them: the next module may need it."""
        states, *_ = self.layer(hidden_states, inputs_embeds, **{CACHE_NAME: self.cache}, **arguments)
        self.states = states if self.states is None else torch.cat((self.states[:, -1:], states), dim=1)
        return self.states


class ModuleCache(DynamicCache):
    """Keys and values of one module: a cache of one layer, whatever the layer's index in the model."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        return super().update(key_states, value_states, 0, *args, **kwargs)


def _real_tokens(input_ids, states, attention_mask) -> tuple[torch.Tensor, torch.Tensor]:
    """The real token after each real token but the last, `[1, n]`, and the main model's states before them."""
    if states.shape[1] != input_ids.shape[1] - 1:
        raise ValueError(
            f"use_mtp=True needs one state a token of the prompt, and the model made {states.shape[1]} for "
            f"{input_ids.shape[1] - 1} tokens: virtual tokens (prompt tuning) only work without use_mtp"
        )
    tokens = input_ids[:, 1:]
    if attention_mask is not None:
        is_real = attention_mask[0].bool()
        states = states[:, is_real[:-1]]
        tokens = tokens[:, is_real[1:]][:, -states.shape[1] :]
    return tokens, states
