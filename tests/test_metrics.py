"""Every derived number is what its formula says."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

import pytest

from foreload.metrics import Metrics, RequestStats, Timeline

if TYPE_CHECKING:
    from pathlib import Path


def busy() -> Metrics:
    return Metrics(
        num_steps=2,
        num_hits=6,
        num_late=1,
        num_misses=3,
        demand_bytes=300,
        prefetch_bytes=50,
        wasted_bytes=20,
        num_prefetched=5,
        num_prefetched_used=4,
        stall_s=0.5,
        link_s=0.75,
        num_rounds=4,
        num_draft_tokens=10,
        num_accepted_tokens=6,
        draft_s=0.25,
        num_executed=16,
        num_speculated=4,
        num_predicted={(1, 1): 8, (1, 2): 4, (0, 1): 2},
        num_predicted_right={(1, 1): 6, (1, 2): 1},
    )


def test_rates_are_shares_of_lookups() -> None:
    metrics = busy()
    assert metrics.num_lookups == 10
    assert metrics.hit_rate == pytest.approx(0.6)
    assert metrics.late_rate == pytest.approx(0.1)
    assert metrics.bytes_moved == 350
    assert metrics.prefetch_precision == pytest.approx(0.8)
    assert metrics.speculated_fraction == pytest.approx(0.25)


def test_rounds_bring_their_own_token_and_the_accepted_ones() -> None:
    metrics = busy()
    assert metrics.acceptance_rate == pytest.approx(0.6)
    assert metrics.accept_length == pytest.approx(2.5)


def test_rounds_that_drafted_nothing_bring_one_token_and_accept_no_share() -> None:
    metrics = Metrics(num_rounds=5)
    assert metrics.acceptance_rate is None
    assert metrics.accept_length == 1.0


def test_rounds_add_up_over_requests() -> None:
    metrics = busy()
    metrics.add(busy())
    assert (metrics.num_rounds, metrics.num_draft_tokens) == (8, 20)
    assert metrics.accept_length == pytest.approx(2.5)


def test_recall_is_by_layer_and_distance() -> None:
    assert busy().recall_at_n == {0: {1: 0.0}, 1: {1: 0.75, 2: 0.25}}


def test_nothing_counted_gives_no_rates_and_no_errors() -> None:
    metrics = Metrics()
    assert metrics.hit_rate is metrics.late_rate is metrics.prefetch_precision is None
    assert metrics.acceptance_rate is metrics.accept_length is None
    assert metrics.recall_at_n == {}
    assert metrics.bytes_moved == 0
    assert metrics.speculated_fraction == 0


def test_a_snapshot_does_not_move_with_the_counters() -> None:
    metrics = busy()
    before = metrics.snapshot()
    assert before == metrics
    metrics.num_hits += 1
    metrics.num_predicted[1, 1] += 1
    metrics.num_predicted_right[9, 9] = 1
    assert before == busy()


def test_the_difference_covers_every_counter() -> None:
    metrics = busy()
    before = metrics.snapshot()
    for field in dataclasses.fields(metrics):
        value = getattr(metrics, field.name)
        if isinstance(value, dict):
            value[1, 1] += 2
            value[7, 7] = 3
        else:
            setattr(metrics, field.name, value + 2)
    request = metrics.since(before)
    for field in dataclasses.fields(metrics):
        value = getattr(request, field.name)
        if isinstance(value, dict):
            assert {key: count for key, count in value.items() if count} == {(1, 1): 2, (7, 7): 3}
        else:
            assert value == 2, field.name
    assert request.recall_at_n == {1: {1: 1.0}, 7: {7: 1.0}}


def test_nothing_since_is_nothing() -> None:
    metrics = busy()
    request = metrics.since(metrics.snapshot())
    assert request.hit_rate is None
    assert request.recall_at_n == {}


def test_request_statistics_are_json() -> None:
    stats = RequestStats(
        ttft_s=0.1,
        tpot_s=None,
        e2e_s=0.1,
        num_prompt_tokens=3,
        num_output_tokens=1,
        hit_rate=None,
        late_rate=None,
        recall_at_n={0: {1: 0.5}},
        prefetch_precision=None,
        bytes_moved=10,
        bytes_per_token=None,
        wasted_bytes=0,
        stall_s=0.0,
        stall_fraction=0.0,
        expert_memory_bytes=4096,
        speculated_fraction=0.0,
    )
    values = json.loads(json.dumps(stats.to_dict()))
    assert set(values) == {field.name for field in dataclasses.fields(stats)}
    assert values["recall_at_n"] == {"0": {"1": 0.5}}
    assert values["tpot_s"] is None
    assert values["round_s"] is values["acceptance_rate"] is values["accept_length"] is None
    assert values["rounds_by_draft"] == {}


class TestTimeline:
    def test_spans_are_kept_only_while_it_is_on(self) -> None:
        timeline = Timeline()
        timeline.add("disk", "0.1", 0.0, 1.0)
        assert timeline.spans == []
        timeline.is_on = True
        timeline.add("disk", "0.2", 1.0, 2.0)
        timeline.is_on = False
        timeline.add("disk", "0.3", 2.0, 3.0)
        assert [span.name for span in timeline.spans] == ["0.2"]
        timeline.clear()
        assert timeline.spans == []

    def test_the_chrome_trace_has_a_row_per_lane_and_microseconds(self, tmp_path: Path) -> None:
        timeline = Timeline()
        timeline.is_on = True
        timeline.add("disk", "0.2", 1.0, 1.5)
        timeline.add("compute", "0.1", 0.25, 2.0)
        path = tmp_path / "trace.json"
        timeline.write_chrome_trace(path)
        events = json.loads(path.read_text())["traceEvents"]
        rows = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
        spans = {
            (rows[event["tid"]], event["name"]): (event["ts"], event["dur"])
            for event in events
            if event["ph"] == "X"
        }
        assert spans == {("disk", "0.2"): (1e6, 0.5e6), ("compute", "0.1"): (0.25e6, 1.75e6)}
