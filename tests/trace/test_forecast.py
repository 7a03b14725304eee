"""Predictions for a replay: recorded, true, or wrong as often as was asked for."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from foreload.errors import ConfigError
from foreload.trace.forecast import make_forecast
from foreload.trace.record import LayerVisit, RoutingTrace
from foreload.types import Prediction


def make_trace(num_steps: int = 300, num_layers: int = 4, num_experts: int = 16) -> RoutingTrace:
    draw = random.Random(0)
    steps = [
        [
            LayerVisit.from_routing([draw.sample(range(num_experts), 4)], num_experts)
            for _ in range(num_layers)
        ]
        for _ in range(num_steps)
    ]
    return RoutingTrace(num_layers, num_experts, steps)


def test_none_says_nothing() -> None:
    forecast = make_forecast("none", make_trace(2), max_distance=2, seed=0)
    assert list(forecast(0, 0)) == []


def test_the_oracle_names_the_coming_layers_for_certain() -> None:
    trace = make_trace(2)
    forecast = make_forecast("oracle", trace, max_distance=2, seed=0)
    near, far = forecast(0, 3)
    assert (near.layer, near.distance, near.experts) == (0, 1, trace.steps[1][0].experts)
    assert (far.layer, far.distance, far.experts) == (1, 2, trace.steps[1][1].experts)
    assert set(near.confidence) == {math.inf}


def test_recorded_predictions_are_given_back_up_to_a_distance() -> None:
    trace = make_trace(1)
    guesses = tuple(Prediction(n, n, (1, 2), (0.5, 0.1), 2) for n in (1, 2, 3))
    trace.steps[0][0] = replace(trace.steps[0][0], predictions=guesses)
    forecast = make_forecast("trace", trace, max_distance=2, seed=0)
    assert tuple(forecast(0, 0)) == guesses[:2]
    assert list(forecast(0, 1)) == []


def test_a_trace_without_predictions_has_none_to_give() -> None:
    with pytest.raises(ConfigError, match="no predictions"):
        make_forecast("trace", make_trace(1), max_distance=1, seed=0)


@pytest.mark.parametrize("predictor", ["crystal-ball", 1.5, -0.1])
def test_unknown_predictors_are_refused(predictor: str | float) -> None:
    with pytest.raises(ConfigError, match="cannot be simulated"):
        make_forecast(predictor, make_trace(1), max_distance=1, seed=0)


@pytest.mark.parametrize("recall", [0.0, 0.5, 0.8, 1.0])
def test_a_recall_is_met_and_falls_with_the_distance(recall: float) -> None:
    trace = make_trace()
    forecast = make_forecast(recall, trace, max_distance=2, seed=0)
    right, named = {1: 0, 2: 0}, {1: 0, 2: 0}
    for step in range(len(trace.steps)):
        for guess in forecast(step, 1):
            true = set(trace.steps[step][guess.layer].experts)
            assert len(set(guess.experts)) == len(guess.experts) == len(guess.confidence)
            assert guess.num_expected == 4
            right[guess.distance] += len(true.intersection(guess.experts))
            named[guess.distance] += len(guess.experts)
    total = 4 * len(trace.steps)
    assert right[1] / total == pytest.approx(recall, abs=0.04)
    assert right[2] / total == pytest.approx(recall**2, abs=0.04)
    assert named[1] == total, "who is wrong names somebody else"


def test_the_last_layers_have_fewer_to_come() -> None:
    forecast = make_forecast(0.5, make_trace(1), max_distance=2, seed=0)
    assert [guess.layer for guess in forecast(0, 2)] == [3]
    assert list(forecast(0, 3)) == []


def test_the_seed_decides_which_guesses_are_wrong() -> None:
    trace = make_trace(20)

    def guesses(seed: int) -> list[Prediction]:
        forecast = make_forecast(0.5, trace, max_distance=1, seed=seed)
        return [guess for step in range(20) for guess in forecast(step, 0)]

    assert guesses(1) == guesses(1) != guesses(2)


def test_wrong_guesses_are_popular_experts() -> None:
    trace = make_trace(400, num_layers=2)
    for step in trace.steps[:200]:
        step[1] = LayerVisit.from_routing([(0, 1, 2, 3)], 16)
    forecast = make_forecast(0.0, trace, max_distance=1, seed=0)
    wrong = [expert for step in range(200, 400) for expert in forecast(step, 0)[0].experts]
    popular = sum(expert < 4 for expert in wrong) / len(wrong)
    assert popular > 0.4, "drawn evenly it would be a quarter"
