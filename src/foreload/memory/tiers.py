"""Disk below, slots above: who is demanded, who is prefetched, who has arrived.

The one owner of arena, cache and transfers. Called by the compute thread only. Knows nothing of
routers or models: it is given keys and probabilities, and gives back readable parameters.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import deque
from typing import TYPE_CHECKING, Protocol

from foreload.errors import CapacityError
from foreload.memory.cache import ExpertCache
from foreload.memory.transfer import TransferState
from foreload.types import ExpertKey, Lookup, Priority

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torch import Tensor

    from foreload.errors import TransferError
    from foreload.memory.eviction import EvictionPolicy
    from foreload.memory.transfer import Transfer, Transfers
    from foreload.metrics import Metrics, Timeline
    from foreload.types import ExpertPlan

__all__ = ["Demand", "ExpertTiers", "Slots"]


class Slots(Protocol):
    """The slots' memory: `memory.arena.SlotArena`, or `memory.device_slots.DeviceSlots`."""

    num_slots: int
    slot_bytes: int

    def tensors(self, slot: int, plan: ExpertPlan) -> dict[str, Tensor]:
        """View a slot as the parameters of the expert that `plan` brought there."""

    def before_reads(self) -> None:
        """Order what will be asked to read slots behind what was asked before."""

    def before_write(self, slot: int) -> None:
        """Let the next copy into a slot wait for what has been asked to read it."""


