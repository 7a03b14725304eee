"""What lossy arms cost: the quality of their samples, pooled over trials.

Quality is counted in the very runs that are timed. Nothing here measures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from foreload.evaluate import bootstrap_interval

if TYPE_CHECKING:
    from collections.abc import Sequence

    from foreload.bench.arm import Sample
    from foreload.evaluate import Interval

__all__ = ["ArmQuality", "pool_quality"]

_BLOCK_TOKENS = 16
"""Consecutive tokens that are resampled as one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmQuality:
    """What a lossy arm costs, with 95 % intervals.

    Attributes:
        kl: KL(exact || arm) per token, nats.
        perplexity_ratio: The arm's perplexity over the exact one.
        top1_agreement: Share of the tokens for which both name the same one as the likeliest.
        speculated_fraction: Executed pairs of token and expert that the true router did not choose.
    """

    kl: Interval
    perplexity_ratio: Interval
    top1_agreement: Interval
    speculated_fraction: float


def pool_quality(samples: Sequence[Sample]) -> ArmQuality | None:
    """Pool the tokens of one arm's samples; None where there are none to judge by."""
    judged = [sample for sample in samples if sample.quality]
    if not any(sample.quality["kl"] for sample in judged):
        return None
    kl: list[float] = []
    loss: list[float] = []
    agrees: list[float] = []
    blocks: list[int] = []
    for sample in judged:
        quality = sample.quality
        first = blocks[-1] + 1 if blocks else 0
        blocks += [first + place // _BLOCK_TOKENS for place in range(len(quality["kl"]))]
        kl += quality["kl"]
        agrees += quality["agrees"]
        both = zip(quality["nll"], quality["nll_exact"], strict=True)
        loss += [nll - exact for nll, exact in both]
    return ArmQuality(
        kl=bootstrap_interval(kl, blocks),
        perplexity_ratio=bootstrap_interval(loss, blocks).map(math.exp),
        top1_agreement=bootstrap_interval(agrees, blocks),
        speculated_fraction=sum(s.speculated_fraction for s in judged) / len(judged),
    )
