"""KV caches: one that grows by doubling, one that stays where it is.

What a model can is found out by letting it try.
"""

from __future__ import annotations

import functools
import inspect
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from foreload.memory.cuda import is_out_of_memory

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "can_be_static",
    "can_rewind",
    "clear_static",
    "make_kv_cache",
    "make_static_cache",
    "pass_cache",
    "rewind",
    "rewind_static",
]

_FIRST_CAPACITY = 256
_LONGEST_TRIAL = 64


def make_kv_cache(model: Any, most_tokens: int | None = None) -> DynamicCache:
    """Make a cache for one sequence (or batch) of a transformers model.

    Args:
        model: The model.
        most_tokens: What the sequence will have at most, where that is known: no layer keeps room
            for more.

    Full-attention layers grow by doubling, sliding windows stay within sight of the mask; others
    (linear attention) stay transformers' own. Cropping and reordering work as in `DynamicCache`.
    A model that brings a cache class of its own gets that, as it accepts no other.
    """
    own = _own_cache_class(type(model))
    if own is not None:
        return own()
    cache = DynamicCache(config=model.config)
    cache.layers = [_own_layer(layer, most_tokens) for layer in cache.layers]
    if getattr(cache, "layer_class_to_replicate", None) is DynamicLayer:
        cache.layer_class_to_replicate = functools.partial(_GrowingLayer, most_tokens)
    return cache


def pass_cache(model: Any, cache: Any) -> dict[str, Any]:
    """Give the argument that a model's forward takes its KV cache by.

    transformers 5.24 renamed it, and warns of the old name.
    """
    names = inspect.signature(model.forward).parameters
    return {"cache" if "cache" in names else "past_key_values": cache}


def rewind(cache: Any, num_tokens: int) -> None:
    """Forget the last `num_tokens` of a cache that was told to keep what that takes; maybe none."""
    cache.crop(-num_tokens)


def can_rewind(model: Any) -> bool:
    """Tell whether a model's cache can forget its last tokens, by letting it try.

    Recurrent states cannot, whether they show at once or not, and whatever else a model keeps is
    found out: what comes after going back must be what comes without having been there. Experts
    need not be attached.

    Raises:
        RuntimeError: The device ran out of memory, which says nothing about the model.

    Cost:
        Six small forwards.
    """
    wanted = _say(model, make_kv_cache(model), detour=False)
    cache = make_kv_cache(model)
    cache.activate_past_recording()
    # A layer may refuse to go back, or what it kept not fit what comes next.
    gives_it = _gives(wanted, lambda: _say(model, cache, detour=True))
    return gives_it and all(getattr(layer, "is_croppable", True) for layer in cache.layers)


def _say(model: Any, cache: Any, *, detour: bool) -> Tensor:
    """Give the logits of the last two of seven tokens, run in three pieces."""
    ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7]], device=model.device)

    def run(tokens: Tensor, num_forgotten: int = 0) -> Tensor:
        output = model(input_ids=tokens, use_cache=True, **pass_cache(model, cache))
        if detour:
            rewind(cache, num_forgotten)
        logits: Tensor = output.logits.float()
        return logits

    with torch.inference_mode():
        run(ids[:, :3])
        run(ids[:, 3:] if detour else ids[:, 3:5], num_forgotten=2)
        return run(ids[:, 5:])


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
    kinds = {type(layer) for layer in like.layers}
    types = getattr(model.config.get_text_config(), "layer_types", None) or ()
    # Chunked attention has windows that do not slide.
    if not kinds or not kinds <= {_GrowingLayer, _WindowLayer} or "chunked_attention" in types:
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

    Raises:
        RuntimeError: The device ran out of memory, which says nothing about the model.

    Cost:
        Six small forwards.
    """
    windows = [getattr(layer, "sliding_window", 0) for layer in make_kv_cache(model).layers]
    # Beyond a short window, so that what must be hidden shows.
    num_tokens = min(max(windows, default=0), _LONGEST_TRIAL) + 8
    ids = (torch.arange(num_tokens, device=model.device) % 7 + 1)[None]
    static = make_static_cache(model, num_tokens + 5)
    if static is None:
        return False
    wanted = _run_pieces(model, ids, make_kv_cache(model))
    return _gives(wanted, lambda: _run_pieces(model, ids, static))


def _gives(wanted: Tensor, run: Callable[[], Tensor]) -> bool:
    """Tell whether a trial gives the logits that are wanted; what a cache refuses does not."""
    try:
        found = run()
    except (NotImplementedError, RuntimeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        return False
    gap = (found - wanted).abs().mean()
    return bool(gap <= 0.02 * wanted.std())


def _run_pieces(model: Any, ids: Tensor, cache: Any) -> Tensor:
    """Give the last token's logits, when the last two come one by one."""
    with torch.inference_mode():
        for piece in (ids[:, :-2], ids[:, -2:-1], ids[:, -1:]):
            output = model(input_ids=piece, use_cache=True, **pass_cache(model, cache))
    logits: Tensor = output.logits[:, -1].float()
    return logits


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


def _own_layer(layer: Any, most_tokens: int | None) -> Any:
    if type(layer) is DynamicLayer:
        return _GrowingLayer(most_tokens)
    if type(layer) is DynamicSlidingWindowLayer:
        return _WindowLayer(sliding_window=layer.sliding_window)
    return layer


class _WindowLayer(DynamicSlidingWindowLayer):  # type: ignore[misc]
    """Shows what the mask covers, however many forwards come before the cache goes back.

    transformers 5.17 shows all that was kept for going back.
    """

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append and give the keys and values in sight, (B, heads, S, D) each."""
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        if self.record_past:
            in_sight = self.sliding_window - 1 + key_states.shape[-2]
            keys, values = keys[..., -in_sight:, :], values[..., -in_sight:, :]
        return keys, values


class _GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values are views of buffers with room to spare."""

    keys: Tensor
    values: Tensor

    def __init__(self, most_tokens: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._most_tokens = most_tokens
        self._key_buffer: Tensor | None = None
        self._value_buffer: Tensor | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append and give all keys and values, (B, heads, S, D) each."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        used = self.get_seq_length()
        most = self._most_tokens
        self._key_buffer = _with_room(self._key_buffer, self.keys, key_states, used, most)
        self._value_buffer = _with_room(self._value_buffer, self.values, value_states, used, most)
        end = used + key_states.shape[-2]
        self._key_buffer[..., used:end, :] = key_states
        self._value_buffer[..., used:end, :] = value_states
        self.keys = self._key_buffer[..., :end, :]
        self.values = self._value_buffer[..., :end, :]
        return self.keys, self.values


def _with_room(
    buffer: Tensor | None, held: Tensor, new: Tensor, used: int, most: int | None
) -> Tensor:
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
    capacity = max(_FIRST_CAPACITY, 2 * used)
    if most is not None and needed <= most:
        capacity = min(capacity, most)
    capacity = max(capacity, needed)
    grown = torch.empty(
        (*new.shape[:-2], capacity, new.shape[-1]), dtype=new.dtype, device=new.device
    )
    if used:
        grown[..., :used, :] = held
    return grown
