"""A round counts what was accepted, and tells the governor what it took, whoever drafts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from foreload.metrics import Metrics
from foreload.model.draft_round import Mark, MeasuredRound
from foreload.schedule.governor import Governor

if TYPE_CHECKING:
    from collections.abc import Callable

    from foreload.schedule.governor import RoundReport


class ListeningGovernor(Governor):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__(pinned=3)
        self.reports: list[RoundReport] = []

    def learn(self, report: RoundReport) -> None:
        self.reports.append(report)


class PaperRound(MeasuredRound):
    """A round of marks alone."""

    def __init__(self, metrics: Metrics, governor: Governor) -> None:
        super().__init__(3, metrics, governor)
        self.forgotten: list[int] = []
        self.told: list[Any] = []

    def __exit__(self, *error: object) -> None:
        pass

    def verify(self, token_ids: list[int], *, hits: int, misses: int) -> None:
        self.token_ids = token_ids
        self._verify_start = Mark.now(self._metrics)
        self._metrics.num_hits += hits
        self._metrics.num_misses += misses
        self._verify_end = Mark.now(self._metrics)

    @property
    def _on_round(self) -> Callable[[Any], None] | None:
        return self.told.append

    def _forget(self, num_tokens: int) -> None:
        self.forgotten.append(num_tokens)


def test_a_settled_round_is_counted_and_told() -> None:
    metrics, governor = Metrics(), ListeningGovernor()
    with PaperRound(metrics, governor) as this_round:
        metrics.prefetch_bytes += 100
        this_round.verify([5, 6, 7, 8], hits=4, misses=2)
        metrics.demand_bytes += 1000
        this_round.settle(1)
    assert this_round.forgotten == [2]
    assert this_round.told == [this_round]
    assert this_round.num_accepted == 1
    assert (metrics.num_rounds, metrics.num_draft_tokens, metrics.num_accepted_tokens) == (1, 3, 1)
    (report,) = governor.reports
    assert (report.num_draft_tokens, report.num_accepted_tokens) == (3, 1)
    assert report.num_lookups == 6
    assert report.copied_bytes == 100, "what comes behind the verification is not this round's"
    assert report.draft_s >= 0
    assert report.verify_s >= 0
    assert metrics.draft_s == report.draft_s
    seen = this_round.verification
    assert (seen.num_tokens, seen.num_lookups, seen.num_absent) == (4, 6, 2)


def test_a_round_that_is_left_unsettled_counts_for_nothing() -> None:
    metrics, governor = Metrics(), ListeningGovernor()
    with PaperRound(metrics, governor) as this_round:
        this_round.verify([5], hits=1, misses=0)
    assert not governor.reports
    assert not metrics.num_rounds
