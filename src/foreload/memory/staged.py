"""Copies experts from disk to a device by way of host memory: the third tier's backend.

    disk -> a block of the host tier -> a slot on the device

Knows nothing of queues, priorities or caches. Thread-safe: each copying thread has a stream of its
own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from foreload.memory.device_slots import DeviceSlots
    from foreload.memory.host_tier import HostTier
    from foreload.types import ExpertPlan

__all__ = ["StagedBackend"]


class StagedBackend:
    """Fills slots on a device from the host tier, which reads what it does not have.

    Args:
        slots: Where the experts go.
        host: Where they pass through; closed with the backend.
    """

    def __init__(self, slots: DeviceSlots, host: HostTier) -> None:
        self._slots = slots
        self._host = host

    @property
    def host_bytes(self) -> int:
        """Give the bytes copied so far that no disk was asked for."""
        return self._host.host_bytes

    def num_pieces(self, plan: ExpertPlan) -> int:
        """Give how many pieces a copy takes."""
        return self._host.num_pieces(plan)

    def copy_piece(self, plan: ExpertPlan, slot: int, piece: int) -> int:
        """Copy one piece of an expert into its slot; return when it is there.

        Returns:
            Bytes copied to the device.

        Raises:
            TransferError: It had to be read, and could not be.
        """
        # The block is held until the device has its bytes: nobody overwrites what is being copied.
        with self._host.hold(plan, piece) as held:
            self._slots.fill(slot, held.start, held.content)
            return len(held.content)

    def close(self) -> None:
        """Release the host tier."""
        self._host.close()
