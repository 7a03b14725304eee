"""The setting `slot_plan` becomes slots of each layer, or an error that says what is wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from foreload.errors import ConfigError, TraceError
from foreload.model.slot_division import divide_slots
from foreload.trace.format import TraceWriter
from foreload.trace.layer_slots import plan_from_trace
from foreload.trace.record import LayerVisit, RoutingTrace, TraceInfo
from foreload.types import ModelSpec

if TYPE_CHECKING:
    from pathlib import Path

SPEC = ModelSpec(
    architecture="TinyForCausalLM",
    model_type="tiny",
    num_moe_layers=2,
    num_experts=8,
    top_k=2,
    hidden_size=16,
    expert_bytes=1000,
    total_expert_bytes=16000,
    dense_bytes=1000,
    dtype="float32",
    identity="abc",
)


def make_trace() -> RoutingTrace:
    """A layer that comes back to two experts, and one that goes round six."""
    steps = [
        [
            LayerVisit.from_routing([[0, 1]], 8),
            LayerVisit.from_routing([[2 * token % 6, 2 * token % 6 + 1]], 8),
        ]
        for token in range(30)
    ]
    info = TraceInfo(model="tiny", top_k=2, expert_bytes=(1000, 1000), identity="abc")
    return RoutingTrace(2, 8, steps, info)


def test_equal_slots_are_rounded_down() -> None:
    assert divide_slots("equal", 9, SPEC) == (4, 4)
    assert divide_slots("equal", 99, SPEC) == (8, 8)


def test_a_trace_divides_all_slots(tmp_path: Path) -> None:
    trace = make_trace()
    assert divide_slots(trace, 8, SPEC) == (2, 6)
    path = tmp_path / "trace.jsonl.gz"
    assert trace.info is not None
    with TraceWriter(path, trace.info, num_layers=2, num_experts=8) as writer:
        for visits in trace.steps:
            writer.write_step(visits)
        writer.finish()
    assert divide_slots(path, 9, SPEC) == plan_from_trace(trace, 9, least=2)
    assert divide_slots(str(path), 9, SPEC) == divide_slots(path, 9, SPEC)


def test_below_a_tokens_own_experts_a_trace_says_nothing() -> None:
    assert divide_slots(make_trace(), 2, SPEC) == (1, 1)
    assert min(divide_slots(make_trace(), 3, SPEC)) == 1
    assert min(divide_slots(make_trace(), 4, SPEC)) == 2


def test_given_slots_are_taken() -> None:
    assert divide_slots((2, 6), 8, SPEC) == (2, 6)
    assert divide_slots([3, 4], 8, SPEC) == (3, 4)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ((4,), "1 MoE layers, the model has 2"),
        ((0, 6), "layer 0 0 slots; it needs 1 to 8"),
        ((2, 9), "layer 1 9 slots"),
        ((4, 5), "9 slots, and there is memory for 8"),
    ],
    ids=str,
)
def test_given_slots_must_make_sense(plan: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        divide_slots(plan, 8, SPEC)


def test_bad_traces_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="cannot read"):
        divide_slots(str(tmp_path / "nowhere.jsonl"), 8, SPEC)
    with pytest.raises(ConfigError, match="3 of 8"):
        divide_slots(make_trace(), 12, replace(SPEC, num_moe_layers=3))
