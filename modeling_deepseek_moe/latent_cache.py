"""A growing cache layer that does not copy itself at every token."""

import torch
from transformers.cache_utils import Cache, DynamicLayer

from .transformers_names import is_paged


class GrowingLayer(DynamicLayer):
    """A dynamic cache layer over spare room: appending a token writes that token only.

    Latent attention stores one tensor, `[B, 1, L, kv_lora_rank + rope]`, in `keys` and leaves `values` with width 0;
    plain attention stores both. Buffers grow by a quarter when full, so a token is copied a bounded number of times.
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self._buffers = [None, None]
        self._views = [None, None]

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        # Writing into a shared buffer would break the graph of an earlier step, and cannot be traced well.
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._append(0, self.keys, key_states)
        self.values = self._append(1, self.values, value_states)
        return self.keys, self.values

    def crop(self, tokens_to_remove: int) -> None:
        in_place = self.keys is self._views[0] and self.values is self._views[1]
        super().crop(tokens_to_remove)
        if in_place:
            self._views = [self.keys, self.values]

    def reset(self) -> None:
        super().reset()
        self._buffers, self._views = [None, None], [None, None]

    def _append(self, slot: int, current: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        length = current.shape[-2] if current.dim() == 4 else 0
        needed = length + new.shape[-2]
        buffer = self._buffers[slot]
        # `current` is no longer the buffer's beginning after a reorder, a batch selection or an offload.
        if buffer is None or current is not self._views[slot] or buffer.shape[-2] < needed or _is_frozen(buffer):
            buffer = new.new_empty(*new.shape[:-2], needed + max(needed // 4, 64), new.shape[-1])
            if length:
                buffer[..., :length, :] = current
            self._buffers[slot] = buffer
        buffer[..., length:needed, :] = new
        self._views[slot] = buffer[..., :needed, :]
        return self._views[slot]


def _is_frozen(buffer: torch.Tensor) -> bool:
    """Made under `torch.inference_mode`, outside of which it must not be written."""
    return buffer.is_inference() and not torch.is_inference_mode_enabled()


def use_growing_layers(cache: Cache | None) -> Cache | None:
    """Swaps the still empty plain dynamic layers of `cache` for `GrowingLayer`s; any other layer is left alone."""
    if cache is None or is_paged(cache):
        return cache
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = GrowingLayer
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and not layer.is_initialized:
            cache.layers[index] = GrowingLayer()
    return cache


def cache_elements(config) -> int:
    """Numbers that the cache holds for a token (FACTS 2.3): a latent and a rotary key a layer, or keys and values."""
    if config.kv_lora_rank is None:
        return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return config.num_hidden_layers * (config.kv_lora_rank + config.qk_rope_head_dim)
