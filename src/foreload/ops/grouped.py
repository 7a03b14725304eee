"""A layer's experts for inputs of many tokens, computed as their blocks come to the device.

Tokens are sorted by expert; experts come in chunks, in any order, and each is computed once for
all its tokens. Plain torch: the truth that `ops.triton_grouped` is held to. Where blocks come from
is the caller's business.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from foreload.ops.device_layout import unpack_expert
from foreload.ops.reference import accumulate, expert_forward, group_by_expert

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from foreload.ops.device_experts import LayerMemory
    from foreload.types import Routing

__all__ = ["Chunk", "GroupedKernels", "SortedPairs", "TwinGrouped", "send_numbers", "sort_pairs"]


class Chunk(NamedTuple):
    """Experts that are on the device at the same time.

    Attributes:
        experts: Who they are.
        blocks: (N, block bytes) uint8 on the device.
        places: The row of `blocks` that each of them is in.
    """

    experts: Sequence[int]
    blocks: Tensor
    places: Sequence[int]


class SortedPairs(NamedTuple):
    """Pairs of token and expert, those of an expert next to each other.

    Attributes:
        order: (T * K,) int64, pairs as `token * K + position`, by expert.
        starts: (E + 1,) where each expert's pairs begin, and where the last one's end: on the host.
            What comes after them stands for no expert.
    """

    order: Tensor
    starts: Sequence[int]


class GroupedKernels(Protocol):
    """What computes long inputs; `TwinGrouped` says what."""

    def forward(
        self,
        memory: LayerMemory,
        pairs: SortedPairs,
        chunks: Iterable[Chunk],
        experts: Any,
        hidden_states: Tensor,
        routing: Routing,
    ) -> Tensor:
        """Compute every wanted expert, each chunk before the next is asked for, and sum, (T, H)."""


class TwinGrouped:
    """The kernels in plain torch: same results, any device, expert by expert."""

    def forward(
        self,
        memory: LayerMemory,
        pairs: SortedPairs,
        chunks: Iterable[Chunk],
        experts: Any,
        hidden_states: Tensor,
        routing: Routing,
    ) -> Tensor:
        """Compute every wanted expert, and sum.

        Args:
            memory: Layout and sum rule of the layer.
            pairs: The routing, sorted.
            chunks: Every wanted expert once. A chunk's blocks are valid until the next chunk is
                asked for; what reads them has been asked for by then.
            experts: transformers' experts module.
            hidden_states: (T, H), any T.
            routing: Final; indices of `experts.num_experts` and above stand for no expert.

        Returns:
            (T, H), bit for bit what `ops.reference` gives.
        """
        index, weights = routing
        groups = group_by_expert(index, experts.num_experts)
        group_of = {group.expert: group for group in groups}
        outputs = {}
        for chunk in chunks:
            for expert, place in zip(chunk.experts, chunk.places, strict=True):
                group = group_of[expert]
                parameters = unpack_expert(memory.layout, chunk.blocks[place])
                output = expert_forward(experts, hidden_states[group.token], parameters)
                outputs[expert] = output * weights[group.token, group.position, None]
        return accumulate(hidden_states, weights.dtype, groups, outputs, memory.sum_rule)


def sort_pairs(top_k_index: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Sort pairs of token and expert by expert, without asking for a value.

    Args:
        top_k_index: (T, K) int64; `num_experts` and above stand for no expert.
        num_experts: E.

    Returns:
        What `SortedPairs` has, both on the device: (T * K,) and (E + 1,) int64.
    """
    experts, order = torch.sort(top_k_index.flatten(), stable=True)
    bounds = torch.arange(num_experts + 1, dtype=experts.dtype, device=experts.device)
    return order, torch.searchsorted(experts, bounds)


def send_numbers(values: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Send a table of numbers to a device, int64, behind what it was asked to do; never waits."""
    is_far = device.type != "cpu"
    table = torch.tensor(values, dtype=torch.int64, pin_memory=is_far)
    return table.to(device, non_blocking=is_far)
