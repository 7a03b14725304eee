"""`foreload simulate` prints hits and times by budget and policy, beside the best possible."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from foreload.trace.format import TraceWriter
from foreload.trace.layer_slots import slot_plan_gain
from foreload.trace.record import LayerVisit, RoutingTrace, TraceInfo, VisitTimes
from foreload.trace.replay import replay
from foreload.trace.simulate import SimulationSettings, simulate

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

INFO = TraceInfo(model="tiny", top_k=4, expert_bytes=(1000, 1000, 1000))


def make_trace() -> RoutingTrace:
    draw = random.Random(0)

    def visit(num_tokens: int, *, is_prefill: bool) -> LayerVisit:
        rows = [draw.choices(range(16), range(16, 0, -1), k=4) for _ in range(num_tokens)]
        times = None if is_prefill else VisitTimes(0.001, 0.002 * len(set(rows[0])), 0.0)
        return LayerVisit.from_routing(rows, 16, is_prefill=is_prefill, times=times)

    sizes = [8] + [1] * 30
    steps = [[visit(size, is_prefill=size > 1) for _ in range(3)] for size in sizes]
    return RoutingTrace(3, 16, steps, INFO)


def write(path: Path, trace: RoutingTrace, bandwidth_bytes_s: float | None) -> Path:
    with TraceWriter(path, INFO, num_layers=3, num_experts=16) as writer:
        for visits in trace.steps:
            writer.write_step(visits)
        writer.finish(bandwidth_bytes_s=bandwidth_bytes_s)
    return path


@pytest.fixture
def timed(tmp_path: Path) -> Path:
    return write(tmp_path / "timed.jsonl", make_trace(), 1e6)


@pytest.fixture
def untimed(tmp_path: Path) -> Path:
    trace = make_trace()
    trace.steps = [[replace(visit, times=None) for visit in visits] for visits in trace.steps]
    return write(tmp_path / "untimed.jsonl", trace, None)


def test_results_are_the_simulators(call: Callable[..., Any], timed: Path) -> None:
    result = call(
        *("simulate", timed, "--json", "--budgets", "25, 20slots, 40kB,100%"),
        *("--evictions", "lru,history", "--predictor", "0.8", "--latency", "20ms"),
        *("--lookahead-layers", "1", "--num-workers", "3", "--seed", "7"),
    )
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout)
    assert [budget["num_slots"] for budget in answer["budgets"]] == [12, 20, 40, 48]
    machine = {"bandwidth_bytes_s": 1e6, "dense_s": 0.001, "expert_s": 0.002}
    assert answer["settings"]["machine"] == pytest.approx(machine)
    expected = simulate(
        make_trace(),
        SimulationSettings(
            num_slots=12,
            expert_bytes=1000,
            eviction="history",
            predictor=0.8,
            latency_s=0.02,
            lookahead_layers=1,
            num_workers=3,
            seed=7,
            **machine,
        ),
    )
    arm = answer["budgets"][0]["arms"]["history"]
    assert arm["tpot_s"] == pytest.approx(expected.tpot_s)
    assert arm["hit_rate"] == expected.hit_rate
    assert arm["late_rate"] == expected.late_rate > 0
    limits = answer["budgets"][0]["limits"]
    assert limits["belady_hit_rate"] == replay(make_trace(), 12, "belady").hit_rate
    assert limits["belady_limit_s"] >= limits["compute_s"] > 0


def test_the_table_has_a_row_per_policy_and_the_bounds(
    call: Callable[..., Any], timed: Path
) -> None:
    result = call("simulate", timed, "--budgets", "25,50", "--evictions", "history,none")
    assert result.exit_code == 0, result.stderr
    for words in ("12 (25%)", "24 (50%)", "TPOT", "30 decoded tokens"):
        assert words in result.stdout
    for policy in ("history", "none", "lru, no prefetch", "belady, no prefetch"):
        assert result.stdout.count(policy) == 2


def test_slots_of_each_layers_own_are_planned_and_shown(
    call: Callable[..., Any], timed: Path
) -> None:
    words = ("simulate", timed, "--budgets", "12,40,50", "--evictions", "lru")
    answer = json.loads(call(*words, "--json").stdout)
    gains = [budget["slots_per_layer"] for budget in answer["budgets"]]
    assert gains[0] is None, "no layer could serve a token"
    for gain, num_slots in zip(gains[1:], (18, 24), strict=True):
        found = slot_plan_gain(make_trace(), num_slots, least=4)
        assert found is not None
        assert gain == json.loads(json.dumps(found.to_dict()))
        assert gain["planned_misses"] <= gain["equal_misses"]
    table = call(*words).stdout
    assert "misses per token" in table
    for gain in gains[1:]:
        for name in ("equal", "planned", "unseen_equal", "unseen_planned"):
            assert f"{gain[f'{name}_misses']:.2f}" in table
    assert "misses per token" not in call("simulate", timed, "--budgets", "12").stdout


def test_the_replay_begins_where_it_is_told_to(call: Callable[..., Any], timed: Path) -> None:
    def hit_rate(*words: str) -> float:
        answer = json.loads(
            call(
                "simulate", timed, "--json", "--budgets", "60", "--evictions", "lru", *words
            ).stdout
        )
        rate: float = answer["budgets"][0]["arms"]["lru"]["hit_rate"]
        assert rate == answer["budgets"][0]["limits"]["lru_hit_rate"]
        return rate

    trace = make_trace()
    slots = int(0.6 * 48)
    assert hit_rate() == hit_rate("--from", "prefill") == replay(trace, slots, "lru").hit_rate
    assert hit_rate("--from", "decode") == replay(trace.decode_part(), slots, "lru").hit_rate


def test_times_may_be_given(call: Callable[..., Any], timed: Path, untimed: Path) -> None:
    words = ("--json", "--budgets", "25", "--bandwidth", "2MB/s", "--compute-time", "30ms")
    machines = {}
    for path in (timed, untimed):
        answer = json.loads(call("simulate", path, *words).stdout)
        machine = machines[path] = answer["settings"]["machine"]
        assert machine["bandwidth_bytes_s"] == 2e6
        assert 3 * machine["dense_s"] + 12 * machine["expert_s"] == pytest.approx(0.03)
    assert machines[timed]["expert_s"] == pytest.approx(2 * machines[timed]["dense_s"])
    assert 12 * machines[untimed]["expert_s"] == pytest.approx(0.015)


def test_without_times_there_are_hit_rates_only(call: Callable[..., Any], untimed: Path) -> None:
    words = ("simulate", untimed, "--budgets", "25", "--evictions", "lru")
    shown = call(*words)
    assert shown.exit_code == 0, shown.stderr
    assert "give --bandwidth and --compute-time" in shown.stderr
    result = call(*words, "--json")
    answer = json.loads(result.stdout, parse_constant=pytest.fail)
    arm = answer["budgets"][0]["arms"]["lru"]
    assert arm["tpot_s"] is arm["wire_limit_s"] is arm["stall_s_per_token"] is None
    assert answer["settings"]["machine"] is None
    assert arm["hit_rate"] == replay(make_trace(), 12, "lru").hit_rate
    refused = call(*words, "--predictor", "oracle")
    assert refused.exit_code == 1
    assert "hint: give --bandwidth and --compute-time" in refused.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["--evictions", "lru,coin"],
        ["--budgets", ","],
        ["--budgets", "0"],
        ["--budgets", "half"],
        ["--budgets", "10B"],
        ["--budgets", "10"],
        ["--budgets", "4slots"],
        ["--budgets", "200"],
        ["--budgets", "200%"],
        ["--predictor", "crystal-ball"],
        ["--predictor", "1.2"],
        ["--bandwidth", "10%"],
        ["--bandwidth", "fast"],
        ["--compute-time", "40"],
        ["--latency", "-1ms"],
        ["--from", "the-middle"],
    ],
    ids=" ".join,
)
def test_bad_usage_of_simulate_ends_with_2(
    words: list[str], call: Callable[..., Any], timed: Path
) -> None:
    result = call("simulate", timed, *words)
    assert result.exit_code == 2
    assert result.stdout == ""


@pytest.mark.parametrize("budget", ["10", "4slots", "4kB"])
def test_a_budget_below_what_an_engine_needs_is_told_the_least(
    budget: str, call: Callable[..., Any], timed: Path
) -> None:
    result = call("simulate", timed, "--budgets", f"50,{budget}", env={"COLUMNS": "300"})
    assert result.exit_code == 2
    assert f"--budgets '{budget}': that is 4 of 48 experts; the least is 5slots" in result.stderr
    assert call("simulate", timed, "--budgets", "5slots", "--evictions", "lru").exit_code == 0


@pytest.mark.parametrize("is_terminal", [True, False])
def test_names_and_numbers_are_not_cut(
    is_terminal: bool, call: Callable[..., Any], timed: Path
) -> None:
    """Neither in 80 columns, nor where stdout is a file and has none."""
    terminal = {"FORCE_COLOR": "1", "COLUMNS": "80"} if is_terminal else {"COLUMNS": "20"}
    result = call("simulate", timed, "--budgets", "25,100", env=terminal)
    assert result.exit_code == 0, result.stderr
    assert "…" not in result.stdout
    for words in ("least-stale", "belady, no prefetch", "48 (100%)", "unseen, planned"):
        assert words in result.stdout
    head = next(line for line in result.stdout.splitlines() if "eviction" in line)
    for name in ("slots", "hits", "late", "misses", "MB", "ms"):
        assert name in head


def test_a_file_that_is_no_trace_is_one_line_of_error(
    call: Callable[..., Any], text_file: Path
) -> None:
    result = call("simulate", text_file)
    assert result.exit_code == 1
    error, hint = result.stderr.splitlines()
    assert error.startswith("error: ")
    assert "line 1" in error
    assert hint.startswith("hint: ")
