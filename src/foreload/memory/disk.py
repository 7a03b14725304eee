"""Reads experts from checkpoint files into slots, piece by piece.

Bypasses the page cache (O_DIRECT) where the filesystem lets it, reads buffered where not. Knows
nothing of queues, priorities or caches. Thread-safe: each worker brings its own scratch memory.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from typing import TYPE_CHECKING

import torch

from foreload.errors import TransferError
from foreload.memory.arena import ALIGNMENT, slot_bytes, span_positions
from foreload.memory.checkpoint import read_stamp

if TYPE_CHECKING:
    from collections.abc import Callable

    from foreload.memory.arena import SlotArena
    from foreload.types import ExpertPlan, Span

    Preadv = Callable[[int, list[memoryview], int], int]

__all__ = ["DiskBackend"]

_NO_DIRECT = (errno.EINVAL, errno.EOPNOTSUPP)


class DiskBackend:
    """Copies experts from safetensors files into the slots of an arena.

    Args:
        arena: Where the experts go.
        piece_bytes: Largest single read; between pieces a copy can be overtaken or cancelled.
        preadv: `os.preadv`, or a stand-in that fails on purpose (tests).
    """

    def __init__(
        self,
        arena: SlotArena,
        *,
        piece_bytes: int = 2 << 20,
        preadv: Preadv = os.preadv,
    ) -> None:
        self._arena = arena
        self._piece_bytes = piece_bytes
        self._preadv = preadv
        self._files: dict[str, _File] = {}
        self._replaced: list[_File] = []
        self._lock = threading.Lock()
        self._local = threading.local()

    def num_pieces(self, plan: ExpertPlan) -> int:
        """Give how many pieces a copy takes; converted experts come in one."""
        if plan.convert is not None:
            return 1
        return sum(-(-length // self._piece_bytes) for _, _, length in span_positions(plan))

    def copy_piece(self, plan: ExpertPlan, slot: int, piece: int) -> int:
        """Read one piece of an expert into its slot.

        Returns:
            Bytes read from the disk.

        Raises:
            TransferError: The file vanished, ended early, is no longer the one that was planned
                from, or the disk answered with an error.
        """
        if plan.convert is not None:
            return self._copy_converted(plan, slot)
        span, at, first, size = self._locate(plan, piece)
        needed = min(size, span.offset + span.num_bytes - first)
        self._read(span, self._arena.buffer(slot)[at : at + size], first, needed)
        return size

    def piece_range(self, plan: ExpertPlan, piece: int) -> tuple[int, int]:
        """Give where in its slot a piece lies: its first byte, and the one behind its last."""
        if plan.convert is not None:
            return 0, slot_bytes(plan)
        _, at, _, size = self._locate(plan, piece)
        return at, at + size

    def close(self) -> None:
        """Close the files; a later copy opens them again."""
        with self._lock:
            for file in (*self._files.values(), *self._replaced):
                os.close(file.descriptor)
            self._files.clear()
            self._replaced.clear()

    def _locate(self, plan: ExpertPlan, piece: int) -> tuple[Span, int, int, int]:
        """Give a piece's span, place in the slot, offset in the file, and bytes."""
        for span, (at, first, length) in zip(plan.spans, span_positions(plan), strict=True):
            pieces = -(-length // self._piece_bytes)
            if piece < pieces:
                start = piece * self._piece_bytes
                return span, at + start, first + start, min(self._piece_bytes, length - start)
            piece -= pieces
        raise IndexError(piece)

    def _copy_converted(self, plan: ExpertPlan, slot: int) -> int:
        if plan.convert is None:
            raise TransferError("the expert needs no conversion")
        positions = span_positions(plan)
        scratch = self._scratch(sum(length for _, _, length in positions))
        raw = []
        for span, (at, first, length) in zip(plan.spans, positions, strict=True):
            skip = span.offset - first
            self._read(span, scratch[at : at + length], first, skip + span.num_bytes)
            view = scratch[at + skip : at + skip + span.num_bytes]
            raw.append(torch.frombuffer(view, dtype=torch.uint8))
        self._arena.write(slot, plan, plan.convert(raw))
        return sum(length for _, _, length in positions)

    def _scratch(self, num_bytes: int) -> memoryview:
        """Give this thread's scratch memory, page-aligned, grown when needed."""
        held: mmap.mmap | None = getattr(self._local, "scratch", None)
        if held is None or len(held) < num_bytes:
            held = self._local.scratch = mmap.mmap(-1, num_bytes)
        return memoryview(held)

    def _read(self, span: Span, view: memoryview, offset: int, needed: int) -> None:
        path = span.path
        file = self._open(path)
        got = 0
        try:
            while got < needed:
                count = self._preadv(file.descriptor, [view[got:]], offset + got)
                got += count
                # A direct read may stop short only at the end of the file.
                if count == 0 or (got < needed and got % ALIGNMENT and file.is_direct):
                    break
            # After the read: writing sets a file's time before its bytes.
            stamp = read_stamp(file.descriptor)
        except OSError as error:
            if error.errno in _NO_DIRECT and file.is_direct:
                self._reopen_buffered(path)
                self._read(span, view, offset, needed)
                return
            raise TransferError(
                f"reading {needed:,} bytes at {offset:,} of {path} failed: {error.strerror}",
                hint="check the disk; the engine stays usable and will try again when asked",
            ) from error
        if got < needed:
            raise TransferError(
                f"{path} ended early: {needed:,} bytes wanted at {offset:,}, {got:,} read",
                hint="the file was truncated or is still being written; restore it, and open the "
                "model again",
            )
        if span.stamp is not None and stamp != span.stamp:
            raise TransferError(
                f"{path} was changed after the model was opened: its bytes are no longer known to "
                "be experts of that model",
                hint="restore the file if it was damaged, and open the model again; a new version "
                "of a checkpoint belongs in a folder of its own",
            )

    def _open(self, path: str) -> _File:
        file = self._files.get(path)
        if file is not None:
            return file
        with self._lock:
            if path not in self._files:
                self._files[path] = _open_file(path)
            return self._files[path]

    def _reopen_buffered(self, path: str) -> None:
        with self._lock:
            if self._files[path].is_direct:
                # Other threads may be reading from the direct one: it is closed with the rest.
                self._replaced.append(self._files[path])
                self._files[path] = _open_file(path, direct=False)


class _File:
    __slots__ = ("descriptor", "is_direct")

    def __init__(self, descriptor: int, is_direct: bool) -> None:
        self.descriptor = descriptor
        self.is_direct = is_direct


def _open_file(path: str, *, direct: bool = True) -> _File:
    try:
        if direct and hasattr(os, "O_DIRECT"):
            try:
                return _File(os.open(path, os.O_RDONLY | os.O_DIRECT), True)
            except OSError as error:
                if error.errno not in _NO_DIRECT:
                    raise
        return _File(os.open(path, os.O_RDONLY), False)
    except OSError as error:
        raise TransferError(
            f"cannot open {path}: {error.strerror}",
            hint="the checkpoint must stay where it was while the engine runs",
        ) from error
