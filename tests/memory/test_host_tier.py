"""The host tier gives what the checkpoint holds, whoever asks, however little it keeps."""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes import PATIENCE_S, finish
from foreload.errors import CapacityError, ForeloadError, TransferError
from foreload.memory import cuda
from foreload.memory.arena import ALIGNMENT, slot_bytes
from foreload.memory.disk import DiskBackend
from foreload.memory.host_tier import HostTier
from foreload.types import ExpertPlan, ExpertTensor, Span

if TYPE_CHECKING:
    from foreload.memory.arena import SlotArena

EXPERTS = 5
EXPERT_BYTES = 3 * ALIGNMENT
PIECES = 3


@pytest.fixture(scope="module")
def content() -> bytes:
    size = EXPERTS * EXPERT_BYTES
    return np.random.default_rng(1).integers(0, 256, size, dtype=np.uint8).tobytes()


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> list[ExpertPlan]:
    path = tmp_path_factory.mktemp("checkpoint") / "experts.safetensors"
    path.write_bytes(content)
    return [
        ExpertPlan(
            (Span(str(path), expert * EXPERT_BYTES, EXPERT_BYTES),),
            (ExpertTensor("weight", "uint8", (EXPERT_BYTES,), EXPERT_BYTES, span=0),),
        )
        for expert in range(EXPERTS)
    ]


def make_tier(num_blocks: int, preadv: Any = os.preadv) -> HostTier:
    return HostTier(
        num_blocks * EXPERT_BYTES,
        EXPERT_BYTES,
        reader=lambda arena: DiskBackend(arena, piece_bytes=ALIGNMENT, preadv=preadv),
    )


def piece_of(content: bytes, expert: int, piece: int) -> bytes:
    start = expert * EXPERT_BYTES + piece * ALIGNMENT
    return content[start : start + ALIGNMENT]


def fetch(tier: HostTier, plan: ExpertPlan, piece: int) -> bytes:
    with tier.hold(plan, piece) as held:
        assert held.start == piece * ALIGNMENT
        return held.content.numpy().tobytes()


class Reads:
    """Counts reads, lets some fail, and holds them up."""

    def __init__(self) -> None:
        self.offsets: list[int] = []
        self.failing: set[int] = set()
        self.begun = threading.Semaphore(0)
        self.gate = threading.Event()
        self.gate.set()

    def preadv(self, descriptor: int, views: list[memoryview], offset: int) -> int:
        self.offsets.append(offset)
        self.begun.release()
        assert self.gate.wait(PATIENCE_S)
        if offset in self.failing:
            # Half of it arrives.
            views[0][:100] = bytes(100)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return os.preadv(descriptor, views, offset)


visits = st.lists(st.tuples(st.integers(0, EXPERTS - 1), st.integers(0, PIECES - 1)), max_size=40)


@settings(max_examples=60)
@given(visits, st.integers(1, EXPERTS + 1))
def test_it_keeps_what_was_used_last(
    plans: list[ExpertPlan], content: bytes, visits: list[tuple[int, int]], num_blocks: int
) -> None:
    reads = Reads()
    tier = make_tier(num_blocks, reads.preadv)
    assert tier.num_blocks == num_blocks
    kept: dict[int, set[int]] = {}
    num_found = 0
    for expert, piece in visits:
        before = len(reads.offsets)
        assert fetch(tier, plans[expert], piece) == piece_of(content, expert, piece)
        pieces = kept.pop(expert, None)
        if pieces is None and len(kept) == num_blocks:
            del kept[next(iter(kept))]
        kept[expert] = pieces or set()
        is_found = piece in kept[expert]
        num_found += is_found
        kept[expert].add(piece)
        assert (len(reads.offsets) == before) is is_found
    assert tier.host_bytes == num_found * ALIGNMENT
    assert tier.disk_bytes == (len(visits) - num_found) * ALIGNMENT
    tier.close()


@pytest.mark.parametrize("num_blocks", [1, 2, 4, EXPERTS])
def test_many_threads_get_what_they_asked_for(
    plans: list[ExpertPlan], content: bytes, num_blocks: int
) -> None:
    tier = make_tier(num_blocks)

    def visit(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(150):
            expert, piece = rng.randrange(EXPERTS), rng.randrange(PIECES)
            wanted = piece_of(content, expert, piece)
            with tier.hold(plans[expert], piece) as held:
                assert held.content.numpy().tobytes() == wanted
                if rng.random() < 0.2:
                    time.sleep(0.0005)
                assert held.content.numpy().tobytes() == wanted, "overwritten while held"

    with ThreadPoolExecutor(6) as pool:
        for visited in [pool.submit(visit, seed) for seed in range(6)]:
            visited.result(PATIENCE_S)
    assert tier.host_bytes + tier.disk_bytes == 6 * 150 * ALIGNMENT
    indices = [block.index for block in tier._blocks.values()]
    assert sorted(indices + tier._free) == list(range(num_blocks)), "blocks leak or alias"
    assert not any(block.num_holders for block in tier._blocks.values())
    finish(tier.close)


def test_a_held_block_is_not_given_away(plans: list[ExpertPlan], content: bytes) -> None:
    tier = make_tier(2)
    with ThreadPoolExecutor(1) as pool:
        with tier.hold(plans[0], 0) as first, tier.hold(plans[1], 0) as second:
            third = pool.submit(fetch, tier, plans[2], 1)
            time.sleep(0.05)
            assert not third.done(), "both blocks are held"
            assert first.content.numpy().tobytes() == piece_of(content, 0, 0)
            assert second.content.numpy().tobytes() == piece_of(content, 1, 0)
        assert third.result(PATIENCE_S) == piece_of(content, 2, 1)
    tier.close()


def test_a_piece_is_read_once_for_all_who_want_it(plans: list[ExpertPlan], content: bytes) -> None:
    reads = Reads()
    reads.gate.clear()
    tier = make_tier(1, reads.preadv)
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(fetch, tier, plans[3], 2) for _ in range(4)]
        assert reads.begun.acquire(timeout=PATIENCE_S)
        time.sleep(0.05)
        reads.gate.set()
        for one in asked:
            assert one.result(PATIENCE_S) == piece_of(content, 3, 2)
    assert len(reads.offsets) == 1
    tier.close()


