"""Replays through each layer's own slots agree with the device's tables, and curves with them."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from foreload.errors import ConfigError
from foreload.ops.device_tables import DeviceTables, assign_slots, make_tables
from foreload.trace.layer_slots import (
    check_trace,
    miss_curves,
    plan_from_trace,
    replay_layers,
    slot_plan_gain,
)
from foreload.trace.record import LayerVisit, RoutingTrace, TraceInfo
from foreload.types import ModelSpec

SPEC = ModelSpec(
    architecture="TinyForCausalLM",
    model_type="tiny",
    num_moe_layers=3,
    num_experts=8,
    top_k=2,
    hidden_size=16,
    expert_bytes=1000,
    total_expert_bytes=24000,
    dense_bytes=1000,
    dtype="float32",
    identity="abc",
)
INFO = TraceInfo(model="tiny", top_k=2, expert_bytes=(1000,) * 3, identity="abc")


def draw_trace(seed: int, top_k: int = 2, num_tokens: int = 40) -> RoutingTrace:
    """Draw routing that comes back to few experts in the last layer, and to many in the first."""
    draw = random.Random(seed)

    def visit(layer: int, size: int, *, is_prefill: bool) -> LayerVisit:
        weights = [1.0 / (1 + expert) ** (2 * layer) for expert in range(8)]
        rows = []
        for _ in range(size):
            row = sorted(range(8), key=lambda e: draw.random() ** (1 / weights[e]), reverse=True)
            rows.append(sorted(row[:top_k]))
        return LayerVisit.from_routing(rows, 8, is_prefill=is_prefill)

    sizes = [12] + [1] * (num_tokens // 2) + [9] + [1] * (num_tokens // 2)
    steps = [[visit(layer, size, is_prefill=size > 1) for layer in range(3)] for size in sizes]
    return RoutingTrace(3, 8, steps, INFO)


def read_prompt(tables: DeviceTables, layer: int, visit: LayerVisit) -> None:
    """Leave a prompt's experts in the tables: the last token's, and others where it is empty."""
    assign_slots(tables, layer, torch.tensor(visit.routing[-1:]))
    counts = dict(zip(visit.experts, visit.counts, strict=True))
    slot_of, expert_of = tables.slot_of[layer], tables.expert_of[layer]
    missing = sorted((e for e in visit.experts if slot_of[e] < 0), key=lambda e: (-counts[e], e))
    empty = [slot for slot in range(tables.num_slots[layer]) if expert_of[slot] < 0]
    for expert, slot in zip(missing, reversed(empty), strict=False):
        slot_of[expert], expert_of[slot], tables.stamp[layer, slot] = slot, expert, 0


@pytest.mark.parametrize("seed", range(6))
def test_replays_count_what_the_devices_tables_count(seed: int) -> None:
    trace = draw_trace(seed)
    slots = random.Random(seed).choices(range(2, 9), k=3)
    tables = make_tables(slots, 8)
    for visits in trace.steps:
        for layer, visit in enumerate(visits):
            if visit.is_prefill:
                before = tables.counters[layer].clone()
                read_prompt(tables, layer, visit)
                tables.counters[layer] = before
            else:
                assign_slots(tables, layer, torch.tensor(visit.routing))
            tables.check()
    counters = tables.read_counters()
    found = replay_layers(trace, slots)
    assert found.num_hits == sum(counter.hits for counter in counters) > 0
    assert found.num_misses == sum(counter.misses for counter in counters) > 0


def test_counting_begins_where_it_is_told_to() -> None:
    trace = draw_trace(0)
    whole, half = (replay_layers(trace, (4, 4, 4), count_from=at) for at in (0, 20))
    assert 0 < half.num_lookups < whole.num_lookups
    assert half.num_hits < whole.num_hits


@pytest.mark.parametrize("seed", range(4))
def test_curves_are_the_replays_of_every_number_of_slots(seed: int) -> None:
    """Exactly, where a token wants one expert: there are no ties."""
    trace = draw_trace(seed, top_k=1)
    curves = miss_curves(trace)
    assert curves.shape == (3, 9)
    assert (np.diff(curves) <= 0).all()
    assert (curves[:, 0] == 40).all()
    for slots in range(1, 9):
        assert replay_layers(trace, (slots,) * 3).num_misses == curves[:, slots].sum()


def test_curves_are_near_the_replays_where_there_are_ties() -> None:
    trace = draw_trace(1, num_tokens=200)
    curves = miss_curves(trace)
    for slots in range(2, 9):
        found = replay_layers(trace, (slots,) * 3).num_misses
        assert curves[:, slots].sum() == pytest.approx(found, rel=0.05)


def test_layers_that_come_back_less_get_more_slots() -> None:
    trace = draw_trace(2, num_tokens=100)
    plan = plan_from_trace(trace, 12, least=2)
    assert plan[0] > plan[2]
    assert sum(plan) == 12
    gain = slot_plan_gain(trace, 14, least=2)
    assert gain is not None
    assert (gain.num_slots, gain.slots) == (12, plan)
    assert gain.planned_misses < gain.equal_misses
    assert gain.planned_misses == replay_layers(trace, plan).num_misses / 100
    half = replace(trace, steps=trace.steps[:52])
    earlier = plan_from_trace(half, 12, least=2)
    unseen = replay_layers(trace, earlier, count_from=52).num_misses / 50
    assert gain.unseen_planned_misses == unseen < gain.unseen_equal_misses
    assert gain.to_dict()["slots"] == plan


def test_without_room_there_is_nothing_to_gain() -> None:
    trace = draw_trace(0)
    assert slot_plan_gain(trace, 5, least=2) is None
    assert slot_plan_gain(replace(trace, steps=trace.steps[:2]), 12, least=2) is None
    full = slot_plan_gain(trace, 24, least=2)
    assert full is not None
    assert full.slots == (8, 8, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_moe_layers": 4}, "3 MoE layers of 8 experts, the model 4 of 8"),
        ({"num_experts": 16}, "3 MoE layers of 8 experts, the model 3 of 16"),
        ({"top_k": 4}, "2 experts per token, the model 4"),
        ({"identity": "xyz"}, "of another checkpoint"),
    ],
    ids=str,
)
def test_a_trace_of_another_model_is_refused(change: dict[str, int], message: str) -> None:
    check_trace(draw_trace(0), SPEC)
    with pytest.raises(ConfigError, match=message) as caught:
        check_trace(draw_trace(0), replace(SPEC, **change))
    assert "foreload trace" in str(caught.value.hint)


def test_a_trace_that_names_no_checkpoint_is_judged_by_its_shape() -> None:
    check_trace(replace(draw_trace(0), info=replace(INFO, identity="")), SPEC)
    check_trace(replace(draw_trace(0), info=None), SPEC)


def test_a_trace_without_decoding_says_nothing() -> None:
    trace = draw_trace(0)
    prompt = replace(trace, steps=trace.steps[:1])
    for ask in (miss_curves, lambda t: check_trace(t, SPEC)):
        with pytest.raises(ConfigError, match="no decoded token"):
            ask(prompt)
