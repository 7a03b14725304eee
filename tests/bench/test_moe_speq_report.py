"""The summary of the suite about drafts: ratios by hand, and no lossy time without its quality."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from test_speculation_report import MACHINE, QUALITY

from foreload.bench.arm import Sample
from foreload.bench.moe_speq_report import (
    busy_s,
    round_limit_s,
    summarise_moe_speq,
    verification_ratios,
)
from foreload.bench.report import BudgetLimits

SPEQ_MACHINE = {**MACHINE, "link_bytes_s": None}


def draft_sample(arm: str, tpot_ms: float, trial: int = 0, **values: Any) -> Sample:
    given = {"budget": 0.4, "context": 100, "eviction": "history", "is_equal": True, **values}
    return Sample(
        arm=arm, trial=trial, tpot_s=tpot_ms / 1e3, prefill_s=0.5, step_s=[tpot_ms / 1e3], **given
    )


def draft_limits(trial: int = 0) -> BudgetLimits:
    """Compute 5 ms; experts of 1 MB at 1 GB/s."""
    return BudgetLimits(
        budget=0.4,
        trial=trial,
        context=100,
        num_slots=4,
        bandwidth_bytes_s=1e9,
        compute_s=5e-3,
        expert_bytes=10**6,
        hit_rates={"lru": 0.3, "history": 0.5, "belady": 0.8},
        misses_per_token={"lru": 14.0, "history": 10.0, "belady": 4.0},
    )


def test_the_limit_of_an_arm_is_its_busy_time_or_its_copies() -> None:
    busy = draft_sample("draft-4", 30, stall_s_per_token=0.01, bytes_per_token=5e6)
    assert busy_s(busy) == pytest.approx(0.02)
    assert round_limit_s(busy, draft_limits()) == pytest.approx(0.02)
    copying = draft_sample("draft-4", 30, stall_s_per_token=0.01, bytes_per_token=25e6)
    assert round_limit_s(copying, draft_limits()) == pytest.approx(0.025)


def test_verifications_of_eight_are_compared_with_their_limit() -> None:
    resident = draft_sample(
        "draft-7-resident", 9, is_resident=True, verifications=[[8, 0.040, 90, 0], [3, 0.01, 9, 0]]
    )
    wide = draft_sample(
        "draft-7",
        20,
        # Limits: 40 ms of computing, then 60 ms of copying 60 experts; the third is not eight wide.
        verifications=[[8, 0.044, 90, 10], [8, 0.090, 90, 60], [2, 1.0, 9, 9]],
    )
    found = verification_ratios([resident, wide], [draft_limits()])
    assert [one.to_limit for one in found] == pytest.approx([1.1, 1.5])
    assert [one.to_shared_limit for one in found] == pytest.approx([1.1, 1.5])
    assert verification_ratios([wide], [draft_limits()]) == []


def test_a_second_limit_counts_in_that_copying_and_computing_disturb_each_other() -> None:
    resident = draft_sample(
        "draft-7-resident", 9, is_resident=True, verifications=[[8, 0.04, 9, 0]]
    )
    wide = draft_sample("draft-7", 20, verifications=[[8, 0.088, 9, 60]])
    limits = replace(draft_limits(), compute_share=0.5, copy_share=0.75)
    (found,) = verification_ratios([resident, wide], [limits])
    # 40 ms of computing and 60 ms of copying: 80 ms of both end both.
    assert found.to_limit == pytest.approx(0.088 / 0.060)
    assert found.to_shared_limit == pytest.approx(0.088 / 0.080)
    text = summarise_moe_speq(SPEQ_MACHINE, [resident, wide], [limits])
    assert "| 0.50 [0.50 to 0.50] and 0.75 [0.75 to 0.75] | 1.10 [1.10 to 1.10] |" in text


def test_the_governor_stands_beside_the_best_fixed_number() -> None:
    samples = [
        draft_sample("lru", 40),
        draft_sample("draft-0", 30, accept_length=1.0),
        draft_sample("draft-2", 20, accept_length=2.5, acceptance_rate=0.9),
        draft_sample("draft-4-no-prefetch", 10, accept_length=2.5),
        draft_sample("governor", 21, accept_length=2.4, rounds={0: 2, 2: 11}),
    ]
    text = summarise_moe_speq(SPEQ_MACHINE, samples, [draft_limits()])
    assert "Best fixed number: draft-2. Governor / draft-2: 1.05 [1.05 to 1.05]." in text
    assert "2 x 0, 11 x 2" in text
    assert "| draft-2 | 20.0 [20.0 to 20.0] | 2.00 [2.00 to 2.00] |" in text


def test_an_arm_with_wrong_logits_has_no_time() -> None:
    samples = [draft_sample("lru", 40), draft_sample("draft-2", 20, is_equal=False)]
    text = summarise_moe_speq(SPEQ_MACHINE, samples, [draft_limits()])
    assert "| draft-2 | logits differ |" in text
    assert "20.0" not in text


def test_the_quantised_model_alone_has_its_quality_beside_its_time() -> None:
    alone = draft_sample("int4-alone", 8, is_lossy=True, quality=QUALITY)
    (row,) = [
        line
        for line in summarise_moe_speq(SPEQ_MACHINE, [alone], [draft_limits()]).splitlines()
        if line.startswith("| int4-alone")
    ]
    assert row.endswith("| 0.0300 | 1.051 |")


def test_a_throttled_link_is_told() -> None:
    machine = {**SPEQ_MACHINE, "link_bytes_s": 5e8}
    samples = [draft_sample("lru", 40)]
    assert "throttled to 0.5 GB/s" in summarise_moe_speq(machine, samples, [draft_limits()])
    assert "throttled" not in summarise_moe_speq(SPEQ_MACHINE, samples, [draft_limits()])


def test_other_choices_are_counted_with_their_widest_gap() -> None:
    samples = [
        draft_sample("draft-2", 20, trial, accept_length=2.5, num_other=n, widest_tie=gap)
        for trial, n, gap in [(0, 1, 0.0625), (1, 2, 0.125)]
    ]
    text = summarise_moe_speq(SPEQ_MACHINE, samples, [draft_limits(0), draft_limits(1)])
    assert "| 3 (gap 0.125) |" in text
