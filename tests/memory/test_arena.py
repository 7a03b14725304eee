"""Slots do not touch one another, and show an expert's bytes as its parameters."""

from __future__ import annotations

import errno
import mmap
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foreload.errors import CapacityError, ForeloadError
from foreload.memory.arena import (
    ALIGNMENT,
    SlotArena,
    slot_bytes,
    span_positions,
    tensor_positions,
)
from foreload.types import ExpertPlan, ExpertTensor, Span


def direct_plan(*spans: tuple[int, int]) -> ExpertPlan:
    """Plan one uint8 tensor per (offset, length)."""
    return ExpertPlan(
        tuple(Span("file", offset, length) for offset, length in spans),
        tuple(
            ExpertTensor(f"t{i}", "uint8", (length,), length, span=i)
            for i, (_, length) in enumerate(spans)
        ),
    )


def converted_plan(*shapes: tuple[int, ...]) -> ExpertPlan:
    tensors = tuple(
        ExpertTensor(f"t{i}", "float32", shape, 4 * torch.Size(shape).numel())
        for i, shape in enumerate(shapes)
    )
    return ExpertPlan((Span("file", 3, 100),), tensors, lambda raw: {})


def test_aligned_spans_take_exactly_their_bytes() -> None:
    plan = direct_plan((8192, 4096))
    assert span_positions(plan) == [(0, 8192, 4096)]
    assert slot_bytes(plan) == 4096


def test_an_unaligned_span_is_read_with_the_blocks_around_it() -> None:
    plan = direct_plan((5000, 4096), (100, 1))
    assert span_positions(plan) == [(0, 4096, 8192), (8192, 0, 4096)]
    assert tensor_positions(plan) == [5000 - 4096, 8192 + 100]
    assert slot_bytes(plan) == 3 * ALIGNMENT


SPANS = st.lists(st.tuples(st.integers(0, 30_000), st.integers(1, 20_000)), min_size=1, max_size=4)


@given(SPANS)
def test_reads_are_aligned_and_tensors_lie_inside_and_apart(spans: list[tuple[int, int]]) -> None:
    plan = direct_plan(*spans)
    size = slot_bytes(plan)
    assert size % ALIGNMENT == 0
    previous_end = 0
    for (at, first, length), span in zip(span_positions(plan), plan.spans, strict=True):
        assert at % ALIGNMENT == first % ALIGNMENT == length % ALIGNMENT == 0
        assert at == previous_end
        assert first <= span.offset
        assert span.offset + span.num_bytes <= first + length
        assert length < span.num_bytes + 2 * ALIGNMENT
        previous_end = at + length
    assert previous_end == size
    for position, tensor, span in zip(
        tensor_positions(plan), plan.tensors, plan.spans, strict=True
    ):
        assert position % ALIGNMENT == span.offset % ALIGNMENT
        assert position + tensor.num_bytes <= size


def test_converted_tensors_lie_apart_on_cache_lines() -> None:
    plan = converted_plan((3,), (5, 7), (1,))
    positions = tensor_positions(plan)
    assert positions == [0, 64, 64 + 192]
    assert slot_bytes(plan) == ALIGNMENT


def test_what_is_read_into_a_buffer_is_what_the_tensors_show() -> None:
    values = torch.arange(6, dtype=torch.float32)
    span = Span("file", 4096 + 8, 24)
    tensors = (
        ExpertTensor("down", "float32", (2, 2), 16, span=0, start=8),
        ExpertTensor("bias", "float32", (2,), 8, span=0, start=0),
    )
    plan = ExpertPlan((span,), tensors)
    arena = SlotArena(3, slot_bytes(plan))
    arena.buffer(1)[8:32] = values.numpy().tobytes()
    views = arena.tensors(1, plan)
    assert torch.equal(views["down"], values[2:].view(2, 2))
    assert torch.equal(views["bias"], values[:2])


def test_slots_do_not_overlap_and_views_are_not_copies() -> None:
    plan = converted_plan((4,))
    arena = SlotArena(3, slot_bytes(plan))
    views = [arena.tensors(slot, plan)["t0"] for slot in range(3)]
    for slot in range(3):
        arena.write(slot, plan, {"t0": torch.full((4,), float(slot))})
    assert [view.tolist() for view in views] == [[float(slot)] * 4 for slot in range(3)]
    assert arena.num_bytes == 3 * slot_bytes(plan)
    assert len(arena.buffer(2)) == slot_bytes(plan)


def test_write_casts_to_the_planned_type() -> None:
    plan = converted_plan((2,))
    arena = SlotArena(1, slot_bytes(plan))
    arena.write(0, plan, {"t0": torch.tensor([1, 2], dtype=torch.int64)})
    assert arena.tensors(0, plan)["t0"].tolist() == [1.0, 2.0]


def test_poison_makes_every_number_nan() -> None:
    plan = converted_plan((2, 3))
    arena = SlotArena(2, slot_bytes(plan))
    arena.poison()
    assert arena.tensors(1, plan)["t0"].isnan().all()
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.full((2,), 0xFF, dtype=torch.uint8).view(dtype).isnan().all()


def test_buffers_begin_on_pages() -> None:
    arena = SlotArena(2, 2 * ALIGNMENT)
    address = torch.frombuffer(arena.buffer(1), dtype=torch.uint8).data_ptr()
    assert address % ALIGNMENT == 0


@pytest.mark.parametrize("num_slots", [0, 1 << 50])
def test_memory_that_cannot_be_had_is_a_capacity_error(num_slots: int) -> None:
    with pytest.raises(CapacityError, match="refused memory") as caught:
        SlotArena(num_slots, ALIGNMENT)
    assert caught.value.setting == "expert_memory"
    assert caught.value.needed_bytes == num_slots * ALIGNMENT


def test_a_kernel_without_huge_pages_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    class SmallPages(mmap.mmap):
        def madvise(self, *args: Any) -> None:
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", SmallPages)
    arena = SlotArena(1, ALIGNMENT)
    arena.buffer(0)[:1] = b"x"
    assert bytes(arena.buffer(0)[:1]) == b"x"


def test_views_outlive_the_memory_and_new_ones_are_refused() -> None:
    """Another thread may be computing with them when an engine is closed."""
    arena = SlotArena(2, ALIGNMENT)
    plan = converted_plan((4, 8))
    (view,) = arena.tensors(1, plan).values()
    view.fill_(7.0)
    arena.release()
    assert (view == 7.0).all()
    with pytest.raises(ForeloadError, match="closed"):
        arena.tensors(1, plan)


def test_the_memory_goes_with_its_last_view() -> None:
    arena = SlotArena(2, ALIGNMENT)
    views = arena.tensors(1, converted_plan((4, 8)))
    mapping = weakref.ref(arena._map)
    arena.release()
    assert mapping() is not None
    views.clear()
    assert mapping() is None
