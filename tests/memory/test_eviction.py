"""Each policy waits for what it says it waits for, and Belady bounds them all."""

from __future__ import annotations

import random
from collections import Counter
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foreload.errors import ConfigError
from foreload.memory.cache import ExpertCache
from foreload.memory.eviction import (
    LFU,
    LRU,
    Belady,
    History,
    LeastStale,
    NextUse,
    make_eviction,
)
from foreload.types import ExpertKey, Lookup

if TYPE_CHECKING:
    from collections.abc import Sequence

    from foreload.memory.eviction import EvictionPolicy

    Trace = Sequence[Sequence[Sequence[int]]]

NAMES = ["history", "next-use", "lru", "lfu", "least-stale"]


def count_misses(trace: Trace, policy: EvictionPolicy, num_slots: int, num_experts: int) -> int:
    """Replay a trace: at each visit all demanded experts must be resident at once."""
    cache = ExpertCache(num_slots, len(trace[0]), num_experts, policy)
    misses = 0
    for layers in trace:
        for layer, experts in enumerate(layers):
            cache.observe(layer, dict.fromkeys(experts, 1), 1)
            keys = [ExpertKey(layer, expert) for expert in experts]
            missing = [key for key in keys if cache.lookup(key) is Lookup.MISS]
            for key in keys:
                if key not in missing:
                    cache.pin(key)
            for key in missing:
                assert cache.reserve(key) is not None
                cache.commit(key)
                cache.pin(key)
            for key in keys:
                cache.unpin(key)
            misses += len(missing)
            cache.check()
    return misses


def count_lookups(trace: Trace) -> int:
    return sum(len(experts) for layers in trace for experts in layers)


def random_trace(
    steps: int, num_layers: int, num_experts: int, top_k: int, seed: int, *, skew: float = 1.0
) -> Trace:
    chance = random.Random(seed)
    weights = [1.0 / (rank + 1) ** skew for rank in range(num_experts)]
    return [[pick(chance, weights, top_k) for _ in range(num_layers)] for _ in range(steps)]


def pick(chance: random.Random, weights: list[float], top_k: int) -> list[int]:
    chosen: set[int] = set()
    while len(chosen) < top_k:
        chosen.add(chance.choices(range(len(weights)), weights)[0])
    return sorted(chosen)


class TestLRU:
    def test_the_wait_is_the_tokens_since_last_use(self) -> None:
        policy = LRU(4, 2)
        policy.observe(0, {0: 1}, 1)
        policy.observe(1, {1: 1}, 1)
        assert policy.expected_wait()[[0, 3]].tolist() == [0.25, 0.0]
        policy.observe(2, {}, 1)
        policy.observe(3, {}, 1)
        policy.observe(0, {}, 1)
        assert policy.expected_wait()[0] == 1.0
        assert policy.expected_wait()[1] > 1e6, "what was never used waits longest"

    def test_skipped_layers_take_their_time(self) -> None:
        policy = LRU(4, 2)
        policy.observe(0, {0: 1}, 1)
        policy.observe(3, {}, 1)
        assert policy.expected_wait()[0] == 0.75
        policy.observe(2, {}, 1)
        assert policy.expected_wait()[0] == 1.5

    def test_the_same_layer_again_is_a_whole_token_later(self) -> None:
        policy = LRU(4, 2)
        policy.observe(1, {0: 1}, 1)
        policy.observe(1, {1: 1}, 1)
        assert policy.expected_wait()[2] == 1.0


class TestLFU:
    def test_the_wait_is_the_mean_gap_between_uses(self) -> None:
        policy = LFU(1, 3)
        for step in range(400):
            policy.observe(0, {0: 1, 1: 1} if step % 4 == 0 else {0: 1}, 1)
        wait = policy.expected_wait()
        assert wait[0] == pytest.approx(1.0)
        assert 3.5 < wait[1] < 4.5
        assert wait[2] > 1e6

    def test_recency_does_not_outweigh_frequency(self) -> None:
        policy = LFU(1, 2)
        for _ in range(20):
            policy.observe(0, {0: 1}, 1)
        policy.observe(0, {1: 1}, 1)
        wait = policy.expected_wait()
        assert wait[0] < wait[1]

    def test_old_habits_are_forgotten(self) -> None:
        policy = LFU(1, 2, half_life=4)
        for _ in range(20):
            policy.observe(0, {0: 1}, 1)
        for _ in range(20):
            policy.observe(0, {1: 1}, 1)
        wait = policy.expected_wait()
        assert wait[1] < wait[0]

    def test_a_chunk_of_tokens_counts_as_its_shares(self) -> None:
        policy = LFU(1, 2)
        policy.observe(0, {0: 25, 1: 100}, 100)
        assert policy.expected_wait().tolist() == pytest.approx([4.0, 1.0])


