"""The summary shows no time of a lossy arm without its quality, and states both claims."""

from __future__ import annotations

from typing import Any

import pytest

from foreload.bench.arm import Sample
from foreload.bench.report import BudgetLimits
from foreload.bench.speculation_report import (
    own_limit_s,
    recall_by_layer,
    share_of_overlap,
    summarise_speculation,
)

MACHINE = {
    "model": "toy",
    "date": "2026-01-02",
    "architecture": "ToyForCausalLM",
    "num_moe_layers": 2,
    "num_experts": 8,
    "expert_bytes": 2**20,
    "top_k": 2,
    "dtype": "bfloat16",
    "total_expert_bytes": 2**24,
    "is_random": False,
    "cores": 2,
    "cpu": "abacus",
    "memory_bytes": 2**33,
    "threads": 1,
    "torch": "2",
    "transformers": "5",
    "foreload": "0",
}
QUALITY = {
    "kl": [0.02, 0.04],
    "nll": [2.1, 2.0],
    "nll_exact": [2.0, 2.0],
    "agrees": [1.0, 0.0],
}


def sample(arm: str, tpot_ms: float, trial: int = 0, **values: Any) -> Sample:
    given = {"budget": 0.25, "context": 100, "eviction": "history", "is_equal": True, **values}
    return Sample(
        arm=arm, trial=trial, tpot_s=tpot_ms / 1e3, prefill_s=0.5, step_s=[tpot_ms / 1e3], **given
    )


def on_demand(tpot_ms: float, trial: int = 0, **values: Any) -> Sample:
    given = {"eviction": "none", "bytes_per_token": 20e6, **values}
    return sample(given.pop("arm", "on-demand"), tpot_ms, trial, **given)


def speculate(tpot_ms: float, trial: int = 0, **values: Any) -> Sample:
    given = {"eviction": "none", "is_lossy": True, "quality": QUALITY, "bytes_per_token": 20e6}
    return sample("speculate-hybrid", tpot_ms, trial, **{**given, **values})


def limits(trial: int = 0, **values: Any) -> BudgetLimits:
    """Compute 5 ms; 20 experts of 1 MB at 1 GB/s without a cache."""
    given: dict[str, Any] = {
        "budget": 0.25,
        "context": 100,
        "num_slots": 4,
        "bandwidth_bytes_s": 1e9,
        "compute_s": 5e-3,
        "expert_bytes": 10**6,
        "hit_rates": {"none": 0.0, "history": 0.5, "belady": 0.8},
        "misses_per_token": {"none": 20.0, "history": 10.0, "belady": 4.0},
        **values,
    }
    return BudgetLimits(trial=trial, **given)


def summary(samples: list[Sample], **values: Any) -> str:
    trials = sorted({(s.context, s.budget, s.trial) for s in samples})
    made = [limits(trial, context=c, budget=b, **values) for c, b, trial in trials]
    return summarise_speculation(MACHINE, samples, made)


