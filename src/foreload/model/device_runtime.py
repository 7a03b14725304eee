"""What happens at one MoE layer where the device decides about its experts.

Called by the model's forward through the experts interface, as `model.runtime` is on the host. A
step of few tokens asks the host for nothing, so that it can be captured whole; long inputs, which
want every expert anyway, are the business of `model.device_prefill`. What is executed for a single
token is `model.device_policy`'s to say.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from foreload.memory.cuda import SideStream, Turns, on_device, wait_idle
from foreload.ops.device_experts import MAX_TOKENS
from foreload.ops.device_tables import ABSENT
from foreload.types import Routing, RoutingEvent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from foreload.metrics import Metrics
    from foreload.model.device_policy import DevicePolicy
    from foreload.model.device_prefill import DevicePrefill
    from foreload.ops.device_experts import DeviceExperts
    from foreload.types import RouterOutput, TensorPredictor

    SeeRouting = Callable[[RoutingEvent, list[int]], None]

__all__ = ["DeviceRuntime", "DraftLayers"]

_MOST_GUESSED = 1
"""Guesses brought per layer. More are wrong so often that they cost more than they hide, unless
what a layer does besides its experts takes as long as two copies. Qwen3-30B-A3B's published trace,
guesses of recall 0.85, slots for one token, per layer and token: 3.74 copies without guesses; with
1, 2, 3 or 6 of them 3.88, 4.10, 4.39 and 4.83, of which 2.90, 2.19, 1.65 and 0.99 are waited for;
November 2026."""


class DraftLayers(Protocol):
    """Stands in for the experts while a draft runs; `model.device_draft.DeviceDraft` is one."""

    def run(self, layer: int, experts: Any, hidden_states: Tensor, routing: Routing) -> Tensor:
        """Compute one MoE layer, (T, H)."""

    def note(self, layer: int, top_k_index: Tensor) -> Tensor:
        """Keep where a token is sent (1, K); give whom the round wants there so far, (N, K)."""


class _Prefetch(NamedTuple):
    """A prefetch beside the step, and what it reads: its memory must not be used again before."""

    mark: Any
    event: RoutingEvent


class _Counts(NamedTuple):
    """What the device has counted, over all layers."""

    steps: int = 0
    hits: int = 0
    misses: int = 0
    prefetched: int = 0
    used: int = 0
    wasted: int = 0
    executed: int = 0
    speculated: int = 0


class DeviceRuntime:
    """Runs the experts of every MoE layer from slots that the device manages.

    Args:
        experts: The slots.
        prefill: Runs inputs that want more than the slots can hold.
        block_bytes: Bytes that travel per expert.
        metrics: Where steps and lookups are counted, once they are asked for.
        device: Where the model is.
        policy: Says what is executed.
        predictor: Guesses the next layer's routing, or None.

    Attributes:
        turns: Taken for every whole forward, and where a captured one is launched: what another did
            to the slots between two layers would be overwritten, or read where it is no longer.
            A guess is waited for where its turn ends, if its layer has not come.
    """

    def __init__(
        self,
        experts: DeviceExperts,
        prefill: DevicePrefill,
        *,
        block_bytes: int,
        metrics: Metrics,
        device: torch.device,
        policy: DevicePolicy,
        predictor: TensorPredictor | None = None,
    ) -> None:
        self.turns = Turns(device, tidy=self._mend)
        self._is_broken = False
        self._experts = experts
        self._prefill = prefill
        self._block_bytes = block_bytes
        self._metrics = metrics
        self._policy = policy
        self._predictor = predictor
        self._side = SideStream(device)
        self._residuals: dict[tuple[int, int], Tensor] = {}
        self._open: dict[int, _Prefetch] = {}
        # By thread, as forwards are.
        self._drafting: dict[int, DraftLayers] = {}
        self._prefilling: set[int] = set()
        self._seeing: dict[int, SeeRouting] = {}
        self._counted = _Counts()

    def see_residual(self, layer: int, residual: Tensor) -> None:
        """Keep the residual stream (T, H) that enters a layer's MoE block, for its prediction."""
        thread = threading.get_ident()
        if self._predictor is not None and thread not in self._drafting:
            self._residuals[thread, layer] = residual

    @contextmanager
    def prefilling(self) -> Iterator[None]:
        """Take this thread's forwards for parts of a prompt, single tokens too."""
        thread = threading.get_ident()
        self._prefilling.add(thread)
        try:
            yield
        finally:
            self._prefilling.discard(thread)

    @contextmanager
    def showing(self, see: SeeRouting) -> Iterator[None]:
        """Show each layer's routing in this thread's forwards, none of which may be captured.

        Args:
            see: Told what is executed; the list, which the host's runtime fills, is empty.
        """
        thread = threading.get_ident()
        self._seeing[thread] = see
        try:
            yield
        finally:
            del self._seeing[thread]

    @contextmanager
    def drafting(self, draft: DraftLayers) -> Iterator[None]:
        """Let a draft compute the experts of this thread's forwards, of one token each.

        Beside it, the experts that it was sent to are brought to the target's slots. When the block
        ends whatever follows on the device waits for them.
        """
        thread = threading.get_ident()
        self._drafting[thread] = draft
        try:
            yield
        finally:
            del self._drafting[thread]
            self._side.join(self._side.mark())

    def run_layer(
        self,
        layer: int,
        experts: Any,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
    ) -> Tensor:
        """Compute one MoE layer; the experts function that transformers calls.

        Args:
            layer: MoE layer.
            experts: transformers' experts module.
            hidden_states: (T, H).
            top_k_index: (T, K) int64.
            top_k_weights: (T, K), final weights.

        Returns:
            (T, H); with the twins bit for bit what the host's loop gives.

        Cost:
            No host sync, with kernels; for more tokens than a step may have one.
        """
        routing = Routing(top_k_index, top_k_weights)
        with self.turns.taken(), self._changing(), on_device(hidden_states.device):
            draft = self._drafting.get(threading.get_ident())
            if draft is not None:
                self._prefetch_noted(layer, draft.note(layer, top_k_index))
                return draft.run(layer, experts, hidden_states, routing)
            self._join(layer)
            slot_of = self._experts.tables.slot_of[layer, : experts.num_experts]
            is_prefill = threading.get_ident() in self._prefilling
            executed = self._policy.decide(layer, routing, slot_of, is_prefill=is_prefill)
            see = self._seeing.get(threading.get_ident())
            if see is not None:
                see(RoutingEvent(0, layer, None, *executed), [])
            residual = self._residuals.pop((threading.get_ident(), layer), None)
            if self._predictor is not None and residual is not None:
                other = None if executed is routing else executed
                event = RoutingEvent(0, layer, residual, *routing, other)
                self._prefetch_next(self._predictor, event)
            if len(top_k_index) > MAX_TOKENS:
                return self._prefill.run(layer, experts, hidden_states, routing)
            return self._experts.run(layer, experts, hidden_states, executed)

    def abandon(self) -> None:
        """Forget prefetches of a forward that was broken off: nobody waits for them any more."""
        self._open.clear()
        self._residuals.clear()
        self._policy.forget()

    def divide(self, slots: Sequence[int]) -> None:
        """Divide the slots anew over the layers, empty; waits for the device.

        Between requests: what was captured must not be replayed afterwards.

        Args:
            slots: Slots of each layer, no more in all than there are.
        """
        with self.turns.taken(), self._changing():
            wait_idle(self._policy.pairs.device)
            self.abandon()
            # Guesses that nobody has wanted so far leave unused.
            self._experts.tables.is_fresh.zero_()
            self.count()
            self._experts.divide(slots)
            self._policy.pairs.zero_()
            self._counted = _Counts()

    def count(self) -> None:
        """Bring the metrics up to date with what the device has counted; waits for the device."""
        with self.turns.taken():
            tables = self._experts.tables
            # One copy: with a draft this is asked for in every round.
            counted = tables.counters.sum(0)
            values = (counted, tables.is_fresh.sum()[None], tables.clock[:1], self._policy.pairs)
            hits, misses, prefetched, used, unseen, steps, *pairs = torch.cat(values).tolist()
            now = _Counts(steps, hits, misses, prefetched, used, prefetched - used - unseen, *pairs)
            new = _Counts(*(a - b for a, b in zip(now, self._counted, strict=True)))
            self._counted = now
            metrics = self._metrics
            metrics.num_steps += new.steps
            metrics.num_hits += new.hits
            metrics.num_misses += new.misses
            metrics.demand_bytes += new.misses * self._block_bytes
            metrics.num_prefetched += new.prefetched
            metrics.num_prefetched_used += new.used
            metrics.prefetch_bytes += new.prefetched * self._block_bytes
            metrics.wasted_bytes += new.wasted * self._block_bytes
            metrics.num_executed += new.executed
            metrics.num_speculated += new.speculated

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Note where what changes the slots is broken off."""
        try:
            yield
        except BaseException:
            self._is_broken = True
            raise

    def _mend(self) -> None:
        """Put right what a forward that was broken off has left.

        A prefetch between two layers is waited for by whatever comes next. An expert is given its
        slot before it is brought there, and what lies between may take memory, compile a kernel, or
        be interrupted: then the slots are emptied, in place. Captured steps stay valid.
        """
        while self._open:
            self._join(next(iter(self._open)))
        if not self._is_broken:
            return
        wait_idle(self._policy.pairs.device)
        self.abandon()
        tables = self._experts.tables
        for table in (tables.slot_of, tables.expert_of, tables.stamp):
            table.fill_(ABSENT)
        tables.is_fresh.zero_()
        self._is_broken = False

    def _prefetch_next(self, predictor: TensorPredictor, event: RoutingEvent) -> None:
        """Bring, beside this layer's computation, what the next one will probably want."""
        layer = event.layer + 1
        if layer >= len(self._experts.tables.num_slots) or len(event.top_k_index) != 1:
            predictor.route_next(event)
            return
        self._join(layer)
        with self._side.forked():
            guess = predictor.route_next(event)
            if guess is not None:
                is_executed = self._policy.see_guess(layer, guess)
                # What will be executed is no guess.
                most = None if is_executed else _MOST_GUESSED
                self._experts.prefetch(layer, _likeliest_first(guess), most=most)
        self._open[layer] = _Prefetch(self._side.mark(), event)

    def _prefetch_noted(self, layer: int, named: Tensor) -> None:
        """Bring, beside the draft, experts that the verification of its tokens will want."""
        with self._side.forked():
            self._experts.prefetch(layer, named)

    def _join(self, layer: int) -> None:
        prefetch = self._open.pop(layer, None)
        if prefetch is not None:
            self._side.join(prefetch.mark)


def _likeliest_first(guess: RouterOutput) -> Tensor:
    """Give the experts of an early answer (1, K); not every router sorts its choice."""
    if guess.top_k_weights is None:
        return guess.top_k_index
    order = guess.top_k_weights.argsort(-1, descending=True)
    return guess.top_k_index.gather(-1, order)
