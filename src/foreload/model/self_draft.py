"""Rounds of speculative decoding with the model's own quantised experts as the draft.

A round drafts on the target's KV cache, goes back, and lets the target run over what was drafted;
what drafting revealed about the routing is copied in the meantime. Chooses no token: the decode
loop does.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch

from foreload.model.draft_round import Mark, MeasuredRound
from foreload.model.kv_cache import rewind
from foreload.predict.draft_routing import LookaheadBuffer
from foreload.schedule.orchestrator import PrefetchRound

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from foreload.memory.tiers import ExpertTiers
    from foreload.metrics import Metrics
    from foreload.model.draft import DraftExperts
    from foreload.model.resident_draft import ResidentDraft
    from foreload.model.runtime import ExpertRuntime
    from foreload.schedule.governor import Governor
    from foreload.schedule.orchestrator import Foresight

    Forward = Callable[[Tensor, Any], Tensor]

__all__ = ["DraftRound", "SelfDraft"]


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
        num_drafting: Rounds that are drafting at the moment; the draft has to stay for them.
        foresight: Gives, by position in the text and layer, who will be wanted, in place of the
            draft's own routing; for comparison with a draft that routes perfectly.
    """

    def __init__(
        self,
        runtime: ExpertRuntime,
        tiers: ExpertTiers,
        metrics: Metrics,
        governor: Governor,
        draft: DraftExperts | ResidentDraft,
        forward: Forward,
        *,
        num_layers: int,
    ) -> None:
        self.governor = governor
        self.draft: DraftExperts | ResidentDraft | None = draft
        self.is_prefetching = True
        self.on_round: Callable[[DraftRound], None] | None = None
        self.runtime = runtime
        self.tiers = tiers
        self.metrics = metrics
        self.forward = forward
        self.num_layers = num_layers
        self.foresight: Foresight | None = None
        self.num_drafting = 0

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


class DraftRound(MeasuredRound):
    """A round whose experts the tiers bring.

    Attributes:
        prefetches: Its copies, with the lookahead buffer.
    """

    def __init__(
        self, owner: SelfDraft, kv_cache: Any, number: int, prefetches: PrefetchRound
    ) -> None:
        super().__init__(number, owner.metrics, owner.governor)
        self.prefetches = prefetches
        self._owner = owner
        self._kv_cache = kv_cache
        self._num_drafted = 0

    def __exit__(self, *error: object) -> None:
        with self._owner.runtime.lock:
            self.prefetches.close()

    def draft(self, token: int, choose: Callable[[Tensor], int | None]) -> None:
        """Draft behind `token`, choosing each by its logits (V,); None ends it early."""
        owner = self._owner
        with owner.runtime.lock:
            draft = owner.draft
            if self.number == 0 or draft is None:
                return
            owner.num_drafting += 1
        try:
            with owner.runtime.drafting(draft.run_layer, self.prefetches):
                following: int | None = token
                while following is not None and self._num_drafted < self.number:
                    logits = owner.forward(torch.tensor([[following]]), self._kv_cache)
                    self._num_drafted += 1
                    self.prefetches.end_token()
                    following = choose(logits[-1])
        finally:
            with owner.runtime.lock:
                owner.num_drafting -= 1
        rewind(self._kv_cache, self._num_drafted)
        with owner.runtime.lock:
            self.prefetches.end_draft()

    def verify(self, token_ids: Sequence[int]) -> Tensor:
        """Give the target's logits (T, V) behind each of the tokens."""
        owner = self._owner
        self.token_ids = list(token_ids)
        self._verify_start = Mark.now(owner.metrics)
        with ExitStack() as stack:
            if self._num_drafted:
                stack.enter_context(owner.runtime.verifying(self.prefetches))
            logits = owner.forward(torch.tensor([self.token_ids]), self._kv_cache)
        self._verify_end = Mark.now(owner.metrics)
        return logits

    @property
    def _on_round(self) -> Callable[[DraftRound], None] | None:
        return self._owner.on_round

    def _forget(self, num_tokens: int) -> None:
        rewind(self._kv_cache, num_tokens)
