"""Token ids to text, piece by piece, without half a character or the beginning of a stop text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Detokenizer", "StopText"]

_UNFINISHED = "\ufffd"


class Detokenizer:
    """Turns a growing list of token ids into pieces of text that add up to its decoding.

    Args:
        tokenizer: transformers' tokenizer, or None: then every piece is empty.
    """

    def __init__(self, tokenizer: Any | None) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = 0
        self._shown = 0

    def feed(self, token_id: int) -> str:
        """Add one token; give the text that is final now."""
        self._ids.append(token_id)
        return self._emit(hold_back=True)

    def flush(self) -> str:
        """Give what is still held back."""
        return self._emit(hold_back=False)

    def _emit(self, *, hold_back: bool) -> str:
        # Only the last tokens are decoded again: enough context for spacing and merged bytes.
        before = self._decode(self._start, self._shown)
        now = self._decode(self._start, len(self._ids))
        if hold_back and now.endswith(_UNFINISHED):
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return now[len(before) :]

    def _decode(self, start: int, end: int) -> str:
        if self._tokenizer is None or start == end:
            return ""
        text: str = self._tokenizer.decode(self._ids[start:end], skip_special_tokens=True)
        return text


class StopText:
    """Lets text through until a stop text, holding back what might begin one.

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
