"""Replays count hits by hand-made traces, and no policy misses less than Belady's."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest

from foreload.errors import ConfigError
from foreload.trace.record import LayerVisit, RoutingTrace
from foreload.trace.replay import ReplayCounts, in_rounds, replay

POLICIES = ("none", "lru", "lfu", "least-stale", "next-use", "history")


def make_trace(steps: list[list[tuple[int, ...]]], num_experts: int = 8) -> RoutingTrace:
    trace = RoutingTrace(len(steps[0]), num_experts)
    for step in steps:
        trace.steps.append([LayerVisit(e, (1,) * len(e), len(e)) for e in step])
    return trace


def random_trace(seed: int) -> tuple[RoutingTrace, int]:
    """Draw a small trace with a wide prefill, and a number of slots."""
    draw = random.Random(seed)
    layers, experts, top_k = draw.choice([(1, 5, 2), (2, 4, 2), (3, 4, 1)])
    sizes = [draw.randint(top_k, experts)] + [top_k] * 4
    steps = [
        [tuple(sorted(draw.sample(range(experts), size))) for _ in range(layers)] for size in sizes
    ]
    return make_trace(steps, experts), draw.randint(1, layers * experts)


def least_misses(trace: RoutingTrace, num_slots: int) -> int:
    """Try every choice of whom to keep."""
    best = {frozenset[tuple[int, int]](): 0}
    for step in trace.demands():
        for layer, experts in enumerate(step):
            batch = frozenset((layer, expert) for expert in experts)
            after: dict[frozenset[tuple[int, int]], int] = {}
            for cache, misses in best.items():
                absent = batch - cache
                everyone = cache | batch
                kept = min(num_slots, len(everyone))
                choices = itertools.combinations(sorted(everyone), kept) if absent else [cache]
                for choice in map(frozenset, choices):
                    total = misses + len(absent)
                    after[choice] = min(after.get(choice, total), total)
            best = after
    return min(best.values())


def test_hits_and_misses_by_hand() -> None:
    trace = make_trace([[(0, 1)], [(0, 2)], [(0, 1)], [(1, 2)]])
    assert replay(trace, 2, "lru") == ReplayCounts(num_hits=3, num_lookups=8)
    counts = replay(trace, 3, "lru")
    assert (counts.num_hits, counts.num_misses, counts.hit_rate) == (5, 3, 5 / 8)


def test_earlier_steps_fill_the_cache_and_are_not_counted() -> None:
    trace = make_trace([[(0, 1)], [(0, 2)], [(0, 1)]])
    assert replay(trace, 3, "lru", count_from=1) == ReplayCounts(3, 4)
    assert replay(trace, 3, "lru", count_from=3) == ReplayCounts(0, 0)
    assert replay(trace, 3, "lru", count_from=3).hit_rate == 0.0


def test_prefills_fill_the_cache_and_are_never_counted() -> None:
    trace = make_trace([[(0, 1)], [(0, 2)], [(0, 1)]])
    trace.steps[0] = [replace(visit, is_prefill=True) for visit in trace.steps[0]]
    for policy in (*POLICIES, "belady"):
        assert replay(trace, 3, policy) == replay(trace, 3, policy, count_from=1)


def test_layers_share_the_slots() -> None:
    trace = make_trace([[(0,), (0,)], [(0,), (0,)]])
    assert replay(trace, 2, "lru").num_hits == 2
    assert replay(trace, 1, "lru").num_hits == 0


def test_none_keeps_nothing() -> None:
    trace = make_trace([[(0, 1)], [(0, 1)], [(0, 1)]])
    assert replay(trace, 8, "none") == ReplayCounts(0, 6)


def test_a_layer_wider_than_the_slots_gets_through() -> None:
    trace = make_trace([[(0, 1, 2, 3, 4)], [(4,)], [(3, 4)]])
    for policy in (*POLICIES, "belady"):
        assert replay(trace, 2, policy).num_lookups == 8
    assert replay(trace, 2, "belady").num_hits == 3


def test_belady_keeps_what_returns_first() -> None:
    trace = make_trace([[(0,)], [(1,)], [(2,)], [(0,)], [(1,)], [(0,)]])
    assert replay(trace, 2, "lru").num_hits == 1
    assert replay(trace, 2, "belady").num_hits == 3


@pytest.mark.parametrize("seed", range(60))
def test_belady_is_the_best_of_all_choices(seed: int) -> None:
    trace, num_slots = random_trace(seed)
    assert replay(trace, num_slots, "belady").num_misses == least_misses(trace, num_slots)


def test_no_policy_misses_less_than_belady() -> None:
    for seed in range(150):
        trace, num_slots = random_trace(seed)
        for start in (0, 1):
            best = replay(trace, num_slots, "belady", count_from=start).num_misses
            for policy in POLICIES:
                assert replay(trace, num_slots, policy, count_from=start).num_misses >= best


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown eviction policy 'coin'"):
        replay(make_trace([[(0,)]]), 2, "coin")


def single(experts: tuple[int, ...]) -> LayerVisit:
    return LayerVisit(tuple(sorted(experts)), (1,) * len(experts), 1, (experts,))


class TestRounds:
    def test_consecutive_tokens_are_verified_together(self) -> None:
        trace = RoutingTrace(1, 8)
        prompt = replace(single((0, 1)), is_prefill=True)
        trace.steps = [[prompt], *([single(e)] for e in [(3, 1), (1, 2), (4, 5), (0, 7), (6, 7)])]
        rounds = in_rounds(trace, 2)
        assert rounds.demands() == [[(0, 1)], [(1, 2, 3)], [(0, 4, 5, 7)]]
        (visit,) = rounds.steps[1]
        assert (visit.counts, visit.num_tokens) == ((2, 1, 1), 2)
        assert visit.routing == ((3, 1), (1, 2))

    def test_rounds_of_one_are_the_trace(self) -> None:
        trace = RoutingTrace(1, 8)
        trace.steps = [[single((0, 1))], [single((2, 1))]]
        assert in_rounds(trace, 1).demands() == trace.demands()

    def test_foresight_keeps_what_the_round_still_wants(self) -> None:
        # Two layers of one token: layer 1's expert 0 is the older one when layer 0 evicts.
        trace = make_trace([[(0,), (0,)], [(1,), (1,)], [(2,), (0,)]])
        assert replay(trace, 3, "lru").num_hits == 0
        assert replay(trace, 3, "lru", with_foresight=True).num_hits == 1

    @pytest.mark.parametrize("policy", ["lru", "history"])
    def test_foresight_never_beats_belady_and_helps_on_the_whole(self, policy: str) -> None:
        blind = knowing = 0
        for seed in range(80):
            trace, num_slots = random_trace(seed)
            best = replay(trace, num_slots, "belady").num_misses
            found = replay(trace, num_slots, policy, with_foresight=True).num_misses
            assert found >= best
            knowing += found
            blind += replay(trace, num_slots, policy).num_misses
        assert knowing < blind
