"""A long input at one MoE layer: more experts are wanted than there are slots.

Those in slots are read there; the others are streamed past the slots in chunks, each computed while
the next one travels. The host is told once per layer who is wanted and who is where. What the last
token wanted is in slots afterwards, and slots that were empty are filled from what came by.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from foreload.ops.grouped import Chunk, SortedPairs, sort_pairs
from foreload.trace.layer_slots import RECENT_TOKENS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from foreload.memory.expert_stream import ExpertStream
    from foreload.metrics import Metrics
    from foreload.ops.device_experts import DeviceExperts
    from foreload.ops.grouped import GroupedKernels
    from foreload.types import Routing

__all__ = ["DevicePrefill"]

_AHEAD_SHARE = 0.9
"""Share of a layer's experts from which on the next layer is taken to want all of its own."""


class _Plan(NamedTuple):
    """Where a layer's wanted experts come from, and where they stay.

    Attributes:
        pairs: The routing, sorted.
        slot_of: The slot of every expert, negative without.
        residents: Wanted experts in slots, ascending.
        missing: The other wanted ones, ascending.
        stay: Slots for some of the missing ones.
        then: The next layer's experts that are in no slot, where it will want them all.
    """

    pairs: SortedPairs
    slot_of: list[int]
    residents: list[int]
    missing: list[int]
    stay: dict[int, int]
    then: tuple[int, list[int]] | None


class DevicePrefill:
    """Runs MoE layers for long inputs.

    Args:
        experts: The slots.
        stream: Brings experts past the slots.
        kernels: What computes them.
        block_bytes: Bytes that travel per expert.
        metrics: Where copies in vain are counted; lookups are counted with the slots.
    """

    def __init__(
        self,
        experts: DeviceExperts,
        stream: ExpertStream,
        kernels: GroupedKernels,
        *,
        block_bytes: int,
        metrics: Metrics,
    ) -> None:
        self._experts = experts
        self._stream = stream
        self._kernels = kernels
        self._block_bytes = block_bytes
        self._metrics = metrics

    def run(self, layer: int, experts: Any, hidden_states: Tensor, routing: Routing) -> Tensor:
        """Compute one MoE layer.

        Args:
            layer: MoE layer; nothing else may be changing its slots.
            experts: transformers' experts module.
            hidden_states: (T, H), any T.
            routing: Final; indices of `experts.num_experts` and above stand for no expert.

        Returns:
            (T, H); with the twins bit for bit what the host's loop gives.

        Cost:
            One host sync. Every wanted expert that is in no slot travels once.
        """
        index = routing.top_k_index
        num_experts = experts.num_experts
        order, starts = sort_pairs(index, num_experts)
        # A visit like any other to the last token: what comes next resembles it more than nothing.
        self._experts.visit(layer, index[-1:], starts[1:] > starts[:-1], num_experts=num_experts)
        plan = self._make_plan(layer, index, order, starts)
        return self._kernels.forward(
            self._experts.memory(layer),
            plan.pairs,
            self._chunks(layer, plan),
            experts,
            hidden_states,
            routing,
        )

    def _make_plan(self, layer: int, index: Tensor, order: Tensor, starts: Tensor) -> _Plan:
        """Ask the device who is wanted and who is where, and decide; the one sync."""
        tables = self._experts.tables
        num_experts = len(starts) - 1
        following = min(layer + 1, len(tables.num_slots) - 1)
        last = index[-RECENT_TOKENS:].flatten().clamp(max=num_experts)
        recent = torch.zeros_like(starts).index_add_(0, last, torch.ones_like(last))
        asked = (starts, recent, tables.slot_of[layer], tables.slot_of[following])
        told = iter(torch.cat(asked).tolist())
        begin, wanted_by, slot_of, next_slot_of = (
            list(itertools.islice(told, len(part))) for part in asked
        )

        counts = [end - start for start, end in itertools.pairwise(begin)]
        wanted = [expert for expert, count in enumerate(counts) if count]
        missing = [expert for expert in wanted if slot_of[expert] < 0]
        empty = sorted(set(range(tables.num_slots[layer])) - set(slot_of))
        ranked = sorted(missing, key=lambda expert: (-wanted_by[expert], -counts[expert]))
        then = None
        if following > layer and len(wanted) >= _AHEAD_SHARE * num_experts:
            then = following, [e for e in range(num_experts) if next_slot_of[e] < 0]
        return _Plan(
            SortedPairs(order, begin),
            slot_of,
            residents=[expert for expert in wanted if slot_of[expert] >= 0],
            missing=missing,
            # Of slots equally stale the lower ones are emptied first.
            stay=dict(zip(ranked, reversed(empty), strict=False)),
            then=then,
        )

    def _chunks(self, layer: int, plan: _Plan) -> Iterator[Chunk]:
        """Give every wanted expert once, those in slots while the first others travel."""
        unused = self._stream.num_unused
        arriving = self._stream.bring(layer, plan.missing, then=plan.then)
        unused = self._stream.num_unused - unused
        self._metrics.num_prefetched += unused
        self._metrics.prefetch_bytes += unused * self._block_bytes
        self._metrics.wasted_bytes += unused * self._block_bytes
        slots = self._experts.memory(layer).slots
        yield Chunk(plan.residents, slots, [plan.slot_of[expert] for expert in plan.residents])
        for chunk in arriving:
            yield chunk
            staying = {expert: plan.stay[expert] for expert in chunk.experts if expert in plan.stay}
            if staying:
                self._experts.hold(layer, chunk, staying)
