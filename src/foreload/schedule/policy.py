"""Who decides which experts are executed: the true router, or a guess.

`Exact` is the default. The others change results and run only where they are asked for; what they
cost is measured by `foreload evaluate`. Torch-free: policies see ids and weights, no tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["Exact", "ExecutionPolicy", "Speculate", "SpeculateWhen"]

_LEAST_KEPT = 1e-6
"""Share of the routing weight that is always executed: less could not be shared out again."""


@dataclass(frozen=True, slots=True)
class Exact:
    """The true router decides, and every expert it chose is waited for."""

    def applies(self, num_tokens: int, *, is_prefill: bool = False) -> bool:
        """Tell whether a forward may execute anything else: never."""
        return False


@dataclass(frozen=True, slots=True)
class Speculate:
    """A layer executes what was predicted for it; its true router is overruled.

    The first MoE layer, prompts, forwards of several tokens, and layers nothing was predicted for
    follow the true router.

    Attributes:
        in_prefill: Speculate in prompts and forwards of several tokens too, as if each token were
            decoded. For training and measuring on the residuals that speculation brings about.

    Reference:
        arXiv:2603.19289, speculative execution.
    """

    in_prefill: bool = False

    def applies(self, num_tokens: int, *, is_prefill: bool = False) -> bool:
        """Tell whether a forward of so many tokens speculates."""
        return self.in_prefill or (num_tokens == 1 and not is_prefill)


@dataclass(frozen=True, slots=True)
class SpeculateWhen:
    """The true router decides, but does without what is missing while that carries little weight.

    Per layer of a single-token forward, routed experts that are neither in memory nor arriving are
    dropped, the lightest first, as long as they carry no more than 1 - `confidence` of the routing
    weight. The best of the experts that are in memory take their places. Prompts and forwards of
    several tokens are exact, and at least one expert of the router's choice is always executed.

    Attributes:
        confidence: Share of the routing weight that must be executed as routed; 1 is exact.
    """

    confidence: float = 0.9

    @property
    def most_lost(self) -> float:
        """Give the share of the routing weight that may be dropped."""
        return min(1 - self.confidence, 1 - _LEAST_KEPT)

    def applies(self, num_tokens: int, *, is_prefill: bool = False) -> bool:
        """Tell whether a forward of so many tokens may do without experts."""
        return num_tokens == 1 and not is_prefill and self.confidence < 1

    def drop(
        self, experts: Sequence[int], weights: Sequence[float], is_here: Callable[[int], bool]
    ) -> list[int]:
        """Name the routed experts to do without.

        Args:
            experts: The token's routed experts.
            weights: Their routing weights.
            is_here: Whether an expert is in memory or arriving.
        """
        allowed = self.most_lost * math.fsum(weights)
        if allowed <= 0:
            return []
        carried: dict[int, float] = {}  # some routers name an expert twice
        for expert, weight in zip(experts, weights, strict=True):
            carried[expert] = carried.get(expert, 0.0) + weight
        lost, dropped = 0.0, []
        for expert, weight in sorted(carried.items(), key=lambda pair: (pair[1], pair[0])):
            if is_here(expert):
                continue
            lost += weight
            if lost > allowed:
                break
            dropped.append(expert)
        return dropped

    def substitute(
        self,
        taken: Sequence[int],
        num_places: int,
        scores: Sequence[float],
        is_here: Callable[[int], bool],
    ) -> list[int]:
        """Name the best experts in memory for the places that became free.

        Args:
            taken: Experts that are routed, dropped ones included.
            num_places: Places to fill.
            scores: The router's score of every expert of the layer, the larger the better.
            is_here: Whether an expert is in memory.
        """
        routed = set(taken)
        others = (e for e in range(len(scores)) if e not in routed and is_here(e))
        return sorted(others, key=lambda expert: -scores[expert])[:num_places]


ExecutionPolicy = Exact | Speculate | SpeculateWhen
