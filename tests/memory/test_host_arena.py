"""The host tier holds the checkpoint's experts, all of them or an error says why not."""

from __future__ import annotations

import gc
import os
import threading
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import torch

from fakes import InstantBackend, make_plans, mark_of
from foreload.errors import CapacityError, ForeloadError, TransferError
from foreload.memory import cuda, host_arena
from foreload.memory.arena import ALIGNMENT
from foreload.memory.host_arena import HostArena
from foreload.types import ExpertKey

if TYPE_CHECKING:
    from collections.abc import Mapping

    from foreload.memory.arena import SlotArena
    from foreload.types import ExpertPlan

LAYERS, EXPERTS = 3, 5


def pack(layer: int, weights: Mapping[str, torch.Tensor], block: torch.Tensor) -> None:
    raw = weights["weight"].view(torch.uint8)
    block[: len(raw)] = raw


def marks(arena: HostArena) -> torch.Tensor:
    return arena.blocks[:, :, :4].contiguous().view(torch.float32)[..., 0]


@pytest.mark.parametrize("num_workers", [1, 3])
def test_every_expert_lies_in_its_block(num_workers: int) -> None:
    arena = HostArena(LAYERS, EXPERTS, ALIGNMENT)
    told: list[tuple[int, int]] = []
    arena.fill(
        make_plans(LAYERS, EXPERTS),
        pack,
        num_workers=num_workers,
        progress=lambda done, total: told.append((done, total)),
        backend=InstantBackend,
    )
    wanted = [[mark_of(ExpertKey(l, e)) for e in range(EXPERTS)] for l in range(LAYERS)]  # noqa: E741
    assert marks(arena).tolist() == wanted
    assert told[-1] == (16 * LAYERS * EXPERTS,) * 2
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert not arena.blocks[:, :, 16:].any(), "what belongs to no parameter stays zero"
    assert arena.blocks.data_ptr() % ALIGNMENT == 0
    arena.release()


@pytest.mark.parametrize("shape", [(0, 1, ALIGNMENT), (1, 0, ALIGNMENT), (1, 1, 0), (1, 1, 100)])
def test_sizes_that_make_no_sense_are_refused(shape: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="host tier"):
        HostArena(*shape)


def test_what_does_not_fit_is_told_before_anything_is_allocated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_map(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("nothing may be allocated")

    monkeypatch.setattr(host_arena.mmap, "mmap", no_map)
    available = psutil.virtual_memory().available
    with pytest.raises(CapacityError, match="host memory") as caught:
        HostArena(available // ALIGNMENT + 2, 1, ALIGNMENT)
    assert caught.value.needed_bytes > caught.value.available_bytes > 0
    assert caught.value.setting == "host_memory"
    with pytest.raises(CapacityError) as caught:
        HostArena(2, 2, ALIGNMENT, limit_bytes=3 * ALIGNMENT)
    assert (caught.value.needed_bytes, caught.value.available_bytes) == (
        4 * ALIGNMENT,
        3 * ALIGNMENT,
    )


def test_a_system_that_refuses_memory_is_a_capacity_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(host_arena.mmap, "mmap", refuse)
    with pytest.raises(CapacityError, match="Cannot allocate memory"):
        HostArena(1, 1, ALIGNMENT)


def test_it_may_be_released_twice_and_views_stay_readable() -> None:
    arena = HostArena(1, 2, ALIGNMENT)
    arena.blocks[0, 1, 7] = 42
    view = arena.blocks[0, 1]
    arena.release()
    arena.release()
    gc.collect()
    assert int(view[7]) == 42
    with pytest.raises(ForeloadError, match="closed"):
        _ = arena.blocks


class Breaking(InstantBackend):
    """Fails at one expert, and remembers whether anything is read after it was closed."""

    def copy_piece(self, plan: ExpertPlan, slot: int, piece: int) -> int:
        assert not self.is_closed
        if plan.spans[0].path == "1.2":
            raise TransferError("the disk is gone")
        return super().copy_piece(plan, slot, piece)


def test_a_failed_read_ends_the_filling_and_is_told() -> None:
    made: list[Breaking] = []

    def backend(arena: SlotArena) -> Breaking:
        made.append(Breaking(arena))
        return made[-1]

    arena = HostArena(40, EXPERTS, ALIGNMENT)
    threads = threading.active_count()
    with pytest.raises(TransferError, match="gone"):
        arena.fill(make_plans(40, EXPERTS), pack, num_workers=2, backend=backend)
    assert threading.active_count() == threads
    assert made[0].is_closed
    assert len(made[0].copied) < 40 * EXPERTS
    arena.release()


def test_an_interruption_leaves_no_thread_that_writes() -> None:
    arena = HostArena(40, EXPERTS, ALIGNMENT)
    threads = threading.active_count()

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        arena.fill(
            make_plans(40, EXPERTS), pack, num_workers=2, progress=interrupt, backend=InstantBackend
        )
    assert threading.active_count() == threads
    # It can be filled again from the start.
    arena.fill(make_plans(40, EXPERTS), pack, backend=InstantBackend)
    assert marks(arena)[39, 4] == mark_of(ExpertKey(39, 4))
    arena.release()


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="only Linux moves threads")
def test_threads_stay_on_the_processors_they_are_given() -> None:
    usual = os.sched_getaffinity(0)
    one = {max(usual)}
    # Threads that were given processors which are not there stay where they are.
    for given, wanted in ((one, one), (None, usual), (set(), usual), ({100_000}, usual)):
        seen: list[set[int]] = []

        def watch(
            layer: int,
            weights: Mapping[str, torch.Tensor],
            block: torch.Tensor,
            seen: list[set[int]] = seen,
        ) -> None:
            seen.append(os.sched_getaffinity(0))
            pack(layer, weights, block)

        arena = HostArena(LAYERS, EXPERTS, ALIGNMENT)
        plans = make_plans(LAYERS, EXPERTS)
        arena.fill(plans, watch, num_workers=2, cpus=given, backend=InstantBackend)
        arena.release()
        assert seen == [wanted] * (LAYERS * EXPERTS)
        assert os.sched_getaffinity(0) == usual, "this thread is not moved"


def test_layers_are_locked_one_by_one_and_unlocked_with_the_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    locked: dict[int, int] = {}
    monkeypatch.setattr(
        cuda, "page_lock", lambda address, size, device: locked.update({address: size})
    )
    monkeypatch.setattr(cuda, "page_unlock", lambda address, device: locked.pop(address))
    arena = HostArena(LAYERS, EXPERTS, ALIGNMENT)
    arena.page_lock(torch.device("cuda", 0))
    assert arena.is_page_locked
    start = arena.blocks.data_ptr()
    size = EXPERTS * ALIGNMENT
    assert locked == {start + layer * size: size for layer in range(LAYERS)}
    arena.release()
    arena.release()
    assert not locked
    assert not arena.is_page_locked


def test_a_driver_that_refuses_in_the_middle_leaves_nothing_locked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    locked: list[int] = []

    def lock(address: int, num_bytes: int, device: torch.device) -> None:
        if len(locked) == 2:
            raise CapacityError("no", needed_bytes=1, available_bytes=0, setting="host_memory")
        locked.append(address)

    monkeypatch.setattr(cuda, "page_lock", lock)
    monkeypatch.setattr(cuda, "page_unlock", lambda address, device: locked.remove(address))
    arena = HostArena(LAYERS, EXPERTS, ALIGNMENT)
    with pytest.raises(CapacityError):
        arena.page_lock(torch.device("cuda", 0))
    assert not locked
    arena.release()
