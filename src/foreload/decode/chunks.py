"""What a stream hands out: new tokens with the text they complete, and at last why it ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from foreload.decode.text import Detokenizer, StopText
from foreload.errors import ForeloadError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from foreload.metrics import RequestStats

__all__ = ["Chunk", "GenerationResult", "Transcript", "join_chunks"]


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one step of a stream brought.

    Attributes:
        token_ids: New tokens; empty in a last chunk that only carries held-back text.
        text: New text, without stop texts and half characters.
        finish_reason: None until the last chunk, then as in `GenerationResult`.
        stats: The request's statistics, with the last chunk.
    """

    token_ids: tuple[int, ...]
    text: str
    finish_reason: str | None = None
    stats: RequestStats | None = None


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """A finished generation.

    Attributes:
        text: The generated text, without the prompt.
        token_ids: The generated tokens: those of a stop text too, an end token not.
        finish_reason: "stop" (end token or stop text), "length" (max_new_tokens), "context" (the
            context is full before that) or "cancelled".
        stats: What it took.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    stats: RequestStats


class Transcript:
    """Turns the tokens of one request into chunks, and knows when its text is over.

    Args:
        tokenizer: transformers' tokenizer, or None: then every text is empty.
        ends: Tokens that end the text and are no part of it.
        stop: Texts that do.

    Attributes:
        is_stopped: An end token or a stop text has come.
    """

    def __init__(
        self, tokenizer: Any | None, ends: Collection[int], stop: Sequence[str] = ()
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._ends = ends
        self._stop = StopText(stop)
        self.is_stopped = False

    def add(self, token: int) -> Chunk | None:
        """Give what a token brings; None for one that ends the text."""
        if token in self._ends:
            self.is_stopped = True
            return None
        text = self._let_through(self._detokenizer.feed(token))
        return Chunk((token,), text)

    def end(self, stats: RequestStats, *, is_cancelled: bool, limit: str = "length") -> Chunk:
        """Give the last chunk, with the text held back, after the last token.

        Args:
            stats: What the request took.
            is_cancelled: Whether it was asked to end; a text that is over anyway has stopped.
            limit: The reason where nothing else ended it.
        """
        rest = ""
        if not self._stop.is_stopped:
            rest = self._let_through(self._detokenizer.flush()) + self._stop.flush()
        reason = "stop" if self.is_stopped else "cancelled" if is_cancelled else limit
        return Chunk((), rest, reason, stats)

    def _let_through(self, text: str) -> str:
        shown = self._stop.feed(text)
        self.is_stopped = self.is_stopped or self._stop.is_stopped
        return shown


def join_chunks(chunks: Iterable[Chunk]) -> GenerationResult:
    """Wait for all of a stream, and give the whole of it.

    Raises:
        ForeloadError: The stream broke off.
    """
    token_ids: list[int] = []
    pieces: list[str] = []
    last = Chunk((), "")
    for last in chunks:
        token_ids.extend(last.token_ids)
        pieces.append(last.text)
    if last.finish_reason is None or last.stats is None:
        raise ForeloadError("the stream ended without a finish reason")
    return GenerationResult("".join(pieces), token_ids, last.finish_reason, last.stats)
