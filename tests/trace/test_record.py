"""A trace holds what every layer of every forward demanded, in order, and what was guessed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from foreload.trace.record import LayerVisit, RoutingRecorder
from foreload.types import Prediction, Routing, RoutingEvent

if TYPE_CHECKING:
    from collections.abc import Callable

    from foreload import Engine


def visit(recorder: RoutingRecorder, layer: int, index: list[list[int]]) -> None:
    chosen = torch.tensor(index)
    wanted = sorted(
        {expert for row in index for expert in row if expert < recorder.trace.num_experts}
    )
    recorder(RoutingEvent(0, layer, None, chosen, torch.ones(chosen.shape)), wanted)


def test_counts_tell_how_many_tokens_want_each_expert() -> None:
    recorder = RoutingRecorder(2, 8)
    visit(recorder, 0, [[5, 1], [1, 3], [7, 1]])
    assert recorder.trace.steps == [
        [LayerVisit((1, 3, 5, 7), (3, 1, 1, 1), 3, ((5, 1), (1, 3), (7, 1)))]
    ]


def test_a_forward_begins_where_the_layer_does_not_grow() -> None:
    recorder = RoutingRecorder(2, 8)
    for layer, expert in ((0, 1), (1, 2), (0, 3), (1, 4), (0, 5)):
        visit(recorder, layer, [[expert, 7]])
    assert recorder.trace.demands() == [[(1, 7), (2, 7)], [(3, 7), (4, 7)], [(5, 7)]]


def test_every_forward_of_a_single_layer_is_a_step() -> None:
    recorder = RoutingRecorder(1, 8)
    for expert in range(3):
        visit(recorder, 0, [[expert]])
    assert recorder.trace.demands() == [[(0,)], [(1,)], [(2,)]]


def test_placeholders_are_no_experts() -> None:
    recorder = RoutingRecorder(1, 8)
    visit(recorder, 0, [[2, 8], [8, 8]])
    assert recorder.trace.steps == [[LayerVisit((2,), (1,), 2, ((2, 8), (8, 8)))]]


def test_weights_and_single_tokens_are_kept_where_asked_for() -> None:
    recorder = RoutingRecorder(1, 8, with_weights=True)
    weights = torch.tensor([[0.75, 0.25]])
    recorder(RoutingEvent(0, 0, None, torch.tensor([[5, 1]]), weights), [1, 5])
    assert recorder.trace.steps == [[LayerVisit((1, 5), (1, 1), 1, ((5, 1),), ((0.75, 0.25),))]]


def test_what_a_policy_executed_is_what_was_demanded() -> None:
    recorder = RoutingRecorder(1, 8, with_weights=True)
    executed = Routing(torch.tensor([[2, 3]]), torch.tensor([[0.5, 0.5]]))
    event = RoutingEvent(0, 0, None, torch.tensor([[5, 1]]), torch.ones(1, 2), executed)
    recorder(event, [2, 3])
    assert recorder.trace.steps == [[LayerVisit((2, 3), (1, 1), 1, ((2, 3),), ((0.5, 0.5),))]]


def test_predictions_belong_to_the_visit_they_were_made_at() -> None:
    recorder = RoutingRecorder(2, 8)
    event = RoutingEvent(0, 0, None, torch.tensor([[5, 1]]), torch.ones(1, 2))
    guess = Prediction(1, 1, (3,), (0.5,), 1, Routing(torch.ones(1, 1), torch.ones(1, 1)))
    recorder(event, [1, 5])
    recorder.see_predictions(event, [guess])
    visit(recorder, 1, [[3, 4]])
    first, second = recorder.trace.steps[0]
    assert first.predictions == (guess._replace(routing=None),)
    assert second.predictions == ()


def test_prefills_are_marked_and_can_be_left_out() -> None:
    recorder = RoutingRecorder(1, 8)
    for is_prefill, experts in ((True, [[1], [2]]), (False, [[3]]), (False, [[4]])):
        recorder.is_prefill = is_prefill
        visit(recorder, 0, experts)
    trace = recorder.trace
    assert [trace.is_prefill(step) for step in range(3)] == [True, False, False]
    assert trace.decode_part().demands() == [[(3,)], [(4,)]]
    assert len(trace.steps) == 3


def test_an_engine_records_every_layer_of_every_forward(
    open_engine: Callable[..., Engine],
) -> None:
    engine: Any = open_engine(predictor="none")
    recorder = RoutingRecorder(engine.spec.num_moe_layers, engine.spec.num_experts)
    engine.runtime.on_routing = recorder
    cache = engine.make_cache()
    for ids in ([[5, 6, 7, 8, 9]], [[10]], [[11]]):
        engine.forward(torch.tensor(ids), cache)
    trace = recorder.trace
    assert [len(step) for step in trace.steps] == [4, 4, 4]
    assert [step[0].num_tokens for step in trace.steps] == [5, 1, 1]
    for step in trace.steps:
        for visited in step:
            assert list(visited.experts) == sorted(set(visited.experts))
            assert sum(visited.counts) == 4 * visited.num_tokens
    lookups = sum(len(visited.experts) for step in trace.steps for visited in step)
    assert lookups == engine.metrics.num_lookups
