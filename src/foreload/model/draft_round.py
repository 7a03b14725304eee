"""What every round of drafting and verifying is measured by, wherever its experts come from.

Marks the counters before, between and after, counts what was accepted and tells the governor.
How tokens are drafted and verified is its subclasses' business.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, Self

from foreload.schedule.governor import RoundReport

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from foreload.metrics import Metrics
    from foreload.schedule.governor import Governor

__all__ = ["Mark", "MeasuredRound", "Verification"]


class Mark(NamedTuple):
    """The counters at some moment."""

    time_s: float
    stall_s: float
    link_s: float
    bytes_moved: int
    num_lookups: int
    num_hits: int

    @classmethod
    def now(cls, metrics: Metrics) -> Mark:
        """Read the clock and the counters."""
        return cls(
            time.perf_counter(),
            metrics.stall_s,
            metrics.link_s,
            metrics.bytes_moved,
            metrics.num_lookups,
            metrics.num_hits,
        )


class Verification(NamedTuple):
    """One forward of the target over several tokens.

    Attributes:
        num_tokens: Tokens it ran over.
        time_s: Seconds it took.
        num_lookups: Distinct experts it demanded, over all layers.
        num_absent: Of these, experts that were not in memory when their layer was reached.
    """

    num_tokens: int
    time_s: float
    num_lookups: int
    num_absent: int


class MeasuredRound(ABC):
    """One round: some drafted tokens, and the target's verdict over them.

    Args:
        number: Tokens to draft at most.
        metrics: Where rounds are counted.
        governor: Told what the round took.

    Attributes:
        number: Tokens it drafts at most.
        token_ids: What the target looked at.
        num_accepted: Of the drafted ones, those it stood by.
    """

    def __init__(self, number: int, metrics: Metrics, governor: Governor) -> None:
        self.number = number
        self.token_ids: list[int] = []
        self.num_accepted = 0
        self._metrics = metrics
        self._governor = governor
        self._start = self._verify_start = self._verify_end = Mark.now(metrics)

    def __enter__(self) -> Self:
        return self

    @abstractmethod
    def __exit__(self, *error: object) -> None:
        """End, settled or not: nothing of the round goes on."""

    @property
    def verification(self) -> Verification:
        """Give what the target's forward took."""
        begun, end = self._verify_start, self._verify_end
        lookups = end.num_lookups - begun.num_lookups
        hits = end.num_hits - begun.num_hits
        return Verification(len(self.token_ids), end.time_s - begun.time_s, lookups, lookups - hits)

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Keep what happens inside, before the verification, out of what the round took."""
        before = Mark.now(self._metrics)
        yield
        now = Mark.now(self._metrics)
        self._start = Mark._make(
            a + c - b for a, b, c in zip(self._start, before, now, strict=True)
        )

    def settle(self, num_accepted: int) -> None:
        """Keep the first verified token and the accepted ones behind it; forget the others."""
        self.num_accepted = num_accepted
        drafted = len(self.token_ids) - 1
        self._forget(drafted - num_accepted)
        metrics = self._metrics
        metrics.num_rounds += 1
        metrics.num_draft_tokens += drafted
        metrics.num_accepted_tokens += num_accepted
        begun, verified, end = self._start, self._verify_start, self._verify_end
        metrics.draft_s += verified.time_s - begun.time_s
        self._governor.learn(
            RoundReport(
                num_draft_tokens=drafted,
                num_accepted_tokens=num_accepted,
                draft_s=verified.time_s - begun.time_s,
                verify_s=end.time_s - verified.time_s,
                stall_s=end.stall_s - verified.stall_s,
                copied_bytes=end.bytes_moved - begun.bytes_moved,
                link_s=end.link_s - begun.link_s,
                num_lookups=end.num_lookups - begun.num_lookups,
            )
        )
        if self._on_round is not None:
            self._on_round(self)

    @property
    @abstractmethod
    def _on_round(self) -> Callable[[Self], None] | None:
        """Give who is told of settled rounds."""

    @abstractmethod
    def _forget(self, num_tokens: int) -> None:
        """Take the last tokens off the KV cache."""
