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
def given(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, suite.SuiteOptions]]:
    """The suites that were started, by name, and their options."""
    taken: list[tuple[str, suite.SuiteOptions]] = []

    def run(options: suite.SuiteOptions, progress: Any, **chosen: Any) -> suite.SuiteResult:
        taken.append((chosen["suite"].name, options))
        progress("trial 1: lru at 25%", 0, 1)
        return suite.SuiteResult(machine={"cpu": "abacus"}, summary="| arm | TPOT |\n")

    monkeypatch.setattr(suite, "run_suite", run)
    return taken


def test_options_reach_the_suite(
    given: list[tuple[str, suite.SuiteOptions]], call: Callable[..., Any], tmp_path: Path
) -> None:
    result = call(
        *("bench", "some/model", "--arms", "lru, auto", "--budgets", "25,50%"),
        *("--contexts", "100, 900", "--trials", "2", "--no-stock", "--output", tmp_path / "out"),
        *("--decode-tokens", "160"),
    )
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "| arm | TPOT |\n"
    assert "trial 1: lru at 25%" in result.stderr
    ((name, options),) = given
    assert name == "engine"
    assert options.model == "some/model"
    assert options.arms == ("lru", "auto")
    assert options.budgets == (0.25, 0.5)
    assert options.contexts == (100, 900)
    assert options.num_trials == 2
    assert options.num_decode_tokens == 160
    assert options.with_stock is False
    assert options.output == tmp_path / "out"


def test_json_holds_samples_and_summary(
    given: list[tuple[str, suite.SuiteOptions]], call: Callable[..., Any]
) -> None:
    result = call("bench", "--json")
    answer = json.loads(result.stdout)
    assert answer["machine"] == {"cpu": "abacus"}
    assert answer["samples"] == []
    assert answer["left_out"] == {}


def test_budgets_and_contexts_are_the_suites_unless_given(
    given: list[tuple[str, suite.SuiteOptions]], call: Callable[..., Any]
) -> None:
    assert call("bench", "--suite", "speculating-experts").exit_code == 0
    ((name, options),) = given
    assert name == "speculating-experts"
    assert (options.arms, options.budgets, options.contexts) == (None, None, None)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--suite", "poetry"], "speculating-experts"),
        (["--contexts", "0"], "give lengths above 0"),
        (["--contexts", "100,long"], "give lengths above 0"),
        (["--contexts", ","], "give lengths above 0"),
        (["--budgets", "0"], "give percentages of all experts"),
    ],
)
def test_wrong_usage_is_refused(
    given: list[tuple[str, suite.SuiteOptions]],
    call: Callable[..., Any],
    words: list[str],
    complaint: str,
) -> None:
    result = call("bench", *words)
    assert result.exit_code == 2
    assert complaint in result.stderr
    assert given == []