def row(text: str, name: str) -> list[str]:
    """Give the cells of the first row that begins with `name`."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def section(text: str, title: str) -> str:
    return next(part for part in text.split("## ") if part.startswith(title))


def test_a_lossy_arms_row_has_its_quality_beside_its_time() -> None:
    samples = [on_demand(24.0), speculate(20.0, speculated_fraction=0.125)]
    cells = row(summary(samples), "speculate-hybrid")
    assert cells[1:4] == ["20.0 [20.0 to 20.0]", "1.20 [1.20 to 1.20]", "1.00 [1.00 to 1.00]"]
    assert cells[4].startswith("0.0300 [")
    assert cells[5].startswith("1.0513 [")
    assert cells[6].startswith("0.500 [")
    assert cells[7] == "0.125"


def test_every_table_with_a_lossy_time_has_kl_and_perplexity() -> None:
    samples = [on_demand(24.0), speculate(20.0), sample("cache-prefetch", 10.0)]
    shown = [line for line in summary(samples).splitlines() if "speculate-hybrid" in line]
    assert len(shown) == 3
    assert all("0.0300 [" in line and "1.0513 [" in line for line in shown)


def test_an_exact_arm_has_nothing_to_confess() -> None:
    assert row(summary([on_demand(24.0)]), "on-demand")[4:8] == ["0", "1", "1", "0"]


def test_arms_are_held_against_the_bytes_they_moved_themselves() -> None:
    assert own_limit_s(speculate(30.0, bytes_per_token=15e6), limits()) == pytest.approx(15e-3)
    assert own_limit_s(speculate(30.0, bytes_per_token=1e6), limits()) == pytest.approx(5e-3)


def test_what_is_saved_is_told_as_a_share_of_what_overlap_can_give() -> None:
    assert share_of_overlap(speculate(20.0), on_demand(24.0), limits()) == pytest.approx(0.8)
    quick = limits(bandwidth_bytes_s=2e10)
    assert share_of_overlap(speculate(20.0), on_demand(24.0), quick) == pytest.approx(4.0)

    samples = [
        *(on_demand(25.0), speculate(20.0), on_demand(24.0, 1), speculate(21.0, 1)),
        *(on_demand(30.0, trial, arm="layerwise-on-demand") for trial in (0, 1)),
    ]
    cells = row(section(summary(samples), "What executing guesses gives"), "speculate-hybrid")
    assert cells[1:3] == ["100", "25%"]
    assert cells[3:5] == ["31.7 [30.0 to 33.3] %", "190 [180 to 200] %"]
    assert cells[5:7] == ["16.3 [12.5 to 20.0] %", "80 [60 to 100] %"]
    assert cells[7].startswith("0.0300 [")


def test_without_one_way_to_load_on_demand_the_other_is_told_alone() -> None:
    text = summary([on_demand(25.0), speculate(20.0)])
    cells = row(section(text, "What executing guesses gives"), "speculate-hybrid")
    assert cells[3:7] == ["", "", "20.0 [20.0 to 20.0] %", "100 [100 to 100] %"]


def test_exact_with_cache_is_compared_with_every_speculation_without() -> None:
    samples = [
        speculate(20.0),
        speculate(12.0, 1),
        sample("cache-prefetch", 10.0),
        sample("cache-prefetch", 10.0, 1),
        speculate(9.0, budget=0.1),
        sample("cache-prefetch", 12.0, budget=0.1),
        speculate(16.0, context=900),
        speculate(8.0, 1, context=900),
        sample("cache-prefetch", 10.0, context=900),
        sample("cache-prefetch", 10.0, 1, context=900),
    ]
    told = section(summary(samples), "Exact with cache and prefetch")
    lines = [line.split(" | ") for line in told.splitlines() if "| speculate-hybrid" in line]
    assert [cells[1:5] for cells in lines] == [
        ["100", "10%", "0.75 [0.75 to 0.75]", "slower in every trial"],
        ["100", "25%", "1.60 [1.20 to 2.00]", "faster in every trial"],
        ["900", "25%", "1.20 [0.80 to 1.60]", "faster in the median"],
    ]


def test_an_arm_whose_logits_differ_gets_no_time_anywhere() -> None:
    samples = [
        on_demand(24.0),
        speculate(77.7, is_equal=False),
        sample("cache-prefetch", 88.8, is_equal=False),
    ]
    text = summary(samples)
    assert row(text, "speculate-hybrid")[1] == "the prompt's logits differ"
    assert row(text, "cache-prefetch")[1] == "logits differ"
    assert not any(time in text for time in ("77.7", "88.8"))
    assert "What executing guesses gives" not in text


def test_nothing_is_claimed_against_an_on_demand_arm_that_went_wrong() -> None:
    text = summary([on_demand(24.0, is_equal=False), speculate(20.0)])
    assert row(text, "speculate-hybrid")[2] == ""
    assert "What executing guesses gives" not in text


def test_random_weights_have_times_and_no_quality() -> None:
    text = summary([on_demand(24.0), speculate(20.0, quality={}, speculated_fraction=0.5)])
    assert row(text, "speculate-hybrid")[4:8] == ["random weights"] * 3 + ["0.500"]


def test_recall_is_that_of_executed_guesses_without_a_cache() -> None:
    recalls = {1: {1: 0.5}, 2: {1: 0.75}}
    better = {1: {1: 0.7}, 2: {1: 0.75}}
    samples = [
        speculate(20.0, recall_at_n=recalls),
        speculate(20.0, 1, recall_at_n=better),
        sample("cache-speculate", 9.0, is_lossy=True, quality=QUALITY, recall_at_n=recalls),
        sample("layerwise", 9.0, is_lossy=True, is_layerwise=True, eviction="none"),
        sample("cache-prefetch", 9.0, recall_at_n=recalls),
    ]
    assert recall_by_layer(samples) == {"speculate-hybrid": {1: pytest.approx(0.6), 2: 0.75}}
    told = section(summary(samples), "Recall per layer")
    assert row(told, "1") == ["1", "60.0"]
    assert row(told, "mean") == ["mean", "67.5"]


def test_limits_stand_below_every_table() -> None:
    text = summary([on_demand(24.0)])
    rows = {name: row(text, f"*{name}*") for name in ("wire limit, no cache", "Belady limit")}
    assert rows["wire limit, no cache"][1] == "20.0 [20.0 to 20.0]"
    assert rows["Belady limit"][1] == "5.0 [5.0 to 5.0]"
    assert rows["Belady limit"][8:11] == ["0.800", "", "4"]
    assert all(len(cells) == len(row(text, "arm")) for cells in rows.values())
