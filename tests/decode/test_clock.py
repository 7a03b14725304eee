"""A request's statistics are its own times and counts, those of nobody before it."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from foreload.decode import clock as clock_module
from foreload.decode.clock import RequestClock
from foreload.metrics import Metrics

if TYPE_CHECKING:
    from foreload.metrics import RequestStats


class Request:
    """A request on an engine that has worked before, on a clock that the test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 100.0
        self.metrics = Metrics(
            num_hits=50, num_misses=50, demand_bytes=9000, stall_s=5.0, wasted_bytes=70,
            num_rounds=7, num_draft_tokens=20, num_accepted_tokens=9,
            num_executed=100, num_speculated=90, num_predicted={(0, 1): 10},
        )  # fmt: skip
        self.rounds = Counter({0: 2, 4: 5})
        monkeypatch.setattr(clock_module, "time", SimpleNamespace(perf_counter=lambda: self.now_s))
        self.clock = RequestClock(self.metrics, self.rounds, 100.0, 12)

    def token(self, seconds: float, *, is_output: bool = True) -> None:
        """Let a token come after some time."""
        self.now_s += seconds
        self.clock.token(is_output=is_output)

    def stats(self) -> RequestStats:
        return self.clock.stats(4096)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Request:
    return Request(monkeypatch)


def test_times_are_counted_from_the_request(asked: Request) -> None:
    asked.token(2.0)
    asked.token(0.5)
    asked.token(1.5)
    asked.now_s += 50.0  # whoever reads the text may take his time
    stats = asked.stats()
    assert stats.ttft_s == pytest.approx(2.0)
    assert stats.e2e_s == pytest.approx(4.0)
    assert stats.tpot_s == pytest.approx(1.0)
    assert (stats.num_prompt_tokens, stats.num_output_tokens) == (12, 3)
    assert stats.expert_memory_bytes == 4096


def test_an_end_token_takes_time_and_is_no_output(asked: Request) -> None:
    asked.token(2.0)
    asked.token(1.0)
    asked.token(1.0, is_output=False)
    stats = asked.stats()
    assert stats.num_output_tokens == 2
    assert stats.tpot_s == pytest.approx(1.0)


def test_one_token_has_no_time_per_token(asked: Request) -> None:
    asked.token(2.0)
    stats = asked.stats()
    assert stats.tpot_s is None
    assert stats.bytes_per_token is None
    assert stats.ttft_s == stats.e2e_s == pytest.approx(2.0)


def test_a_askedthat_brought_nothing_has_no_times(asked: Request) -> None:
    stats = asked.stats()
    assert (stats.ttft_s, stats.e2e_s, stats.tpot_s) == (0.0, 0.0, None)
    assert stats.stall_fraction == 0.0
    assert stats.hit_rate is None
    assert stats.num_output_tokens == 0


def test_counts_are_the_requests_own(asked: Request) -> None:
    asked.metrics.num_misses += 6
    asked.metrics.demand_bytes += 600
    asked.metrics.stall_s += 1.0
    asked.token(2.0)
    asked.metrics.num_hits += 3
    asked.metrics.num_late += 1
    asked.metrics.prefetch_bytes += 100
    asked.metrics.demand_bytes += 50
    asked.metrics.wasted_bytes += 30
    asked.metrics.num_predicted[0, 1] += 4
    asked.metrics.num_predicted_right[0, 1] = 3
    asked.token(1.0)
    asked.token(1.0)
    stats = asked.stats()
    assert stats.hit_rate == pytest.approx(0.3)
    assert stats.late_rate == pytest.approx(0.1)
    assert stats.bytes_moved == 750
    assert stats.bytes_per_token == pytest.approx(75.0), "of the decode phase only"
    assert stats.wasted_bytes == 30
    assert stats.stall_s == pytest.approx(1.0)
    assert stats.stall_fraction == pytest.approx(0.25)
    assert stats.recall_at_n == {0: {1: 0.75}}


def test_what_was_speculated_is_counted_behind_the_prompt(asked: Request) -> None:
    asked.metrics.num_executed += 40
    asked.token(1.0)
    asked.metrics.num_executed += 20
    asked.metrics.num_speculated += 5
    asked.token(1.0)
    assert asked.stats().speculated_fraction == pytest.approx(0.25)


def test_rounds_are_the_requests_own(asked: Request) -> None:
    asked.token(2.0)
    for drafted, accepted in ((4, 4), (4, 1), (0, 0)):
        asked.metrics.num_rounds += 1
        asked.metrics.num_draft_tokens += drafted
        asked.metrics.num_accepted_tokens += accepted
        asked.rounds[drafted] += 1
        for _ in range(1 + accepted):
            asked.token(0.25)
    stats = asked.stats()
    assert stats.round_s == pytest.approx(2.0 / 3)
    assert stats.acceptance_rate == pytest.approx(5 / 8)
    assert stats.accept_length == pytest.approx(8 / 3)
    assert stats.rounds_by_draft == {0: 1, 4: 2}
    assert list(stats.rounds_by_draft) == [0, 4]


def test_without_a_draft_there_are_no_rounds(asked: Request) -> None:
    asked.token(2.0)
    asked.token(1.0)
    stats = asked.stats()
    assert stats.round_s is stats.acceptance_rate is stats.accept_length is None
    assert stats.rounds_by_draft == {}


def test_counters_are_brought_up_to_date_before_they_are_read() -> None:
    metrics = Metrics()
    clock = RequestClock(
        metrics,
        Counter(),
        0.0,
        3,
        refresh=lambda: setattr(metrics, "num_hits", metrics.num_hits + 5),
    )
    metrics.num_misses += 15
    for _ in range(3):
        clock.token(is_output=True)
    assert metrics.num_hits == 10, "at the start, and behind the prompt"
    assert clock.stats(1).hit_rate == 10 / 25
    assert metrics.num_hits == 15
