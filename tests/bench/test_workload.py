"""Windows of text do not overlap, and a seed decides which are taken."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from foreload.bench.workload import Workload, make_workloads
from foreload.errors import ConfigError


def tokenizer(text: str, **settings: Any) -> dict[str, list[int]]:
    """Number the words: a token says where in the text it stood."""
    return {"input_ids": list(range(len(text.split())))}


def cut(num_words: int = 100, *, num_workloads: int = 5, seed: int = 0) -> list[Workload]:
    return make_workloads(
        tokenizer,
        "word " * num_words,
        num_workloads=num_workloads,
        num_prompt_tokens=6,
        num_decode_tokens=4,
        vocab_size=50,
        seed=seed,
    )


def test_windows_do_not_overlap_and_are_pieces_of_the_text() -> None:
    windows = cut(num_workloads=10)
    assert sorted(token for window in windows for token in window.token_ids) == list(range(100))
    for window in windows:
        first = window.token_ids[0]
        assert window.token_ids == tuple(range(first, first + 10))
        assert (window.num_prompt_tokens, window.num_decode_tokens) == (6, 4)


def test_a_shorter_prompt_is_the_end_of_the_longer_one() -> None:
    window = Workload(tuple(range(10)), 6)
    short = window.shortened(2)
    assert short.token_ids == (4, 5, 6, 7, 8, 9)
    assert short.num_prompt_tokens == 2
    assert short.num_decode_tokens == window.num_decode_tokens
    assert window.shortened(6) == window


def test_the_seed_decides_the_windows() -> None:
    assert cut(seed=1) == cut(seed=1)
    assert cut(seed=1) != cut(seed=2)


def test_a_longer_series_begins_like_a_shorter_one() -> None:
    assert cut(num_workloads=7)[:3] == cut(num_workloads=3)


def test_too_short_a_text_is_refused() -> None:
    assert len(cut(50, num_workloads=5)) == 5
    with pytest.raises(ConfigError, match="the text has 49 tokens; 5 windows of 10 are wanted"):
        cut(49, num_workloads=5)


def test_without_a_tokenizer_tokens_are_drawn_by_the_seed() -> None:
    settings = SimpleNamespace(
        num_workloads=3, num_prompt_tokens=30, num_decode_tokens=20, vocab_size=7
    )
    one = make_workloads(None, "", **vars(settings), seed=1)
    assert one == make_workloads(None, "", **vars(settings), seed=1)
    assert one != make_workloads(None, "", **vars(settings), seed=2)
    assert len(set(one)) == 3
    assert [len(window.token_ids) for window in one] == [50, 50, 50]
    assert {token for window in one for token in window.token_ids} == set(range(7))
