"""The table says medians, ranges and distances from the limits, and no time of a wrong arm."""

from __future__ import annotations

from typing import Any

import pytest

from foreload.bench.arm import Sample
from foreload.bench.report import (
    BudgetLimits,
    belady_limit_s,
    label_arm,
    samples_at,
    summarise,
    wire_limit_s,
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


def sample(arm: str, trial: int, tpot_ms: float, budget: float = 0.25, **values: Any) -> Sample:
    given = {"prefill_s": 0.5, "step_s": [tpot_ms / 1e3], "is_equal": True, **values}
    given.setdefault("eviction", "history")
    return Sample(arm=arm, budget=budget, trial=trial, tpot_s=tpot_ms / 1e3, **given)


def limits(trial: int = 0, budget: float = 0.25, **values: Any) -> BudgetLimits:
    """Compute 2 ms; of 1 MB experts at 1 GB/s, next-use misses 10 (10 ms), Belady 5 (5 ms)."""
    given: dict[str, Any] = {
        "num_slots": 4,
        "bandwidth_bytes_s": 1e9,
        "compute_s": 2e-3,
        "expert_bytes": 10**6,
        "hit_rates": {"none": 0.0, "lru": 0.2, "history": 0.5, "belady": 0.8},
        "misses_per_token": {"none": 20.0, "lru": 16.0, "history": 10.0, "belady": 5.0},
        **values,
    }
    return BudgetLimits(budget=budget, trial=trial, **given)


def row(summary: str, name: str) -> list[str]:
    """Give the cells of the first row that begins with `name`."""
    line = next(line for line in summary.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize(
    ("policy", "compute_s", "bandwidth", "limit"),
    [
        ("history", 2e-3, 1e9, 10e-3),
        ("history", 2e-3, 4e9, 2.5e-3),
        ("history", 2e-3, 1e10, 2e-3),
        ("lru", 2e-3, 1e9, 16e-3),
        ("none", 30e-3, 1e9, 30e-3),
    ],
)
def test_the_wire_limit_is_the_larger_of_compute_and_copies(
    policy: str, compute_s: float, bandwidth: float, limit: float
) -> None:
    made = limits(compute_s=compute_s, bandwidth_bytes_s=bandwidth)
    assert wire_limit_s(made, policy) == pytest.approx(limit)


def test_the_belady_limit_is_the_wire_limit_of_its_misses() -> None:
    assert belady_limit_s(limits()) == pytest.approx(5e-3)
    assert belady_limit_s(limits(compute_s=7e-3)) == 7e-3


def test_an_arms_row_has_medians_ranges_and_distances() -> None:
    rates = {"hit_rate": 0.5, "late_rate": 0.25, "wasted_bytes_per_token": 3e6}
    samples = [
        *(sample("on-demand", trial, 60.0) for trial in range(3)),
        sample("lookahead", 0, 20.0, bytes_per_token=9e6, stall_s_per_token=1e-3, **rates),
        sample("lookahead", 1, 10.0, bytes_per_token=7e6, stall_s_per_token=2e-3, **rates),
        sample("lookahead", 2, 30.0, bytes_per_token=8e6, stall_s_per_token=6e-3, **rates),
    ]
    summary = summarise(MACHINE, samples, [limits(trial) for trial in range(3)])
    assert row(summary, "lookahead") == [
        "lookahead",
        "20.0 [10.0 to 30.0]",
        "2.00 [1.00 to 3.00]",
        "4.00 [2.00 to 6.00]",
        "3.00 [2.00 to 6.00]",
        "0.500",
        "0.250",
        "8",
        "3",
        "2.0",
    ]


def test_columns_are_named_and_the_limits_have_rows() -> None:
    summary = summarise(MACHINE, [sample("auto", 0, 20.0)], [limits()])
    assert row(summary, "arm")[1:5] == [
        "TPOT ms",
        "/ wire limit",
        "/ Belady limit",
        "on-demand / it",
    ]
    assert row(summary, "arm")[5:] == ["hits", "late", "MB per token", "wasted MB", "stall ms"]
    wire, best = row(summary, "*wire limit, history*"), row(summary, "*Belady limit*")
    assert (wire[1], wire[5], wire[7]) == ("10.0 [10.0 to 10.0]", "0.500", "10")
    assert (best[1], best[5], best[7]) == ("5.0 [5.0 to 5.0]", "0.800", "5")
    assert "## 25% of the experts' memory (4 slots, disk 1.00 [1.00 to 1.00] GB/s)" in summary


def test_reference_arms_are_held_against_their_own_policys_limit() -> None:
    names = ("on-demand", "lru", "history", "auto")
    evictions = ("none", "lru", "history", "history")
    samples = [
        sample(name, 0, 40.0, eviction=eviction)
        for name, eviction in zip(names, evictions, strict=True)
    ]
    summary = summarise(MACHINE, samples, [limits()])
    wire = {name: row(summary, name)[2].split()[0] for name in names}
    assert wire == {"on-demand": "2.00", "lru": "2.50", "history": "4.00", "auto": "4.00"}


def test_an_arm_whose_logits_differ_gets_no_time() -> None:
    samples = [
        sample("on-demand", 0, 60.0),
        sample("auto", 0, 77.7),
        sample("auto", 1, 88.8, is_equal=False),
        sample("all-resident", 0, 99.9, 1.0, is_resident=True, is_equal=False),
    ]
    summary = summarise(MACHINE, samples, [limits(0), limits(1)])
    assert row(summary, "auto") == ["auto", "logits differ"] + [""] * 8
    assert row(summary, "all-resident") == ["all-resident", "logits differ", ""]
    assert not any(time in summary for time in ("77.7", "88.8", "99.9"))


def test_nothing_is_compared_with_an_on_demand_arm_whose_logits_differ() -> None:
    samples = [sample("on-demand", 0, 60.0, is_equal=False), sample("auto", 0, 20.0)]
    assert row(summarise(MACHINE, samples, [limits()]), "auto")[4] == ""


def test_resident_arms_have_a_table_of_their_own_even_at_a_budget_of_all() -> None:
    samples = [
        sample("transformers eager", 0, 3.0, 1.0, is_resident=True),
        sample("transformers eager", 1, 5.0, 1.0, is_resident=True, prefill_s=1.5),
        sample("lru", 0, 40.0, 1.0),
    ]
    summary = summarise(MACHINE, samples, [limits(0, 1.0), limits(1, 1.0)])
    assert row(summary, "transformers eager") == [
        "transformers eager",
        "4.0 [3.0 to 5.0]",
        "1.00 [0.50 to 1.50]",
    ]
    assert len(row(summary, "lru | 40.0 [40.0 to 40.0]")) == 10


def test_every_budget_has_its_own_table() -> None:
    samples = [sample("lru", 0, 40.0, 0.5), sample("auto", 0, 20.0, 0.25)]
    summary = summarise(MACHINE, samples, [limits(0, 0.5), limits(0, 0.25)])
    quarter, half = summary.split("## ")[1:]
    assert quarter.startswith("25%")
    assert "| auto |" in quarter
    assert "| auto |" not in half
    assert row(half, "lru")[1] == "40.0 [40.0 to 40.0]"


def test_every_context_has_its_own_table_and_resident_rows() -> None:
    samples = [
        sample("auto", 0, 20.0, context=100),
        sample("auto", 0, 30.0, context=900),
        sample("all-resident", 0, 3.0, 1.0, context=100, is_resident=True),
        sample("all-resident", 0, 5.0, 1.0, context=900, is_resident=True),
    ]
    summary = summarise(MACHINE, samples, [limits(context=900), limits(context=100)])
    short, long = summary.split("## ")[1:]
    assert short.startswith("25% of the experts' memory (100 tokens of prompt, 4 slots")
    assert row(short, "auto")[1] == "20.0 [20.0 to 20.0]"
    assert row(long, "auto")[1] == "30.0 [30.0 to 30.0]"
    assert row(summary, "all-resident, 900 tokens")[1] == "5.0 [5.0 to 5.0]"


def test_arms_stand_in_one_order_in_all_tables() -> None:
    samples = [sample(arm, 0, 20.0) for arm in ("lru", "auto")]
    samples += [sample(arm, 0, 20.0, context=900) for arm in ("auto", "lru")]
    assert list(samples_at(samples, [limits(context=900)])) == ["lru", "auto"]
    assert list(samples_at(samples[1:], [limits()])) == ["auto"]


def test_a_lossy_arm_is_named_with_its_quality() -> None:
    quality = {"kl": [0.1, 0.3], "nll": [2.0, 2.0], "nll_exact": [1.0, 2.0], "agrees": [1, 1]}
    lossy = sample("speculate", 0, 20.0, is_lossy=True, quality=quality)
    assert label_arm("speculate", [lossy]) == "speculate (KL 0.2, perplexity x1.649)"
    assert label_arm("auto", [sample("auto", 0, 20.0)]) == "auto"
    unjudged = sample("speculate", 0, 20.0, is_lossy=True)
    assert label_arm("speculate", [unjudged]) == "speculate (lossy; random weights, no quality)"


def test_policies_are_placed_between_lru_and_belady() -> None:
    parts = summarise(MACHINE, [], [limits()]).split("Hit rates of eviction policies")
    assert row(parts[1], "history") == [
        "history",
        "0.500 [0.500 to 0.500]",
        "0.50 [0.50 to 0.50]",
    ]
    assert row(parts[1], "belady")[2] == "1.00 [1.00 to 1.00]"


def test_random_weights_are_labelled() -> None:
    note = "Random weights: times only, routing means nothing."
    assert note not in summarise(MACHINE, [], [limits()])
    assert note in summarise({**MACHINE, "is_random": True}, [], [limits()])


def test_the_header_says_what_logits_were_compared_with() -> None:
    eager = sample("transformers eager", 0, 3.0, 1.0, is_resident=True)
    with_stock = summarise(MACHINE, [eager], [limits()])
    without = summarise(MACHINE, [], [limits()])
    assert "compared with transformers' eager experts at every step" in with_stock
    assert "compared with those of the all-resident arm at every step" in without
