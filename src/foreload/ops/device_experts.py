"""The experts of every MoE layer from slots on the device that manage themselves.

What to fetch and where to is decided where the routing is, on the device: with kernels a step
never waits for the host, and can be captured whole. Without, the twins below do the same slowly.
Streams are the caller's business, and so are long inputs, which read slots and fill empty ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from foreload.errors import ForeloadError, ShapeError
from foreload.ops.device_layout import unpack_expert
from foreload.ops.device_tables import ABSENT, assign_prefetch, assign_slots, make_tables
from foreload.ops.grouped import send_numbers
from foreload.ops.reference import accumulate, expert_forward, group_by_expert

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from foreload.ops.device_layout import ExpertLayout
    from foreload.ops.device_tables import Counters, DeviceTables, WorkList
    from foreload.ops.grouped import Chunk
    from foreload.ops.reference import SumRule
    from foreload.types import Routing

__all__ = [
    "MAX_TOKENS",
    "DeviceExperts",
    "ExpertKernels",
    "LayerMemory",
    "ResidentExperts",
    "TwinKernels",
]

MAX_TOKENS = 16
"""Tokens that one step may have: a tile of the kernels. Longer inputs want every expert anyway."""

_UNWRITTEN = 0xFF
"""Every bit set is a NaN in every floating type: reading what was never written shows."""


class LayerMemory(NamedTuple):
    """Where the experts of one layer are.

    Attributes:
        layout: How each lies in its block.
        slots: (S, block bytes) uint8 on the device.
        host: (E, block bytes) uint8 in host memory.
        host_address: The same as the device addresses it.
        sum_rule: The element type that outputs are summed in.
    """

    layout: ExpertLayout
    slots: Tensor
    host: Tensor
    host_address: int
    sum_rule: SumRule


class ExpertKernels(Protocol):
    """What a step is made of; `TwinKernels` says what each computes."""

    def assign_slots(
        self, tables: DeviceTables, layer: int, top_k_index: Tensor, *, num_experts: int
    ) -> WorkList:
        """As `ops.device_tables.assign_slots`."""

    def assign_prefetch(
        self,
        tables: DeviceTables,
        layer: int,
        predicted_index: Tensor,
        *,
        max_fetches: int,
    ) -> WorkList:
        """As `ops.device_tables.assign_prefetch`."""

    def forward(
        self,
        memory: LayerMemory,
        work: WorkList,
        experts: Any,
        hidden_states: Tensor,
        routing: Routing,
    ) -> Tensor:
        """Fetch what missed, compute, and sum over the top-k, (T, H)."""

    def fetch(self, memory: LayerMemory, work: WorkList) -> None:
        """Copy the blocks of a work list's misses to their slots, of those that have one."""


class TwinKernels:
    """The kernels in plain torch: same results, any device, waiting for it all the time."""

    def assign_slots(
        self, tables: DeviceTables, layer: int, top_k_index: Tensor, *, num_experts: int
    ) -> WorkList:
        """Give wanted experts their slots."""
        return assign_slots(tables, layer, top_k_index, num_experts=num_experts)

    def assign_prefetch(
        self,
        tables: DeviceTables,
        layer: int,
        predicted_index: Tensor,
        *,
        max_fetches: int,
    ) -> WorkList:
        """Make room for guessed experts."""
        return assign_prefetch(tables, layer, predicted_index, max_fetches=max_fetches)

    def forward(
        self,
        memory: LayerMemory,
        work: WorkList,
        experts: Any,
        hidden_states: Tensor,
        routing: Routing,
    ) -> Tensor:
        """Fetch what missed, compute, and sum over the top-k, as the reference does it."""
        self.fetch(memory, work)
        slot_of = dict(zip(work.expert.tolist(), work.slot.tolist(), strict=True))

        def block_of(expert: int) -> Tensor:
            slot = slot_of[expert]
            if slot == ABSENT:
                return memory.host[expert].to(memory.slots.device)
            return memory.slots[slot]

        return _sum_experts(memory, experts, hidden_states, routing, block_of)

    def fetch(self, memory: LayerMemory, work: WorkList) -> None:
        """Copy the blocks of a work list's misses to their slots, of those that have one."""
        columns = (work.expert.tolist(), work.slot.tolist(), work.is_hit.tolist())
        for expert, slot, is_hit in zip(*columns, strict=True):
            if slot != ABSENT and not is_hit:
                memory.slots[slot].copy_(memory.host[expert])


