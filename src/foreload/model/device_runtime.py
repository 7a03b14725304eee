"""What happens at one MoE layer where the device decides about its experts.

Called by the model's forward through the experts interface, as `model.runtime` is on the host. A
single token's step asks the host for nothing, so that it can be captured whole; long inputs, which
want every expert anyway, are the business of `model.device_prefill`. The true router is executed,
or, where that was asked for, what was guessed for a single token one layer earlier.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from foreload.memory.cuda import SideStream, on_device
from foreload.ops.device_experts import MAX_TOKENS
from foreload.types import Routing, RoutingEvent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from foreload.metrics import Metrics
    from foreload.model.device_prefill import DevicePrefill
    from foreload.ops.device_experts import DeviceExperts
    from foreload.types import RouterOutput

    NameExperts = Callable[[RoutingEvent], Tensor | None]
    RouteNext = Callable[[RoutingEvent], RouterOutput | None]

__all__ = ["DeviceRuntime", "DraftLayers"]


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
        name_experts: Names the next layer's likely experts without a host sync, or None.
        route_next: Guesses the next layer's routing, for the policy `schedule.policy.Speculate`: in
            place of `name_experts`, and to be executed. None follows the true router.

    Attributes:
        lock: Held at every layer: forwards of several threads take turns.
    """

    def __init__(
        self,
        experts: DeviceExperts,
        prefill: DevicePrefill,
        *,
        block_bytes: int,
        metrics: Metrics,
        device: torch.device,
        name_experts: NameExperts | None = None,
        route_next: RouteNext | None = None,
    ) -> None:
        self.lock = threading.RLock()
        self._experts = experts
        self._prefill = prefill
        self._block_bytes = block_bytes
        self._metrics = metrics
        self._name_experts = name_experts
        self._route_next = route_next
        self._side = SideStream(device)
        self._residuals: dict[tuple[int, int], Tensor] = {}
        self._open: dict[int, _Prefetch] = {}
        # By thread, as forwards are.
        self._drafting: dict[int, DraftLayers] = {}
        self._prefilling: set[int] = set()
        self._guessed: dict[int, tuple[int, Routing]] = {}
        # Pairs of token and expert that were executed, and those that no router chose.
        self._pairs = torch.zeros(2, dtype=torch.int64, device=device)
        self._counted = _Counts()

    def see_residual(self, layer: int, residual: Tensor) -> None:
        """Keep the residual stream (T, H) that enters a layer's MoE block, for its prediction."""
        thread = threading.get_ident()
        is_wanted = self._name_experts is not None or self._route_next is not None
        if is_wanted and residual.shape[0] == 1 and thread not in self._drafting:
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
            For a step no host sync, with kernels; for more than the slots can serve one.
        """
        routing = Routing(top_k_index, top_k_weights)
        with self.lock, on_device(hidden_states.device):
            draft = self._drafting.get(threading.get_ident())
            if draft is not None:
                self._prefetch_noted(layer, draft.note(layer, top_k_index))
                return draft.run(layer, experts, hidden_states, routing)
            residual = self._residuals.pop((threading.get_ident(), layer), None)
            self._join(layer)
            executed = self._decide(layer, routing)
            if not self._is_step(layer, *top_k_index.shape):
                return self._prefill.run(layer, experts, hidden_states, routing)
            if residual is not None:
                other = None if executed is routing else executed
                self._prefetch_next(RoutingEvent(0, layer, residual, *routing, other))
            return self._experts.run(layer, experts, hidden_states, executed)

    def abandon(self) -> None:
        """Forget prefetches of a forward that was broken off: nobody waits for them any more."""
        self._open.clear()
        self._residuals.clear()
        self._guessed.clear()

    def count(self) -> None:
        """Bring the metrics up to date with what the device has counted; waits for the device."""
        with self.lock:
            tables = self._experts.tables
            # One copy: with a draft this is asked for in every round.
            counted = tables.counters.sum(0)
            values = (counted, tables.is_fresh.sum()[None], tables.clock[:1], self._pairs)
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

    def _is_step(self, layer: int, num_tokens: int, top_k: int) -> bool:
        """Tell whether the slots can serve a forward, whatever it wants."""
        tables = self._experts.tables
        most = min(num_tokens * top_k, tables.num_experts)
        return num_tokens <= MAX_TOKENS and most <= tables.num_slots[layer]

    def _may_speculate(self, num_tokens: int) -> bool:
        """Tell whether this thread's forward executes guesses."""
        is_prefill = threading.get_ident() in self._prefilling
        return self._route_next is not None and num_tokens == 1 and not is_prefill

    def _decide(self, layer: int, true: Routing) -> Routing:
        """Give the routing to execute; `true` itself where the true router decides."""
        if self._route_next is None:
            return true
        guess = self._guessed.pop(threading.get_ident(), None)
        self._pairs[0] += true.top_k_index.numel()
        if guess is None or guess[0] != layer or not self._may_speculate(len(true.top_k_index)):
            return true
        index, weights = guess[1]
        same = true.top_k_index[:, :, None] == index[:, None, :]
        self._pairs[1] += (~same.any(-1)).sum()
        return Routing(index, weights.to(true.top_k_weights.dtype))

    def _prefetch_next(self, event: RoutingEvent) -> None:
        """Bring, beside this layer's computation, what the next one will probably want."""
        layer = event.layer + 1
        if layer >= len(self._experts.tables.num_slots):
            return
        self._join(layer)
        with self._side.forked():
            named = self._name(event)
            if named is not None:
                self._experts.prefetch(layer, named)
        self._open[layer] = _Prefetch(self._side.mark(), event)

    def _name(self, event: RoutingEvent) -> Tensor | None:
        """Name the next layer's likely experts (1, K), and settle what it will execute."""
        if self._route_next is None:
            return None if self._name_experts is None else self._name_experts(event)
        output = self._route_next(event)
        if output is None:
            return None
        if output.top_k_weights is not None and self._may_speculate(len(event.top_k_index)):
            guess = Routing(output.top_k_index, output.top_k_weights)
            self._guessed[threading.get_ident()] = (event.layer + 1, guess)
        return output.top_k_index

    def _prefetch_noted(self, layer: int, named: Tensor) -> None:
        """Bring, beside the draft, experts that the verification of its tokens will want."""
        with self._side.forked():
            # Surer than that what a layer wanted last it wants again.
            self._experts.prefetch(layer, named, min_age=0)

    def _join(self, layer: int) -> None:
        prefetch = self._open.pop(layer, None)
        if prefetch is not None:
            self._side.join(prefetch.mark)
