"""What one expert computes, in plain torch: the truth every faster version is compared with.

The arithmetic, and its order, is that of transformers' eager experts, so results agree bit for
bit on the CPU. Weights come as arguments; the experts module only says how they are laid out.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

__all__ = ["ExpertGroup", "SumRule", "accumulate", "expert_forward", "group_by_expert"]


class ExpertGroup(NamedTuple):
    """The tokens one expert serves: rows `token` (n,), their place `position` (n,) in the top-k."""

    expert: int
    token: Tensor
    position: Tensor


def group_by_expert(top_k_index: Tensor, num_experts: int) -> list[ExpertGroup]:
    """Group tokens by expert, in ascending expert order.

    Args:
        top_k_index: (T, K) int64. Indices of `num_experts` and above are placeholders of expert
            parallelism and stand for no expert.
        num_experts: Experts of the layer.

    Returns:
        One group per distinct expert; inside it rows are ordered by position, then by token, as
        transformers' eager experts order them.
    """
    num_tokens, top_k = top_k_index.shape
    if num_tokens == 1:
        ids = top_k_index[0].tolist()
        zero = top_k_index.new_zeros(1)
        if len(set(ids)) == top_k:
            order = sorted((e, k) for k, e in enumerate(ids) if e < num_experts)
            return [ExpertGroup(e, zero, zero + k) for e, k in order]
    # Stable sort of the (K, T) view: by expert, then position, then token.
    flat = top_k_index.t().reshape(-1)
    experts, order_of = torch.sort(flat, stable=True)
    distinct, counts = torch.unique_consecutive(experts, return_counts=True)
    groups = []
    chunks = torch.split(order_of, counts.tolist())
    for expert, chunk in zip(distinct.tolist(), chunks, strict=True):
        if expert < num_experts:
            groups.append(ExpertGroup(expert, chunk % num_tokens, chunk // num_tokens))
    return groups


def expert_forward(experts: Any, hidden_states: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """Run one expert.

    Args:
        experts: transformers' experts module: layout flags, gate and activation, no weights.
        hidden_states: (n, H) rows routed to this expert.
        weights: The expert's parameters by name: `gate_up_proj` (2I, H) or `up_proj` (I, H),
            `down_proj` (H, I), transposed where the module says so, and `*_bias`.

    Returns:
        (n, H), not yet multiplied by the routing weights.

    Cost:
        6 * n * H * I FLOP gated, 4 * n * H * I ungated; every weight is read once.
    """
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    hidden = _linear(hidden_states, weights[first], experts.is_transposed)
    if experts.has_bias:
        hidden = hidden + weights[f"{first}_bias"]
    hidden = experts._apply_gate(hidden) if experts.has_gate else experts.act_fn(hidden)
    hidden = _linear(hidden, weights["down_proj"], experts.is_transposed)
    if experts.has_bias:
        hidden = hidden + weights["down_proj_bias"]
    if getattr(experts, "has_post_expert_norm", False):
        hidden = experts.post_expert_norm(hidden)
    return hidden


class SumRule(Enum):
    """The element type in which expert outputs are summed; architectures differ."""

    HIDDEN = "that of the hidden states"
    WEIGHTS = "that of the routing weights"
    FLOAT32 = "float32"


def accumulate(
    hidden_states: Tensor,
    weights_dtype: torch.dtype,
    groups: list[ExpertGroup],
    outputs: Mapping[int, Tensor],
    rule: SumRule = SumRule.HIDDEN,
) -> Tensor:
    """Sum weighted expert outputs per token, in ascending expert order whatever order they came in.

    Args:
        hidden_states: (T, H), for shape and dtype.
        weights_dtype: Element type of the routing weights.
        groups: The tokens of each expert, ascending.
        outputs: (n, H) per expert, already weighted.
        rule: The element type to sum in.

    Returns:
        (T, H) in the hidden states' dtype.
    """
    dtype = {
        SumRule.HIDDEN: hidden_states.dtype,
        SumRule.WEIGHTS: weights_dtype,
        SumRule.FLOAT32: torch.float32,
    }[rule]
    total = torch.zeros_like(hidden_states, dtype=dtype)
    for group in groups:
        output = outputs[group.expert].to(dtype)
        if total.shape[0] == 1 and output.shape[0] == 1:
            total += output
        else:
            total.index_add_(0, group.token, output)
    return total.to(hidden_states.dtype)


def _linear(hidden: Tensor, weight: Tensor, is_transposed: bool) -> Tensor:
    return hidden @ weight if is_transposed else F.linear(hidden, weight)
