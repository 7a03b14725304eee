"""Turns what drafting reveals into copies for the verification that follows.

One object per round. While tokens are drafted the link carries what they will want, the earliest
layer first; while the target verifies, it carries what later layers still lack. Decides order and
amount only: the tiers copy, and a demand overtakes everything here. Torch-free.
"""

from __future__ import annotations

import heapq
from enum import Enum
from typing import TYPE_CHECKING, Protocol

from foreload.types import ExpertKey

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from foreload.predict.draft_routing import LookaheadBuffer

    Foresight = Callable[[int, int], Sequence[int]]

__all__ = ["ForesightTarget", "Phase", "PrefetchRound", "foreseen_wait"]

_FORESEEN_WAIT = 1e-3
"""Tokens until what was drafted is verified, for the last layer: all of it comes before anything
that nobody drafted."""
_GUIDED_WAIT = 0.5
"""Tokens. Before all tokens are drafted an expert that is used more often than every other token is
likely to be wanted by one of those to come, and is not evicted for one that is known."""


class ForesightTarget(Protocol):
    """Where prefetches go and foresight is kept; `memory.tiers.ExpertTiers` is one."""

    @property
    def num_open_prefetches(self) -> int:
        """Give how many guessed experts are queued or on their way."""

    def is_absent(self, key: ExpertKey) -> bool:
        """Tell whether an expert is neither readable nor on its way."""

    def prefetch(self, key: ExpertKey, *, expected_wait: float, order: float) -> bool:
        """Start to bring an absent expert on a guess; False where that would not pay."""

    def foresee(self, layer: int, waits: Mapping[int, float], *, is_complete: bool) -> None:
        """Know what a layer is going to demand."""

    def call_off(self, keys: Iterable[ExpertKey]) -> None:
        """Cancel the copies of guesses that nobody is waiting for any more."""


class Phase(Enum):
    """How much of the link a round may take.

    Reference:
        arXiv:2511.14102, the three phases of its prefetching.
    """

    PRIMING = "the first token is drafted: each copying thread has something to do, no more"
    GUIDED = "as much is queued as the link carries while one token is drafted"
    SATURATION = "drafting is over: everything that is missing is queued"


def foreseen_wait(layer: int, num_layers: int) -> float:
    """Give the tokens until what was drafted is verified at a layer: next to nothing."""
    return _FORESEEN_WAIT * (layer + 1) / num_layers


class PrefetchRound:
    """The copies of one round of drafting and verifying.

    Args:
        target: Where copies are started and foresight is kept.
        buffer: Where the drafted tokens' routing is kept.
        num_layers: MoE layers.
        chances: By drafted position, the probability that the target's text comes to it.
        num_workers: Copying threads.
        link_experts: Experts that the link carries while one token is drafted.
        first_order: Rank of the verification's first layer among prefetches.
        is_prefetching: Whether copies are started at all; eviction knows the future either way.
        foresight: Gives, by drafted token and layer, who will be wanted, in place of the draft's
            own routing; None trusts the draft.
    """

    def __init__(
        self,
        target: ForesightTarget,
        buffer: LookaheadBuffer,
        *,
        num_layers: int,
        chances: Sequence[float],
        num_workers: int,
        link_experts: float,
        first_order: float = 0.0,
        is_prefetching: bool = True,
        foresight: Foresight | None = None,
    ) -> None:
        self.buffer = buffer
        self.phase = Phase.PRIMING
        self._target = target
        self._num_layers = num_layers
        self._chances = chances
        self._num_workers = num_workers
        self._link_experts = link_experts
        self._first_order = first_order
        self._is_prefetching = is_prefetching
        self._foresight = foresight
        self._candidates: list[tuple[int, float, int]] = []
        self._started: list[ExpertKey] = []
        self._reached = -1

    def note(self, layer: int, experts: Sequence[int], weights: Sequence[float]) -> None:
        """Learn where the token being drafted was sent, and start what there is room for."""
        if self._foresight is not None:
            experts = self._foresight(self.buffer.num_tokens, layer)
        self.buffer.note(layer, experts, weights, self._chances[self.buffer.num_tokens])
        uses = self.buffer.uses(layer)
        self._foresee(layer, is_complete=False)
        for expert in set(experts):
            if self._target.is_absent(ExpertKey(layer, expert)):
                # Pushed again for each token that wants it: the most wanted copy surfaces first.
                heapq.heappush(self._candidates, (layer, -uses[expert], expert))
        self._pump()

    def end_token(self) -> None:
        """Go on to the next drafted token."""
        self.buffer.end_token()
        self.phase = Phase.GUIDED

    def end_draft(self) -> None:
        """Nothing more is drafted: what is not foreseen now is not wanted this round."""
        self.phase = Phase.SATURATION
        for layer in range(self._num_layers):
            self._foresee(layer, is_complete=True)
        self._pump()

    def reach(self, layer: int) -> None:
        """The target has come to a layer: what it wants is settled, later layers go on."""
        self._reached = max(self._reached, layer)
        while self._candidates and self._candidates[0][0] <= layer:
            heapq.heappop(self._candidates)
        self._pump()

    def close(self) -> None:
        """End the round, verified or not: nothing is foreseen, nothing more is on its way."""
        self._candidates = []
        for layer in range(self._reached + 1, self._num_layers):
            self._target.foresee(layer, {}, is_complete=False)
        self._target.call_off(self._started)
        self._started = []

    @property
    def _quota(self) -> float:
        """Give how many copies may be queued or on their way."""
        match self.phase:
            case Phase.PRIMING:
                return self._num_workers
            case Phase.GUIDED:
                return max(self._num_workers, self._link_experts)
        return float("inf")

    def _foresee(self, layer: int, *, is_complete: bool) -> None:
        wait = foreseen_wait(layer, self._num_layers)
        waits = dict.fromkeys(self.buffer.uses(layer), wait)
        self._target.foresee(layer, waits, is_complete=is_complete)

    def _pump(self) -> None:
        """Start the most urgent copies, as many as the phase allows and slots can be had for."""
        if not self._is_prefetching or not self._candidates:
            return
        room = self._quota - self._target.num_open_prefetches
        wait = 2 * _FORESEEN_WAIT if self.phase is Phase.SATURATION else _GUIDED_WAIT
        while self._candidates and room > 0:
            layer, less, expert = self._candidates[0]
            key = ExpertKey(layer, expert)
            if self._target.is_absent(key):
                # As guesses of other kinds are ranked: layer by layer, the surer one first.
                order = self._first_order + layer + less / (0.1 - less)
                if not self._target.prefetch(key, expected_wait=wait, order=order):
                    return
                self._started.append(key)
                room -= 1
            heapq.heappop(self._candidates)
