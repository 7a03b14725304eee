"""Turn what a router answered early into a guess: experts in order, with their confidence.

Knows no predictor; every one that asks routers ranks their answers here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from foreload.types import Prediction, Routing

if TYPE_CHECKING:
    from foreload.types import RouterOutput

__all__ = ["make_prediction", "rank_experts"]

_SURELY_CHOSEN = 1.0
_LEAST = 1e-3


def make_prediction(output: RouterOutput, layer: int, distance: int, num_extra: int) -> Prediction:
    """Make a guess about `layer` of its router's early answer.

    Args:
        output: The answer; with weights, the guess can be executed.
        layer: MoE layer the guess is about.
        distance: MoE layers ahead.
        num_extra: Experts to name beyond those the answer demands.
    """
    weights = output.top_k_weights
    routing = None if weights is None else Routing(output.top_k_index, weights)
    return Prediction(layer, distance, *rank_experts(output, num_extra), routing)


def rank_experts(
    output: RouterOutput, num_extra: int
) -> tuple[tuple[int, ...], tuple[float, ...], int]:
    """Rank experts by how likely a layer wants them.

    For one token: the router's own choice first, then the best of the rest. Confidence is the
    distance of an expert's logit from the line between chosen and not, in standard deviations of
    the logits. For several tokens: by the share of tokens that choose an expert.

    Returns:
        The ranked experts, their confidence, and how many would be demanded if the guess held.
    """
    index = output.top_k_index.reshape(-1, output.top_k_index.shape[-1])
    if index.shape[0] > 1:
        experts, counts = torch.unique(index, return_counts=True)
        order = torch.argsort(counts, descending=True, stable=True)
        shares = (counts[order] / index.shape[0]).tolist()
        return tuple(experts[order].tolist()), tuple(shares), len(shares)
    chosen = index[0].tolist()
    if output.logits is None:
        return tuple(chosen), (_SURELY_CHOSEN,) * len(chosen), len(chosen)
    logits = output.logits.reshape(-1).float()
    scores = ((logits - logits.mean()) / (logits.std() + 1e-9)).tolist()
    picked = set(chosen)
    chosen.sort(key=lambda expert: -scores[expert])
    rest = sorted((e for e in range(len(scores)) if e not in picked), key=lambda e: -scores[e])
    line = (scores[chosen[-1]] + scores[rest[0]]) / 2 if rest else scores[chosen[-1]]
    ranked = chosen + rest[:num_extra]
    # Routers with groups or biases do not choose by logit alone: the sign follows their choice.
    confidence = [
        max(scores[e] - line, _LEAST) if e in picked else min(scores[e] - line, -_LEAST)
        for e in ranked
    ]
    return tuple(ranked), tuple(confidence), len(chosen)
