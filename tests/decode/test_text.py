"""Pieces of text add up to the whole, without half characters; stop texts never show."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from foreload.decode.text import Detokenizer, StopText

if TYPE_CHECKING:
    from collections.abc import Iterable


def pieces(tokenizer: PreTrainedTokenizerFast | None, ids: Iterable[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [detokenizer.feed(token) for token in ids] + [detokenizer.flush()]


@pytest.fixture(scope="module")
def spaced_tokenizer() -> PreTrainedTokenizerFast:
    """Words begin with a mark that is a space, except at the beginning of the text."""
    words = ["▁the", "▁cat", "s", "▁", "<unk>", "ab", "▁a", "<0xC3>", "<0xA9>"]
    made = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.mark.parametrize("text", ["the cat sat", "naïve café", "日本語 🎉👩‍👩‍👧", "a\n\n b\t", " "])
def test_pieces_add_up_and_show_whole_characters(
    tokenizer: PreTrainedTokenizerFast, text: str
) -> None:
    ids = tokenizer(text)["input_ids"]
    shown = pieces(tokenizer, ids)
    assert "".join(shown) == text
    assert not any("\ufffd" in piece for piece in shown)
    assert len(ids) > 1 or text == " "


def test_a_character_shows_with_its_last_byte(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("é🎉")["input_ids"]
    assert pieces(tokenizer, ids) == ["", "é", "", "", "", "🎉", ""]


def test_plain_text_shows_without_delay(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("the cat")["input_ids"]
    shown = pieces(tokenizer, ids)
    assert shown[-1] == ""
    assert all(shown[:-1])


def test_half_a_character_at_the_end_shows_as_what_it_is(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    ids = tokenizer("ab🎉")["input_ids"][:-1]
    shown = pieces(tokenizer, ids)
    assert "".join(shown[:-1]) == "ab"
    assert set(shown[-1]) == {"\ufffd"}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 319), max_size=40))
def test_any_tokens_add_up_to_their_decoding(
    tokenizer: PreTrainedTokenizerFast, ids: list[int]
) -> None:
    shown = "".join(pieces(tokenizer, ids))
    assert shown == tokenizer.decode(ids, skip_special_tokens=True)


def test_words_keep_their_spaces(spaced_tokenizer: PreTrainedTokenizerFast) -> None:
    ids = [0, 1, 2, 6, 5]
    assert spaced_tokenizer.decode(ids) == "the cats aab"
    assert pieces(spaced_tokenizer, ids) == ["the", " cat", "s", " a", "ab", ""]


def test_bytes_that_are_tokens_make_characters(
    spaced_tokenizer: PreTrainedTokenizerFast,
) -> None:
    assert "".join(pieces(spaced_tokenizer, [0, 7, 8, 1])) == "theé cat"


def test_special_tokens_do_not_show(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("the")["input_ids"]
    assert "".join(pieces(tokenizer, [1, *ids, 2])) == "the"


def test_without_a_tokenizer_there_is_no_text() -> None:
    assert pieces(None, [1, 2, 3]) == ["", "", "", ""]


def test_nothing_fed_is_nothing_shown(tokenizer: PreTrainedTokenizerFast) -> None:
    assert pieces(tokenizer, []) == [""]


def test_long_texts_are_not_decoded_again_and_again(tokenizer: PreTrainedTokenizerFast) -> None:
    lengths: list[int] = []

    class Watching:
        def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
            lengths.append(len(ids))
            return tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    ids = tokenizer("the cat sat on the mat " * 30)["input_ids"]
    detokenizer = Detokenizer(Watching())
    assert "".join(detokenizer.feed(token) for token in ids) == "the cat sat on the mat " * 30
    assert max(lengths) <= 2


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
