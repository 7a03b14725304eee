"""What may be dropped is light and missing, and what takes its place is in memory."""

from __future__ import annotations

import itertools
import random

import pytest

from foreload.schedule.policy import Exact, Speculate, SpeculateWhen

EXPERTS, WEIGHTS = [7, 2, 5, 0], [0.4, 0.3, 0.2, 0.1]


def nobody(expert: int) -> bool:
    return False


def everybody(expert: int) -> bool:
    return True


def test_the_exact_policy_never_applies() -> None:
    assert not Exact().applies(1)
    assert not Exact().applies(20, is_prefill=True)


class TestSpeculate:
    def test_it_speculates_in_decoding_only(self) -> None:
        policy = Speculate()
        assert policy.applies(1)
        assert not policy.applies(1, is_prefill=True)
        assert not policy.applies(2)

    def test_in_prefill_too_where_that_is_asked_for(self) -> None:
        policy = Speculate(in_prefill=True)
        assert policy.applies(1)
        assert policy.applies(1, is_prefill=True)
        assert policy.applies(20, is_prefill=True)


class TestSpeculateWhen:
    def test_it_acts_on_single_tokens_and_below_full_confidence(self) -> None:
        assert SpeculateWhen(0.5).applies(1)
        assert not SpeculateWhen(0.5).applies(1, is_prefill=True)
        assert not SpeculateWhen(0.5).applies(2)
        assert not SpeculateWhen(1.0).applies(1)

    def test_what_is_in_memory_is_never_dropped(self) -> None:
        assert SpeculateWhen(0.0).drop(EXPERTS, WEIGHTS, everybody) == []

    @pytest.mark.parametrize(
        ("confidence", "dropped"),
        [
            (1.0, []),
            (0.95, []),
            (0.89, [0]),
            (0.71, [0]),
            (0.69, [0, 5]),
            (0.39, [0, 5, 2]),
            (0.0, [0, 5, 2]),
        ],
    )
    def test_the_lightest_missing_go_first_until_enough_is_lost(
        self, confidence: float, dropped: list[int]
    ) -> None:
        assert SpeculateWhen(confidence).drop(EXPERTS, WEIGHTS, nobody) == dropped

    def test_heavier_experts_are_dropped_where_the_light_ones_are_here(self) -> None:
        assert SpeculateWhen(0.69).drop(EXPERTS, WEIGHTS, lambda e: e in (0, 5)) == [2]
        assert SpeculateWhen(0.0).drop(EXPERTS, WEIGHTS, lambda e: e == 0) == [5, 2, 7]

    def test_without_confidence_one_expert_is_waited_for_at_most(self) -> None:
        policy = SpeculateWhen(0.0)
        for size in range(5):
            for here in itertools.combinations(EXPERTS, size):
                dropped = policy.drop(EXPERTS, WEIGHTS, here.__contains__)
                waited_for = set(EXPERTS) - set(dropped) - set(here)
                assert len(waited_for) == (size == 0)

    def test_only_the_share_of_the_weight_counts(self) -> None:
        scaled = [2.5 * weight for weight in WEIGHTS]
        assert SpeculateWhen(0.69).drop(EXPERTS, scaled, nobody) == [0, 5]

    def test_a_token_without_weight_is_left_alone(self) -> None:
        assert SpeculateWhen(0.0).drop([1, 2], [0.0, 0.0], nobody) == []

    def test_what_carries_no_weight_is_not_waited_for(self) -> None:
        assert SpeculateWhen(0.99).drop([1, 2], [1.0, 0.0], nobody) == [2]

    def test_an_expert_that_is_named_twice_carries_both_weights(self) -> None:
        policy = SpeculateWhen(0.75)
        assert policy.drop([0, 3, 0], [0.3, 0.7, 0.0], nobody) == []
        assert policy.drop([0, 3, 0], [0.2, 0.8, 0.0], nobody) == [0]

    def test_what_is_executed_always_carries_weight(self) -> None:
        assert SpeculateWhen(0.0).drop([1, 2], [1.0, 0.0], lambda e: e == 2) == []

    def test_no_more_weight_is_lost_than_is_allowed(self) -> None:
        chance = random.Random(0)
        for _ in range(300):
            weights = [chance.random() ** 3 for _ in range(6)]
            here = {e for e in range(6) if chance.random() < 0.5}
            policy = SpeculateWhen(chance.random())
            dropped = policy.drop(range(6), weights, here.__contains__)
            lost = sum(weights[e] for e in dropped)
            assert lost <= (1 - policy.confidence) * sum(weights) + 1e-9
            assert not here.intersection(dropped)
            left = set(range(6)) - here - set(dropped)
            for expert in left:
                least = lost + min(weights[e] for e in left)
                assert least > (1 - policy.confidence) * sum(weights) * (1 - 1e-5), expert

    def test_the_best_in_memory_take_the_places(self) -> None:
        scores = [9.0, 1.0, 8.0, 2.0, 7.0, 3.0]
        policy = SpeculateWhen()
        assert policy.substitute([0, 2], 2, scores, everybody) == [4, 5]
        assert policy.substitute([0, 2], 2, scores, lambda e: e != 4) == [5, 3]

    def test_places_stay_empty_where_memory_has_nobody(self) -> None:
        scores = [3.0, 2.0, 1.0]
        assert SpeculateWhen().substitute([0], 2, scores, lambda e: e in (0, 2)) == [2]
        assert SpeculateWhen().substitute([0], 2, scores, nobody) == []
