"""How a router turns logits into the weights of its experts, found out from its own answers.

Needed where an expert the router did not choose is to get the weight the router would have given
it, and where two routers' distributions are compared.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LayerScores", "ScoreRule", "find_scores"]

_TOLERANCE = 0.01
"""Relative; routing weights in bfloat16 are off by up to 0.4 %."""


class ScoreRule(Enum):
    """What an expert's weight is proportional to, within one token."""

    SOFTMAX = "the exponential of its logit"
    SIGMOID = "the sigmoid of its logit"
    SQRT_SOFTPLUS = "the root of the softplus of its logit"
    GIVEN = "what the router gives as its logit"

    def log_scores(self, logits: Tensor) -> Tensor:
        """Give the logarithms of the scores, (T, E) float32; differentiable."""
        logits = logits.float()
        match self:
            case ScoreRule.SOFTMAX:
                return F.log_softmax(logits, -1)
            case ScoreRule.SIGMOID:
                return F.logsigmoid(logits)
            case ScoreRule.SQRT_SOFTPLUS:
                return 0.5 * torch.log(F.softplus(logits))
            case ScoreRule.GIVEN:
                return torch.log(logits.clamp(min=torch.finfo(torch.float32).tiny))


class LayerScores(NamedTuple):
    """How one router makes weights of logits.

    `is_normalised` tells whether a token's weights add up to the same for every token.
    """

    rule: ScoreRule
    is_normalised: bool

    def scores(self, logits: Tensor) -> list[float]:
        """Give every expert's score, proportional to the weight it would get; `logits` (E,)."""
        values: list[float] = self.rule.log_scores(logits).exp().tolist()
        return values


def find_scores(logits: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> LayerScores | None:
    """Find the rule that explains a router's weights best; None where none explains them.

    Args:
        logits: (T, E) what the router gives as logits, T of at least 2.
        top_k_index: (T, K) its choice.
        top_k_weights: (T, K) its weights.
    """
    weights = top_k_weights.float()
    num_tokens, top_k = top_k_index.shape
    is_telling = num_tokens > 1 and top_k > 1 and bool((weights > 0).all())
    if not is_telling or int(top_k_index.max()) >= logits.shape[-1]:
        return None
    deviation = {}
    for rule in ScoreRule:
        if rule is ScoreRule.GIVEN and bool((logits < 0).any()):
            continue
        scores = rule.log_scores(logits).gather(-1, top_k_index).exp()
        # (T, K), constant within a token where the rule holds
        deviation[rule] = _deviation(scores / weights)
    best = min(deviation, key=lambda rule: deviation[rule])
    if not deviation[best] < _TOLERANCE:
        return None
    return LayerScores(best, is_normalised=_deviation(weights.sum(-1)) < _TOLERANCE)


def _deviation(values: Tensor) -> float:
    """Give how far values are at most from their mean along the last dimension, as its share."""
    share = values / values.mean(-1, keepdim=True) - 1
    return float(share.abs().max().nan_to_num(torch.inf))
