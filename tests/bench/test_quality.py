"""Quality is pooled over the tokens of all trials, with intervals of whole blocks."""

from __future__ import annotations

import math
from typing import Any

import pytest

from foreload.bench.arm import Sample
from foreload.bench.quality import pool_quality


def sample(trial: int = 0, **quality: list[float]) -> Sample:
    values: dict[str, Any] = {"arm": "speculate", "budget": 0.25, "is_lossy": True}
    return Sample(
        trial=trial,
        tpot_s=0.1,
        prefill_s=0.5,
        step_s=[0.1],
        is_equal=True,
        speculated_fraction=0.1 * (trial + 1),
        quality=quality,
        **values,
    )


def judged(kl: list[float], loss: list[float], trial: int = 0) -> Sample:
    nll = [1.0 + value for value in loss]
    exact = [1.0] * len(loss)
    return sample(trial, kl=kl, nll=nll, nll_exact=exact, agrees=[value < 0.5 for value in kl])


def test_every_token_counts_the_same_whatever_its_trial() -> None:
    pooled = pool_quality([judged([0.1], [0.3]), judged([0.4, 0.7], [0.0, 0.0], trial=1)])
    assert pooled is not None
    assert pooled.kl.value == pytest.approx(0.4)
    assert pooled.perplexity_ratio.value == pytest.approx(math.exp(0.1))
    assert pooled.top1_agreement.value == pytest.approx(2 / 3)
    assert pooled.speculated_fraction == pytest.approx(0.15)


def test_the_interval_spans_the_blocks_and_holds_the_mean() -> None:
    pooled = pool_quality([judged([0.01 * i] * 16, [0.0] * 16, i) for i in range(20)])
    assert pooled is not None
    assert 0.05 < pooled.kl.low < pooled.kl.value < pooled.kl.high < 0.15
    assert pooled.perplexity_ratio.low == pooled.perplexity_ratio.high == 1


def test_tokens_that_follow_each_other_are_drawn_together() -> None:
    noisy = [0.0, 1.0] * 16
    together = pool_quality([judged(noisy, [0.0] * 32)])
    assert together is not None
    assert together.kl.low == together.kl.high == 0.5, "both blocks have the same mean"


def test_without_tokens_there_is_no_quality() -> None:
    assert pool_quality([]) is None
    assert pool_quality([sample()]) is None
    assert pool_quality([judged([], [])]) is None


def test_samples_that_were_not_judged_are_passed_over() -> None:
    pooled = pool_quality([sample(), judged([0.2], [0.0], trial=1)])
    assert pooled is not None
    assert pooled.kl.value == pytest.approx(0.2)
    assert pooled.speculated_fraction == pytest.approx(0.2)
