"""The better predictor is found by measuring, and only it runs afterwards."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import torch

from foreload.predict.choice import MeasuredChoice
from foreload.types import Prediction, RoutingEvent

if TYPE_CHECKING:
    from collections.abc import Sequence

LAYERS, EXPERTS, TOP_K = 4, 16, 2


class Scripted:
    """Is right about the next layer as often as it is told to be."""

    def __init__(
        self,
        truth: Sequence[Sequence[Sequence[int]]],
        share: float,
        *,
        name: str = "scripted",
        distances: Sequence[int] = (1, 2),
    ) -> None:
        self.name = name
        self.asked = 0
        self._truth = truth
        self._share = share
        self._random = random.Random(name)
        self._distances = distances

    def predict(self, event: RoutingEvent) -> list[Prediction]:
        self.asked += 1
        guesses = []
        for distance in self._distances:
            layer = event.layer + distance
            if layer < LAYERS:
                experts = tuple(
                    expert if self._random.random() < self._share else EXPERTS + expert
                    for expert in self._truth[event.step][layer]
                )
                guesses.append(Prediction(layer, distance, experts, (1.0,) * TOP_K, TOP_K))
        return guesses


def make_truth(steps: int) -> list[list[list[int]]]:
    chance = random.Random(0)
    return [[chance.sample(range(EXPERTS), TOP_K) for _ in range(LAYERS)] for _ in range(steps)]


def run(
    choice: MeasuredChoice, truth: Sequence[Sequence[Sequence[int]]], num_tokens: int = 1
) -> list[list[Prediction]]:
    answers = []
    for step, layers in enumerate(truth):
        for layer, experts in enumerate(layers):
            index = torch.tensor([experts] * num_tokens)
            event = RoutingEvent(step, layer, None, index, torch.ones(index.shape))
            answers.append(choice.predict(event))
    return answers


def test_the_preferred_one_is_used_until_another_proves_better() -> None:
    truth = make_truth(1)
    first, second = Scripted(truth, 0.5, name="a"), Scripted(truth, 1.0, name="b")
    choice = MeasuredChoice([first, second])
    assert choice.chosen is first
    assert run(choice, truth)[0] == Scripted(truth, 0.5, name="a").predict(
        RoutingEvent(0, 0, None, torch.zeros(1, 1), torch.zeros(1, 1))
    )


def test_the_one_with_the_better_recall_wins() -> None:
    truth = make_truth(40)
    for shares, winner in [((0.4, 0.9), 1), ((0.9, 0.4), 0)]:
        candidates = [Scripted(truth, share, name=str(i)) for i, share in enumerate(shares)]
        choice = MeasuredChoice(candidates, num_samples=90)
        run(choice, truth)
        assert choice.chosen is candidates[winner]


def test_the_preferred_one_wins_ties() -> None:
    truth = make_truth(40)
    candidates = [Scripted(truth, 1.0, name=name) for name in "ab"]
    choice = MeasuredChoice(candidates, num_samples=90)
    run(choice, truth)
    assert choice.chosen is candidates[0]


def test_once_chosen_only_the_winner_runs() -> None:
    truth = make_truth(60)
    worse, better = Scripted(truth, 0.2, name="a"), Scripted(truth, 1.0, name="b")
    choice = MeasuredChoice([worse, better], num_samples=60)
    run(choice, truth)
    # three of four layers can be measured, so 60 samples are 20 steps of 4 visits
    assert worse.asked == 80
    assert better.asked == 240


def test_several_tokens_are_predicted_but_not_measured() -> None:
    truth = make_truth(40)
    worse, better = Scripted(truth, 0.0, name="a"), Scripted(truth, 1.0, name="b")
    choice = MeasuredChoice([worse, better], num_samples=10)
    answers = run(choice, truth, num_tokens=3)
    assert choice.chosen is worse, "nothing was measured"
    assert better.asked == 0
    assert any(answers)


def test_silence_is_no_recall_and_no_error() -> None:
    truth = make_truth(40)
    silent, talking = Scripted(truth, 1.0, distances=()), Scripted(truth, 0.3)
    choice = MeasuredChoice([silent, talking], num_samples=60)
    run(choice, truth)
    assert choice.chosen is talking


def test_guesses_about_later_layers_are_not_taken_for_the_next() -> None:
    # Layer 1's router cannot be asked: the first answer at layer 0 is about layer 2.
    truth = [[[0, 1], [2, 3], [2, 3], [4, 5]]] * 40
    far, near = Scripted(truth, 1.0, distances=(2,)), Scripted(truth, 0.6, distances=(1,))
    choice = MeasuredChoice([far, near], num_samples=90)
    run(choice, truth)
    assert choice._right[0] == 0, "a guess about layer 2 was scored at layer 1"
    assert choice.chosen is near
