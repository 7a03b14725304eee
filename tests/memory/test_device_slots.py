"""Slots on a device: bytes where they belong, and written only once they have been read."""

from __future__ import annotations

import pytest
import torch

from fakes import make_plan
from foreload.errors import CapacityError, ForeloadError
from foreload.memory import cuda
from foreload.memory import device_slots as device_slots_module
from foreload.memory.arena import ALIGNMENT, SlotArena
from foreload.memory.device_slots import DeviceSlots
from foreload.types import ExpertKey

CPU = torch.device("cpu")


def test_it_views_what_was_filled_in_as_an_arena_would() -> None:
    plan = make_plan(ExpertKey(0, 0), 4096)
    slots, arena = DeviceSlots(3, ALIGNMENT, CPU), SlotArena(3, ALIGNMENT)
    content = torch.arange(1024, dtype=torch.float32).view(torch.uint8)
    slots.block(0).zero_()
    slots.block(2).zero_()
    for start in (0, 1000, 3000):
        slots.fill(1, start, content[start : start + 2000])
    arena.block(1).copy_(content)
    own, other = slots.tensors(1, plan), arena.tensors(1, plan)
    assert own.keys() == other.keys()
    assert all(torch.equal(own[name], other[name]) for name in own)
    assert not slots.block(0).any()
    assert not slots.block(2).any()


def test_copies_wait_for_the_reads_marked_when_the_slot_was_given_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log: list[tuple[object, ...]] = []

    class Streams:
        def __init__(self, device: torch.device) -> None:
            self.count = 0

        def order_reads(self) -> None:
            log.append(("order",))

        def mark_reads(self) -> int:
            self.count += 1
            return self.count

        def copy(self, target: torch.Tensor, source: torch.Tensor, after: object) -> None:
            log.append((target.data_ptr(), len(source), after))

    monkeypatch.setattr(cuda, "CopyStreams", Streams)
    slots = DeviceSlots(2, ALIGNMENT, CPU)
    piece = torch.zeros(16, dtype=torch.uint8)
    slots.before_reads()
    slots.fill(1, 0, piece)
    slots.before_write(1)
    slots.before_write(0)
    slots.fill(1, 32, piece)
    slots.fill(1, 48, piece)
    slots.fill(0, 0, piece)
    base = slots.block(0).data_ptr()
    assert log == [
        ("order",),
        (base + ALIGNMENT, 16, None),
        (base + ALIGNMENT + 32, 16, 1),
        (base + ALIGNMENT + 48, 16, 1),
        (base, 16, 2),
    ]


def test_released_slots_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(cuda, "wait_idle", waited.append)
    slots = DeviceSlots(1, ALIGNMENT, CPU)
    view = slots.tensors(0, make_plan(ExpertKey(0, 0)))["weight"]
    view.fill_(1.0)
    slots.release()
    slots.release()
    assert waited == [CPU, CPU], "kernels may be reading it still"
    assert view.tolist() == [1.0] * 4
    with pytest.raises(ForeloadError, match="closed"):
        slots.tensors(0, make_plan(ExpertKey(0, 0)))


def test_a_device_without_room_names_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*size: int, **options: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(device_slots_module.torch, "empty", refuse)
    with pytest.raises(CapacityError, match="out of memory") as caught:
        DeviceSlots(4, ALIGNMENT, CPU)
    assert (caught.value.needed_bytes, caught.value.setting) == (4 * ALIGNMENT, "expert_memory")
