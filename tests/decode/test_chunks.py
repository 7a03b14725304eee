"""Chunks add up to the text, and the last one says why it ended."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import pytest

from foreload.decode.chunks import Chunk, GenerationResult, Transcript, join_chunks
from foreload.decode.clock import RequestClock
from foreload.errors import ForeloadError
from foreload.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers import PreTrainedTokenizerFast

    from foreload.metrics import RequestStats

END = 2


@pytest.fixture
def stats() -> RequestStats:
    return RequestClock(Metrics(), Counter(), 0.0, 1).stats(0)


def shown(transcript: Transcript, ids: Iterable[int]) -> str:
    chunks = [transcript.add(token) for token in ids]
    return "".join(chunk.text for chunk in chunks if chunk is not None)


def test_each_token_has_its_chunk(tokenizer: PreTrainedTokenizerFast, stats: RequestStats) -> None:
    ids = tokenizer("the cat")["input_ids"]
    transcript = Transcript(tokenizer, {END})
    chunks = [transcript.add(token) for token in ids]
    assert [chunk.token_ids for chunk in chunks if chunk is not None] == [(token,) for token in ids]
    assert "".join(chunk.text for chunk in chunks if chunk is not None) == "the cat"
    assert not transcript.is_stopped
    assert transcript.end(stats, is_cancelled=False) == Chunk((), "", "length", stats)


def test_an_end_token_is_no_part_of_the_text(
    tokenizer: PreTrainedTokenizerFast, stats: RequestStats
) -> None:
    transcript = Transcript(tokenizer, {END}, ("cats",))
    assert shown(transcript, tokenizer("the cat")["input_ids"]) == "the "
    assert transcript.add(END) is None
    assert transcript.is_stopped
    # What was held back might have begun a stop text, and did not.
    assert transcript.end(stats, is_cancelled=False) == Chunk((), "cat", "stop", stats)


def test_a_stop_text_ends_the_text_with_its_last_token(
    tokenizer: PreTrainedTokenizerFast, stats: RequestStats
) -> None:
    ids = tokenizer("the cat")["input_ids"]
    transcript = Transcript(tokenizer, {END}, (" cat",))
    assert shown(transcript, ids[:-1]) == "the"
    assert not transcript.is_stopped
    assert transcript.add(ids[-1]) == Chunk((ids[-1],), "")
    assert transcript.is_stopped
    assert transcript.end(stats, is_cancelled=False).finish_reason == "stop"


def test_half_a_character_that_completes_a_stop_text_stops(
    tokenizer: PreTrainedTokenizerFast, stats: RequestStats
) -> None:
    ids = tokenizer("ab🎉")["input_ids"][:-1]
    transcript = Transcript(tokenizer, {END}, ("\ufffd",))
    assert shown(transcript, ids) == "ab"
    assert transcript.end(stats, is_cancelled=False) == Chunk((), "", "stop", stats)


@pytest.mark.parametrize(("last", "reason"), [(END, "stop"), (5, "cancelled")])
def test_a_text_that_is_over_was_not_cancelled(
    tokenizer: PreTrainedTokenizerFast, stats: RequestStats, last: int, reason: str
) -> None:
    transcript = Transcript(tokenizer, {END})
    transcript.add(last)
    assert transcript.end(stats, is_cancelled=True).finish_reason == reason


def test_a_full_context_is_a_reason_of_its_own(
    tokenizer: PreTrainedTokenizerFast, stats: RequestStats
) -> None:
    transcript = Transcript(tokenizer, {END})
    transcript.add(5)
    last = transcript.end(stats, is_cancelled=False, limit="context")
    assert last.finish_reason == "context"
    assert transcript.end(stats, is_cancelled=True, limit="context").finish_reason == "cancelled"


def test_chunks_join_to_the_whole(stats: RequestStats) -> None:
    chunks = [Chunk((1,), "a"), Chunk((2, 3), "b"), Chunk((), "c", "length", stats)]
    assert join_chunks(iter(chunks)) == GenerationResult("abc", [1, 2, 3], "length", stats)


@pytest.mark.parametrize("chunks", [[], [Chunk((1,), "a")]])
def test_a_stream_that_breaks_off_is_an_error(chunks: list[Chunk]) -> None:
    with pytest.raises(ForeloadError, match="without a finish reason"):
        join_chunks(chunks)
