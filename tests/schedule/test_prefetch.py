"""Odds follow what came true, guesses worth it are copied, and prefetching goes off at a loss."""

from __future__ import annotations

import math

import pytest

from foreload.metrics import Metrics
from foreload.schedule.prefetch import GuessOdds, Prefetcher, PrefetchSwitch
from foreload.types import ExpertKey, Prediction


class TestGuessOdds:
    def test_before_measuring_surer_guesses_have_better_odds(self) -> None:
        odds = GuessOdds()
        by_confidence = [odds.get(1, True, confidence) for confidence in (-2, -0.2, 0.1, 0.5, 3)]
        assert by_confidence == sorted(by_confidence)
        assert by_confidence[0] < 0.3 < 0.8 < by_confidence[-1]
        for distance in (1, 3):
            for confidence in (-1e9, -0.6, 0.0, 1.6, 1e9):
                assert 0 < odds.get(distance, False, confidence) < 1

    def test_what_is_known_for_certain_stays_certain(self) -> None:
        odds = GuessOdds()
        for _ in range(50):
            odds.learn(1, True, math.inf, was_right=False)
        assert odds.get(1, True, math.inf) == 1.0
        assert odds.get(3, False, math.inf) == 1.0

    @pytest.mark.parametrize("was_right", [True, False])
    def test_odds_move_towards_what_came_true(self, was_right: bool) -> None:
        odds = GuessOdds()
        before = odds.get(1, True, 0.1)
        odds.learn(1, True, 0.1, was_right=was_right)
        assert (odds.get(1, True, 0.1) > before) is was_right
        for _ in range(400):
            odds.learn(1, True, 0.1, was_right=was_right)
        assert odds.get(1, True, 0.1) == pytest.approx(float(was_right), abs=0.01)

    def test_odds_settle_on_the_share(self) -> None:
        odds = GuessOdds()
        for turn in range(2000):
            odds.learn(1, True, 0.1, was_right=turn % 4 == 0)
        assert odds.get(1, True, 0.1) == pytest.approx(0.25, abs=0.05)

    def test_kinds_of_guesses_are_learned_apart(self) -> None:
        odds = GuessOdds()
        others = [(2, True, 0.1), (1, False, 0.1), (1, True, 0.4), (1, True, -0.1)]
        before = [odds.get(*other) for other in others]
        for _ in range(50):
            odds.learn(1, True, 0.1, was_right=False)
        assert [odds.get(*other) for other in others] == before

    def test_similar_confidence_shares_what_is_learned(self) -> None:
        odds = GuessOdds()
        for _ in range(400):
            odds.learn(1, True, 0.05, was_right=False)
        assert odds.get(1, True, 0.14) < 0.01


class Shelf:
    """A target that remembers what it was asked to bring, and brings it at once."""

    def __init__(self, *present: tuple[int, int]) -> None:
        self.present = set(present)
        self.refused: set[tuple[int, int]] = set()
        self.begun: list[tuple[int, int]] = []
        self.waits: dict[tuple[int, int], float] = {}
        self.orders: dict[tuple[int, int], float] = {}
        self.num_open_prefetches = 0

    def is_absent(self, key: ExpertKey) -> bool:
        return key not in self.present

    def prefetch(self, key: ExpertKey, *, expected_wait: float, order: float) -> bool:
        if key in self.refused:
            return False
        self.begun.append(tuple(key))
        self.present.add(key)
        self.waits[key], self.orders[key] = expected_wait, order
        return True


class PrefetcherBench:
    """Four layers; a step's number is counted as the runtime counts it."""

    def __init__(self, *present: tuple[int, int], max_prefetches: int = 8) -> None:
        self.shelf = Shelf(*present)
        self.metrics = Metrics(num_steps=1)
        self.prefetcher = Prefetcher(
            self.shelf, self.metrics, num_layers=4, max_prefetches=max_prefetches
        )

    def guess(self, *guesses: Prediction, is_single: bool = True) -> list[tuple[int, int]]:
        before = len(self.shelf.begun)
        self.prefetcher.prefetch(guesses, is_single=is_single)
        return self.shelf.begun[before:]


def sure(layer: int, distance: int, *experts: int) -> Prediction:
    return Prediction(layer, distance, experts, (math.inf,) * len(experts), len(experts))


def hunch(layer: int, confidence: float, *experts: int) -> Prediction:
    return Prediction(layer, 1, experts, (confidence,) * len(experts), len(experts))


