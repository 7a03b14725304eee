"""Experts brought from host memory in chunks, through a double buffer on the device.

For inputs that want more experts than there are slots. While one chunk is computed the next is on
its way, from one layer to the next where the next is known to want everything. Nothing is kept.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from foreload.memory.cuda import SideStream
from foreload.ops.grouped import Chunk

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["ExpertStream"]


class _Travel(NamedTuple):
    """A chunk on its way."""

    layer: int
    chunk: Chunk
    mark: Any


class ExpertStream:
    """Two buffers on the device that take turns.

    Args:
        host: (L, E, block bytes) uint8, every expert; page-locked where the device is a CUDA one.
        device: Where the experts are wanted.
        chunk_blocks: Blocks of each buffer.

    Attributes:
        num_unused: Blocks that were sent ahead and not wanted.

    Raises:
        ValueError: A buffer has no block.
    """

    def __init__(self, host: torch.Tensor, device: torch.device, *, chunk_blocks: int) -> None:
        if chunk_blocks < 1:
            raise ValueError(f"{chunk_blocks} blocks: a chunk has one at least")
        self.num_unused = 0
        self._host = host
        self._side = SideStream(device)
        shape = (2, chunk_blocks, host.shape[2])
        self._buffers = torch.empty(shape, dtype=torch.uint8, device=device)
        self._turn = 0
        self._ahead: _Travel | None = None

    @property
    def num_bytes(self) -> int:
        """Give the bytes of both buffers."""
        return self._buffers.numel()

    def bring(
        self,
        layer: int,
        experts: Sequence[int],
        *,
        then: tuple[int, Sequence[int]] | None = None,
    ) -> Iterator[Chunk]:
        """Bring experts of a layer, and begin at once.

        Args:
            layer: MoE layer.
            experts: Whom, in the order they are wanted in.
            then: Another layer, the next to ask, and experts it will want: as many as a buffer
                takes are sent ahead.

        Returns:
            Chunks of them; each is valid until the next one is asked for.

        Cost:
            One copy of each block over the bus.
        """
        ahead, self._ahead = self._ahead, None
        travels: deque[_Travel] = deque()
        came: set[int] = set()
        if ahead is not None:
            kept = _only(ahead.chunk, set(experts) if ahead.layer == layer else set())
            self.num_unused += len(ahead.chunk.experts) - len(kept.experts)
            if kept.experts:
                travels.append(ahead._replace(chunk=kept))
                came.update(kept.experts)
        rest = [expert for expert in experts if expert not in came]
        size = self._buffers.shape[1]
        todo = deque((layer, rest[start : start + size]) for start in range(0, len(rest), size))
        if then is not None and then[1]:
            todo.append((then[0], list(then[1][:size])))
        while todo and len(travels) < 2:
            travels.append(self._begin(*todo.popleft()))
        return self._arrivals(layer, travels, todo)

    def release(self) -> None:
        """Let go of the buffers and of host memory; nothing can be brought afterwards.

        The device must have nothing left to do with either.
        """
        self._host = self._host.new_empty((0, 0, self._host.shape[2]))
        self._buffers = self._buffers.new_empty((2, 0, self._host.shape[2]))
        self._ahead = None

    def _arrivals(
        self, layer: int, travels: deque[_Travel], todo: deque[tuple[int, list[int]]]
    ) -> Iterator[Chunk]:
        while travels and travels[0].layer == layer:
            travel = travels.popleft()
            self._side.join(travel.mark)
            yield travel.chunk
            # What reads it has been asked for: its buffer is the next to be written to.
            if todo:
                travels.append(self._begin(*todo.popleft()))
        if travels:
            self._ahead = travels.popleft()

    def _begin(self, layer: int, experts: list[int]) -> _Travel:
        """Begin to copy a chunk, behind all computation asked for so far."""
        blocks = self._buffers[self._turn]
        self._turn = 1 - self._turn
        with self._side.forked():
            for place, first, count in _runs(experts):
                source = self._host[layer, first : first + count]
                blocks[place : place + count].copy_(source, non_blocking=True)
        return _Travel(layer, Chunk(experts, blocks, range(len(experts))), self._side.mark())


def _only(chunk: Chunk, experts: set[int]) -> Chunk:
    """Leave out whom nobody wants."""
    pairs = [
        (expert, place)
        for expert, place in zip(chunk.experts, chunk.places, strict=True)
        if expert in experts
    ]
    return Chunk([expert for expert, _ in pairs], chunk.blocks, [place for _, place in pairs])


def _runs(experts: list[int]) -> Iterator[tuple[int, int, int]]:
    """Give (place, first expert, count) of experts that follow each other: one copy each."""
    start = 0
    for place in range(1, len(experts) + 1):
        if place == len(experts) or experts[place] != experts[place - 1] + 1:
            yield start, experts[start], place - start
            start = place
