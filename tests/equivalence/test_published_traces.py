"""Replays and simulations give the hit rates known of real models' routing.

A global LRU and Belady's algorithm are written down here again, access by access, in the plainest
way; on published traces they give the figures published with them. The demo's trace was made by

    foreload trace demo --predictor lookahead --expert-memory 25% --num-prompt-tokens 64 \\
        --max-tokens 256 --output tests/data/demo-trace.jsonl.gz
"""

from __future__ import annotations

import heapq
import os
from collections import OrderedDict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from foreload.trace.read import read_trace
from foreload.trace.replay import replay
from foreload.trace.simulate import SimulationSettings, simulate

if TYPE_CHECKING:
    from foreload.trace.record import RoutingTrace

ROOT = Path(__file__).parents[2]
DEMO_TRACE = ROOT / "tests" / "data" / "demo-trace.jsonl.gz"
PUBLISHED = Path(os.environ.get("FORELOAD_TRACES", ROOT.parent / "shared" / "traces"))

# Percent of experts cached, LRU's and Belady's hit rates in percent, on the decode part, cold.
KNOWN = {
    "qwen.route.csv": (
        (3, 0.0, 45.3),
        (5, 37.7, 57.6),
        (10, 49.8, 74.0),
        (20, 73.4, 86.8),
        (30, 86.4, 91.1),
    ),
    "gemma.route.csv": ((3, 0.0, 44.8), (10, 48.8, 72.6), (20, 71.4, 84.7)),
}
HALF_A_POINT = 0.5


@cache
def read_decoded(path: Path) -> RoutingTrace:
    if not path.is_file():
        pytest.skip(f"the published traces are not in {PUBLISHED} (FORELOAD_TRACES)")
    return read_trace(path).decode_part()


def slots_of(trace: RoutingTrace, percent: int) -> int:
    return percent * trace.num_layers * trace.num_experts // 100


def plain_lru(trace: RoutingTrace, num_slots: int) -> float:
    held: OrderedDict[tuple[int, int], None] = OrderedDict()
    hits = lookups = 0
    for key in accesses(trace):
        lookups += 1
        if key in held:
            hits += 1
            held.move_to_end(key)
            continue
        if len(held) == num_slots:
            held.popitem(last=False)
        held[key] = None
    return 100 * hits / lookups


def plain_belady(trace: RoutingTrace, num_slots: int) -> float:
    order = accesses(trace)
    following = [0] * len(order)
    seen: dict[tuple[int, int], int] = {}
    for place in range(len(order) - 1, -1, -1):
        following[place] = seen.get(order[place], len(order) + place)
        seen[order[place]] = place
    held: dict[tuple[int, int], int] = {}
    farthest: list[tuple[int, tuple[int, int]]] = []
    hits = 0
    for key, wanted in zip(order, following, strict=True):
        if key in held:
            hits += 1
        elif len(held) == num_slots:
            while held.get(farthest[0][1]) != -farthest[0][0]:
                heapq.heappop(farthest)
            del held[heapq.heappop(farthest)[1]]
        held[key] = wanted
        heapq.heappush(farthest, (-wanted, key))
    return 100 * hits / len(order)


def accesses(trace: RoutingTrace) -> list[tuple[int, int]]:
    """Give every lookup in order, as (layer, expert)."""
    return [
        (layer, expert)
        for step in trace.demands()
        for layer, experts in enumerate(step)
        for expert in experts
    ]


def simulated(trace: RoutingTrace, num_slots: int, eviction: str) -> float:
    settings = SimulationSettings(
        num_slots=num_slots,
        expert_bytes=1 << 20,
        bandwidth_bytes_s=1e9,
        dense_s=1e-4,
        expert_s=1e-5,
        eviction=eviction,
    )
    return 100 * simulate(trace, settings).hit_rate


@pytest.mark.parametrize(
    ("name", "percent", "lru", "belady"),
    [(name, *row) for name, rows in KNOWN.items() for row in rows],
)
def test_published_hit_rates_come_out(name: str, percent: int, lru: float, belady: float) -> None:
    trace = read_decoded(PUBLISHED / name)
    num_slots = slots_of(trace, percent)
    assert plain_lru(trace, num_slots) == pytest.approx(lru, abs=0.06)
    assert plain_belady(trace, num_slots) == pytest.approx(belady, abs=0.06)
    assert simulated(trace, num_slots, "lru") == pytest.approx(lru, abs=HALF_A_POINT)
    assert 100 * replay(trace, num_slots, "lru").hit_rate == pytest.approx(lru, abs=HALF_A_POINT)
    best = 100 * replay(trace, num_slots, "belady").hit_rate
    assert best == pytest.approx(belady, abs=HALF_A_POINT)


@pytest.mark.parametrize("percent", [25, 50])
def test_the_demos_hit_rates_come_out(percent: int) -> None:
    trace = read_trace(DEMO_TRACE).decode_part()
    num_slots = slots_of(trace, percent)
    lru, belady = plain_lru(trace, num_slots), plain_belady(trace, num_slots)
    assert simulated(trace, num_slots, "lru") == pytest.approx(lru, abs=HALF_A_POINT)
    assert 100 * replay(trace, num_slots, "lru").hit_rate == pytest.approx(lru, abs=HALF_A_POINT)
    best = 100 * replay(trace, num_slots, "belady").hit_rate
    assert best == pytest.approx(belady, abs=HALF_A_POINT)
    assert best > lru


@pytest.mark.parametrize("percent", [3, 5, 10, 25, 50])
def test_the_replays_belady_is_no_lower_than_access_by_access(percent: int) -> None:
    """A layer is served as a whole and need not keep what it served: with few slots that shows."""
    trace = read_trace(DEMO_TRACE).decode_part()
    num_slots = slots_of(trace, percent)
    best = 100 * replay(trace, num_slots, "belady").hit_rate
    assert 0 <= best - plain_belady(trace, num_slots) < 4
