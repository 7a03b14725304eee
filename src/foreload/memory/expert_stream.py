"""Experts brought from host memory one after the other, through a few blocks on the device.

For inputs that want more experts than there are slots: nothing is kept, and copies run ahead of
the computation by as many blocks as there are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from foreload.memory.cuda import SideStream

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["ExpertStream"]


class ExpertStream:
    """A ring of blocks on the device.

    Args:
        host: (L, E, block bytes) uint8, every expert; page-locked where the device is a CUDA one.
        device: Where the experts are wanted.
        num_blocks: Blocks of the ring, at least 2: one in use, the others on their way.
    """

    def __init__(self, host: torch.Tensor, device: torch.device, *, num_blocks: int = 4) -> None:
        if num_blocks < 2:
            raise ValueError(f"{num_blocks} blocks: one in use and one on its way are the least")
        self._host = host
        self._side = SideStream(device)
        self._ring = torch.empty((num_blocks, host.shape[2]), dtype=torch.uint8, device=device)

    @property
    def num_bytes(self) -> int:
        """Give the bytes of the ring."""
        return self._ring.numel()

    def bring(self, layer: int, experts: Sequence[int]) -> Iterator[torch.Tensor]:
        """Bring experts of a layer; each block is valid until the next one is asked for.

        Args:
            layer: MoE layer.
            experts: Whom, in the order they are wanted in.

        Yields:
            (block bytes,) uint8 on the device.

        Cost:
            One copy of each block over the bus.
        """
        num_blocks = len(self._ring)
        marks = []

        def begin(place: int) -> None:
            # Behind all computation asked for so far, that on the block to be overwritten included.
            with self._side.forked():
                block = self._ring[place % num_blocks]
                block.copy_(self._host[layer, experts[place]], non_blocking=True)
            marks.append(self._side.mark())

        ahead = num_blocks - 1
        for place in range(min(ahead, len(experts))):
            begin(place)
        for place in range(len(experts)):
            if place + ahead < len(experts):
                begin(place + ahead)
            self._side.join(marks[place])
            yield self._ring[place % num_blocks]
