"""The oracle tells exactly what the trace says comes next, and nothing else."""

from __future__ import annotations

import math

import torch

from foreload.predict.oracle import Oracle
from foreload.types import Prediction, RoutingEvent

TRACE = [[(0, 1), (2,)], [(3,), (4, 5)], [(6,), (7,)]]


def sure(layer: int, distance: int, *experts: int) -> Prediction:
    return Prediction(layer, distance, experts, (math.inf,) * len(experts), len(experts))


def at(step: int, layer: int) -> RoutingEvent:
    return RoutingEvent(step, layer, None, torch.zeros(1, 1).long(), torch.zeros(1, 1))


def test_it_reads_the_coming_layers_off_the_trace() -> None:
    assert Oracle(TRACE).predict(at(1, 0)) == [
        sure(1, 1, *(4, 5)),
        sure(0, 2, *(6,)),
    ]


def test_it_crosses_into_the_next_forward() -> None:
    assert Oracle(TRACE, max_distance=3).predict(at(0, 1)) == [
        sure(0, 1, *(3,)),
        sure(1, 2, *(4, 5)),
        sure(0, 3, *(6,)),
    ]


def test_it_is_silent_before_and_after_the_trace() -> None:
    oracle = Oracle(TRACE, first_step=10)
    assert oracle.predict(at(2, 0)) == []
    assert oracle.predict(at(12, 1)) == []
    assert [guess.layer for guess in oracle.predict(at(12, 0))] == [1]


def test_steps_are_counted_from_where_the_replay_begins() -> None:
    assert Oracle(TRACE, first_step=10).predict(at(11, 0)) == Oracle(TRACE).predict(at(1, 0))
    assert Oracle(TRACE, first_step=10).predict(at(9, 1)) == [
        sure(0, 1, *(0, 1)),
        sure(1, 2, *(2,)),
    ]
