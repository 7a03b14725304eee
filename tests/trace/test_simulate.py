"""Simulated times come out as by hand, and counts as the replay's."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest

from foreload.errors import ConfigError
from foreload.trace.record import LayerVisit, RoutingTrace
from foreload.trace.replay import replay
from foreload.trace.simulate import (
    SimulationSettings,
    simulate,
    simulation_limits,
    wire_limit_s,
)

EVICTIONS = ("none", "lru", "lfu", "least-stale", "next-use", "history")


def settings(**values: Any) -> SimulationSettings:
    """A link of 100 bytes a second, experts of 10 bytes: a copy takes 0.1 s."""
    defaults = {
        "num_slots": 8,
        "expert_bytes": 10,
        "bandwidth_bytes_s": 100.0,
        "dense_s": 0.0,
        "expert_s": 0.0,
        "eviction": "lru",
    }
    return SimulationSettings(**{**defaults, **values})


def make_trace(*steps: list[tuple[int, ...]], num_experts: int = 8) -> RoutingTrace:
    """Make a trace of single tokens from [step][layer] demands."""
    return RoutingTrace(
        len(steps[0]),
        num_experts,
        [[LayerVisit.from_routing([row], num_experts) for row in step] for step in steps],
    )


def random_trace(seed: int, *, num_steps: int = 40, prompt: int = 0) -> RoutingTrace:
    draw = random.Random(seed)

    def visit(num_tokens: int, *, is_prefill: bool) -> LayerVisit:
        # Squares are uneven: low experts are popular.
        rows = [
            sorted({int(16 * draw.random() ** 2) for _ in range(6)})[:4] for _ in range(num_tokens)
        ]
        return LayerVisit.from_routing(rows, 16, is_prefill=is_prefill)

    steps = [[visit(1, is_prefill=False) for _ in range(3)] for _ in range(num_steps)]
    if prompt:
        steps.insert(0, [visit(prompt, is_prefill=True) for _ in range(3)])
    return RoutingTrace(3, 16, steps)


class TestTimes:
    def test_misses_are_waited_for_and_hits_are_not(self) -> None:
        trace = make_trace([(0, 1)], [(0, 1)], [(0, 2)])
        result = simulate(trace, settings(dense_s=1.0))
        assert result.step_s == pytest.approx((1.2, 1.0, 1.1))
        assert result.tpot_s == pytest.approx(1.1)
        assert result.stall_s_per_token == pytest.approx(0.1)
        assert result.compute_s == pytest.approx(1.0)
        assert result.bytes_per_token == pytest.approx(10.0)
        assert (result.num_hits, result.num_late, result.num_misses) == (3, 0, 3)
        assert (result.hit_rate, result.late_rate, result.miss_rate) == (0.5, 0.0, 0.5)

    def test_what_is_there_is_computed_while_the_rest_comes(self) -> None:
        trace = make_trace([(0, 1)], [(0, 1, 2, 3)])
        result = simulate(trace, settings(expert_s=0.08, num_workers=1))
        # Copies end at 0.1 and 0.2; residents take until 0.16, the third expert until 0.24.
        assert result.step_s[1] == pytest.approx(0.16 + 0.08 + 0.08)
        assert result.stall_s_per_token == pytest.approx((0.12 + 0.0) / 2)

    def test_an_oracle_hides_copies_behind_computation(self) -> None:
        trace = make_trace(*[[(n, n + 1), (n + 2, n + 3)] for n in range(4)])
        slow = simulate(trace, settings(dense_s=0.3, eviction="none"))
        fast = simulate(trace, settings(dense_s=0.3, eviction="none", predictor="oracle"))
        assert slow.tpot_s == pytest.approx(2 * (0.3 + 0.2))
        assert fast.step_s[1:] == pytest.approx((0.6,) * 3)
        assert fast.stall_s_per_token == pytest.approx(0.2 / 4)
        assert fast.hit_rate == pytest.approx(14 / 16)
        assert fast.bytes_per_token == slow.bytes_per_token
        assert fast.prefetch_bytes_per_token == pytest.approx(35.0)
        assert fast.prefetch_precision == 1.0

    def test_a_guess_that_comes_too_late_is_late(self) -> None:
        trace = make_trace(*[[(n, n + 1), (n + 2, n + 3)] for n in range(4)])
        result = simulate(trace, settings(dense_s=0.05, eviction="none", predictor="oracle"))
        assert result.late_rate > 0.5
        limit = wire_limit_s(trace, settings(dense_s=0.05, eviction="none"))
        assert limit == pytest.approx(0.4)
        assert limit * 0.99 <= result.tpot_s <= limit * 1.3

    def test_copies_and_computing_may_be_in_each_others_way(self) -> None:
        trace = make_trace([(0, 1)], [(0, 1, 2, 3)])
        free = settings(expert_s=0.08, num_workers=1)
        alone = simulate(trace, free)
        slowed = simulate(trace, replace(free, compute_share=0.8))
        # Two residents take 0.2 s beside two copies; the other two experts run alone.
        assert slowed.step_s[1] == pytest.approx(0.2 + 0.16)
        assert slowed.step_s[1] > alone.step_s[1]
        both = simulate(trace, replace(free, compute_share=0.8, copy_share=0.5))
        assert both.tpot_s > slowed.tpot_s
        assert both.num_hits == slowed.num_hits == alone.num_hits

    def test_every_copy_may_cost_who_computes(self) -> None:
        trace = make_trace([(0, 1)], [(0, 2)])
        result = simulate(trace, settings(dense_s=1.0, call_s=0.3))
        # The second copy begins when the first, of 0.1 s, has long arrived.
        assert result.step_s == pytest.approx((1.6, 1.3))

    def test_latency_is_paid_per_copy(self) -> None:
        trace = make_trace([(0,)], [(1,)])
        assert simulate(trace, settings(latency_s=0.4)).tpot_s == pytest.approx(0.5)

    def test_layers_may_have_experts_of_different_sizes(self) -> None:
        trace = make_trace([(0,), (0,)], [(1,), (1,)])
        result = simulate(trace, settings(expert_bytes=(10, 30)))
        assert result.bytes_per_token == 40.0
        assert result.tpot_s == pytest.approx(0.4)

    def test_an_infinite_link_never_stalls(self) -> None:
        result = simulate(random_trace(0), settings(bandwidth_bytes_s=math.inf, dense_s=0.5))
        assert result.stall_s_per_token == 0.0
        assert result.tpot_s == pytest.approx(1.5)
        assert result.miss_rate > 0


class TestCounting:
    def test_prompts_fill_the_cache_and_are_not_counted(self) -> None:
        trace = random_trace(1, prompt=6)
        with_prompt = simulate(trace, settings(num_slots=48))
        without = simulate(trace.decode_part(), settings(num_slots=48))
        assert with_prompt.num_steps == without.num_steps == 40
        assert with_prompt.hit_rate > without.hit_rate

    def test_prompts_in_between_are_not_counted_either(self) -> None:
        trace = random_trace(1, num_steps=4)
        middle = [replace(visit, is_prefill=True) for visit in trace.steps[2]]
        trace.steps[2] = middle
        result = simulate(trace, settings())
        assert result.num_steps == 3
        lookups = sum(len(v.experts) for n in (0, 1, 3) for v in trace.steps[n])
        assert result.num_hits + result.num_misses == lookups

    def test_counting_may_begin_later(self) -> None:
        trace = make_trace([(0,)], [(0,)], [(0,)])
        assert simulate(trace, settings(count_from=1)).hit_rate == 1.0

    def test_a_trace_without_decoded_steps_is_refused(self) -> None:
        trace = random_trace(0, num_steps=0, prompt=3)
        for work in (simulate, simulation_limits, wire_limit_s):
            with pytest.raises(ConfigError, match="no decoded step"):
                work(trace, settings())
        with pytest.raises(ConfigError, match="from step 9 on"):
            simulate(make_trace([(0,)]), settings(count_from=9))

    def test_a_random_predictor_wastes_bytes_and_is_called_so(self) -> None:
        trace = random_trace(2)
        result = simulate(trace, settings(num_slots=24, predictor=0.6, dense_s=0.2))
        assert result.wasted_bytes_per_token > 0
        assert 0 < (result.prefetch_precision or 0) < 1
        assert result.recall_at_n[1][1] == pytest.approx(0.6, abs=0.15)

    def test_the_same_settings_give_the_same_result(self) -> None:
        trace, here = random_trace(3), settings(num_slots=20, predictor=0.7, dense_s=0.1)
        assert simulate(trace, here) == simulate(trace, here)


class TestAgainstTheReplay:
    """The replay knows no time: where all copies of a layer start at once, both miss the same."""

    @pytest.mark.parametrize("eviction", EVICTIONS)
    @pytest.mark.parametrize("num_slots", [6, 12, 24, 48])
    def test_both_count_the_same_hits(self, eviction: str, num_slots: int) -> None:
        for seed in range(3):
            trace = random_trace(seed, prompt=2 * (num_slots > 20))
            here = settings(num_slots=num_slots, eviction=eviction, num_workers=4, expert_s=0.03)
            result = simulate(trace, here)
            counts = replay(trace, num_slots, eviction)
            assert (result.num_hits, result.num_misses) == (counts.num_hits, counts.num_misses)

    def test_limits_are_made_of_replays(self) -> None:
        trace = random_trace(4, prompt=4)
        here = settings(num_slots=12, dense_s=0.05, expert_s=0.01, eviction="lfu")
        limits = simulation_limits(trace, here)
        belady, lfu = replay(trace, 12, "belady"), replay(trace, 12, "lfu")
        assert limits.lru_hit_rate == replay(trace, 12, "lru").hit_rate
        assert limits.belady_hit_rate == belady.hit_rate > limits.lru_hit_rate
        lookups = belady.num_lookups / 40
        assert limits.compute_s == pytest.approx(0.15 + 0.01 * lookups)
        assert limits.belady_limit_s == pytest.approx(
            max(limits.compute_s, belady.num_misses / 40 * 0.1)
        )
        assert wire_limit_s(trace, here) == pytest.approx(lfu.num_misses / 40 * 0.1)
        assert set(limits.to_dict()) == {
            "lru_hit_rate",
            "belady_hit_rate",
            "compute_s",
            "belady_limit_s",
        }

    @pytest.mark.parametrize("eviction", EVICTIONS)
    def test_nothing_beats_the_limits_without_a_predictor(self, eviction: str) -> None:
        trace = random_trace(5)
        for bandwidth in (50.0, 100.0, 1000.0):
            here = settings(
                num_slots=16,
                eviction=eviction,
                bandwidth_bytes_s=bandwidth,
                dense_s=0.05,
                expert_s=0.01,
            )
            result = simulate(trace, here)
            assert result.tpot_s >= wire_limit_s(trace, here) * (1 - 1e-9)
            assert result.tpot_s >= simulation_limits(trace, here).belady_limit_s * (1 - 1e-9)
            assert result.compute_s == pytest.approx(simulation_limits(trace, here).compute_s)


class TestSettings:
    @pytest.mark.parametrize(
        "bad",
        [
            {"num_slots": 0},
            {"expert_bytes": 0},
            {"expert_bytes": (1, 0)},
            {"bandwidth_bytes_s": 0.0},
            {"dense_s": -1.0},
            {"expert_s": math.nan},
            {"latency_s": math.inf},
            {"num_workers": 0},
            {"compute_share": 0.0},
            {"copy_share": 1.5},
            {"call_s": -1.0},
            {"lookahead_layers": 0},
        ],
        ids=str,
    )
    def test_values_that_make_no_sense_are_refused(self, bad: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match=f"{next(iter(bad))}="):
            settings(**bad)

    def test_what_does_not_fit_the_trace_is_refused(self) -> None:
        trace = make_trace([(0,), (1,)])
        with pytest.raises(ConfigError, match="num_slots=1 must be at least 2"):
            simulate(trace, settings(num_slots=1))
        with pytest.raises(ConfigError, match="3 sizes for 2 layers"):
            simulate(trace, settings(expert_bytes=(1, 2, 3)))
        with pytest.raises(ConfigError, match="unknown eviction policy"):
            simulate(trace, settings(eviction="coin"))
        with pytest.raises(ConfigError, match="no predictions"):
            simulate(trace, settings(predictor="trace"))

    def test_a_result_is_json_ready(self) -> None:
        values = simulate(make_trace([(0,)]), settings()).to_dict()
        assert values["tpot_s"] == pytest.approx(0.1)
        assert values["num_steps"] == 1