class TestLeastStale:
    def test_layers_to_come_are_kept_over_layers_just_passed(self) -> None:
        policy = LeastStale(4, 1)
        for _ in range(2):
            for layer in range(4):
                policy.observe(layer, {0: 1}, 1)
        policy.observe(0, {0: 1}, 1)
        policy.observe(1, {0: 1}, 1)
        wait = policy.expected_wait()
        assert wait.tolist() == [0.5, 0.75, 0.0, 0.25]

    def test_the_stale_leave_before_all_of_this_cycle(self) -> None:
        policy = LeastStale(2, 2)
        policy.observe(0, {0: 1, 1: 1}, 1)
        policy.observe(1, {0: 1}, 1)
        policy.observe(0, {0: 1}, 1)
        stale, used_now, to_come = policy.expected_wait()[[1, 0, 2]]
        assert stale > used_now > to_come

    @pytest.mark.parametrize("num_layers", [3, 7, 10, 47, 48])
    def test_a_cycle_is_a_cycle_however_many_layers_share_it(self, num_layers: int) -> None:
        policy = LeastStale(num_layers, 2)
        for step in range(30):
            for layer in range(num_layers):
                policy.observe(layer, {0: 1, 1: 1} if step % 2 == 0 else {0: 1}, 1)
                wait = policy.expected_wait().reshape(num_layers, 2)
                expected = step % 2  # expert 1 was used now, or exactly one cycle ago
                assert wait[layer, 1] - wait[layer, 0] == pytest.approx(expected)


class TestNextUse:
    def test_the_wait_is_the_way_to_the_layer_plus_the_mean_gap(self) -> None:
        policy = NextUse(4, 2, fast_weight=0.0)
        for step in range(2000):
            for layer in range(4):
                policy.observe(layer, {0: 1, 1: 1} if step % 2 == 0 else {0: 1}, 1)
        wait = policy.expected_wait().reshape(4, 2)
        assert wait[:, 0].tolist() == pytest.approx([0.0, 0.25, 0.5, 0.75])
        assert wait[:, 1].tolist() == pytest.approx([1.0, 1.25, 1.5, 1.75], abs=0.05)

    def test_the_next_layer_is_kept_over_the_one_just_passed(self) -> None:
        policy = NextUse(3, 1)
        for layer in (0, 1, 2, 0, 1):
            policy.observe(layer, {0: 1}, 1)
        assert np.argsort(policy.expected_wait()).tolist() == [2, 0, 1]

    def test_what_the_text_does_now_counts_more_than_what_it_did(self) -> None:
        policy = NextUse(1, 2)
        for _ in range(40):
            policy.observe(0, {0: 1}, 1)
        before = policy.expected_wait()
        for _ in range(12):
            policy.observe(0, {1: 1}, 1)
        after = policy.expected_wait()
        assert before[0] < before[1]
        assert after[1] < after[0]

    def test_more_choices_than_tokens_never_make_a_wait_negative(self) -> None:
        policy = NextUse(1, 2)
        policy.observe(0, {0: 9}, 3)
        assert (policy.expected_wait() >= 0).all()


class TestBelady:
    def test_the_wait_is_the_true_one(self) -> None:
        trace = [[[0], [1]], [[1], [0]], [[0], [1]]]
        policy = Belady(2, 2, trace)
        policy.observe(0, {0: 1}, 1)
        assert policy.expected_wait()[:3].tolist() == [2.0, 1.0, 1.5]
        policy.observe(1, {1: 1}, 1)
        policy.observe(0, {1: 1}, 1)
        wait = policy.expected_wait()
        assert wait[[0, 2, 3]].tolist() == [1.0, 0.5, 1.5]
        assert wait[1] > 10, "what never comes again leaves first"

    @settings(max_examples=60)
    @given(st.data())
    def test_no_policy_misses_less(self, data: st.DataObject) -> None:
        num_layers, num_experts = data.draw(st.integers(1, 3)), data.draw(st.integers(2, 6))
        top_k = data.draw(st.integers(1, num_experts))
        experts = st.lists(
            st.integers(0, num_experts - 1), min_size=1, max_size=top_k, unique=True
        ).map(sorted)
        trace = data.draw(
            st.lists(
                st.lists(experts, min_size=num_layers, max_size=num_layers),
                min_size=1,
                max_size=12,
            )
        )
        num_slots = data.draw(st.integers(top_k, num_layers * num_experts))
        best = count_misses(trace, Belady(num_layers, num_experts, trace), num_slots, num_experts)
        for name in NAMES:
            policy = make_eviction(name, num_layers, num_experts)
            assert best <= count_misses(trace, policy, num_slots, num_experts), name

    def test_knowing_the_future_pays(self) -> None:
        trace = random_trace(60, 3, 16, 4, seed=0)
        best = count_misses(trace, Belady(3, 16, trace), 16, 16)
        others = [count_misses(trace, make_eviction(n, 3, 16), 16, 16) for n in NAMES]
        assert best < 0.9 * min(others)


