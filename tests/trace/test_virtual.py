"""The simulated link does what the real one does: same order, same ends, and time adds up."""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING

import pytest

from fakes import make_plan
from foreload.errors import ForeloadError
from foreload.memory.transfer import TransferState
from foreload.trace.virtual import VirtualClock, VirtualSlots, VirtualTransfers
from foreload.types import ExpertKey, Priority

if TYPE_CHECKING:
    from foreload.memory.transfer import Transfer

DEMAND, PREFETCH = Priority.DEMAND, Priority.PREFETCH


class Bench:
    """A link that carries 100 bytes a second, in pieces of 10."""

    def __init__(
        self,
        *,
        num_workers: int = 1,
        latency_s: float = 0.0,
        bandwidth_bytes_s: float = 100.0,
        compute_share: float = 1.0,
        copy_share: float = 1.0,
        call_s: float = 0.0,
    ) -> None:
        self.clock = VirtualClock()
        self.link = VirtualTransfers(
            self.clock,
            bandwidth_bytes_s=bandwidth_bytes_s,
            latency_s=latency_s,
            num_workers=num_workers,
            piece_bytes=10,
            compute_share=compute_share,
            copy_share=copy_share,
            call_s=call_s,
        )

    def submit(
        self, expert: int, priority: Priority = DEMAND, *, order: float = 0.0, num_bytes: int = 20
    ) -> Transfer:
        key = ExpertKey(0, expert)
        return self.link.submit(key, make_plan(key, num_bytes), expert, priority, order=order)

    def ends(self) -> list[tuple[int, float]]:
        """Let everything end; give (expert, time)."""
        ended = []
        while self.link.num_open:
            ended += [(t.key.expert, round(self.clock(), 9)) for t in self.link.wait()]
        return ended


def test_a_copy_takes_its_bytes_over_the_bandwidth() -> None:
    bench = Bench()
    copy = bench.submit(0)
    assert copy.state is TransferState.RUNNING
    assert bench.link.poll() == []
    bench.clock.advance(0.19)
    assert bench.link.poll() == []
    bench.clock.advance(0.02)
    assert bench.link.poll() == [copy]
    assert copy.state is TransferState.DONE
    assert copy.bytes_moved == 20
    assert copy.busy == [(0.0, pytest.approx(0.1)), (pytest.approx(0.1), pytest.approx(0.2))]
    assert bench.clock() == pytest.approx(0.21), "polling takes no time"
    assert bench.link.wait() == [], "nothing is open: waiting returns at once"
    assert bench.clock() == pytest.approx(0.21)


def test_a_copy_begins_when_it_is_asked_for() -> None:
    bench = Bench()
    bench.clock.advance(1.0)
    bench.submit(0)
    assert bench.ends() == [(0, 1.2)]


def test_waiting_passes_exactly_the_time_that_is_left() -> None:
    bench = Bench()
    copy = bench.submit(0)
    bench.clock.advance(0.05)
    assert bench.link.wait(0.1) == []
    assert bench.clock() == pytest.approx(0.15)
    assert bench.link.wait() == [copy]
    assert bench.clock() == pytest.approx(0.2)


def test_the_last_piece_is_as_small_as_what_is_left() -> None:
    bench = Bench()
    copy = bench.submit(0, num_bytes=24)
    assert bench.ends() == [(0, 0.24)]
    assert [round(end - start, 9) for start, end in copy.busy] == [0.1, 0.1, 0.04]


def test_demands_overtake_prefetches_and_prefetches_go_by_order() -> None:
    bench = Bench()
    bench.submit(0)
    for expert, priority, order in [(1, PREFETCH, 2.0), (2, PREFETCH, 1.0), (3, DEMAND, 0.0)]:
        bench.submit(expert, priority, order=order)
    assert bench.ends() == [(0, 0.2), (3, 0.4), (2, 0.6), (1, 0.8)]


def test_a_demand_waits_for_one_piece_of_a_prefetch_not_for_all() -> None:
    bench = Bench()
    bench.submit(0, PREFETCH)
    bench.clock.advance(0.05)
    bench.submit(1)
    assert bench.ends() == [(1, 0.3), (0, 0.4)]


def test_a_promoted_prefetch_goes_on_where_it_stopped() -> None:
    bench = Bench()
    guess = bench.submit(0, PREFETCH)
    bench.submit(1)
    bench.submit(2, PREFETCH, order=-1.0)
    bench.link.raise_priority(guess)
    assert guess.is_guess
    assert bench.ends() == [(1, 0.3), (0, 0.4), (2, 0.6)]


def test_a_cancelled_copy_ends_at_once_while_queued_and_after_its_piece_while_running() -> None:
    bench = Bench()
    running, queued = bench.submit(0, PREFETCH), bench.submit(1, PREFETCH)
    assert bench.link.cancel(queued)
    assert bench.link.poll() == [queued]
    assert bench.link.cancel(running)
    assert bench.link.poll() == []
    assert bench.link.wait() == [running]
    assert bench.clock() == pytest.approx(0.1)
    assert (running.bytes_moved, queued.bytes_moved) == (10, 0)
    assert {running.state, queued.state} == {TransferState.CANCELLED}
    assert not bench.link.cancel(running)


def test_a_cancelled_copy_can_be_demanded_while_its_piece_runs() -> None:
    bench = Bench()
    guess = bench.submit(0, PREFETCH)
    bench.link.cancel(guess)
    bench.link.raise_priority(guess)
    assert bench.ends() == [(0, 0.2)]
    assert guess.state is TransferState.DONE


