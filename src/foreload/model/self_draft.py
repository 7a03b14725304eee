"""Rounds of speculative decoding with the model's own quantised experts as the draft.

A round drafts on the target's KV cache, goes back, and lets the target run over what was drafted;
what drafting revealed about the routing is copied in the meantime. Keeps the times of each round
for the governor. Chooses no token: the decode loop does.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch

from foreload.model.kv_cache import rewind
from foreload.predict.draft_routing import LookaheadBuffer
from foreload.schedule.governor import RoundReport
from foreload.schedule.orchestrator import PrefetchRound

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from foreload.memory.tiers import ExpertTiers
    from foreload.metrics import Metrics
    from foreload.model.draft import DraftExperts
    from foreload.model.runtime import ExpertRuntime
    from foreload.schedule.governor import Governor
    from foreload.schedule.orchestrator import Foresight

    Forward = Callable[[Tensor, Any], Tensor]

__all__ = ["DraftRound", "SelfDraft", "Verification"]


class SelfDraft:
    """Makes the rounds of one engine.

    Args:
        runtime: Runs the MoE layers.
        tiers: Where experts come from.
        metrics: Where rounds are counted.
        governor: Chooses how far to draft, and learns what it took.
        draft: The quantised experts.
        forward: Runs the model on token ids (1, T) and a cache; gives logits (T, V).
        num_layers: MoE layers.

    Attributes:
        draft: The quantised experts; None once they were let go of: then nothing is drafted.
        is_prefetching: Whether copies begin while drafting; for comparison.
        on_round: Told each round's lookahead buffer when it is settled; for measuring.
        foresight: Gives, by position in the text and layer, who will be wanted, in place of the
            draft's own routing; for comparison with a draft that routes perfectly.
    """

    def __init__(
        self,
        runtime: ExpertRuntime,
        tiers: ExpertTiers,
        metrics: Metrics,
        governor: Governor,
        draft: DraftExperts,
        forward: Forward,
        *,
        num_layers: int,
    ) -> None:
        self.governor = governor
        self.draft: DraftExperts | None = draft
        self.is_prefetching = True
        self.on_round: Callable[[DraftRound], None] | None = None
        self.runtime = runtime
        self.tiers = tiers
        self.metrics = metrics
        self.forward = forward
        self.num_layers = num_layers
        self.foresight: Foresight | None = None

    def begin(self, kv_cache: Any, most: int) -> DraftRound:
        """Make a round that drafts as many tokens as pays, at most `most`; none is a choice."""
        number = self.governor.choose(most) if self.draft is not None else 0
        chances = self.governor.chances(number)
        prefetches = PrefetchRound(
            self.tiers,
            LookaheadBuffer(self.num_layers),
            num_layers=self.num_layers,
            chances=chances,
            num_workers=self.tiers.num_workers,
            link_experts=self._link_experts(),
            first_order=(self.metrics.num_steps + 1) * self.num_layers,
            is_prefetching=self.is_prefetching,
            foresight=None if self.foresight is None else self._foresee(kv_cache),
        )
        return DraftRound(self, kv_cache, number, prefetches)

    def _foresee(self, kv_cache: Any) -> Foresight | None:
        """Give foresight by drafted token instead of by position in the text."""
        told, start = self.foresight, kv_cache.get_seq_length()
        return None if told is None else lambda token, layer: told(start + token, layer)

    def release(self) -> None:
        """Let go of the draft's memory; rounds draft nothing from now on."""
        if self.draft is not None:
            self.draft.release()
            self.draft = None

    def _link_experts(self) -> float:
        """Give how many experts the link carries while one token is drafted."""
        moved = self.governor.link_bytes_s * self.governor.draft_token_s
        return moved / max(self.tiers.expert_bytes)


class _Mark(NamedTuple):
    """The counters at some moment."""

    time_s: float
    stall_s: float
    link_s: float
    bytes_moved: int
    num_lookups: int
    num_hits: int

    @classmethod
    def now(cls, metrics: Metrics) -> _Mark:
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


class DraftRound:
    """One round: some drafted tokens, and the target's verdict over them.

    Attributes:
        number: Tokens it drafts at most.
        prefetches: Its copies, with the lookahead buffer.
        token_ids: What the target looked at.
        num_accepted: Of the drafted ones, those it stood by.
    """

    def __init__(
        self, owner: SelfDraft, kv_cache: Any, number: int, prefetches: PrefetchRound
    ) -> None:
        self.number = number
        self.prefetches = prefetches
        self.token_ids: list[int] = []
        self.num_accepted = 0
        self._owner = owner
        self._kv_cache = kv_cache
        self._num_drafted = 0
        self._start = _Mark.now(owner.metrics)
        self._verify_start = self._start
        self._verify_end = self._start

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        with self._owner.runtime.lock:
            self.prefetches.close()

    def draft(self, token: int, choose: Callable[[Tensor], int | None]) -> None:
        """Draft behind `token`, choosing each by its logits (V,); None ends it early."""
        owner, draft = self._owner, self._owner.draft
        if self.number == 0 or draft is None:
            return
        with owner.runtime.drafting(draft.run_layer, self.prefetches):
            following: int | None = token
            while following is not None and self._num_drafted < self.number:
                logits = owner.forward(torch.tensor([[following]]), self._kv_cache)
                self._num_drafted += 1
                self.prefetches.end_token()
                following = choose(logits[-1])
        rewind(self._kv_cache, self._num_drafted)
        with owner.runtime.lock:
            self.prefetches.end_draft()

    def verify(self, token_ids: Sequence[int]) -> Tensor:
        """Give the target's logits (T, V) behind each of the tokens."""
        owner = self._owner
        self.token_ids = list(token_ids)
        self._verify_start = _Mark.now(owner.metrics)
        with ExitStack() as stack:
            if self._num_drafted:
                stack.enter_context(owner.runtime.verifying(self.prefetches))
            logits = owner.forward(torch.tensor([self.token_ids]), self._kv_cache)
        self._verify_end = _Mark.now(owner.metrics)
        return logits

    @property
    def verification(self) -> Verification:
        """Give what the target's forward took."""
        begun, end = self._verify_start, self._verify_end
        lookups = end.num_lookups - begun.num_lookups
        hits = end.num_hits - begun.num_hits
        return Verification(len(self.token_ids), end.time_s - begun.time_s, lookups, lookups - hits)

    def settle(self, num_accepted: int) -> None:
        """Keep the first verified token and the accepted ones behind it; forget the others."""
        owner = self._owner
        self.num_accepted = num_accepted
        drafted = len(self.token_ids) - 1
        rewind(self._kv_cache, drafted - num_accepted)
        metrics = owner.metrics
        metrics.num_rounds += 1
        metrics.num_draft_tokens += drafted
        metrics.num_accepted_tokens += num_accepted
        begun, verified, end = self._start, self._verify_start, self._verify_end
        metrics.draft_s += verified.time_s - begun.time_s
        owner.governor.learn(
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
        if owner.on_round is not None:
            owner.on_round(self)
