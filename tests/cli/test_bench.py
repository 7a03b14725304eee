"""`foreload bench`: hands the suite its options and prints what comes back."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from foreload.bench import suite

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[suite.SuiteOptions]:
    taken: list[suite.SuiteOptions] = []

    def run(options: suite.SuiteOptions, progress: Any) -> suite.SuiteResult:
        taken.append(options)
        progress("trial 1: lru at 25%", 0, 1)
        return suite.SuiteResult(machine={"cpu": "abacus"}, summary="| arm | TPOT |\n")

    monkeypatch.setattr(suite, "run_suite", run)
    return taken


def test_options_reach_the_suite(
    given: list[suite.SuiteOptions], call: Callable[..., Any], tmp_path: Path
) -> None:
    result = call(
        *("bench", "some/model", "--arms", "lru, auto", "--budgets", "25,50%"),
        *("--trials", "2", "--no-stock", "--output", tmp_path / "out"),
    )
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "| arm | TPOT |\n"
    assert "trial 1: lru at 25%" in result.stderr
    (options,) = given
    assert options.model == "some/model"
    assert options.arms == ("lru", "auto")
    assert options.budgets == (0.25, 0.5)
    assert options.num_trials == 2
    assert options.with_stock is False
    assert options.output == tmp_path / "out"


def test_json_holds_samples_and_summary(
    given: list[suite.SuiteOptions], call: Callable[..., Any]
) -> None:
    result = call("bench", "--json")
    answer = json.loads(result.stdout)
    assert answer["machine"] == {"cpu": "abacus"}
    assert answer["samples"] == []
    assert given[0].budgets == (0.1, 0.25, 0.5, 0.75)
