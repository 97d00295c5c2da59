"""A growing cache layer that does not copy itself at every token."""

import math

import torch
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

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
    """Swaps the still empty plain dynamic layers of `cache` for `GrowingLayer`s; any other layer is left alone.

    So are those of a cache that moves its layers to the CPU: spare room would stay behind on the GPU.
    """
    if cache is None or is_paged(cache) or cache.offloading:
        return cache
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = GrowingLayer
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and not layer.is_initialized:
            cache.layers[index] = GrowingLayer()
    return cache


def update_latents(
    cache: Cache, cached: torch.Tensor, indexed: torch.Tensor | None, rank: int, layer_idx: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Adds what latent attention keeps of new tokens to a layer of `cache`.

    Layers that keep tensors as they are get latents and rotary keys as one tensor, which attention reads in place, and
    an indexer's keys, or nothing, as values. Any other, such as those that quantise, has no use for values of width 0:
    without an indexer it gets latents as keys and rotary keys as values.

    Args:
        cached: `[B, 1, T, rank + rope]`.
        indexed: `[B, 1, T, width]`, the indexer's keys, if the model has one.

    Returns:
        Both of all tokens, `[B, 1, L, ...]`.

    Raises:
        ValueError: a layer quantises in groups that do not divide the two widths.
    """
    layers = cache.layers
    layer_class = type(layers[layer_idx]) if layer_idx < len(layers) else cache.layer_class_to_replicate
    if layer_class in (GrowingLayer, DynamicLayer, StaticLayer):
        cached, kept = cache.update(cached, cached[..., :0] if indexed is None else indexed, layer_idx)
        return cached, None if indexed is None else kept
    keys, values = (cached[..., :rank], cached[..., rank:]) if indexed is None else (cached, indexed)
    group = getattr(layers[layer_idx], "q_group_size", 1)
    if keys.shape[-1] % group or values.shape[-1] % group:
        raise ValueError(
            f"the quantised cache's q_group_size={group} does not divide the widths {keys.shape[-1]} and "
            f"{values.shape[-1]} of what latent attention keeps (kv_lora_rank={rank}): pass "
            f"cache_config={{'q_group_size': {math.gcd(keys.shape[-1], values.shape[-1])}}}"
        )
    keys, values = cache.update(keys, values, layer_idx)
    return (torch.cat((keys, values), dim=-1), None) if indexed is None else (keys, values)


def check_cache(cache: Cache | None, device: torch.device) -> None:
    """Raises a ValueError for a cache that cannot work with a model on `device`."""
    if getattr(cache, "offloading", False) and device.type != "cuda":
        raise ValueError(
            "an offloaded cache (cache_implementation='offloaded' or 'offloaded_static') keeps its layers beside a "
            f"CUDA device, and the model is on {device}: leave it out"
        )


def cache_elements(config) -> int:
    """Numbers that the cache holds for a token (FACTS 2.3): a latent and a rotary key a layer, and an indexer's key
    where there is one, or keys and values."""
    if config.kv_lora_rank is None:
        return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    width = config.kv_lora_rank + config.qk_rope_head_dim + (config.index_head_dim or 0)
    return config.num_hidden_layers * width
