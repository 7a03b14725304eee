"""`foreload plan`: figures in, a table and advice out; nothing is measured that is given."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

GIVEN = (
    *("--disk-bandwidth", "1GB", "--memory-bandwidth", "10GB"),
    *("--memory", "4GiB", "--layer-overhead", "0.5"),
)


def test_table_and_json_say_the_same(call: Callable[..., Any], checkpoint: Path) -> None:
    result = call("plan", checkpoint, *GIVEN, "--json")
    assert result.exit_code == 0, result.stderr
    plan = json.loads(result.stdout)
    assert plan["machine"]["rates"]["disk_bytes_s"] == 1e9
    assert plan["machine"]["rates"]["memory_bytes_s"] == 1e10
    assert plan["machine"]["memory_bytes"] == 4 << 30
    assert plan["machine"]["rates"]["layer_s"] == pytest.approx(0.0005)
    assert plan["basis"] == "cost model"
    assert plan["slot_plans"] == []
    assert "without a trace" in result.stderr
    table = call("plan", checkpoint, *GIVEN).stdout
    for text in ("1.00 GB/s", "given", "assumed", "no limit", "all-resident"):
        assert text in table
    assert f"--expert-memory {plan['recommendation']['expert_memory_bytes']}" in table
    assert f"{plan['recommendation']['tpot_s'] * 1000:.1f}" in table


def test_budgets_are_chosen_and_shown(call: Callable[..., Any], checkpoint: Path) -> None:
    result = call("plan", checkpoint, *GIVEN, "--budgets", "50", "--json")
    arms = json.loads(result.stdout)["arms"]
    assert [arm["budget"] for arm in arms] == [0.5, 1.0]
    assert "to" in call("plan", checkpoint, *GIVEN, "--budgets", "50").stdout


def test_a_machine_too_small_is_an_answer(call: Callable[..., Any], checkpoint: Path) -> None:
    small = [*GIVEN, "--memory", "100MiB"]
    result = call("plan", checkpoint, *small)
    assert result.exit_code == 0, result.stderr
    assert "It does not fit" in result.stdout
    assert json.loads(call("plan", checkpoint, *small, "--json").stdout)["num_fitting"] == 0


def test_bandwidths_may_be_written_per_second(call: Callable[..., Any], checkpoint: Path) -> None:
    words = ("--disk-bandwidth", "7GB/s", "--memory-bandwidth", "20 GB/s", "--json")
    rates = json.loads(call("plan", checkpoint, *GIVEN, *words).stdout)["machine"]["rates"]
    assert (rates["disk_bytes_s"], rates["memory_bytes_s"]) == (7e9, 2e10)


def test_a_budget_that_nothing_runs_in_is_left_out_and_named(
    call: Callable[..., Any], checkpoint: Path
) -> None:
    result = call("plan", checkpoint, *GIVEN, "--budgets", "3,50")
    assert result.exit_code == 0, result.stderr
    assert "left out: 3% of the experts are fewer than a model at work needs" in result.stderr
    said = call("plan", checkpoint, *GIVEN, "--budgets", "50,100").stderr
    assert "fewer than a model at work" not in said


@pytest.mark.parametrize(
    "wrong",
    [
        ("--disk-bandwidth", "fast"),
        ("--memory-bandwidth", "50%"),
        ("--memory", "0"),
        ("--memory", "4GB/s"),
        ("--budgets", "150"),
        ("--layer-overhead", "-1"),
        ("--layer-overhead", "inf"),
        ("--layer-overhead", "nan"),
        ("--trace", "nowhere.jsonl"),
    ],
)
def test_wrong_figures_are_usage_errors(
    call: Callable[..., Any], checkpoint: Path, wrong: tuple[str, str]
) -> None:
    assert call("plan", checkpoint, *GIVEN, *wrong).exit_code == 2


def test_a_model_that_cannot_run_is_an_error(
    call: Callable[..., Any], checkpoint: Path, tmp_path: Path
) -> None:
    for path in checkpoint.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((checkpoint / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "dbrx"}))
    result = call("plan", tmp_path, *GIVEN)
    assert result.exit_code == 1
    assert "dbrx" in result.stderr


def test_a_trace_is_simulated(
    call: Callable[..., Any], checkpoint: Path, text_file: Path, tmp_path: Path
) -> None:
    trace = tmp_path / "trace.jsonl.gz"
    words = ("trace", checkpoint, "--text", text_file, "--output", trace)
    assert call(*words, "--num-prompt-tokens", "8", "--max-tokens", "24").exit_code == 0
    result = call("plan", checkpoint, *GIVEN, "--trace", trace, "--budgets", "50", "--json")
    assert result.exit_code == 0, result.stderr
    plan = json.loads(result.stdout)
    assert plan["basis"] == "trace"
    assert {"on-demand", "lru", "history", "oracle"} <= {arm["arm"] for arm in plan["arms"]}
    assert plan["slot_plans"][0]["num_slots"] == plan["num_slots"] // 2
    assert (
        "misses per token"
        in call("plan", checkpoint, *GIVEN, "--trace", trace, "--budgets", "50").stdout
    )
