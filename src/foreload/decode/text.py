"""Token ids to text, piece by piece, without showing half a character."""

from __future__ import annotations

from typing import Any

__all__ = ["Detokenizer"]

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
