"""Whether tokens are drawn as they should be: the second of a text, against its exact shares."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from foreload.config import SamplingConfig
from foreload.decode.sampling import probabilities

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from foreload import Engine


class Comparison(NamedTuple):
    """Pearson's statistic, its degrees of freedom, the 99.9 % quantile, and draws of no share."""

    chi_square: float
    degrees: int
    limit: float
    num_impossible: int

    @property
    def is_fine(self) -> bool:
        return self.degrees >= 3 and self.num_impossible == 0 and self.chi_square < self.limit


def exact_second(
    engine: Engine, prompt: Sequence[int], settings: Mapping[str, Any]
) -> dict[int, float]:
    """Give the exact distribution of the second token, over all first ones."""
    config = SamplingConfig(**settings)
    shares: dict[int, float] = {}

    def after(token_ids: Sequence[int]) -> torch.Tensor:
        cache = engine.make_cache()
        return probabilities(engine.forward(torch.tensor([list(token_ids)]), cache), config)

    first = after(prompt)
    for token in first.nonzero().flatten().tolist():
        second = after([*prompt, token])
        for other in second.nonzero().flatten().tolist():
            chance = float(first[token]) * float(second[other])
            shares[other] = shares.get(other, 0.0) + chance
    return shares


def compare_draws(drawn: Sequence[int], shares: Mapping[int, float]) -> Comparison:
    """Compare draws with shares; those too rare for Pearson's test are taken together."""
    draws, seen = len(drawn), Counter(drawn)
    common = {token: draws * share for token, share in shares.items() if draws * share >= 5}
    rest = draws - sum(common.values())
    statistic = sum((seen[token] - wanted) ** 2 / wanted for token, wanted in common.items())
    if rest >= 5:
        others = draws - sum(seen[token] for token in common)
        statistic += (others - rest) ** 2 / rest
    degrees = len(common) - 1 + (rest >= 5)
    # Wilson and Hilferty's approximation of the quantile.
    spread = 2 / (9 * max(degrees, 1))
    limit = degrees * (1 - spread + 3.09 * spread**0.5) ** 3
    impossible = sum(count for token, count in seen.items() if shares.get(token, 0) == 0)
    return Comparison(statistic, degrees, limit, impossible)