def test_workers_share_the_bandwidth() -> None:
    bench = Bench(num_workers=2)
    bench.submit(0, num_bytes=10)
    bench.submit(1, num_bytes=10)
    assert bench.ends() == [(0, 0.2), (1, 0.2)]
    bench.submit(2, num_bytes=20)
    assert bench.ends() == [(2, 0.4)], "both carry pieces of the one copy there is"


def test_latency_is_hidden_behind_another_copy_where_there_are_workers() -> None:
    alone, together = Bench(latency_s=0.1), Bench(latency_s=0.1, num_workers=2)
    for bench in (alone, together):
        bench.submit(0, num_bytes=10)
        bench.submit(1, num_bytes=10)
    assert alone.ends() == [(0, 0.2), (1, 0.4)]
    assert together.ends() == [(0, 0.3), (1, 0.3)]


def test_an_infinite_link_takes_no_time() -> None:
    bench = Bench(bandwidth_bytes_s=math.inf, num_workers=2)
    copies = [bench.submit(expert) for expert in range(5)]
    assert bench.link.poll() == copies
    assert bench.clock() == 0.0


def test_a_closed_link_has_ended_everything() -> None:
    bench = Bench()
    running, queued = bench.submit(0), bench.submit(1)
    bench.link.close()
    assert {*bench.link.poll()} == {running, queued}
    with pytest.raises(ForeloadError, match="closed"):
        bench.submit(2)


def test_slots_without_memory_have_no_parameters() -> None:
    slots = VirtualSlots(3, 4096)
    assert (slots.num_slots, slots.slot_bytes) == (3, 4096)
    assert slots.tensors(0, make_plan(ExpertKey(0, 0))) == {}


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_however_it_is_used_no_byte_is_lost_and_the_link_is_never_idle(num_workers: int) -> None:
    draw = random.Random(num_workers)
    bench = Bench(num_workers=num_workers)
    opened: list[Transfer] = []
    ended: list[Transfer] = []
    for expert in range(400):
        bench.clock.advance(draw.choice([0.0, 0.01, 0.17, 0.3]))
        opened.append(bench.submit(expert, draw.choice([DEMAND, PREFETCH]), order=draw.random()))
        match draw.randrange(4):
            case 0:
                bench.link.cancel(draw.choice(opened))
            case 1:
                bench.link.raise_priority(draw.choice(opened))
            case 2:
                ended += bench.link.poll()
            case 3:
                ended += bench.link.wait()
    while bench.link.num_open:
        ended += bench.link.wait()
    ended += bench.link.poll()
    assert sorted(t.key.expert for t in ended) == list(range(400)), "each ends exactly once"
    assert all(t.bytes_moved == 20 for t in ended if t.state is TransferState.DONE)
    moved = sum(t.bytes_moved for t in ended)
    pieces = sorted(span for t in ended for span in t.busy)
    busy_s, until_s = 0.0, 0.0
    for start_s, end_s in pieces:
        busy_s += max(0.0, end_s - max(start_s, until_s))
        until_s = max(until_s, end_s)
    assert moved == pytest.approx(100.0 * busy_s)


class TestComputing:
    def test_it_takes_its_time_where_nothing_is_copied(self) -> None:
        bench = Bench(compute_share=0.5, copy_share=0.5)
        bench.link.compute(0.3)
        assert bench.clock() == pytest.approx(0.3)

    def test_copies_go_on_beside_it(self) -> None:
        bench = Bench()
        copy = bench.submit(0)
        bench.link.compute(0.5)
        assert bench.clock() == pytest.approx(0.5)
        assert bench.link.poll() == [copy]
        assert copy.busy[-1][1] == pytest.approx(0.2)

    def test_it_is_slower_only_while_a_copy_is_in_flight(self) -> None:
        bench = Bench(compute_share=0.5)
        bench.submit(0)
        bench.link.compute(0.3)
        # 0.2 s beside the copy are 0.1 s of work; the other 0.2 s run alone.
        assert bench.clock() == pytest.approx(0.4)

    def test_copies_are_slower_only_while_it_runs(self) -> None:
        bench = Bench(copy_share=0.5)
        bench.submit(0)
        bench.link.compute(0.2)
        assert bench.clock() == pytest.approx(0.2)
        # Half of the 20 bytes have arrived.
        assert bench.ends() == [(0, pytest.approx(0.3))]

    def test_pieces_taken_up_meanwhile_are_in_its_way_too(self) -> None:
        bench = Bench(compute_share=0.5, num_workers=2)
        for expert in range(3):
            bench.submit(expert)
        bench.link.compute(1.0)
        assert bench.clock() == pytest.approx(0.6 + (1.0 - 0.3))
        assert len(bench.link.poll()) == 3

    def test_asking_for_a_copy_takes_time_in_which_it_begins(self) -> None:
        bench = Bench(call_s=0.05)
        bench.submit(0)
        assert bench.clock() == pytest.approx(0.05)
        assert bench.ends() == [(0, pytest.approx(0.2))]

    def test_a_link_without_limits_ends_its_copies_at_once(self) -> None:
        bench = Bench(bandwidth_bytes_s=math.inf, compute_share=0.5)
        bench.submit(0)
        bench.link.compute(0.1)
        assert bench.clock() == pytest.approx(0.1)
        assert len(bench.link.poll()) == 1