class ExpertTiers:
    """Brings experts from the checkpoint into slots, on demand and on a guess.

    Args:
        arena: The slots' memory.
        plans: How to read each expert, [layer][expert].
        transfers: Works off the copies; closed with the tiers.
        policy: Estimates waits until next use.
        metrics: Where lookups, bytes and stalls are counted.
        timeline: Where copies and stalls are drawn.
        keep: Whether experts stay after use; False is the on-demand reference.
        num_slots: Slots of the arena to use for now; None uses all.
        clock: Tells the seconds by which stalls are measured.

    Attributes:
        cache: Who is in which slot.
        num_slots: How many experts fit.
        is_layerwise: Whether a demand hands out nothing before all that it can have has arrived, as
            engines must whose kernels compute whole layers. For comparison with them.
    """

    def __init__(
        self,
        arena: Slots,
        plans: Sequence[Sequence[ExpertPlan]],
        transfers: Transfers,
        policy: EvictionPolicy,
        metrics: Metrics,
        timeline: Timeline,
        *,
        keep: bool = True,
        num_slots: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._arena = arena
        self._plans = plans
        self._metrics = metrics
        self._timeline = timeline
        self._keep = keep
        num_experts = max(len(layer) for layer in plans)
        self.num_slots = arena.num_slots if num_slots is None else num_slots
        self.cache = ExpertCache(self.num_slots, len(plans), num_experts, policy)
        self._transfers = transfers
        self._clock = clock
        self._open: dict[ExpertKey, Transfer] = {}
        self._guessed: set[ExpertKey] = set()
        # Called off too late to be stopped; without a cache they leave as soon as they arrive.
        self._unwanted: set[ExpertKey] = set()
        self._failed: dict[ExpertKey, TransferError] = {}
        self._views: dict[ExpertKey, dict[str, Tensor]] = {}
        self._window = 4 * transfers.num_workers
        self._demand: Demand | None = None
        # When pieces were on their way, sorted and apart; none while no copy is open.
        self._link_spans: list[tuple[float, float]] = []
        self.is_layerwise = False

    def observe(
        self,
        layer: int,
        counts: Mapping[int, int],
        num_tokens: int,
        routing: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """Learn the true routing at `layer` and call off prefetches that it proves wrong."""
        self.poll()
        self.cache.observe(layer, counts, num_tokens, routing)
        for key, transfer in list(self._open.items()):
            if (
                key.layer == layer
                and key.expert not in counts
                and transfer.priority is Priority.PREFETCH
            ):
                self._transfers.cancel(transfer)
                if not self._keep:
                    self._unwanted.add(key)
        self.poll()
        if not self._keep:
            self._drop_wrong_guesses(layer, counts)

    def demand(self, layer: int, experts: Sequence[int]) -> Demand:
        """Ask for experts of one layer; what is missing starts to come at once.

        There is one demand at a time: what an abandoned one still holds is let go.
        """
        self._drop_demand()
        self._arena.before_reads()
        self._demand = Demand(self)
        self._demand.ask([ExpertKey(layer, expert) for expert in experts])
        return self._demand

    def prefetch(self, key: ExpertKey, *, expected_wait: float, order: float) -> bool:
        """Start to bring an absent expert on a guess; False where that would not pay.

        Args:
            key: The guessed expert.
            expected_wait: Tokens until it is expected to be used; what is expected back sooner
                is not evicted for it.
            order: Rank among prefetches; the smaller goes first.
        """
        if not self.is_absent(key) or not self._begin(key, Priority.PREFETCH, order, expected_wait):
            return False
        self._guessed.add(key)
        self._metrics.num_prefetched += 1
        return True

    def foresee(self, layer: int, waits: Mapping[int, float], *, is_complete: bool) -> None:
        """Know what a layer is going to demand; see `ExpertCache.foresee`."""
        self.cache.foresee(layer, waits, is_complete=is_complete)

    def call_off(self, keys: Iterable[ExpertKey]) -> None:
        """Cancel the copies of guesses that nobody is waiting for any more."""
        for key in keys:
            transfer = self._open.get(key)
            if transfer is not None and transfer.priority is Priority.PREFETCH:
                self._transfers.cancel(transfer)
        self.poll()

    def grow(self, num_slots: int) -> None:
        """Use slots of the arena that were not in use so far."""
        self.num_slots += num_slots
        self.cache.grow(num_slots)

    def is_absent(self, key: ExpertKey) -> bool:
        """Tell whether an expert is neither readable nor on its way."""
        return self.cache.lookup(key) is Lookup.MISS

    def is_ready(self, key: ExpertKey) -> bool:
        """Tell whether an expert is readable."""
        return self.cache.lookup(key) is Lookup.HIT

    def is_arriving(self, key: ExpertKey) -> bool:
        """Tell whether an expert is readable, or its bytes are on their way (not just queued)."""
        if self.is_ready(key):
            return True
        transfer = self._open.get(key)
        # A worker may finish it at any moment; that it did is booked by the next poll.
        begun = (TransferState.RUNNING, TransferState.DONE)
        return transfer is not None and transfer.state in begun

    @property
    def num_workers(self) -> int:
        """Give how many pieces are copied at once."""
        return self._transfers.num_workers

    @property
    def expert_bytes(self) -> tuple[int, ...]:
        """Give, per layer, the bytes read from disk for its largest expert."""
        return tuple(max(plan.read_bytes for plan in layer) for layer in self._plans)

    @property
    def num_open_prefetches(self) -> int:
        """Give how many guessed experts are queued or on their way."""
        return sum(t.priority is Priority.PREFETCH for t in self._open.values())

    def parameters(self, key: ExpertKey) -> dict[str, Tensor]:
        """View a readable expert's parameters, valid while it is pinned."""
        views = self._views.get(key)
        if views is None:
            views = self._arena.tensors(self.cache.slot_of(key), self._plan(key))
            self._views[key] = views
        return views

    def poll(self) -> None:
        """Book what has finished; never blocks."""
        self._book(self._transfers.poll())

    def wait_news(self) -> None:
        """Block until a copy has finished, and book it as stall."""
        start = self._clock()
        finished = self._transfers.wait()
        end = self._clock()
        self._metrics.stall_s += end - start
        self._timeline.add("stall", "stall", start, end)
        self._book(finished)

    def wait_idle(self) -> None:
        """Block until no copy is queued or on its way."""
        while self._open:
            self._book(self._transfers.wait())

    def flush(self) -> None:
        """Empty the tier: cancel what is on its way, evict the rest."""
        self._drop_demand()
        for transfer in list(self._open.values()):
            self._transfers.cancel(transfer)
        self.wait_idle()
        residents = self.cache.keys()
        for key in residents:
            self._evict(key)

    def close(self) -> None:
        """Cancel all copies."""
        self._transfers.close()
        self.poll()
        self._views.clear()

    def _drop_wrong_guesses(self, layer: int, counts: Mapping[int, int]) -> None:
        """Evict what was brought for `layer` in vain: it would be a cache across tokens."""
        wrong = [key for key in self._guessed if key.layer == layer and key.expert not in counts]
        for key in wrong:
            if self.is_ready(key):
                self._evict(key)

    def _drop_demand(self) -> None:
        """Unpin what a demand holds that was never iterated, or not to its end."""
        if self._demand is not None:
            self._demand.close()
            self._demand = None

    def _plan(self, key: ExpertKey) -> ExpertPlan:
        return self._plans[key.layer][key.expert]

    def _begin(
        self, key: ExpertKey, priority: Priority, order: float, expected_wait: float | None = None
    ) -> bool:
        reservation = self.cache.reserve(key, expected_wait=expected_wait)
        if reservation is None:
            return False
        if reservation.evicted is not None:
            self._forget(reservation.evicted)
        self._failed.pop(key, None)
        plan = self._plan(key)
        try:
            self._arena.before_write(reservation.slot)
            transfer = self._transfers.submit(key, plan, reservation.slot, priority, order=order)
        except BaseException:
            self.cache.abort(key)
            raise
        self._open[key] = transfer
        return True

    def _book(self, finished: Sequence[Transfer]) -> None:
        """Enter finished transfers into cache, counters and timeline."""
        for transfer in finished:
            key = transfer.key
            del self._open[key]
            if transfer.is_guess:
                self._metrics.prefetch_bytes += transfer.bytes_moved
            else:
                self._metrics.demand_bytes += transfer.bytes_moved
            for start_s, end_s in transfer.busy:
                self._count_link(start_s, end_s)
                self._timeline.add("disk", f"{key.layer}.{key.expert}", start_s, end_s)
            is_unwanted = key in self._unwanted
            self._unwanted.discard(key)
            if transfer.state is TransferState.DONE:
                self.cache.commit(key)
                if is_unwanted:
                    self._evict(key)
                continue
            self.cache.abort(key)
            if key in self._guessed:
                self._guessed.remove(key)
                self._metrics.wasted_bytes += transfer.bytes_moved
            if transfer.error is not None:
                self._failed[key] = transfer.error
        if not self._open:
            self._link_spans.clear()

    def _count_link(self, start_s: float, end_s: float) -> None:
        """Count what of a piece's time no other piece covers, in whatever order they are booked."""
        spans = self._link_spans
        first = last = bisect_left(spans, start_s, key=lambda span: span[1])
        covered_s = 0.0
        while last < len(spans) and spans[last][0] <= end_s:
            covered_s += spans[last][1] - spans[last][0]
            last += 1
        if first < last:
            start_s, end_s = min(start_s, spans[first][0]), max(end_s, spans[last - 1][1])
        spans[first:last] = [(start_s, end_s)]
        self._metrics.link_s += end_s - start_s - covered_s

    def _evict(self, key: ExpertKey) -> None:
        if self.cache.evict(key):
            self._forget(key)

    def _forget(self, key: ExpertKey) -> None:
        """Drop what is known of an expert that has left its slot."""
        self._views.pop(key, None)
        if key in self._guessed:
            self._guessed.remove(key)
            self._metrics.wasted_bytes += self._plan(key).read_bytes


class Demand:
    """Experts one layer is waiting for: iterate to get each as soon as it is readable.

    Residents come first, so that computing them hides the copies of the others; every missing
    expert is copied once. However few slots there are, a layer gets through: experts that have
    been consumed make room. An expert's parameters are valid until the next one is asked for.

    Raises:
        TransferError: While iterating: a copy failed. Nothing stays pinned.
        CapacityError: While iterating: not one slot can be had.
    """

    def __init__(self, tiers: ExpertTiers) -> None:
        self._tiers = tiers
        self._ready: deque[ExpertKey] = deque()
        self._coming: list[ExpertKey] = []
        self._missing: deque[ExpertKey] = deque()

    def ask(self, keys: Sequence[ExpertKey]) -> None:
        """Pin what is readable, hurry what is on its way, start what is missing; count each."""
        tiers = self._tiers
        metrics = tiers._metrics
        for key in keys:
            match self._claim(key):
                case Lookup.HIT:
                    metrics.num_hits += 1
                case Lookup.PENDING:
                    metrics.num_late += 1
                case Lookup.MISS:
                    metrics.num_misses += 1
                    self._missing.append(key)
        self._admit()

    def __iter__(self) -> Iterator[tuple[ExpertKey, dict[str, Tensor]]]:
        tiers = self._tiers
        try:
            while tiers.is_layerwise and self._coming:
                tiers.wait_news()
                self._collect()
            while self._ready or self._coming or self._missing:
                if not self._ready:
                    self._await_arrival()
                    continue
                # It stays pinned, and first in line, until the next one is asked for.
                key = self._ready[0]
                yield key, tiers.parameters(key)
                self._ready.popleft()
                tiers.cache.unpin(key)
                if not tiers._keep:
                    tiers._evict(key)
                self._collect()
        finally:
            self.close()

    def close(self) -> None:
        """Unpin what was not consumed; copies on their way go on."""
        while self._ready:
            self._tiers.cache.unpin(self._ready.popleft())

    def _await_arrival(self) -> None:
        self._collect()
        if self._ready:
            return
        if not self._coming:
            self._make_room()
        self._tiers.wait_news()
        self._collect()

    def _collect(self) -> None:
        """Pin what has arrived, ask again for what was called off, start what now fits."""
        tiers = self._tiers
        tiers.poll()
        still_coming = []
        for key in self._coming:
            match tiers.cache.lookup(key):
                case Lookup.HIT:
                    tiers.cache.pin(key)
                    self._ready.append(key)
                case Lookup.PENDING:
                    still_coming.append(key)
                case Lookup.MISS:
                    error = tiers._failed.pop(key, None)
                    if error is not None:
                        raise error
                    self._missing.append(key)
        self._coming = still_coming
        self._admit()

    def _admit(self) -> None:
        """Start copies of missing experts, a few ahead of the computation."""
        tiers = self._tiers
        while self._missing and len(self._coming) < tiers._window:
            key = self._missing[0]
            # A guess may have brought it in the meantime.
            if self._claim(key) is Lookup.MISS:
                if not tiers._begin(key, Priority.DEMAND, 0.0):
                    return
                self._coming.append(key)
            self._missing.popleft()

    def _claim(self, key: ExpertKey) -> Lookup:
        """Pin an expert that is readable, hurry one that is on its way; tell which it was."""
        tiers = self._tiers
        found = tiers.cache.lookup(key)
        if found is Lookup.HIT:
            tiers.cache.pin(key)
            self._ready.append(key)
        elif found is Lookup.PENDING:
            tiers._transfers.raise_priority(tiers._open[key])
            tiers._unwanted.discard(key)
            self._coming.append(key)
        if key in tiers._guessed:
            tiers._guessed.remove(key)
            tiers._metrics.num_prefetched_used += 1
        return found

    def _make_room(self) -> None:
        """Call off guesses that hold every slot."""
        tiers = self._tiers
        if not tiers._open:
            raise CapacityError(
                "no expert slot can be freed",
                needed_bytes=tiers._arena.slot_bytes,
                available_bytes=0,
                setting="expert_memory",
            )
        for transfer in list(tiers._open.values()):
            tiers._transfers.cancel(transfer)
