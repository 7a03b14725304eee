"""Experts arrive byte for byte, however the disk lets itself be read, or an error says why not."""

from __future__ import annotations

import errno
import os
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foreload.errors import TransferError
from foreload.memory import disk as disk_module
from foreload.memory.arena import ALIGNMENT, SlotArena, slot_bytes, span_positions
from foreload.memory.disk import DiskBackend
from foreload.types import ExpertPlan, ExpertTensor, FileStamp, Span

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

FILE_BYTES = 5 * ALIGNMENT + 777


@pytest.fixture(scope="module")
def content() -> bytes:
    return np.random.default_rng(0).integers(0, 256, FILE_BYTES, dtype=np.uint8).tobytes()


@pytest.fixture
def path(tmp_path: Path, content: bytes) -> Path:
    file = tmp_path / "experts.safetensors"
    file.write_bytes(content)
    return file


def plan_of(path: Path, *spans: tuple[int, int]) -> ExpertPlan:
    return ExpertPlan(
        tuple(Span(str(path), offset, length) for offset, length in spans),
        tuple(
            ExpertTensor(f"t{i}", "uint8", (length,), length, span=i)
            for i, (_, length) in enumerate(spans)
        ),
    )


def copy(backend: DiskBackend, plan: ExpertPlan, slot: int = 0) -> int:
    pieces = backend.num_pieces(plan)
    return sum(backend.copy_piece(plan, slot, piece) for piece in range(pieces))


def assert_read(arena: SlotArena, plan: ExpertPlan, content: bytes, slot: int = 0) -> None:
    views = arena.tensors(slot, plan)
    for tensor, span in zip(plan.tensors, plan.spans, strict=True):
        wanted = content[span.offset : span.offset + span.num_bytes]
        assert views[tensor.name].numpy().tobytes() == wanted, tensor.name


def open_files() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def never_direct(monkeypatch: pytest.MonkeyPatch, error: int) -> list[int]:
    """Let opening with O_DIRECT fail, and collect the flags of every open."""
    real_open = os.open
    flags_seen: list[int] = []

    def open_without_direct(path: str, flags: int, *args: Any, **kwargs: Any) -> int:
        flags_seen.append(flags)
        if flags & os.O_DIRECT:
            raise OSError(error, os.strerror(error))
        return real_open(path, flags, *args, **kwargs)

    monkeypatch.setattr(disk_module.os, "open", open_without_direct)
    return flags_seen


SPAN_SETS = [
    [(0, ALIGNMENT)],
    [(8, 100)],
    [(ALIGNMENT - 1, 2)],
    [(4100, 9000), (1, 1), (2 * ALIGNMENT, 3 * ALIGNMENT)],
    [(FILE_BYTES - 5, 5)],
    [(5 * ALIGNMENT, 777)],
    [(0, FILE_BYTES)],
]


