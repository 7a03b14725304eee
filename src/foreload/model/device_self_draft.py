"""Rounds of speculative decoding where the device decides about experts.

Drafting, and the target's verification, are steps at fixed addresses on one static KV cache, each
captured where there is something to capture. While a token is drafted the target's experts are
fetched to where the draft's routing says, inside the draft's own step. The host chooses how far to
draft, between rounds. Chooses no token: the decode loop does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from foreload.model.draft_round import Mark, MeasuredRound
from foreload.ops.device_experts import MAX_TOKENS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from foreload.metrics import Metrics
    from foreload.model.device_draft import DeviceDraft
    from foreload.model.device_runtime import DeviceRuntime
    from foreload.model.graph import ForwardAll, StepGraph, StepGraphs
    from foreload.schedule.governor import Governor

__all__ = ["DeviceRound", "DeviceSelfDraft"]


class DeviceSelfDraft:
    """Makes the rounds of one engine.

    Args:
        runtime: Runs the MoE layers.
        steps: Lends requests their steps; a round's KV cache is that of a lent one.
        metrics: Where rounds are counted.
        governor: Chooses how far to draft, and learns what it took.
        draft: The quantised experts.
        forward: From token ids (1, T) and a KV cache to logits (T, V).

    Attributes:
        draft: The quantised experts; None once they were let go of: then nothing is drafted.
        on_round: Told each round when it is settled; for measuring.
    """

    def __init__(
        self,
        runtime: DeviceRuntime,
        steps: StepGraphs,
        metrics: Metrics,
        governor: Governor,
        draft: DeviceDraft,
        forward: ForwardAll,
    ) -> None:
        self.governor = governor
        self.draft: DeviceDraft | None = draft
        self.on_round: Callable[[DeviceRound], None] | None = None
        self.runtime = runtime
        self.metrics = metrics
        self._steps = steps
        self._forward = forward

    def begin(self, kv_cache: Any, most: int) -> DeviceRound:
        """Make a round that drafts as many tokens as pays, at most `most`; none is a choice.

        Raises:
            ForeloadError: The engine was closed.
        """
        step = self._steps.step_of(kv_cache)
        number = self.governor.choose(most) if self.draft is not None else 0
        # Before the clock runs: a capture would be taken for what a round takes.
        is_new = self.verifying_step(step, number + 1).prepare()
        if number:
            is_new |= self.drafting_step(step).prepare()
        if is_new:
            self.runtime.count()
        return DeviceRound(self, step, number)

    def release(self) -> None:
        """Let go of the draft's memory; rounds draft nothing from now on."""
        self.draft = None

    def drafting_step(self, step: StepGraph) -> StepGraph:
        """Give the draft's step on the sequence of another."""
        return step.beside(1, forward=self._forward_draft)

    def verifying_step(self, step: StepGraph, num_tokens: int) -> StepGraph:
        """Give the target's step of so many tokens on the sequence of another."""
        if num_tokens == 1:
            return step
        # Longer ones run as prompts do.
        return step.beside(num_tokens, can_capture=num_tokens <= MAX_TOKENS)

    def _forward_draft(self, token_ids: Tensor, kv_cache: Any) -> Tensor:
        """Run the draft on one token (1, 1); give its logits (1, V)."""
        draft = self.draft
        if draft is None:
            raise ValueError("the draft was let go of")
        with self.runtime.drafting(draft):
            logits = self._forward(token_ids, kv_cache)
            draft.end_token()
        return logits


class DeviceRound(MeasuredRound):
    """A round whose experts the device brings.

    Args:
        owner: Made it.
        step: The target's step of one token; all others are beside it.
        number: Tokens to draft at most.
    """

    def __init__(self, owner: DeviceSelfDraft, step: StepGraph, number: int) -> None:
        super().__init__(number, owner.metrics, owner.governor)
        self._owner = owner
        self._step = step

    def __exit__(self, *error: object) -> None:
        """End; what a broken round left in the KV cache goes with its request."""

    def draft(self, token: int, choose: Callable[[Tensor], int | None]) -> None:
        """Draft behind `token`, choosing each by its logits (V,); None ends it early."""
        draft = self._owner.draft
        if self.number == 0 or draft is None:
            return
        draft.restart()
        step = self._owner.drafting_step(self._step)
        num_drafted = 0
        following: int | None = token
        while following is not None and num_drafted < self.number:
            logits, _ = step.run([following])
            num_drafted += 1
            # The next token's logits will be where these are.
            following = choose(logits[-1].clone())
        step.rewind(num_drafted)

    def verify(self, token_ids: Sequence[int]) -> Tensor:
        """Give the target's logits (T, V) behind each of the tokens, valid until the next round.

        Cost:
            Waits for the device once, to read what it has counted.
        """
        owner = self._owner
        self.token_ids = list(token_ids)
        step = owner.verifying_step(self._step, len(self.token_ids))
        if step.wants_capture:
            # The draft has ended early, with another number of tokens than was prepared for.
            owner.runtime.count()
            with self.left_out():
                step.prepare()
                owner.runtime.count()
        self._verify_start = Mark.now(owner.metrics)
        logits, _ = step.run(self.token_ids)
        owner.runtime.count()
        self._verify_end = Mark.now(owner.metrics)
        return logits

    @property
    def _on_round(self) -> Callable[[DeviceRound], None] | None:
        return self._owner.on_round

    def _forget(self, num_tokens: int) -> None:
        self._step.rewind(num_tokens)