class DeviceExperts:
    """Owns the slots of every MoE layer and runs experts from them.

    Args:
        layouts: How the experts of each MoE layer lie in their blocks.
        host: (L, E, block bytes) uint8, every expert of the model; page-locked where kernels read
            it over the bus.
        num_slots: Slots of each layer, at least one; they need not be equal.
        sum_rules: Per layer, the element type that expert outputs are summed in.
        device: Where the slots are.
        kernels: What computes; the twins by default.
        host_address: Where the device sees `host`; by default where the processor does.
        max_prefetches: Most experts that one `prefetch` brings.

    Attributes:
        num_bytes: Bytes of all slots.
        tables: Who is in which slot; `tables.read_counters()` tells hits and misses.

    Raises:
        ShapeError: `host` does not fit the layouts.
        ValueError: A layer has no slots.
    """

    def __init__(
        self,
        layouts: Sequence[ExpertLayout],
        host: Tensor,
        *,
        num_slots: Sequence[int],
        sum_rules: Sequence[SumRule],
        device: torch.device | str,
        kernels: ExpertKernels | None = None,
        host_address: int | None = None,
        max_prefetches: int = 8,
    ) -> None:
        block_bytes = max(layout.num_bytes for layout in layouts)
        if host.dtype != torch.uint8 or host.ndim != 3 or not host.is_contiguous():
            raise ShapeError(
                "experts in host memory are (layers, experts, bytes) of uint8 in a row"
            )
        if len({len(layouts), host.shape[0], len(num_slots), len(sum_rules)}) != 1:
            raise ShapeError(
                f"{len(layouts)} layouts, {len(sum_rules)} sum rules and {len(num_slots)} numbers "
                f"of slots for {host.shape[0]} layers in host memory"
            )
        if host.shape[2] < block_bytes:
            raise ShapeError(f"a block has {block_bytes} bytes, in host memory {host.shape[2]}")
        self._kernels: ExpertKernels = kernels or TwinKernels()
        self._max_prefetches = max_prefetches
        self._slots = torch.empty((sum(num_slots), host.shape[2]), dtype=torch.uint8, device=device)
        self.num_bytes = self._slots.numel()
        address = host.data_ptr() if host_address is None else host_address
        self._layers = list(
            zip(
                layouts,
                host,
                (address + layer * host[0].numel() for layer in range(len(host))),
                sum_rules,
                strict=True,
            )
        )
        self.divide(num_slots)

    def divide(self, num_slots: Sequence[int]) -> None:
        """Divide the slots anew over the layers, all of them empty and nothing counted.

        Tables and addresses are others afterwards: what was captured must not be replayed, and the
        device must have nothing left to do with the slots.

        Args:
            num_slots: Slots of each layer, no more in all than there are.

        Raises:
            ShapeError: There are more.
            ValueError: A layer has no slots.
        """
        spare = len(self._slots) - sum(num_slots)
        if len(num_slots) != len(self._layers) or spare < 0:
            raise ShapeError(f"{list(num_slots)} slots per layer, of {len(self._slots)} slots")
        num_experts = self._layers[0][1].shape[0]
        self.tables = make_tables(num_slots, num_experts, self._slots.device)
        self._slots.fill_(_UNWRITTEN)
        parts = torch.split(self._slots, [*num_slots, spare])
        self._memory = [
            LayerMemory(layout, slots, host, address, rule)
            for slots, (layout, host, address, rule) in zip(parts, self._layers, strict=False)
        ]

    def run(self, layer: int, experts: Any, hidden_states: Tensor, routing: Routing) -> Tensor:
        """Compute one MoE layer, fetching the experts that are in no slot.

        Args:
            layer: MoE layer.
            experts: transformers' experts module: layout flags, gate and activation, no weights.
            hidden_states: (T, H), T up to `MAX_TOKENS`.
            routing: Final; indices of `experts.num_experts` and above stand for no expert.

        Returns:
            (T, H); with the twins bit for bit what `ops.reference` gives.

        Raises:
            ValueError: More tokens than a step may have.

        Cost:
            Every expert wanted is read once, from its slot or over the bus; what there is no slot
            for is not kept. Kernels never wait for the host.
        """
        num_tokens = hidden_states.shape[0]
        if num_tokens > MAX_TOKENS:
            raise ValueError(f"a step of {num_tokens} tokens; the most are {MAX_TOKENS}")
        work = self._kernels.assign_slots(
            self.tables, layer, routing.top_k_index, num_experts=experts.num_experts
        )
        return self._kernels.forward(self.memory(layer), work, experts, hidden_states, routing)

    def prefetch(self, layer: int, predicted_index: Tensor, *, most: int | None = None) -> None:
        """Bring experts that the next visit of a layer is expected to want.

        Must be over before that visit's `run` begins, and begin after the last one's has ended:
        on a stream of its own, fork and join.

        Args:
            layer: The MoE layer that is coming.
            predicted_index: (T, N) expert ids, likeliest first in each row; negative ones stand for
                no expert.
            most: Most experts to bring, in place of the number for all prefetches.
        """
        work = self._kernels.assign_prefetch(
            self.tables,
            layer,
            predicted_index,
            max_fetches=self._max_prefetches if most is None else most,
        )
        self._kernels.fetch(self.memory(layer), work)

    def memory(self, layer: int) -> LayerMemory:
        """Give where a layer's experts are; who is in which slot is said by `tables`.

        Raises:
            ForeloadError: The memory was released.
        """
        if not self._memory:
            raise ForeloadError("the expert memory is closed", hint="open a new engine")
        return self._memory[layer]

    def visit(self, layer: int, last_index: Tensor, is_wanted: Tensor, *, num_experts: int) -> None:
        """Note that a long input visits a layer: slots serve its last token as they do a step's.

        What the other tokens want is counted as hits and misses, and left where it is.

        Args:
            layer: MoE layer.
            last_index: (1, K) the last token's experts, which are in slots afterwards.
            is_wanted: (E,) whether any token wants an expert.
            num_experts: Experts of this layer.

        Cost:
            The last token's missing experts come over the bus. Kernels never wait for the host.
        """
        tables = self.tables
        work = self._kernels.assign_slots(tables, layer, last_index, num_experts=num_experts)
        self._kernels.fetch(self.memory(layer), work)
        others = torch.zeros_like(tables.slot_of[layer], dtype=torch.bool)
        others[:num_experts] = is_wanted
        last = torch.arange(len(others), device=others.device)[:, None] == last_index
        others &= ~last.any(1)
        is_in = tables.slot_of[layer] >= 0
        held = tables.expert_of[layer].long()
        is_hit = (held >= 0) & others[held.clamp(min=0)]
        used = tables.is_fresh[layer] * is_hit
        tables.is_fresh[layer] -= used
        hits, misses = (others & is_in).sum(), (others & ~is_in).sum()
        tables.counters[layer] += torch.stack((hits, misses, torch.zeros_like(hits), used.sum()))

    def hold(self, layer: int, chunk: Chunk, slots: Mapping[int, int]) -> None:
        """Copy experts that are on the device anyway to empty slots, as the stalest there.

        Args:
            layer: MoE layer.
            chunk: Where they are.
            slots: Empty slots, by expert.
        """
        place_of = dict(zip(chunk.experts, chunk.places, strict=True))
        for expert, slot in slots.items():
            self.memory(layer).slots[slot].copy_(chunk.blocks[place_of[expert]])
        numbers = send_numbers([list(slots), list(slots.values())], self._slots.device)
        # Only now: whoever is said to be in a slot is there.
        self.tables.slot_of[layer].index_copy_(0, numbers[0], numbers[1].int())
        self.tables.expert_of[layer].index_copy_(0, numbers[1], numbers[0].int())
        self.tables.stamp[layer].index_fill_(0, numbers[1], 0)

    def read_counters(self) -> list[Counters]:
        """Read hits, misses and prefetches of every layer; waits for the device."""
        return self.tables.read_counters()

    def release(self) -> None:
        """Let go of slots and host memory; nothing can run afterwards. May be called twice.

        The device must have nothing left to do with either.
        """
        self._slots = self._slots.new_empty((0, self._slots.shape[1]))
        self._layers, self._memory = [], []