@pytest.mark.parametrize("spans", SPAN_SETS, ids=str)
@pytest.mark.parametrize("piece_bytes", [ALIGNMENT, 2 * ALIGNMENT, 4 << 20])
@pytest.mark.parametrize("is_direct", [True, False], ids=["direct", "buffered"])
def test_every_byte_arrives(
    path: Path,
    content: bytes,
    spans: list[tuple[int, int]],
    piece_bytes: int,
    is_direct: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not is_direct:
        never_direct(monkeypatch, errno.EINVAL)
    plan = plan_of(path, *spans)
    arena = SlotArena(2, slot_bytes(plan))
    arena.poison()
    backend = DiskBackend(arena, piece_bytes=piece_bytes)
    assert backend.num_pieces(plan) == sum(
        -(-length // piece_bytes) for _, _, length in span_positions(plan)
    )
    moved = copy(backend, plan, slot=1)
    assert_read(arena, plan, content, slot=1)
    assert moved == slot_bytes(plan)
    assert bytes(arena.buffer(0)) == b"\xff" * arena.slot_bytes, "the neighbour was written to"
    backend.close()


@settings(max_examples=40)
@given(st.data())
def test_any_spans_in_any_pieces_arrive(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, data: st.DataObject
) -> None:
    file = tmp_path_factory.getbasetemp() / "any.safetensors"
    file.write_bytes(content)
    starts = data.draw(st.lists(st.integers(0, FILE_BYTES - 1), min_size=1, max_size=3))
    spans = [(s, data.draw(st.integers(1, FILE_BYTES - s))) for s in starts]
    plan = plan_of(file, *spans)
    arena = SlotArena(1, slot_bytes(plan))
    backend = DiskBackend(arena, piece_bytes=ALIGNMENT * data.draw(st.integers(1, 3)))
    pieces = data.draw(st.permutations(range(backend.num_pieces(plan))))
    for piece in pieces:
        backend.copy_piece(plan, 0, piece)
    assert_read(arena, plan, content)
    backend.close()


def test_the_page_cache_is_bypassed_where_the_filesystem_lets_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_open = os.open
    flags_seen: list[int] = []

    def note_flags(file: str, flags: int, *args: Any) -> int:
        flags_seen.append(flags)
        return real_open(file, flags & ~os.O_DIRECT, *args)

    monkeypatch.setattr(disk_module.os, "open", note_flags)
    plan = plan_of(path, (0, 10))
    backend = DiskBackend(SlotArena(1, slot_bytes(plan)))
    copy(backend, plan)
    copy(backend, plan)
    backend.close()
    assert len(flags_seen) == 1, "a file is opened once"
    assert flags_seen[0] & os.O_DIRECT


@pytest.mark.parametrize("error", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_filesystem_that_refuses_direct_opens_is_read_buffered(
    path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    flags_seen = never_direct(monkeypatch, error)
    plan = plan_of(path, (10, 5000))
    arena = SlotArena(1, slot_bytes(plan))
    backend = DiskBackend(arena)
    copy(backend, plan)
    backend.close()
    assert_read(arena, plan, content)
    assert [bool(flags & os.O_DIRECT) for flags in flags_seen] == [True, False]


def refuse_first(count: int, error: int) -> Callable[[int, list[memoryview], int], int]:
    """Give a preadv whose first `count` calls fail."""
    left = [count]

    def preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if left[0] > 0:
            left[0] -= 1
            raise OSError(error, os.strerror(error))
        return os.preadv(descriptor, buffers, offset)

    return preadv


def test_a_filesystem_that_refuses_direct_reads_is_read_buffered(
    path: Path, content: bytes
) -> None:
    plan = plan_of(path, (10, 9000), (FILE_BYTES - 3, 3))
    arena = SlotArena(1, slot_bytes(plan))
    before = open_files()
    backend = DiskBackend(arena, piece_bytes=ALIGNMENT, preadv=refuse_first(1, errno.EINVAL))
    copy(backend, plan)
    assert_read(arena, plan, content)
    assert not backend._files[str(path)].is_direct
    backend.close()
    assert open_files() == before, "a descriptor was lost"


def test_a_buffered_read_that_is_refused_is_an_error_and_no_endless_loop(path: Path) -> None:
    plan = plan_of(path, (0, 10))
    backend = DiskBackend(
        SlotArena(1, slot_bytes(plan)), preadv=refuse_first(1_000_000, errno.EINVAL)
    )
    with pytest.raises(TransferError, match="Invalid argument"):
        copy(backend, plan)
    backend.close()


def test_short_reads_are_continued(
    path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    never_direct(monkeypatch, errno.EINVAL)

    def some_at_a_time(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        return os.preadv(descriptor, [buffers[0][:1000]], offset)

    plan = plan_of(path, (4000, 9000))
    arena = SlotArena(1, slot_bytes(plan))
    backend = DiskBackend(arena, preadv=some_at_a_time)
    copy(backend, plan)
    backend.close()
    assert_read(arena, plan, content)


def test_short_direct_reads_of_whole_blocks_are_continued(path: Path, content: bytes) -> None:
    def a_block_at_a_time(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        return os.preadv(descriptor, [buffers[0][:ALIGNMENT]], offset)

    plan = plan_of(path, (100, FILE_BYTES - 100))
    arena = SlotArena(1, slot_bytes(plan))
    backend = DiskBackend(arena, preadv=a_block_at_a_time)
    copy(backend, plan)
    backend.close()
    assert_read(arena, plan, content)


@pytest.mark.parametrize("left_bytes", [0, 100, ALIGNMENT, ALIGNMENT + 1, FILE_BYTES - 1])
@pytest.mark.parametrize("is_direct", [True, False], ids=["direct", "buffered"])
def test_a_truncated_file_is_an_error_that_says_so(
    path: Path, left_bytes: int, is_direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_direct:
        never_direct(monkeypatch, errno.EINVAL)
    os.truncate(path, left_bytes)
    plan = plan_of(path, (50, FILE_BYTES - 50))
    backend = DiskBackend(SlotArena(1, slot_bytes(plan)))
    with pytest.raises(TransferError, match="ended early") as caught:
        copy(backend, plan)
    assert str(path) in str(caught.value)
    assert "truncated" in str(caught.value.hint)
    backend.close()


def test_a_file_that_vanished_is_an_error_that_says_so(path: Path) -> None:
    plan = plan_of(path, (0, 10))
    path.unlink()
    backend = DiskBackend(SlotArena(1, slot_bytes(plan)))
    with pytest.raises(TransferError, match="cannot open") as caught:
        copy(backend, plan)
    assert str(path) in str(caught.value)
    backend.close()


def test_a_file_that_vanishes_later_is_still_read(path: Path, content: bytes) -> None:
    first, second = plan_of(path, (0, 10)), plan_of(path, (9000, 200))
    arena = SlotArena(1, slot_bytes(second))
    backend = DiskBackend(arena)
    copy(backend, first)
    path.unlink()
    copy(backend, second)
    assert_read(arena, second, content)
    backend.close()


def stamped(plan: ExpertPlan, path: Path) -> ExpertPlan:
    """Give the plan with the file as it is now, which was last changed long ago."""
    os.utime(path, (10**9, 10**9))
    stamp = FileStamp(path.stat().st_size, path.stat().st_mtime_ns)
    return replace(plan, spans=tuple(replace(span, stamp=stamp) for span in plan.spans))


def overwrite(path: Path, offset: int = 0, data: bytes = b"new bytes") -> None:
    with path.open("r+b") as stream:
        stream.seek(offset)
        stream.write(data)


CHANGES: dict[str, Callable[[Path], object]] = {
    "other bytes": overwrite,
    "bytes of another place": lambda path: overwrite(path, 4 * ALIGNMENT),
    "cut behind what is read": lambda path: os.truncate(path, FILE_BYTES - 1),
    "grown": lambda path: overwrite(path, FILE_BYTES),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("is_open", [True, False], ids=["while open", "before it is opened"])
@pytest.mark.parametrize("is_converted", [True, False], ids=["converted", "direct"])
def test_a_file_that_changes_is_an_error_that_says_so(
    path: Path, change: str, is_open: bool, is_converted: bool
) -> None:
    spans = ((10, 9000), (ALIGNMENT, 50))
    plan = converted_plan(path, sum_and_reverse, *spans) if is_converted else plan_of(path, *spans)
    plan = stamped(plan, path)
    backend = DiskBackend(SlotArena(1, slot_bytes(plan)))
    if is_open:
        copy(backend, plan)
    CHANGES[change](path)
    for _ in range(2):
        with pytest.raises(TransferError, match="was changed after") as caught:
            copy(backend, plan)
        assert str(path) in str(caught.value)
        assert "open the model again" in str(caught.value.hint)
    backend.close()


def test_a_change_in_the_middle_of_a_read_is_an_error(path: Path) -> None:
    def change_first(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        overwrite(path)
        return os.preadv(descriptor, buffers, offset)

    plan = stamped(plan_of(path, (0, 100)), path)
    backend = DiskBackend(SlotArena(1, slot_bytes(plan)), preadv=change_first)
    with pytest.raises(TransferError, match="was changed after"):
        copy(backend, plan)
    backend.close()


def test_a_file_that_is_replaced_is_still_read_as_it_was(path: Path, content: bytes) -> None:
    plan = stamped(plan_of(path, (10, 9000)), path)
    arena = SlotArena(1, slot_bytes(plan))
    backend = DiskBackend(arena)
    copy(backend, plan)
    other = path.with_name("other")
    other.write_bytes(content[::-1])
    other.replace(path)
    arena.poison()
    copy(backend, plan)
    assert_read(arena, plan, content)
    backend.close()
    with pytest.raises(TransferError, match="was changed after"):
        copy(backend, plan)
    backend.close()


def test_a_file_restored_with_its_time_is_read_again(path: Path, content: bytes) -> None:
    plan = stamped(plan_of(path, (10, 9000)), path)
    arena = SlotArena(1, slot_bytes(plan))
    backend = DiskBackend(arena)
    overwrite(path)
    with pytest.raises(TransferError, match="was changed after"):
        copy(backend, plan)
    overwrite(path, 0, content)
    os.utime(path, (10**9, 10**9))
    copy(backend, plan)
    assert_read(arena, plan, content)
    backend.close()


def test_a_disk_error_names_the_place_and_the_next_read_works(path: Path, content: bytes) -> None:
    plan = plan_of(path, (5000, 100))
    arena = SlotArena(1, slot_bytes(plan))
    backend = DiskBackend(arena, preadv=refuse_first(1, errno.EIO))
    with pytest.raises(TransferError, match="Input/output error") as caught:
        copy(backend, plan)
    assert str(path) in str(caught.value)
    assert "4,096" in str(caught.value), "the offset is missing"
    assert isinstance(caught.value.__cause__, OSError)
    copy(backend, plan)
    assert_read(arena, plan, content)
    assert backend._files[str(path)].is_direct, "an EIO is no reason to give up direct reads"
    backend.close()


def test_close_gives_every_descriptor_back_and_a_later_copy_opens_again(
    path: Path, content: bytes
) -> None:
    plan = plan_of(path, (0, 100))
    arena = SlotArena(1, slot_bytes(plan))
    before = open_files()
    backend = DiskBackend(arena)
    copy(backend, plan)
    assert open_files() != before
    backend.close()
    backend.close()
    assert open_files() == before
    arena.poison()
    copy(backend, plan)
    assert_read(arena, plan, content)
    backend.close()
    assert open_files() == before


def sum_and_reverse(raw: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    assert all(part.dtype == torch.uint8 for part in raw)
    return {"total": sum(part.float().sum() for part in raw).view(1), "back": raw[0].flip(0)}


def converted_plan(path: Path, convert: Any, *spans: tuple[int, int]) -> ExpertPlan:
    length = spans[0][1]
    tensors = (
        ExpertTensor("total", "float32", (1,), 4),
        ExpertTensor("back", "uint8", (length,), length),
    )
    return ExpertPlan(tuple(Span(str(path), *span) for span in spans), tensors, convert)


def test_converted_experts_come_in_one_piece_from_exactly_their_bytes(
    path: Path, content: bytes
) -> None:
    plan = converted_plan(path, sum_and_reverse, (4090, 20), (FILE_BYTES - 9, 9))
    arena = SlotArena(2, slot_bytes(plan))
    backend = DiskBackend(arena, piece_bytes=ALIGNMENT)
    assert backend.num_pieces(plan) == 1
    moved = backend.copy_piece(plan, 1, 0)
    assert moved == 3 * ALIGNMENT
    views = arena.tensors(1, plan)
    first, second = content[4090:4110], content[FILE_BYTES - 9 :]
    assert views["total"].item() == sum(first) + sum(second)
    assert views["back"].numpy().tobytes() == first[::-1]
    backend.close()


def test_a_smaller_expert_after_a_larger_one_sees_only_its_own_bytes(
    path: Path, content: bytes
) -> None:
    backend = DiskBackend(SlotArena(1, 8 * ALIGNMENT))
    for span in [(0, 9_000), (7, 5), (100, 20_000)]:
        plan = converted_plan(path, sum_and_reverse, span)
        backend.copy_piece(plan, 0, 0)
        total = backend._arena.tensors(0, plan)["total"].item()
        assert total == sum(content[span[0] : sum(span)])
    backend.close()


def test_threads_do_not_share_scratch_memory(path: Path, content: bytes) -> None:
    meeting = threading.Barrier(2, timeout=20)

    def convert_together(raw: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        meeting.wait()  # both have read, neither has converted
        return sum_and_reverse(raw)

    plans = [converted_plan(path, convert_together, span) for span in [(0, 50), (9000, 50)]]
    arena = SlotArena(2, slot_bytes(plans[0]))
    backend = DiskBackend(arena)
    threads = [
        threading.Thread(target=backend.copy_piece, args=(plan, slot, 0))
        for slot, plan in enumerate(plans)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for slot, plan in enumerate(plans):
        start = plan.spans[0].offset
        wanted = content[start : start + 50][::-1]
        assert arena.tensors(slot, plan)["back"].numpy().tobytes() == wanted
    backend.close()


def test_many_threads_meeting_a_refusal_all_fall_back(path: Path, content: bytes) -> None:
    meeting = threading.Barrier(4, timeout=20)
    refused = threading.local()

    def refuse_each_once(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if not hasattr(refused, "once"):
            refused.once = True
            meeting.wait()  # all four hold the direct descriptor now
            raise OSError(errno.EINVAL, "Invalid argument")
        return os.preadv(descriptor, buffers, offset)

    plan = plan_of(path, (10, 9000))
    arena = SlotArena(4, slot_bytes(plan))
    before = open_files()
    backend = DiskBackend(arena, preadv=refuse_each_once)
    threads = [threading.Thread(target=copy, args=(backend, plan, slot)) for slot in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for slot in range(4):
        assert_read(arena, plan, content, slot)
    backend.close()
    assert open_files() == before


@pytest.fixture(autouse=True)
def _no_lost_descriptors() -> Iterator[None]:
    before = open_files()
    yield
    assert open_files() == before
