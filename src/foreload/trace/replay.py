"""Replays a trace through the engine's own cache: what any policy would have missed.

Knows no time, and so no prefetch: `trace.simulate` has both, and counts the same misses without a
predictor. This is the shorter way to them, and the only one to Belady's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from foreload.memory.cache import ExpertCache
from foreload.memory.eviction import Belady, make_eviction
from foreload.schedule.orchestrator import foreseen_wait
from foreload.trace.record import LayerVisit
from foreload.types import ExpertKey, Lookup

if TYPE_CHECKING:
    from collections.abc import Sequence

    from foreload.trace.record import RoutingTrace

__all__ = ["ReplayCounts", "in_rounds", "replay"]


class ReplayCounts(NamedTuple):
    """Lookups and hits of the replayed steps."""

    num_hits: int
    num_lookups: int

    @property
    def num_misses(self) -> int:
        """Give lookups that were not hits."""
        return self.num_lookups - self.num_hits

    @property
    def hit_rate(self) -> float:
        """Give hits / lookups."""
        return self.num_hits / self.num_lookups if self.num_lookups else 0.0


def in_rounds(trace: RoutingTrace, num_tokens: int) -> RoutingTrace:
    """Put consecutive single tokens into forwards of `num_tokens`, as a verified draft would.

    Prefills stay as they are; tokens that do not fill a forward are left out.
    """
    steps: list[list[LayerVisit]] = []
    waiting: list[list[LayerVisit]] = []
    for step, visits in enumerate(trace.steps):
        if trace.is_prefill(step) or visits[0].num_tokens > 1:
            steps.append(visits)
            continue
        waiting.append(visits)
        if len(waiting) == num_tokens:
            steps.append([_merge(rows, trace.num_experts) for rows in zip(*waiting, strict=True)])
            waiting = []
    return replace(trace, steps=steps)


def _merge(visits: Sequence[LayerVisit], num_experts: int) -> LayerVisit:
    return LayerVisit.from_routing(
        [visit.routing[0] if visit.routing else visit.experts for visit in visits], num_experts
    )


def replay(
    trace: RoutingTrace,
    num_slots: int,
    eviction: str,
    *,
    count_from: int = 0,
    with_foresight: bool = False,
) -> ReplayCounts:
    """Run a trace through a cache without prefetching, from empty.

    The engine counts the same hits where a layer's copies all start at once; where they wait for
    a worker or for a slot, its hits depend on which experts were computed first.

    Args:
        trace: Recorded routing.
        num_slots: Slots of the cache.
        eviction: A policy's name, "belady" for the best possible, "none" to keep nothing.
        count_from: First step that is counted; earlier ones only fill the cache, and so do
            prefills.
        with_foresight: Whether eviction knows each forward's demands before it begins, as it does
            where a draft has shown them.
    """
    if eviction == "belady":
        return _replay_belady(trace, num_slots, count_from)
    policy = make_eviction(eviction, trace.num_layers, trace.num_experts)
    cache = ExpertCache(num_slots, trace.num_layers, trace.num_experts, policy)
    hits = lookups = 0
    for step, visits in enumerate(trace.steps):
        if with_foresight and not trace.is_prefill(step):
            for layer, visit in enumerate(visits):
                soon = dict.fromkeys(visit.experts, foreseen_wait(layer, trace.num_layers))
                cache.foresee(layer, soon, is_complete=True)
        for layer, visit in enumerate(visits):
            counts = dict(zip(visit.experts, visit.counts, strict=True))
            cache.observe(layer, counts, visit.num_tokens, visit.routing or None)
            keys = [ExpertKey(layer, expert) for expert in visit.experts]
            resident = [key for key in keys if cache.lookup(key) is Lookup.HIT]
            if step >= count_from and not trace.is_prefill(step):
                hits += len(resident)
                lookups += len(keys)
            _serve(cache, keys, resident, keep=eviction != "none")
    return ReplayCounts(hits, lookups)


def _replay_belady(trace: RoutingTrace, num_slots: int, count_from: int) -> ReplayCounts:
    """Keep, after every layer, what returns first of all that was there: no engine misses less.

    In whatever order an engine serves a layer, what it keeps is a part of the same.
    """
    policy = Belady(trace.num_layers, trace.num_experts, trace.demands())
    held = np.zeros(trace.num_layers * trace.num_experts, dtype=bool)
    hits = lookups = 0
    for step, visits in enumerate(trace.steps):
        for layer, visit in enumerate(visits):
            counts = dict(zip(visit.experts, visit.counts, strict=True))
            policy.observe(layer, counts, visit.num_tokens)
            flat = layer * trace.num_experts + np.asarray(visit.experts, dtype=np.int64)
            if step >= count_from and not trace.is_prefill(step):
                hits += int(held[flat].sum())
                lookups += len(flat)
            held[flat] = True
            present = np.flatnonzero(held)
            wait = policy.expected_wait()[present]
            held[present[wait.argsort(kind="stable")[num_slots:]]] = False
    return ReplayCounts(hits, lookups)


def _serve(
    cache: ExpertCache, keys: list[ExpertKey], resident: list[ExpertKey], *, keep: bool
) -> None:
    """Serve one layer as the engine does: residents are protected until they are consumed."""
    for key in resident:
        cache.pin(key)
    waiting = list(resident)
    for key in keys:
        if cache.lookup(key) is not Lookup.MISS:
            continue
        while cache.reserve(key) is None:
            cache.unpin(waiting.pop(0))
        cache.commit(key)
        cache.pin(key)
        waiting.append(key)
    for key in waiting:
        cache.unpin(key)
    if not keep:
        for key in keys:
            if cache.lookup(key) is Lookup.HIT:
                cache.evict(key)
