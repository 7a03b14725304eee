"""`ops.present` as one Triton kernel: fifty small operations in every layer would be felt.

Needs the `triton` extra.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch

from foreload.errors import MissingExtraError

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise MissingExtraError("triton", "triton") from error

from foreload.types import Routing

if TYPE_CHECKING:
    from torch import Tensor

    from foreload.ops.scores import LayerScores

__all__ = ["choose_among_present", "choose_present"]


def choose_present(
    true: Routing,
    slot_of: Tensor,
    pairs: Tensor,
    *,
    most_lost: float,
    rule: LayerScores | None = None,
    logits: Tensor | None = None,
) -> Routing:
    """Replace light experts that are missing; as `ops.present.choose_present`.

    Cost:
        One program, beside what makes scores of logits. No host sync.
    """
    index, weights = (values.contiguous() for values in true)
    num_experts, top_k = len(slot_of), index.shape[1]
    scores = None
    if rule is not None and logits is not None and logits.shape == (1, num_experts):
        scores = rule.rule.log_scores(logits[0]).exp()
    found = Routing(torch.empty_like(index), torch.empty_like(weights))
    choose_among_present[(1,)](
        index,
        weights,
        slot_of,
        weights if scores is None else scores,
        pairs,
        *found,
        top_k,
        num_experts,
        MOST_LOST=most_lost,
        LEAST_SCORE=sys.float_info.min,
        HAS_SCORES=scores is not None,
        IS_NORMALISED=rule is None or rule.is_normalised,
        BLOCK_K=triton.next_power_of_2(top_k),
        BLOCK_E=triton.next_power_of_2(num_experts),
        num_warps=1,
    )
    return found


@triton.jit
def choose_among_present(
    ids,
    weights,
    slot_of,
    scores,
    pairs,
    chosen_ids,
    chosen_weights,
    top_k,
    num_experts,
    MOST_LOST: tl.constexpr,
    LEAST_SCORE: tl.constexpr,
    HAS_SCORES: tl.constexpr,
    IS_NORMALISED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """One program: the experts that one token executes.

    Everything about a place stands twice, along rows and along columns of a matrix of pairs.
    """
    place = tl.arange(0, BLOCK_K)
    row, column = place[:, None], place[None, :]
    is_place = place < top_k
    expert = tl.load(ids + place, mask=is_place, other=-1).to(tl.int32)
    weight = tl.load(weights + place, mask=is_place, other=0).to(tl.float64)
    is_real = is_place & (expert < num_experts)
    slot = tl.load(slot_of + expert, mask=is_real, other=0)
    is_missing = slot < 0
    same = expert[:, None] == expert[None, :]
    carried = tl.sum(tl.where(same, weight[None, :], 0.0), 1)
    carried_across = tl.sum(tl.where(same, weight[:, None], 0.0), 0)
    is_again = tl.sum((same & (column < row)).to(tl.int32), 1) > 0
    is_again_across = tl.sum((same & (row < column)).to(tl.int32), 0) > 0

    is_lighter = carried_across[None, :] < carried[:, None]
    is_equal = carried_across[None, :] == carried[:, None]
    goes_before = is_lighter | (is_equal & (expert[None, :] <= expert[:, None]))
    goes_before = goes_before & is_missing[None, :] & ~is_again_across[None, :]
    lost = tl.sum(tl.where(goes_before, carried_across[None, :], 0.0), 1)
    total = tl.sum(weight, 0)
    allowed = total * tl.full([BLOCK_K], MOST_LOST, tl.float64)
    is_dropped = is_missing & (lost <= allowed) & (allowed > 0)
    num_dropped = tl.sum(is_dropped.to(tl.int32), 0)
    tl.store(pairs, tl.load(pairs) + top_k)
    tl.store(pairs + 1, tl.load(pairs + 1) + num_dropped)

    index = tl.where(is_dropped, num_experts, expert)
    kept = tl.where(is_dropped, 0.0, weight)
    if HAS_SCORES:
        # In the router's own unit: the weight its heaviest kept expert got.
        real = tl.where(is_real, kept, 0.0)
        most = tl.max(real, 0)
        heaviest = tl.min(tl.where(is_place & (real == most), place, BLOCK_K), 0)
        pivot = tl.sum(tl.where(place == heaviest, index, 0), 0)
        score = tl.load(scores + pivot, mask=pivot < num_experts, other=0).to(tl.float64)
        least = tl.full([BLOCK_K], LEAST_SCORE, tl.float64)
        unit = most / tl.maximum(score, least)

        other = tl.arange(0, BLOCK_E)
        is_other = other < num_experts
        is_free = tl.load(slot_of + other, mask=is_other, other=-1) >= 0
        is_routed = tl.sum((other[:, None] == expert[None, :]).to(tl.int32), 1) > 0
        own = tl.load(scores + other, mask=is_other, other=0).to(tl.float64)
        left = tl.where(is_free & ~is_routed, own, -1.0)
        is_vacant = is_dropped & ~is_again
        number = tl.cumsum(is_vacant.to(tl.int32), 0) - 1
        for turn in range(BLOCK_K):
            best = tl.max(left, 0)
            found = tl.min(tl.where(left == best, other, BLOCK_E), 0)
            given = best * unit
            # Nobody is left where the best is negative, and there is no unit where it is zero.
            is_filled = is_vacant & (number == turn) & (given >= 0) & (unit > 0)
            index = tl.where(is_filled, found, index)
            kept = tl.where(is_filled, given, kept)
            left = tl.where(other == found, -1.0, left)
    if IS_NORMALISED:
        # Where nothing was dropped the weights stay as they are, even if there is none to share.
        remaining = tl.sum(kept, 0)
        is_shared = (num_dropped > 0) & (remaining > 0)
        share = tl.where(is_shared, total / tl.where(is_shared, remaining, 1.0), 1.0)
        kept = kept * share
    tl.store(chosen_ids + place, index, mask=is_place)
    tl.store(chosen_weights + place, kept.to(tl.float32), mask=is_place)