def test_what_could_not_be_read_is_not_there(plans: list[ExpertPlan], content: bytes) -> None:
    reads = Reads()
    tier = make_tier(1, reads.preadv)
    bad = 2 * EXPERT_BYTES + ALIGNMENT
    reads.failing = {bad}
    with pytest.raises(TransferError):
        fetch(tier, plans[2], 1)
    assert not tier._blocks, "a block with nothing in it is free"
    assert fetch(tier, plans[2], 0) == piece_of(content, 2, 0)
    with pytest.raises(TransferError):
        fetch(tier, plans[2], 1)
    reads.failing.clear()
    before = len(reads.offsets)
    assert fetch(tier, plans[2], 0) == piece_of(content, 2, 0), "other pieces are not lost"
    assert len(reads.offsets) == before
    assert fetch(tier, plans[2], 1) == piece_of(content, 2, 1)
    assert reads.offsets.count(bad) == 3
    tier.close()


def test_who_waited_for_a_failed_read_tries_itself(plans: list[ExpertPlan], content: bytes) -> None:
    reads = Reads()
    reads.failing = {0}
    reads.gate.clear()
    tier = make_tier(2, reads.preadv)
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(fetch, tier, plans[0], 0)
        assert reads.begun.acquire(timeout=PATIENCE_S)
        other = pool.submit(fetch, tier, plans[0], 0)
        time.sleep(0.05)
        reads.gate.set()
        with pytest.raises(TransferError):
            one.result(PATIENCE_S)
        with pytest.raises(TransferError):
            other.result(PATIENCE_S)
    assert len(reads.offsets) == 2
    reads.failing.clear()
    assert fetch(tier, plans[0], 0) == piece_of(content, 0, 0)
    tier.close()


def test_closing_waits_for_reads_and_turns_the_others_away(
    plans: list[ExpertPlan], content: bytes
) -> None:
    reads = Reads()
    reads.gate.clear()
    tier = make_tier(1, reads.preadv)
    with ThreadPoolExecutor(3) as pool:
        reading = pool.submit(fetch, tier, plans[0], 0)
        assert reads.begun.acquire(timeout=PATIENCE_S)
        waiting = pool.submit(fetch, tier, plans[1], 0)
        closing = pool.submit(tier.close)
        with pytest.raises(ForeloadError, match="closed"):
            waiting.result(PATIENCE_S)
        assert not closing.done()
        reads.gate.set()
        assert reading.result(PATIENCE_S) == piece_of(content, 0, 0)
        closing.result(PATIENCE_S)
    with pytest.raises(ForeloadError, match="closed"):
        fetch(tier, plans[0], 0)
    tier.close()


def test_no_room_for_one_expert_is_refused() -> None:
    with pytest.raises(CapacityError, match="no room for one expert") as caught:
        HostTier(EXPERT_BYTES - 1, EXPERT_BYTES)
    assert (caught.value.needed_bytes, caught.value.setting) == (EXPERT_BYTES, "host_memory")
    tier = HostTier(3 * EXPERT_BYTES - 1, EXPERT_BYTES)
    assert (tier.num_blocks, tier.num_bytes) == (2, 2 * EXPERT_BYTES)
    tier.close()


def test_converted_experts_are_kept_converted(plans: list[ExpertPlan], content: bytes) -> None:
    calls = []

    def convert(raw: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        calls.append(len(raw))
        return {"weight": raw[0].to(torch.float32)}

    tensor = ExpertTensor("weight", "float32", (100,), 400)
    plan = ExpertPlan((Span(plans[0].spans[0].path, 7, 100),), (tensor,), convert)
    tier = HostTier(slot_bytes(plan), slot_bytes(plan))
    assert tier.num_pieces(plan) == 1
    for _ in range(2):
        with tier.hold(plan, 0) as held:
            values = held.content[:400].view(torch.float32)
            assert values.tolist() == list(content[7:107])
    assert calls == [1]
    tier.close()


def test_pages_are_locked_once_and_unlocked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[tuple[str, int]] = []
    monkeypatch.setattr(cuda, "page_lock", lambda address, size, device: log.append(("lock", size)))
    monkeypatch.setattr(
        cuda, "page_unlock", lambda address, device: log.append(("unlock", address))
    )
    tier = HostTier(2 * ALIGNMENT, ALIGNMENT, device=torch.device("cuda", 0))
    assert log == [("lock", 2 * ALIGNMENT)]
    address = tier._arena.block(0).data_ptr()
    tier.close()
    tier.close()
    assert log[1:] == [("unlock", address)]


def test_a_driver_that_refuses_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(address: int, size: int, device: torch.device) -> None:
        raise CapacityError("no", needed_bytes=size, available_bytes=0, setting="host_memory")

    made: list[SlotArena] = []
    monkeypatch.setattr(cuda, "page_lock", refuse)
    with pytest.raises(CapacityError):
        HostTier(
            ALIGNMENT,
            ALIGNMENT,
            device=torch.device("cuda", 0),
            reader=lambda arena: made.append(arena) or DiskBackend(arena),  # type: ignore[func-returns-value]
        )
    assert made == []