class TestCyclicTrace:
    """Every token wants the same 16 experts, and there is room for those of three layers."""

    TRACE: ClassVar[Trace] = [[[0, 1, 2, 3]] * 4] * 30
    SLOTS = 12

    @pytest.mark.parametrize("num_slots", [8, 12])
    def test_lru_evicts_everything_just_before_it_is_needed(self, num_slots: int) -> None:
        misses = count_misses(self.TRACE, LRU(4, 8), num_slots, 8)
        assert misses == count_lookups(self.TRACE)

    @pytest.mark.parametrize("name", ["history", "next-use", "least-stale"])
    def test_the_default_does_as_well_as_knowing_the_future(self, name: str) -> None:
        misses = count_misses(self.TRACE, make_eviction(name, 4, 8), self.SLOTS, 8)
        assert misses < 0.4 * count_lookups(self.TRACE)
        assert misses == count_misses(self.TRACE, Belady(4, 8, self.TRACE), self.SLOTS, 8)

    @pytest.mark.parametrize("name", NAMES)
    def test_room_for_all_ends_all_misses(self, name: str) -> None:
        misses = count_misses(self.TRACE, make_eviction(name, 4, 8), 16, 8)
        assert misses == 16


def test_the_default_beats_lru_on_skewed_text() -> None:
    trace = random_trace(150, 4, 16, 2, seed=1, skew=1.3)
    default = count_misses(trace, make_eviction("history", 4, 16), 16, 16)
    assert default < 0.9 * count_misses(trace, LRU(4, 16), 16, 16)


@pytest.mark.parametrize("name", NAMES)
def test_the_wait_covers_every_expert_and_is_finite(name: str) -> None:
    policy = make_eviction(name, 3, 5)
    for step in range(3):
        wait = policy.expected_wait()
        assert wait.shape == (15,)
        assert np.isfinite(wait).all()
        policy.observe(step, {step: 2}, 2)


def test_each_name_makes_its_policy() -> None:
    made = {name: type(make_eviction(name, 2, 2)) for name in [*NAMES, "none"]}
    assert made == {
        "history": History,
        "next-use": NextUse,
        "lru": LRU,
        "lfu": LFU,
        "least-stale": LeastStale,
        "none": LRU,
    }
    with pytest.raises(ConfigError, match="random"):
        make_eviction("random", 2, 2)


class TestHistory:
    """Routing that repeats itself, with nothing else to go by: every expert is equally frequent."""

    PERIOD, LAYERS, EXPERTS = 24, 3, 12

    def tokens(self, repeats: int) -> list[list[list[int]]]:
        draw = random.Random(5)
        once = [
            [draw.sample(range(self.EXPERTS), 2) for _ in range(self.LAYERS)]
            for _ in range(self.PERIOD)
        ]
        return once * repeats

    def misses(self, policy: Any, trace: list[list[list[int]]]) -> int:
        return count_misses(trace, policy, 9, self.EXPERTS)

    def test_what_followed_before_is_expected_again(self) -> None:
        trace = self.tokens(6)
        history = self.misses(History(self.LAYERS, self.EXPERTS), trace)
        by_rate = self.misses(NextUse(self.LAYERS, self.EXPERTS), trace)
        best = self.misses(Belady(self.LAYERS, self.EXPERTS, trace), trace)
        assert history < by_rate - 0.5 * (by_rate - best)

    def test_the_prompt_is_remembered_token_by_token(self) -> None:
        told, untold = (History(self.LAYERS, self.EXPERTS) for _ in range(2))
        prompt = self.tokens(3)
        for layer in range(self.LAYERS):
            rows = [token[layer] for token in prompt]
            counts = Counter(expert for row in rows for expert in row)
            told.observe(layer, counts, len(prompt), rows)
            untold.observe(layer, counts, len(prompt))
        trace = self.tokens(1)
        assert self.misses(told, trace) < 0.9 * self.misses(untold, trace)

    def test_it_forgets_what_is_too_long_ago(self) -> None:
        trace = self.tokens(6)
        short = self.misses(History(self.LAYERS, self.EXPERTS, capacity=4), trace)
        long = self.misses(History(self.LAYERS, self.EXPERTS, capacity=64), trace)
        assert long < short

    def test_placeholders_of_expert_parallelism_are_ignored(self) -> None:
        policy = History(1, 3)
        policy.observe(0, {1: 1}, 2, [[1, 3], [3, 3]])
        policy.observe(0, {1: 1}, 1)
        assert np.isfinite(policy.expected_wait()).all()
