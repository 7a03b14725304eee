"""Experts read one after the other, for whoever works through a whole checkpoint."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from foreload.memory.arena import SlotArena, slot_bytes
from foreload.memory.disk import DiskBackend

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from torch import Tensor

    from foreload.types import ExpertPlan

__all__ = ["read_experts"]


def read_experts(
    plans: Sequence[ExpertPlan],
) -> Generator[dict[str, Tensor], None, None]:
    """Read experts one after the other, the next one while this one is worked on.

    Args:
        plans: How to read each of them.

    Yields:
        An expert's parameters by name, valid until the next one is asked for.

    Raises:
        TransferError: One cannot be read.

    Cost:
        Memory for two experts.
    """
    arena = SlotArena(2, max(slot_bytes(plan) for plan in plans))
    backend = DiskBackend(arena)

    def read(number: int) -> None:
        for piece in range(backend.num_pieces(plans[number])):
            backend.copy_piece(plans[number], number % 2, piece)

    with ThreadPoolExecutor(1, thread_name_prefix="foreload-reader") as pool:
        try:
            coming = pool.submit(read, 0)
            for number, plan in enumerate(plans):
                coming.result()
                if number + 1 < len(plans):
                    coming = pool.submit(read, number + 1)
                yield arena.tensors(number % 2, plan)
        finally:
            coming.cancel()
            pool.shutdown()
            backend.close()
            arena.release()
