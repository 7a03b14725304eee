"""The host tier: all experts of a model in one block each, where a GPU can read them in place.

Filled once from the checkpoint, read only from then on. Owns bytes; who is where on the device is
not its business.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TYPE_CHECKING

import torch

from foreload.errors import CapacityError, ForeloadError
from foreload.memory import cuda
from foreload.memory.arena import ALIGNMENT, SlotArena, slot_bytes
from foreload.memory.available import available_bytes
from foreload.memory.disk import DiskBackend

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from foreload.memory.transfer import CopyBackend
    from foreload.types import ExpertPlan

    Pack = Callable[[int, Mapping[str, torch.Tensor], torch.Tensor], None]

__all__ = ["HostArena"]


class HostArena:
    """One block of equal size per expert, in one mapping.

    Args:
        num_layers: L.
        num_experts: E, the most experts in a layer.
        block_bytes: Bytes of a block, a multiple of the page size.
        limit_bytes: What it may take at most; None for what the machine has available.

    Raises:
        CapacityError: It is larger than that, or the system refused the mapping. Nothing has been
            allocated.
    """

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        block_bytes: int,
        *,
        limit_bytes: int | None = None,
    ) -> None:
        if min(num_layers, num_experts, block_bytes) < 1 or block_bytes % ALIGNMENT:
            raise ValueError(
                f"a host tier of {num_layers} x {num_experts} blocks of {block_bytes} bytes: they "
                f"must be multiples of {ALIGNMENT}"
            )
        self._shape = (num_layers, num_experts, block_bytes)
        self.num_bytes = num_layers * num_experts * block_bytes
        available = available_bytes()
        limit = available if limit_bytes is None else min(limit_bytes, available)
        if self.num_bytes > limit:
            raise CapacityError(
                f"the {num_layers} x {num_experts} experts do not fit into host memory",
                needed_bytes=self.num_bytes,
                available_bytes=limit,
                setting="host_memory",
            )
        try:
            self._map = mmap.mmap(-1, self.num_bytes, flags=mmap.MAP_PRIVATE)
        except (OSError, ValueError) as error:
            raise CapacityError(
                f"the system refused memory for the host tier ({error})",
                needed_bytes=self.num_bytes,
                available_bytes=limit,
                setting="host_memory",
            ) from error
        if hasattr(mmap, "MADV_HUGEPAGE"):
            # Fewer pages to lock, and fewer for the device to look up.
            with contextlib.suppress(OSError):
                self._map.madvise(mmap.MADV_HUGEPAGE)
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self._locked: list[tuple[int, torch.device]] = []

    @property
    def blocks(self) -> torch.Tensor:
        """View all blocks: (L, E, block_bytes) uint8, on the CPU.

        Raises:
            ForeloadError: The memory was released.
        """
        if not len(self._bytes):
            raise ForeloadError("the host tier is closed", hint="open a new engine")
        return self._bytes.view(self._shape)

    @property
    def is_page_locked(self) -> bool:
        """Tell whether CUDA devices can read the blocks in place."""
        return bool(self._locked)

    def fill(
        self,
        plans: Sequence[Sequence[ExpertPlan]],
        pack: Pack,
        *,
        num_workers: int = 8,
        progress: Callable[[int, int], None] | None = None,
        cpus: Collection[int] | None = None,
        backend: Callable[[SlotArena], CopyBackend] = DiskBackend,
    ) -> None:
        """Read every expert of the checkpoint into its block, several at once.

        Args:
            plans: How to read each expert, [layer][expert].
            pack: Writes an expert's parameters to its block, given its layer, the parameters by
                name and the block; called on several threads at once.
            num_workers: Experts read at once.
            progress: Called on this thread with (done, total) bytes of the checkpoint.
            cpus: Processors to read on: a page lies near the processor that first writes to it.
            backend: Reads the checkpoint.

        Raises:
            TransferError: A read failed.

        Cost:
            One read of all experts; each byte is copied once more, from scratch memory for
            `num_workers` experts to its place.
        """
        todo = [(layer, expert) for layer, row in enumerate(plans) for expert in range(len(row))]
        total = sum(plan.read_bytes for row in plans for plan in row)
        scratch = SlotArena(num_workers, max(slot_bytes(plan) for row in plans for plan in row))
        reader = backend(scratch)
        filler = _Filler(self.blocks, scratch, reader, plans, pack)
        done = 0
        pool = ThreadPoolExecutor(num_workers, initializer=_stay_on, initargs=(cpus,))
        try:
            reads = [pool.submit(filler.read, layer, expert) for layer, expert in todo]
            for finished in as_completed(reads):
                done += finished.result()
                if progress is not None:
                    progress(done, total)
        finally:
            # However this ends, nobody writes into the blocks afterwards.
            filler.stop()
            pool.shutdown(wait=True, cancel_futures=True)
            reader.close()
            scratch.release()

    def page_lock(self, device: torch.device) -> None:
        """Let CUDA devices read the blocks in place, layer by layer. CUDA only.

        Args:
            device: The one that will.

        Raises:
            CapacityError: The driver refused; nothing stays locked. What it names as available is
                what could be locked.
        """
        try:
            # One registration per layer: a copy may not reach across two.
            for layer in self.blocks:
                cuda.page_lock(layer.data_ptr(), layer.numel(), device)
                self._locked.append((layer.data_ptr(), device))
        except CapacityError as error:
            locked = len(self._locked) * (self.num_bytes // len(self.blocks))
            self._unlock()
            reason, _, _ = str(error).partition(": ")
            # The figures of the layer that was refused say little.
            raise CapacityError(
                reason,
                needed_bytes=self.num_bytes,
                available_bytes=locked,
                setting=error.setting,
                hint=error.hint,
            ) from error
        except BaseException:
            self._unlock()
            raise

    def release(self) -> None:
        """Unlock the memory, and give it back with the last view of it; may be called twice."""
        self._unlock()
        self._bytes = torch.empty(0, dtype=torch.uint8)
        # Views keep the mapping alive through the tensor they were made of.
        self._map = mmap.mmap(-1, 1)

    def _unlock(self) -> None:
        while self._locked:
            cuda.page_unlock(*self._locked.pop())


class _Filler:
    """Reads one expert at a time on each thread, through a scratch slot of that thread's own."""

    def __init__(
        self,
        blocks: torch.Tensor,
        scratch: SlotArena,
        reader: CopyBackend,
        plans: Sequence[Sequence[ExpertPlan]],
        pack: Pack,
    ) -> None:
        self._blocks = blocks
        self._scratch = scratch
        self._reader = reader
        self._plans = plans
        self._pack = pack
        self._free = list(range(scratch.num_slots))
        self._is_stopped = threading.Event()

    def stop(self) -> None:
        """Let reads under way end at their next piece."""
        self._is_stopped.set()

    def read(self, layer: int, expert: int) -> int:
        """Bring one expert; give the bytes read, 0 where it was called off."""
        slot = self._free.pop()
        try:
            plan = self._plans[layer][expert]
            for piece in range(self._reader.num_pieces(plan)):
                if self._is_stopped.is_set():
                    return 0
                self._reader.copy_piece(plan, slot, piece)
            self._pack(layer, self._scratch.tensors(slot, plan), self._blocks[layer, expert])
            return plan.read_bytes
        except BaseException:
            self.stop()
            raise
        finally:
            self._free.append(slot)


def _stay_on(cpus: Collection[int] | None) -> None:
    """Keep this thread on some processors, where the system lets it."""
    if cpus and hasattr(os, "sched_setaffinity"):
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, cpus)
