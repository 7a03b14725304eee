"""KV caches: one that grows by doubling, one at fixed addresses, and what a model can do with them."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

__all__ = [
    "can_be_static",
    "can_rewind",
    "clear_static",
    "make_kv_cache",
    "make_static_cache",
    "rewind",
    "rewind_static",
]

_FIRST_CAPACITY = 256


def make_kv_cache(model: Any) -> DynamicCache:
    """Make a cache for one sequence (or batch) of a transformers model.

    Full-attention layers grow by doubling; layers that are bounded anyway (sliding windows,
    linear attention) stay transformers' own. Cropping and reordering work as in `DynamicCache`.
    A model that brings a cache class of its own gets that, as it accepts no other.
    """
    own = _own_cache_class(type(model))
    if own is not None:
        return own()
    cache = DynamicCache(config=model.config)
    cache.layers = [
        _GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    if getattr(cache, "layer_class_to_replicate", None) is DynamicLayer:
        cache.layer_class_to_replicate = _GrowingLayer
    return cache


def rewind(cache: Any, num_tokens: int) -> None:
    """Forget the last `num_tokens` of a cache that was told to keep what that takes; maybe none."""
    cache.crop(-num_tokens)


def can_rewind(model: Any) -> bool:
    """Tell whether a model's cache can forget its last tokens, by letting it try.

    Recurrent states cannot, whether they show at once or not, and whatever else a model keeps is
    found out: what comes after going back must be what comes without having been there. Experts
    need not be attached.

    Cost:
        Six small forwards.
    """
    ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7]], device=model.device)
    caches = [make_kv_cache(model) for _ in range(2)]
    logits = []
    try:
        with torch.inference_mode():
            for cache, detour in zip(caches, (True, False), strict=True):
                cache.activate_past_recording()
                pieces = [ids[:, :3], ids[:, 3:5]]
                if detour:
                    model(input_ids=pieces[0], past_key_values=cache, use_cache=True)
                    rewind(cache, 0)
                    model(input_ids=ids[:, 3:], past_key_values=cache, use_cache=True)
                    rewind(cache, 2)
                else:
                    for piece in pieces:
                        model(input_ids=piece, past_key_values=cache, use_cache=True)
                        rewind(cache, 0)
                output = model(input_ids=ids[:, 5:], past_key_values=cache, use_cache=True)
                logits.append(output.logits.float())
                if not all(getattr(layer, "is_croppable", True) for layer in cache.layers):
                    return False
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return False
    gap = (logits[0] - logits[1]).abs().mean()
    return bool(gap <= 0.02 * logits[1].std())


def make_static_cache(model: Any, num_positions: int) -> Cache | None:
    """Make a cache for one sequence whose buffers never move, as a captured step needs.

    Layers with a sliding window keep all positions too, and leave it to their mask to hide the old
    ones: how much of a window is full would otherwise be known on the host only.

    Args:
        model: A transformers model.
        num_positions: Tokens it has room for.

    Returns:
        The cache, or None where a layer keeps anything but keys and values.
    """
    like = make_kv_cache(model)
    kinds = {type(layer) for layer in getattr(like, "layers", ())}
    if not kinds or not kinds <= {_GrowingLayer, DynamicSlidingWindowLayer}:
        return None
    return Cache(layers=[StaticLayer(num_positions) for _ in like.layers])


def clear_static(cache: Cache) -> None:
    """Forget every token of a static cache; its buffers stay where they are."""
    for layer in cache.layers:
        layer.cumulative_length.zero_()


def rewind_static(cache: Cache, num_tokens: int) -> None:
    """Forget the last `num_tokens` of a static cache; no host sync."""
    for layer in cache.layers:
        layer.cumulative_length.sub_(num_tokens)


def can_be_static(model: Any) -> bool:
    """Tell whether a model gives with a static cache what it gives with its own, by trying.

    Experts need not be attached.

    Cost:
        Six small forwards.
    """
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    # Beyond a short window, so that what is hidden shows.
    length = min(window, 64) + 3 if isinstance(window, int) and window > 0 else 8
    ids = (torch.arange(length, device=model.device) % 7 + 1)[None]
    logits = []
    try:
        with torch.inference_mode():
            for cache in (make_kv_cache(model), make_static_cache(model, length + 5)):
                if cache is None:
                    return False
                for piece in (ids[:, :-2], ids[:, -2:-1], ids[:, -1:]):
                    output = model(input_ids=piece, past_key_values=cache, use_cache=True)
                logits.append(output.logits[:, -1].float())
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return False
    gap = (logits[0] - logits[1]).abs().mean()
    return bool(gap <= 0.02 * logits[0].std())


def _own_cache_class(model_class: type) -> type[DynamicCache] | None:
    """Find the cache class that a model's own module defines."""
    module = sys.modules[model_class.__module__]
    for value in vars(module).values():
        if (
            isinstance(value, type)
            and issubclass(value, DynamicCache)
            and value.__module__ == module.__name__
        ):
            return value
    return None


class _GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values are views of buffers with room to spare."""

    keys: Tensor
    values: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._key_buffer: Tensor | None = None
        self._value_buffer: Tensor | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append and give all keys and values, (B, heads, S, D) each."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        used = self.get_seq_length()
        self._key_buffer = _with_room(self._key_buffer, self.keys, key_states, used)
        self._value_buffer = _with_room(self._value_buffer, self.values, value_states, used)
        end = used + key_states.shape[-2]
        self._key_buffer[..., used:end, :] = key_states
        self._value_buffer[..., used:end, :] = value_states
        self.keys = self._key_buffer[..., :end, :]
        self.values = self._value_buffer[..., :end, :]
        return self.keys, self.values


def _with_room(buffer: Tensor | None, held: Tensor, new: Tensor, used: int) -> Tensor:
    """Give a buffer that begins with `held` and has room for `new` behind it."""
    needed = used + new.shape[-2]
    # After a reorder or a selection `held` is a tensor of its own: the buffer is stale. One made
    # in inference mode must not be written outside it.
    is_current = (
        buffer is not None
        and used > 0
        and held.data_ptr() == buffer.data_ptr()
        and held.shape[:2] == buffer.shape[:2]
        and (not buffer.is_inference() or torch.is_inference_mode_enabled())
    )
    if buffer is not None and is_current and buffer.shape[-2] >= needed:
        return buffer
    capacity = max(_FIRST_CAPACITY, 2 * used, needed)
    grown = torch.empty(
        (*new.shape[:-2], capacity, new.shape[-1]), dtype=new.dtype, device=new.device
    )
    if used:
        grown[..., :used, :] = held
    return grown
