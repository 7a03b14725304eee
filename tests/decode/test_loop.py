"""Every token is fed once, in order, and stop texts never show."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from foreload.config import SamplingConfig
from foreload.decode.loop import StopText, decode

VOCABULARY = 50


class Counting:
    """A model whose likeliest next token is the sum of all it has seen."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []

    def __call__(self, token_ids: Tensor, kv_cache: list[int]) -> Tensor:
        assert token_ids.dtype == torch.int64
        assert token_ids.shape[0] == 1
        self.calls.append(token_ids[0].tolist())
        kv_cache.extend(self.calls[-1])
        logits = torch.zeros(VOCABULARY)
        logits[sum(kv_cache) % VOCABULARY] = 9.0
        return logits


def greedy(prompt: list[int], num_tokens: int) -> list[int]:
    seen = list(prompt)
    for _ in range(num_tokens):
        seen.append(sum(seen) % VOCABULARY)
    return seen[len(prompt) :]


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 100])
def test_prefill_chunks_cover_the_prompt_and_then_tokens_come_one_by_one(chunk: int) -> None:
    prompt, model, cache = [3, 1, 4, 1, 5], Counting(), []
    config = SamplingConfig(max_new_tokens=4)
    tokens = list(decode(model, prompt, cache, config, prefill_chunk=chunk))
    assert tokens == greedy(prompt, 4)
    prefill = [prompt[start : start + chunk] for start in range(0, 5, chunk)]
    assert model.calls == prefill + [[token] for token in tokens[:-1]]
    assert cache == prompt + tokens[:-1]


def test_no_forward_is_run_for_a_token_nobody_asks_for() -> None:
    model = Counting()
    tokens = decode(model, [1], [], SamplingConfig(max_new_tokens=9), prefill_chunk=8)
    assert model.calls == [], "nothing runs before the first token is asked for"
    next(tokens)
    next(tokens)
    assert len(model.calls) == 2
    tokens.close()
    assert len(model.calls) == 2


def test_one_token_takes_one_forward() -> None:
    model = Counting()
    config = SamplingConfig(max_new_tokens=1)
    assert list(decode(model, [7, 8], [], config, prefill_chunk=8)) == [15]
    assert model.calls == [[7, 8]]


@pytest.mark.parametrize("chunk", [1, 2, 4])
def test_the_prompt_is_run_by_who_runs_prompts(chunk: int) -> None:
    prompt, reader, writer, cache = [3, 1, 4], Counting(), Counting(), []
    config = SamplingConfig(max_new_tokens=3)
    tokens = list(decode(writer, prompt, cache, config, prefill_chunk=chunk, prefill=reader))
    assert reader.calls == [prompt[start : start + chunk] for start in range(0, 3, chunk)]
    assert writer.calls == [[token] for token in tokens[:-1]]


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        next(decode(Counting(), [], [], SamplingConfig(), prefill_chunk=8))


def draw(seed: int | None) -> list[int]:
    config = SamplingConfig(max_new_tokens=30, temperature=3.0, seed=seed)
    return list(decode(Counting(), [1], [], config, prefill_chunk=8))


def test_the_seed_decides_the_samples_whatever_else_is_drawn() -> None:
    first = draw(5)
    torch.manual_seed(99)
    torch.rand(3)
    state = torch.get_rng_state()
    assert draw(5) == first != draw(6)
    assert torch.equal(torch.get_rng_state(), state), "the global generator was touched"


def test_without_a_seed_samples_differ() -> None:
    assert draw(None) != draw(None)


class TestStopText:
    def test_without_stop_texts_everything_shows_at_once(self) -> None:
        stop = StopText(())
        assert [stop.feed("ab"), stop.feed("c"), stop.flush()] == ["ab", "c", ""]
        assert not stop.is_stopped

    def test_what_might_begin_a_stop_text_is_held_back(self) -> None:
        stop = StopText(("END",))
        assert [stop.feed(piece) for piece in ("aE", "N", "xE", "ND", "more")][:3] == [
            "a",
            "",
            "ENx",
        ]
        assert stop.is_stopped

    def test_the_stop_text_and_what_follows_do_not_show(self) -> None:
        stop = StopText(("STOP",))
        assert stop.feed("one STOP two") == "one "
        assert stop.is_stopped
        assert stop.flush() == ""

    def test_the_earliest_of_several_ends_the_text(self) -> None:
        stop = StopText(("bb", "a", "abb"))
        assert stop.feed("xxabb") == "xx"

    def test_held_back_text_shows_when_the_text_ends_without_a_stop(self) -> None:
        stop = StopText(("END",))
        assert stop.feed("an EN") == "an "
        assert stop.flush() == "EN"
        assert stop.flush() == ""
        assert not stop.is_stopped

    def test_a_stop_text_that_repeats_itself_is_found_in_any_pieces(self) -> None:
        stop = StopText(("aab",))
        shown = "".join(stop.feed(letter) for letter in "xaaab")
        assert shown == "xa"
        assert stop.is_stopped

    @given(
        st.text("ab\n", max_size=30),
        st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
        st.lists(st.integers(0, 30), max_size=6),
    )
    def test_any_pieces_show_what_the_whole_text_would(
        self, text: str, stops: list[str], cuts: list[int]
    ) -> None:
        stop, shown = StopText(stops), ""
        edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
        for start, end in itertools.pairwise(edges):
            shown += stop.feed(text[start:end])
            assert text.startswith(shown)
            if stop.is_stopped:
                break
        # A stop text counts as soon as it is complete: what ends first decides.
        ends = [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]
        assert stop.is_stopped is bool(ends)
        if ends:
            assert not any(s in shown for s in stops)
        else:
            assert shown + stop.flush() == text