class ResidentExperts:
    """Runs experts all of which lie on the device for good: every one is a hit.

    Args:
        layouts: How the experts of each MoE layer lie in their blocks.
        blocks: (L, E, block bytes) uint8 on the device, every expert of the model.
        sum_rules: Per layer, the element type that expert outputs are summed in.
        kernels: What computes; the twins by default.

    Raises:
        ShapeError: `blocks` does not fit the layouts.
    """

    def __init__(
        self,
        layouts: Sequence[ExpertLayout],
        blocks: Tensor,
        *,
        sum_rules: Sequence[SumRule],
        kernels: ExpertKernels | None = None,
    ) -> None:
        block_bytes = max(layout.num_bytes for layout in layouts)
        if blocks.ndim != 3 or len(blocks) != len(layouts) or blocks.shape[2] < block_bytes:
            raise ShapeError(f"blocks of {tuple(blocks.shape)} for {len(layouts)} layers")
        num_layers, num_experts, _ = blocks.shape
        tables = make_tables([num_experts] * num_layers, num_experts, blocks.device)
        tables.slot_of.copy_(torch.arange(num_experts))
        tables.expert_of.copy_(torch.arange(num_experts))
        tables.stamp.zero_()
        self._tables = tables
        self._kernels: ExpertKernels = kernels or TwinKernels()
        # Nothing is fetched: an expert's block is its slot.
        self._memory = [
            LayerMemory(layout, block, block, block.data_ptr(), rule)
            for layout, block, rule in zip(layouts, blocks, sum_rules, strict=True)
        ]

    def run(self, layer: int, experts: Any, hidden_states: Tensor, routing: Routing) -> Tensor:
        """Compute one MoE layer; arguments and result as for `DeviceExperts.run`."""
        work = self._kernels.assign_slots(
            self._tables, layer, routing.top_k_index, num_experts=experts.num_experts
        )
        return self._kernels.forward(self._memory[layer], work, experts, hidden_states, routing)


def _sum_experts(
    memory: LayerMemory,
    experts: Any,
    hidden_states: Tensor,
    routing: Routing,
    block_of: Callable[[int], Tensor],
) -> Tensor:
    """Run each expert from its block, ascending, and sum."""
    index, weights = routing
    groups = group_by_expert(index, experts.num_experts)
    outputs = {}
    for group in groups:
        parameters = unpack_expert(memory.layout, block_of(group.expert))
        output = expert_forward(experts, hidden_states[group.token], parameters)
        outputs[group.expert] = output * weights[group.token, group.position, None]
    return accumulate(hidden_states, weights.dtype, groups, outputs, memory.sum_rule)
