"""Do without light experts that are in no slot: `schedule.policy.SpeculateWhen` in tensors.

The same rule as there, so that a device can follow it without asking the host. For one token.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch

from foreload.types import Routing

if TYPE_CHECKING:
    from torch import Tensor

    from foreload.ops.scores import LayerScores

__all__ = ["choose_present"]


def choose_present(
    true: Routing,
    slot_of: Tensor,
    pairs: Tensor,
    *,
    most_lost: float,
    rule: LayerScores | None = None,
    logits: Tensor | None = None,
) -> Routing:
    """Replace light experts that are missing by the best that are there.

    Missing experts are dropped, the lightest first, as long as they carry no more than `most_lost`
    of the weight. Where `rule` and `logits` tell what their router would give them, the best of
    the others that are there take the places, in no particular order.

    Args:
        true: The router's choice, (1, K) each; indices of E and above stand for no expert.
        slot_of: (E,) integers, negative for experts of the layer that are in no slot.
        pairs: (2,) int64, changed in place: pairs of token and expert that were routed, and those
            of them that were dropped, are added.
        most_lost: Share of the routing weight that may be dropped, below 1.
        rule: How the router makes weights of logits, or None.
        logits: (1, E) the router's logits; of any other shape they are not used.

    Returns:
        Whom to execute, (1, K) each, with E and no weight in places that stay empty. Bit for bit
        what the host's rule gives, the order of experts aside.

    Cost:
        Some 50 operations on up to K * K or E numbers in double precision, no host sync; on a GPU
        one kernel (`ops.triton_present`).
    """
    num_experts = len(slot_of)
    weights = true.top_k_weights[0].double()
    # Placeholders are at E, and never missing.
    experts = true.top_k_index[0].long().clamp(max=num_experts)
    here = torch.cat([slot_of >= 0, torch.ones_like(slot_of[:1], dtype=torch.bool)])
    is_dropped = _find_dropped(experts, weights, ~here[experts], most_lost)
    pairs[0] += len(experts)
    pairs[1] += is_dropped.sum()
    index = experts.masked_fill(is_dropped, num_experts)
    kept = weights.masked_fill(is_dropped, 0)
    if rule is not None and logits is not None and logits.shape == (1, num_experts):
        scores = rule.rule.log_scores(logits[0]).exp().double()
        index, kept = _fill(index, kept, experts, is_dropped, here, scores)
    if rule is None or rule.is_normalised:
        # Where nothing was dropped the weights stay as they are, even if there is none to share.
        kept = kept * torch.where(is_dropped.any(), weights.sum() / kept.sum(), 1.0)
    dtypes = true.top_k_index.dtype, true.top_k_weights.dtype
    return Routing(index[None].to(dtypes[0]), kept[None].to(dtypes[1]))


def _find_dropped(experts: Tensor, weights: Tensor, is_missing: Tensor, most_lost: float) -> Tensor:
    """Tell which of a token's experts to do without, (K,) bool."""
    same = experts[:, None] == experts  # (K, K); some routers name an expert twice
    carried = (same * weights).sum(-1)
    is_again = same.tril(-1).any(-1)
    row = carried[:, None]
    goes_before = (carried < row) | ((carried == row) & (experts <= experts[:, None]))
    lost = (goes_before & is_missing & ~is_again).mul(carried).sum(-1)
    allowed = most_lost * weights.sum()
    return is_missing & (lost <= allowed) & (allowed > 0)


def _fill(
    index: Tensor,
    kept: Tensor,
    experts: Tensor,
    is_dropped: Tensor,
    here: Tensor,
    scores: Tensor,
) -> tuple[Tensor, Tensor]:
    """Give the places of the dropped to the best experts that are there and not routed."""
    num_experts = len(scores)
    is_free = here.index_fill(0, experts, False)[:num_experts]
    best, other = scores.masked_fill(~is_free, -1).sort(descending=True, stable=True)
    # Of an expert that is named twice one place alone is free.
    is_place = is_dropped & ~(experts[:, None] == experts).tril(-1).any(-1)
    number = (is_place.cumsum(0) - 1).clamp(min=0)
    best, other = best[number], other[number]
    # In the router's own unit: the weight its heaviest kept expert got.
    real = kept.masked_fill(index >= num_experts, 0)
    heaviest = real.argmax(0, keepdim=True)
    score = scores[index[heaviest].clamp(max=num_experts - 1)]
    unit = real[heaviest] / score.clamp(min=sys.float_info.min)
    is_filled = is_place & (best >= 0) & (unit > 0)
    return torch.where(is_filled, other, index), torch.where(is_filled, best * unit, kept)
