"""Prefill in chunks, then one token per forward, until something says stop.

Works on any callable from token ids and a KV cache to logits: knows neither transformers nor
where experts come from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch

from foreload.decode.sampling import sample

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from foreload.config import SamplingConfig

__all__ = ["Forward", "StopText", "decode"]


class Forward(Protocol):
    """Runs the model on new tokens of a sequence whose past the KV cache holds."""

    def __call__(self, token_ids: Tensor, kv_cache: Any) -> Tensor:
        """Give the last position's logits (V,) for `token_ids` (1, T)."""


def decode(
    forward: Forward,
    prompt_ids: Sequence[int],
    kv_cache: Any,
    config: SamplingConfig,
    *,
    prefill_chunk: int,
    prefill: Forward | None = None,
    is_cancelled: Callable[[], bool] = lambda: False,
) -> Iterator[int]:
    """Generate token ids one by one; the caller stops by no longer asking.

    Args:
        forward: Runs the model.
        prompt_ids: The prompt, at least one token.
        kv_cache: Empty cache of this sequence.
        config: Sampling settings.
        prefill_chunk: Most prompt tokens per forward.
        prefill: Runs the model on the prompt; `forward` where None.
        is_cancelled: Asked between forwards of the prompt; true ends without a token.
    """
    generator = torch.Generator()
    if config.seed is None:
        generator.seed()
    else:
        generator.manual_seed(config.seed)
    logits = None
    for start in range(0, len(prompt_ids), prefill_chunk):
        if is_cancelled():
            return
        chunk = torch.tensor([list(prompt_ids[start : start + prefill_chunk])])
        logits = (prefill or forward)(chunk, kv_cache)
    if logits is None:
        raise ValueError("the prompt is empty")
    for _ in range(config.max_new_tokens - 1):
        token = sample(logits, config, generator)
        yield token
        logits = forward(torch.tensor([[token]]), kv_cache)
    yield sample(logits, config, generator)


class StopText:
    """Turns token texts into printable text, holding back what might begin a stop text.

    Args:
        stop: Texts that end the generation.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = [text for text in stop if text]
        self._held = ""
        self.is_stopped = False

    def feed(self, text: str) -> str:
        """Add new text; give what may be shown. Sets `is_stopped` when a stop text is complete."""
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.is_stopped = True
            shown, self._held = self._held[: min(found)], ""
            return shown
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        end = len(self._held) - keep
        shown, self._held = self._held[:end], self._held[end:]
        return shown

    def flush(self) -> str:
        """Give what was held back; the text has ended without a stop text."""
        shown, self._held = self._held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """Give the longest end of `text` that begins `stop`."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
