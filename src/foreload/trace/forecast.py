"""Predictions for a replayed trace: those it has, the truth, or made-up ones of a given recall.

Says what is guessed at a layer visit; whether a guess is worth a copy decides the prefetcher.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import TYPE_CHECKING, Any

from foreload.errors import ConfigError
from foreload.predict.oracle import Oracle
from foreload.types import Prediction, RoutingEvent

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from foreload.trace.record import RoutingTrace

    Forecast = Callable[[int, int], Sequence[Prediction]]

__all__ = ["make_forecast"]

_SURE_RIGHT, _SURE_WRONG = 0.8, 0.15
"""Mean confidence of guesses that came true, and of others; lookahead, demo, November 2026."""


def make_forecast(
    predictor: str | float, trace: RoutingTrace, *, max_distance: int, seed: int
) -> Forecast:
    """Make the function that gives what is predicted at a (step, layer) of a trace.

    Args:
        predictor: "none", "trace", "oracle", or a recall from 0 to 1.
        trace: The trace that is replayed.
        max_distance: How many MoE layers ahead is predicted, at most.
        seed: Draws which guesses of a given recall are wrong.

    Raises:
        ConfigError: No such predictor, or a trace without predictions.
    """
    if isinstance(predictor, int | float) and 0 <= predictor <= 1:
        return _MadeUp(trace, float(predictor), max_distance, seed)
    match predictor:
        case "none":
            return lambda step, layer: ()
        case "trace":
            return _recorded(trace, max_distance)
        case "oracle":
            return _oracle(trace, max_distance)
    raise ConfigError(
        f"predictor={predictor!r} cannot be simulated",
        hint="use none, trace, oracle, or a recall from 0 to 1",
    )


def _recorded(trace: RoutingTrace, max_distance: int) -> Forecast:
    if not any(visit.predictions for visits in trace.steps for visit in visits):
        raise ConfigError(
            "the trace has no predictions",
            hint="record it with a predictor, or simulate oracle or a recall from 0 to 1",
        )

    def forecast(step: int, layer: int) -> list[Prediction]:
        guesses = trace.steps[step][layer].predictions
        return [guess for guess in guesses if guess.distance <= max_distance]

    return forecast


def _oracle(trace: RoutingTrace, max_distance: int) -> Forecast:
    oracle = Oracle(trace.demands(), max_distance=max_distance)
    # The oracle asks where it is, and looks at no tensor.
    nothing: Any = None
    return lambda step, layer: oracle.predict(RoutingEvent(step, layer, None, nothing, nothing))


class _MadeUp:
    """Names each demanded expert with a given probability, and another one where it does not.

    The recall is that of one layer ahead; d layers ahead it is the d-th power. Wrong guesses are
    drawn by how often the layer uses each expert: what is popular is guessed wrongly more often.
    They are less sure than the right ones, as a real predictor's are.
    """

    def __init__(self, trace: RoutingTrace, recall: float, max_distance: int, seed: int) -> None:
        self._trace = trace
        self._recall = recall
        self._max_distance = max_distance
        self._draw = random.Random(seed)
        self._uses = [Counter[int]() for _ in range(trace.num_layers)]
        for visits in trace.steps:
            for layer, visit in enumerate(visits):
                self._uses[layer].update(visit.experts)

    def __call__(self, step: int, layer: int) -> list[Prediction]:
        last = min(layer + self._max_distance, self._trace.num_layers - 1)
        return [self._guess(step, layer, at) for at in range(layer + 1, last + 1)]

    def _guess(self, step: int, layer: int, at: int) -> Prediction:
        true = self._trace.steps[step][at].experts
        recall = self._recall ** (at - layer)
        named = [expert for expert in true if self._draw.random() < recall]
        sure = [self._draw.expovariate(1 / _SURE_RIGHT) for _ in named]
        num_wrong = len(true) - len(named)
        others = {expert: n for expert, n in self._uses[at].items() if expert not in true}
        # A layer that demands nearly all has hardly anything to be wrong about.
        for _ in range(min(num_wrong, len(others))):
            wrong = self._draw.choices(list(others), list(others.values()))[0]
            del others[wrong]
            named.append(wrong)
            sure.append(self._draw.expovariate(1 / _SURE_WRONG))
        ranked = sorted(zip(sure, named, strict=True), reverse=True)
        return Prediction(
            at,
            at - layer,
            tuple(expert for _, expert in ranked),
            tuple(confidence for confidence, _ in ranked),
            len(true),
        )
