"""Odds follow what came true, and prefetching goes off exactly while it loses."""

from __future__ import annotations

import math

import pytest

from foreload.schedule.prefetch import GuessOdds, PrefetchSwitch


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
