"""Times one request: when its tokens came, and what was counted in the meantime."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING

from foreload.metrics import RequestStats

if TYPE_CHECKING:
    from collections.abc import Callable

    from foreload.metrics import Metrics

__all__ = ["RequestClock"]


class RequestClock:
    """Takes the times of one request, and the difference of the engine's counters.

    Args:
        metrics: The engine's counters.
        rounds_by_draft: Rounds so far by tokens drafted; empty without a draft.
        submitted_s: When the request was submitted.
        num_prompt_tokens: Tokens of the prompt.
        refresh: Brings the counters up to date, where something else counts; called before they
            are read.
    """

    def __init__(
        self,
        metrics: Metrics,
        rounds_by_draft: Counter[int],
        submitted_s: float,
        num_prompt_tokens: int,
        *,
        refresh: Callable[[], None] = lambda: None,
    ) -> None:
        self._metrics = metrics
        self._refresh = refresh
        self._rounds = rounds_by_draft
        self._submitted_s = submitted_s
        self._num_prompt_tokens = num_prompt_tokens
        refresh()
        self._before = metrics.snapshot()
        self._rounds_before = Counter(rounds_by_draft)
        self._after_prefill = self._before
        self._first_s = submitted_s
        self._last_s = submitted_s
        self._num_steps = 0
        self._num_tokens = 0

    def token(self, *, is_output: bool) -> None:
        """Note that a token has become available; an end token is no output."""
        self._last_s = time.perf_counter()
        self._num_steps += 1
        self._num_tokens += is_output
        if self._num_steps == 1:
            self._first_s = self._last_s
            self._refresh()
            self._after_prefill = self._metrics.snapshot()

    def stats(self, expert_memory_bytes: int) -> RequestStats:
        """Give the request's statistics."""
        self._refresh()
        request = self._metrics.since(self._before)
        decoded = self._metrics.since(self._after_prefill)
        gaps = self._num_steps - 1
        e2e_s = self._last_s - self._submitted_s
        ttft_s = self._first_s - self._submitted_s
        rounds = self._rounds - self._rounds_before
        return RequestStats(
            ttft_s=ttft_s,
            tpot_s=(e2e_s - ttft_s) / gaps if gaps > 0 else None,
            e2e_s=e2e_s,
            num_prompt_tokens=self._num_prompt_tokens,
            num_output_tokens=self._num_tokens,
            hit_rate=request.hit_rate,
            late_rate=request.late_rate,
            recall_at_n=request.recall_at_n,
            prefetch_precision=request.prefetch_precision,
            bytes_moved=request.bytes_moved,
            bytes_per_token=decoded.bytes_moved / gaps if gaps > 0 else None,
            wasted_bytes=request.wasted_bytes,
            stall_s=request.stall_s,
            stall_fraction=request.stall_s / e2e_s if e2e_s > 0 else 0.0,
            expert_memory_bytes=expert_memory_bytes,
            speculated_fraction=decoded.speculated_fraction,
            round_s=(e2e_s - ttft_s) / decoded.num_rounds if decoded.num_rounds else None,
            acceptance_rate=decoded.acceptance_rate,
            accept_length=decoded.accept_length,
            rounds_by_draft=dict(sorted(rounds.items())),
        )
