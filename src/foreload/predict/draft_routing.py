"""The draft's own routing, kept until the target comes to the same tokens.

Drafting a token shows which experts the quantised model routed it to, in every layer. The target
routes nearly the same way, so this is knowledge of the future. Holds it and sums it up; moves
nothing. Torch-free.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["DraftRouting", "LookaheadBuffer"]


class DraftRouting(NamedTuple):
    """Where the draft sent one token at one layer: `experts` (K,) and their `weights` (K,)."""

    experts: tuple[int, ...]
    weights: tuple[float, ...]


class LookaheadBuffer:
    """The routing of every drafted token of one round, by token and layer.

    Args:
        num_layers: MoE layers.

    Attributes:
        num_tokens: Tokens that were drafted to their end.

    Reference:
        Wang et al. 2025, "MoE-SpeQ", arXiv:2511.14102, the Expert Lookahead Buffer.
    """

    def __init__(self, num_layers: int) -> None:
        self.num_tokens = 0
        self._rows: list[dict[int, DraftRouting]] = [{}]
        self._uses: list[dict[int, float]] = [{} for _ in range(num_layers)]

    def note(
        self, layer: int, experts: Sequence[int], weights: Sequence[float], chance: float
    ) -> None:
        """Add the routing of the token being drafted.

        Args:
            layer: MoE layer.
            experts: Its experts at that layer.
            weights: Their routing weights.
            chance: Probability that the target's text comes to this token.
        """
        self._rows[-1][layer] = DraftRouting(tuple(experts), tuple(weights))
        uses = self._uses[layer]
        for expert in set(experts):
            uses[expert] = uses.get(expert, 0.0) + chance

    def end_token(self) -> None:
        """Go on to the next token."""
        self.num_tokens += 1
        self._rows.append({})

    def uses(self, layer: int) -> dict[int, float]:
        """Give, by expert, how many drafted tokens want it at a layer, weighted by their chance."""
        return self._uses[layer]

    def routing(self, token: int, layer: int) -> DraftRouting | None:
        """Give where a drafted token was sent at a layer; None where it never came there."""
        return self._rows[token].get(layer) if token < len(self._rows) else None
