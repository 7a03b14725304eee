"""Equal slots in a device's memory, for experts that the host decides about.

The counterpart of the arena in host memory. Owns the bytes and the order of reads and writes on
them; who is in which slot is the cache's business.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from foreload.errors import CapacityError, ForeloadError
from foreload.memory import cuda
from foreload.memory.arena import view_expert

if TYPE_CHECKING:
    from foreload.types import ExpertPlan

__all__ = ["DeviceSlots"]


class DeviceSlots:
    """Slots on one device, allocated once, filled from host memory.

    Args:
        num_slots: Number of slots.
        slot_bytes: Bytes of each.
        device: Where they lie; the CPU is one, for tests.

    Raises:
        CapacityError: The device has less memory.
    """

    def __init__(self, num_slots: int, slot_bytes: int, device: torch.device) -> None:
        self.num_slots = num_slots
        self.slot_bytes = slot_bytes
        self._device = device
        try:
            self._bytes = torch.empty(num_slots * slot_bytes, dtype=torch.uint8, device=device)
        except RuntimeError as error:
            raise CapacityError(
                f"the device refused memory for {num_slots} expert slots ({error})",
                needed_bytes=num_slots * slot_bytes,
                available_bytes=0,
                setting="expert_memory",
                hint="set expert_memory to less",
            ) from error
        self._streams = cuda.CopyStreams(device)
        # By slot: what was asked to read it before it was given away. Written by the compute
        # thread before the slot's copy is queued, read by the threads that copy.
        self._reads: list[cuda.ReadMark] = [None] * num_slots

    def block(self, slot: int) -> torch.Tensor:
        """View a slot's bytes, (slot_bytes,) uint8 on the device.

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
        """Order what will be asked to read slots behind what was asked before."""
        self._streams.order_reads()

    def before_write(self, slot: int) -> None:
        """Let coming copies into a slot wait for what has been asked to read it."""
        self._reads[slot] = self._streams.mark_reads()

    def fill(self, slot: int, start: int, source: torch.Tensor) -> None:
        """Copy into a slot, and return when the bytes are there; for any thread.

        Args:
            slot: The slot.
            start: Where in it, in bytes.
            source: (n,) uint8 in host memory, page-locked where the device is a CUDA one.
        """
        # Memory that was made in inference mode can be written to only there, on any thread.
        with torch.inference_mode():
            target = self.block(slot)[start : start + len(source)]
            self._streams.copy(target, source, self._reads[slot])

    def release(self) -> None:
        """Give the memory back once the last view of it is gone; may be called twice."""
        # Another stream than the one it was allocated on may be reading it still.
        cuda.wait_idle(self._device)
        self._bytes = torch.empty(0, dtype=torch.uint8)
