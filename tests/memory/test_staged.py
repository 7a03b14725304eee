"""From disk through the host tier into slots, by threads, beside a device that computes late."""

from __future__ import annotations

import os
import random
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fakes import assert_settled, finish
from foreload.errors import TransferError
from foreload.memory.arena import ALIGNMENT, slot_bytes
from foreload.memory.device_slots import DeviceSlots
from foreload.memory.disk import DiskBackend
from foreload.memory.eviction import make_eviction
from foreload.memory.host_tier import HostTier
from foreload.memory.staged import StagedBackend
from foreload.memory.tiers import ExpertTiers
from foreload.memory.transfer import TransferEngine
from foreload.metrics import Metrics, Timeline
from foreload.types import ExpertKey, ExpertPlan, ExpertTensor, Span

if TYPE_CHECKING:
    from collections.abc import Callable

LAYERS, EXPERTS = 3, 6
NUM_BYTES = 2 * ALIGNMENT + 400
CPU = torch.device("cpu")


class LateDevice:
    """Streams of a device that reads slots only when somebody waits for it to have done so."""

    def __init__(self) -> None:
        self.asked: list[Callable[[], None]] = []
        self._num_done = 0
        self._lock = threading.Lock()

    def order_reads(self) -> None:
        pass

    def mark_reads(self) -> int:
        return len(self.asked)

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: int | None) -> None:
        self.wait(after or 0)
        target.copy_(source)

    def wait(self, number: int) -> None:
        with self._lock:
            while self._num_done < number:
                self.asked[self._num_done]()
                self._num_done += 1


def value_of(key: ExpertKey) -> int:
    return 1 + key.layer * EXPERTS + key.expert


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> list[list[ExpertPlan]]:
    """Experts that lie one behind the other, unaligned, each filled with its own value."""
    path = tmp_path_factory.mktemp("checkpoint") / "experts.safetensors"
    keys = [ExpertKey(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]
    path.write_bytes(bytes(64) + b"".join(bytes([value_of(key)]) * NUM_BYTES for key in keys))
    tensor = ExpertTensor("weight", "uint8", (NUM_BYTES,), NUM_BYTES, span=0)
    made = [
        ExpertPlan((Span(str(path), 64 + place * NUM_BYTES, NUM_BYTES),), (tensor,))
        for place in range(len(keys))
    ]
    return [made[layer * EXPERTS : (layer + 1) * EXPERTS] for layer in range(LAYERS)]


def make_tiers(
    plans: list[list[ExpertPlan]],
    *,
    num_slots: int,
    num_blocks: int,
    num_workers: int = 2,
    preadv: Any = os.preadv,
) -> tuple[ExpertTiers, DeviceSlots, HostTier, Metrics]:
    size = max(slot_bytes(plan) for layer in plans for plan in layer)
    slots = DeviceSlots(num_slots, size, CPU)
    host = HostTier(
        num_blocks * size,
        size,
        reader=lambda arena: DiskBackend(arena, piece_bytes=ALIGNMENT, preadv=preadv),
    )
    metrics = Metrics()
    tiers = ExpertTiers(
        slots,
        plans,
        TransferEngine(StagedBackend(slots, host), num_workers=num_workers),
        make_eviction("lru", LAYERS, EXPERTS),
        metrics,
        Timeline(),
    )
    return tiers, slots, host, metrics


@pytest.mark.parametrize("num_blocks", [1, 2, 5, LAYERS * EXPERTS])
@pytest.mark.parametrize("num_workers", [1, 3])
def test_a_device_reads_what_was_there_when_it_was_asked(
    plans: list[list[ExpertPlan]], num_blocks: int, num_workers: int
) -> None:
    tiers, slots, host, metrics = make_tiers(
        plans, num_slots=3, num_blocks=num_blocks, num_workers=num_workers
    )
    device = LateDevice()
    slots._streams = device  # type: ignore[assignment]
    rng = random.Random(num_blocks)
    wrong: list[ExpertKey] = []

    def read_late(key: ExpertKey, weight: torch.Tensor) -> Callable[[], None]:
        def read() -> None:
            if not bool((weight == value_of(key)).all()):
                wrong.append(key)

        return read

    def run() -> None:
        for step in range(60):
            layer = step % LAYERS
            wanted = sorted(rng.sample(range(EXPERTS), rng.randint(1, 4)))
            tiers.observe(layer, dict.fromkeys(wanted, 1), 1)
            demand = tiers.demand(layer, wanted)
            guess = ExpertKey((layer + 1) % LAYERS, rng.randrange(EXPERTS))
            tiers.prefetch(guess, expected_wait=0.5, order=0.0)
            for key, parameters in demand:
                device.asked.append(read_late(key, parameters["weight"]))

    finish(run)
    device.wait(len(device.asked))
    assert wrong == []
    assert len(device.asked) >= 60
    assert_settled(tiers)
    assert host.host_bytes + host.disk_bytes == metrics.bytes_moved
    if num_blocks == LAYERS * EXPERTS:
        assert host.disk_bytes <= LAYERS * EXPERTS * host._arena.slot_bytes, "each is read once"
        assert host.host_bytes > 0
    tiers.close()


def test_a_failed_read_reaches_the_demand_and_is_tried_again(
    plans: list[list[ExpertPlan]],
) -> None:
    is_broken = True

    def preadv(descriptor: int, views: list[memoryview], offset: int) -> int:
        if is_broken:
            raise OSError(5, "Input/output error")
        return os.preadv(descriptor, views, offset)

    tiers, *_ = make_tiers(plans, num_slots=2, num_blocks=1, preadv=preadv)
    with pytest.raises(TransferError, match="Input/output error"):
        finish(lambda: list(tiers.demand(0, [1])))
    assert_settled(tiers)
    is_broken = False
    seen = finish(lambda: [p["weight"].unique().tolist() for _, p in tiers.demand(0, [1])])
    assert seen == [[value_of(ExpertKey(0, 1))]]
    tiers.close()


def test_closing_ends_what_is_on_its_way(plans: list[list[ExpertPlan]]) -> None:
    tiers, slots, host, _ = make_tiers(plans, num_slots=6, num_blocks=1, num_workers=3)
    for expert in range(EXPERTS):
        tiers.prefetch(ExpertKey(0, expert), expected_wait=0.5, order=0.0)
    finish(tiers.close)
    assert host._is_closed
    slots.release()