class TestPrefetcher:
    def test_absent_guesses_are_begun_in_their_order(self) -> None:
        bench = PrefetcherBench((1, 5))
        assert bench.guess(sure(1, 1, 4, 5, 6), sure(2, 2, 4)) == [(1, 4), (1, 6), (2, 4)]

    def test_what_is_open_already_leaves_less_room(self) -> None:
        bench = PrefetcherBench(max_prefetches=4)
        bench.shelf.num_open_prefetches = 2
        assert bench.guess(sure(1, 1, 4, 5, 6), sure(2, 2, 4)) == [(1, 4), (1, 5)]

    def test_what_would_not_pay_takes_no_room(self) -> None:
        bench = PrefetcherBench(max_prefetches=2)
        bench.shelf.refused = {(1, 4), (1, 5)}
        assert bench.guess(sure(1, 1, 4, 5, 6, 7, 0)) == [(1, 6), (1, 7)]

    def test_unlikely_guesses_are_left_out_and_learned_from(self) -> None:
        bench = PrefetcherBench()
        assert bench.guess(hunch(1, -0.2, 3)) == []
        for _ in range(60):
            bench.prefetcher.score(1, [3])
            bench.guess(hunch(1, -0.2, 3))
        assert bench.shelf.begun == [(1, 3)]

    def test_residents_teach_nothing(self) -> None:
        bench = PrefetcherBench((1, 3))
        for _ in range(60):
            bench.guess(hunch(1, -0.2, 3))
            bench.prefetcher.score(1, [3])
        bench.shelf.present.clear()
        assert bench.guess(hunch(1, -0.2, 3)) == []

    def test_nearer_and_likelier_goes_first_and_waits_less(self) -> None:
        bench = PrefetcherBench()
        bench.guess(hunch(1, 2.0, 3), hunch(1, 0.2, 4), sure(2, 2, 5))
        shelf = bench.shelf
        assert shelf.orders[1, 3] < shelf.orders[1, 4] < shelf.orders[2, 5]
        assert shelf.waits[1, 3] < shelf.waits[1, 4]
        assert shelf.waits[2, 5] == pytest.approx(2 / 4)

    def test_the_next_steps_guesses_go_after_this_steps(self) -> None:
        bench = PrefetcherBench()
        bench.guess(sure(3, 1, 5))
        bench.metrics.num_steps += 1
        bench.guess(sure(0, 1, 5))
        assert bench.shelf.orders[3, 5] < bench.shelf.orders[0, 5]

    def test_recall_counts_as_many_guesses_as_were_wanted(self) -> None:
        bench = PrefetcherBench()
        bench.guess(sure(1, 1, 6, 4, 5), sure(2, 2, 7))
        bench.prefetcher.score(1, [5, 6])
        assert bench.metrics.num_predicted == {(1, 1): 2}
        assert bench.metrics.num_predicted_right == {(1, 1): 1}
        bench.prefetcher.score(1, [5, 6])
        assert bench.metrics.num_predicted == {(1, 1): 2}, "a guess is scored once"

    def test_a_new_step_forgets_the_layers_it_will_not_score(self) -> None:
        bench = PrefetcherBench()
        bench.guess(sure(0, 1, 3), sure(2, 3, 3))
        bench.prefetcher.begin_step(0)
        bench.prefetcher.score(0, [3])
        bench.prefetcher.score(2, [3])
        assert bench.metrics.num_predicted == {(0, 1): 1}

    def test_what_will_be_executed_is_begun_whatever_its_odds_and_the_cap(self) -> None:
        bench = PrefetcherBench((1, 4), max_prefetches=1)
        guess = hunch(1, -3.0, 3, 4, 5, 6)
        bench.prefetcher.commit(guess, guess.experts[:3], is_single=True)
        assert bench.shelf.begun == [(1, 3), (1, 5)]
        assert set(bench.shelf.waits.values()) == {1 / 4}
        bench.prefetcher.score(1, [3, 6])
        assert bench.metrics.recall_at_n == {1: {1: 0.5}}

    def test_what_will_be_executed_teaches_no_odds(self) -> None:
        bench = PrefetcherBench()
        for _ in range(60):
            bench.prefetcher.commit(hunch(1, -0.2, 3), [3], is_single=True)
            bench.prefetcher.score(1, [3])
        assert bench.guess(hunch(1, -0.2, 4)) == []


class Clockwork:
    """Runs steps that take one time with prefetching and another without."""

    def __init__(self, with_s: float, without_s: float) -> None:
        self.switch = PrefetchSwitch(window=4, trial_every=8, margin=0.02)
        self.with_s, self.without_s = with_s, without_s

    def run(self, steps: int) -> list[bool]:
        was_on = []
        for _ in range(steps):
            was_on.append(self.switch.is_on)
            self.switch.record(self.with_s if self.switch.is_on else self.without_s)
        return was_on


class TestPrefetchSwitch:
    def test_it_starts_on_and_tries_without_early_and_after_a_while(self) -> None:
        was_on = Clockwork(1.0, 1.0).run(36)
        assert was_on == [True] * 8 + [False] * 4 + [True] * 20 + [False] * 4

    def test_prefetching_that_pays_stays_on_but_for_trials(self) -> None:
        was_on = Clockwork(1.0, 2.0).run(400)
        assert 0.85 < sum(was_on) / len(was_on) < 0.9
        assert not all(was_on[200:]), "the other way must be tried again"

    def test_prefetching_that_loses_goes_off_but_for_trials(self) -> None:
        was_on = Clockwork(2.0, 1.0).run(400)
        late = was_on[100:]
        assert 0.1 < sum(late) / len(late) < 0.15

    @pytest.mark.parametrize(("with_s", "stays_on"), [(1.01, True), (1.05, False)])
    def test_a_difference_within_the_margin_does_not_switch(
        self, with_s: float, stays_on: bool
    ) -> None:
        late = Clockwork(with_s, 1.0).run(400)[100:]
        assert (sum(late) > len(late) / 2) is stays_on

    def test_it_changes_its_mind_when_the_machine_does(self) -> None:
        clock = Clockwork(2.0, 1.0)
        clock.run(200)
        assert not clock.switch.is_on
        clock.with_s = 0.5
        late = clock.run(400)[-100:]
        assert sum(late) > 80

    def test_one_slow_step_decides_nothing(self) -> None:
        clock = Clockwork(1.0, 1.5)
        clock.run(33)
        clock.switch.record(1000.0)
        late = clock.run(200)
        assert sum(late) > 150
