"""One aligned block of memory, cut into equal slots, allocated once.

Owns the bytes and nothing else: who is in which slot is the cache's business.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from typing import TYPE_CHECKING

import torch

from foreload.errors import CapacityError, ForeloadError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from foreload.types import ExpertPlan

__all__ = ["ALIGNMENT", "SlotArena", "slot_bytes", "span_positions", "view_expert"]

ALIGNMENT = 4096
"""Bytes; direct reads want file offset, length and address to be multiples of it."""


def span_positions(plan: ExpertPlan) -> list[tuple[int, int, int]]:
    """Lay a direct plan's spans out in a slot, each as aligned as it is in its file.

    Returns:
        Per span: position in the slot of the aligned read, file offset of that read, its length.
    """
    positions = []
    at = 0
    for span in plan.spans:
        first = span.offset // ALIGNMENT * ALIGNMENT
        last = math.ceil((span.offset + span.num_bytes) / ALIGNMENT) * ALIGNMENT
        positions.append((at, first, last - first))
        at += last - first
    return positions


def tensor_positions(plan: ExpertPlan) -> list[int]:
    """Give where each tensor of a plan begins in its slot, in bytes."""
    if plan.convert is None:
        spans = span_positions(plan)
        return [
            spans[tensor.span][0] + plan.spans[tensor.span].offset % ALIGNMENT + tensor.start
            for tensor in plan.tensors
        ]
    positions = []
    at = 0
    for tensor in plan.tensors:
        positions.append(at)
        at += math.ceil(tensor.num_bytes / 64) * 64
    return positions


def slot_bytes(plan: ExpertPlan) -> int:
    """Give the bytes a slot needs for this plan, a multiple of the alignment."""
    if plan.convert is None:
        at, _, length = span_positions(plan)[-1]
        return at + length
    used = tensor_positions(plan)[-1] + plan.tensors[-1].num_bytes
    return math.ceil(used / ALIGNMENT) * ALIGNMENT


def view_expert(block: torch.Tensor, plan: ExpertPlan) -> dict[str, torch.Tensor]:
    """View a slot's bytes as the parameters of the expert that `plan` brought there.

    Args:
        block: (slot bytes,) uint8, on any device.
        plan: How the expert was brought.
    """
    views = {}
    for tensor, start in zip(plan.tensors, tensor_positions(plan), strict=True):
        raw = block[start : start + tensor.num_bytes]
        views[tensor.name] = raw.view(getattr(torch, tensor.dtype)).view(tensor.shape)
    return views


class SlotArena:
    """Equal slots in one anonymous mapping; pages become resident when first written.

    Args:
        num_slots: Number of slots.
        slot_bytes: Bytes of each, a multiple of `ALIGNMENT`.

    Raises:
        CapacityError: The system refused the mapping.
    """

    def __init__(self, num_slots: int, slot_bytes: int) -> None:
        self.num_slots = num_slots
        self.slot_bytes = slot_bytes
        try:
            self._map = mmap.mmap(-1, num_slots * slot_bytes, flags=mmap.MAP_PRIVATE)
        except (OSError, ValueError) as error:
            raise CapacityError(
                f"the system refused memory for {num_slots} expert slots ({error})",
                needed_bytes=num_slots * slot_bytes,
                available_bytes=0,
                setting="expert_memory",
                hint="set expert_memory to less",
            ) from error
        if hasattr(mmap, "MADV_HUGEPAGE"):
            # Fewer pages for direct reads to pin: 6 instead of 3,072 for a 12 MB expert. Kernels
            # built without huge pages refuse the wish, and nothing is lost.
            with contextlib.suppress(OSError):
                self._map.madvise(mmap.MADV_HUGEPAGE)
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)

    @property
    def num_bytes(self) -> int:
        """Give the size of the whole arena."""
        return self.num_slots * self.slot_bytes

    def buffer(self, slot: int) -> memoryview:
        """Give a slot's bytes as a writable buffer for reads."""
        start = slot * self.slot_bytes
        return memoryview(self._map)[start : start + self.slot_bytes]

    def block(self, slot: int) -> torch.Tensor:
        """View a slot's bytes, (slot_bytes,) uint8.

        Raises:
            ForeloadError: The memory was released.
        """
        if not len(self._bytes):
            raise ForeloadError("the expert memory is closed", hint="open a new engine")
        start = slot * self.slot_bytes
        return self._bytes[start : start + self.slot_bytes]

    def tensors(self, slot: int, plan: ExpertPlan) -> dict[str, torch.Tensor]:
        """View a slot as the parameters of the expert that `plan` brought there.

        Raises:
            ForeloadError: The memory was released.
        """
        return view_expert(self.block(slot), plan)

    def before_reads(self) -> None:
        """Do nothing: the processor has read what it was asked to read."""

    def before_write(self, slot: int) -> None:
        """Do nothing, as above."""

    def write(self, slot: int, plan: ExpertPlan, values: Mapping[str, torch.Tensor]) -> None:
        """Copy converted parameters into a slot."""
        # Memory that was made in inference mode can be written to only there, on any thread.
        with torch.inference_mode():
            for name, view in self.tensors(slot, plan).items():
                view.copy_(values[name])

    def release(self) -> None:
        """Give the memory back once the last view of it is gone: until then all stay readable."""
        self._bytes = torch.empty(0, dtype=torch.uint8)
        # Closing would take it from views in use: torch does not tell the mapping that it has some.
        self._map = mmap.mmap(-1, 1)

    def poison(self) -> None:
        """Fill with NaN patterns, so that reading what was never written shows."""
        self._bytes.fill_(0xFF)
