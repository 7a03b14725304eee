"""The host tier between disk and device: experts that were read once, kept while there is room.

A cache of pieces in page-locked blocks, least recently used first out. Every byte on its way to
the device passes through it, so it is the staging memory too, however small. Thread-safe; knows
nothing of slots, priorities or devices.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from foreload.errors import CapacityError, ForeloadError
from foreload.memory import cuda
from foreload.memory.arena import SlotArena
from foreload.memory.disk import DiskBackend

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch
    from torch import Tensor

    from foreload.types import ExpertPlan

__all__ = ["HeldPiece", "HostTier"]


class HeldPiece(NamedTuple):
    """A piece in host memory: where in its expert it begins, in bytes, and its bytes (n,) uint8."""

    start: int
    content: Tensor


class HostTier:
    """Blocks of host memory, each one expert large, over the checkpoint.

    Args:
        num_bytes: What it may take; it has as many blocks as fit.
        block_bytes: Bytes of a block, any expert's `memory.arena.slot_bytes`.
        device: The CUDA device that copies from it; None where there is none.
        reader: Makes what reads experts into the blocks.

    Attributes:
        num_blocks: Experts it has room for.
        disk_bytes: Bytes given that had to be read for it.
        host_bytes: Bytes given that were there.

    Raises:
        CapacityError: There is no room for one expert, or the system refused the memory.
    """

    def __init__(
        self,
        num_bytes: int,
        block_bytes: int,
        *,
        device: torch.device | None = None,
        reader: Callable[[SlotArena], DiskBackend] = DiskBackend,
    ) -> None:
        self.num_blocks = num_bytes // block_bytes
        if self.num_blocks < 1:
            raise CapacityError(
                "the host tier has no room for one expert",
                needed_bytes=block_bytes,
                available_bytes=max(num_bytes, 0),
                setting="host_memory",
            )
        self.disk_bytes = 0
        self.host_bytes = 0
        self._arena = SlotArena(self.num_blocks, block_bytes)
        self._locked: tuple[int, torch.device] | None = None
        if device is not None:
            address = self._arena.block(0).data_ptr()
            cuda.page_lock(address, self._arena.num_bytes, device)
            self._locked = address, device
        self._reader = reader(self._arena)
        # By the identity of its plan, least recently used first; a block keeps its plan alive.
        self._blocks: dict[int, _Block] = {}
        self._free = list(range(self.num_blocks - 1, -1, -1))
        self._is_closed = False
        self._changed = threading.Condition()

    @property
    def num_bytes(self) -> int:
        """Give the bytes of all blocks."""
        return self._arena.num_bytes

    def num_pieces(self, plan: ExpertPlan) -> int:
        """Give in how many pieces an expert is read."""
        return self._reader.num_pieces(plan)

    @contextmanager
    def hold(self, plan: ExpertPlan, piece: int) -> Iterator[HeldPiece]:
        """Give a piece of an expert, read first if it is not there; it stays until the block ends.

        Blocks while every block is held by others, or while another thread reads this piece.

        Raises:
            TransferError: It could not be read; nobody will find it here.
            ForeloadError: The tier was closed.
        """
        start, stop = self._reader.piece_range(plan, piece)
        block = self._take(plan)
        try:
            self._bring(block, piece, stop - start)
            yield HeldPiece(start, self._arena.block(block.index)[start:stop])
        finally:
            self._let_go(block)

    def close(self) -> None:
        """Wait for what is held, give the memory back and close the files; may be called twice."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not any(b.num_holders for b in self._blocks.values()))
            self._blocks.clear()
            locked, self._locked = self._locked, None
        if locked is not None:
            cuda.page_unlock(*locked)
        self._arena.release()
        self._reader.close()

    def _take(self, plan: ExpertPlan) -> _Block:
        """Hold an expert's block, an empty one if it has none."""
        key = id(plan)
        with self._changed:
            while not self._is_closed:
                block = self._blocks.pop(key, None) or self._make_block(plan)
                if block is not None:
                    # Most recently used: last in line.
                    self._blocks[key] = block
                    block.num_holders += 1
                    return block
                self._changed.wait()
        raise ForeloadError("the host tier is closed", hint="open a new engine")

    def _make_block(self, plan: ExpertPlan) -> _Block | None:
        """Find room for an expert; None while every block is held."""
        if self._free:
            return _Block(plan, self._free.pop())
        for key, block in self._blocks.items():
            if not block.num_holders:
                del self._blocks[key]
                return _Block(plan, block.index)
        return None

    def _bring(self, block: _Block, piece: int, num_bytes: int) -> None:
        """Read a piece into its block, unless it is there or another thread reads it."""
        with self._changed:
            # The reader holds this very block, so it waits for nobody.
            self._changed.wait_for(lambda: piece not in block.being_read)
            if piece in block.present:
                self.host_bytes += num_bytes
                return
            block.being_read.add(piece)
        is_read = False
        try:
            self._reader.copy_piece(block.plan, block.index, piece)
            is_read = True
        finally:
            with self._changed:
                block.being_read.remove(piece)
                if is_read:
                    block.present.add(piece)
                    self.disk_bytes += num_bytes
                self._changed.notify_all()

    def _let_go(self, block: _Block) -> None:
        with self._changed:
            block.num_holders -= 1
            if block.num_holders:
                return
            if not block.present:
                # Nothing could be read: it is as good as none.
                del self._blocks[id(block.plan)]
                self._free.append(block.index)
            self._changed.notify_all()


class _Block:
    """Who is in a block, which pieces of it are there, and how many threads count on that."""

    __slots__ = ("being_read", "index", "num_holders", "plan", "present")

    def __init__(self, plan: ExpertPlan, index: int) -> None:
        self.plan = plan
        self.index = index
        self.num_holders = 0
        self.present: set[int] = set()
        self.being_read: set[int] = set()
