"""Copies happen in order of urgency, end exactly once, and never make anyone wait for ever."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from fakes import PATIENCE_S, InstantBackend, SteppedBackend, finish, make_plan, mark_of
from foreload.errors import ForeloadError, TransferError
from foreload.memory.arena import SlotArena
from foreload.memory.transfer import Transfer, TransferEngine, TransferState
from foreload.types import ExpertKey, ExpertPlan, Priority

if TYPE_CHECKING:
    from collections.abc import Iterator

DEMAND, PREFETCH = Priority.DEMAND, Priority.PREFETCH


class Bench:
    """A transfer engine with one worker over a disk that the test steps."""

    def __init__(self, *, pieces: int = 1, num_workers: int = 1) -> None:
        self.arena = SlotArena(16, 4096)
        self.disk = SteppedBackend(self.arena, pieces=pieces)
        self.engine = TransferEngine(self.disk, num_workers=num_workers)

    def submit(self, expert: int, priority: Priority, order: float = 0.0) -> Transfer:
        key = ExpertKey(0, expert)
        return self.engine.submit(key, make_plan(key), expert, priority, order=order)

    def begin(self, expert: int, priority: Priority = PREFETCH) -> Transfer:
        """Submit a copy and wait until its first piece is on its way."""
        transfer = self.submit(expert, priority)
        assert self.disk.wait_begun() == (f"0.{expert}", 0)
        return transfer

    def end(self) -> list[Transfer]:
        """Let everything run to its end, and give what finished."""
        self.disk.let_all_go()
        finished: list[Transfer] = []
        while self.engine.num_open:
            finished += finish(self.engine.wait)
        return finished + self.engine.poll()


@pytest.fixture
def make_bench() -> Iterator[Any]:
    benches: list[Bench] = []

    def make(**settings: Any) -> Bench:
        benches.append(Bench(**settings))
        return benches[-1]

    yield make
    for bench in benches:
        bench.disk.let_all_go()
        finish(bench.engine.close)
        assert not any(thread.is_alive() for thread in bench.engine._threads)
        assert bench.disk.is_closed


def states(*transfers: Transfer) -> list[str]:
    return [transfer.state.value for transfer in transfers]


def test_a_copy_goes_through_its_states_and_is_reported_once(make_bench: Any) -> None:
    bench = make_bench(pieces=2)
    copy = bench.begin(3)
    assert copy.state is TransferState.RUNNING
    assert bench.engine.num_open == 1
    assert bench.engine.poll() == []
    bench.disk.let_go(2)
    assert finish(bench.engine.wait) == [copy]
    assert copy.state is TransferState.DONE
    assert copy.error is None
    assert copy.bytes_moved == 16
    assert len(copy.busy) == 2
    assert all(start <= end for start, end in copy.busy)
    assert bench.engine.num_open == 0
    assert bench.engine.poll() == []
    weight = bench.arena.tensors(3, copy.plan)["weight"]
    assert weight.tolist() == [mark_of(copy.key)] * 4


class TestOrder:
    def test_demands_overtake_prefetches(self, make_bench: Any) -> None:
        bench = make_bench()
        bench.begin(0, DEMAND)
        for expert, priority in [(1, PREFETCH), (2, DEMAND), (3, PREFETCH), (4, DEMAND)]:
            bench.submit(expert, priority)
        bench.end()
        assert bench.disk.copied == ["0.0", "0.2", "0.4", "0.1", "0.3"]

    def test_among_equals_the_smaller_order_goes_first_then_the_earlier(
        self, make_bench: Any
    ) -> None:
        bench = make_bench()
        bench.begin(0, DEMAND)
        for expert, order in [(1, 2.0), (2, 1.0), (3, 2.0), (4, 0.5)]:
            bench.submit(expert, PREFETCH, order)
        bench.end()
        assert bench.disk.copied == ["0.0", "0.4", "0.2", "0.1", "0.3"]

    def test_a_demand_waits_for_one_piece_of_a_prefetch_not_for_all(self, make_bench: Any) -> None:
        bench = make_bench(pieces=3)
        guess = bench.begin(0)
        demand = bench.submit(1, DEMAND)
        bench.disk.let_go(4)
        assert finish(bench.engine.wait) == [demand]
        assert states(guess) == ["running"]
        assert bench.end() == [guess]
        log = [("0.0", 0), *(("0.1", i) for i in range(3)), ("0.0", 1), ("0.0", 2)]
        assert bench.disk.log == log, "pieces are copied once each, the demand's in between"
        assert guess.bytes_moved == demand.bytes_moved

    def test_a_prefetch_does_not_overtake_a_demand_or_another_prefetch(
        self, make_bench: Any
    ) -> None:
        bench = make_bench(pieces=2)
        bench.begin(0, DEMAND)
        bench.submit(1, PREFETCH, order=5.0)
        bench.submit(2, PREFETCH, order=1.0)
        bench.end()
        assert [name for name, _ in bench.disk.log] == ["0.0"] * 2 + ["0.2"] * 2 + ["0.1"] * 2

    def test_workers_copy_side_by_side(self, make_bench: Any) -> None:
        bench = make_bench(num_workers=3)
        for expert in range(4):
            bench.submit(expert, DEMAND)
        begun = {bench.disk.wait_begun() for _ in range(3)}
        assert begun == {("0.0", 0), ("0.1", 0), ("0.2", 0)}
        assert len(bench.end()) == 4

    def test_workers_share_the_pieces_of_the_most_urgent_copy(self, make_bench: Any) -> None:
        bench = make_bench(num_workers=3, pieces=4)
        first, second = bench.submit(0, DEMAND), bench.submit(1, DEMAND)
        begun = {bench.disk.wait_begun() for _ in range(3)}
        assert begun == {("0.0", 0), ("0.0", 1), ("0.0", 2)}
        assert set(bench.end()) == {first, second}
        assert sorted(bench.disk.log) == [(f"0.{e}", p) for e in range(2) for p in range(4)]
        assert first.bytes_moved == second.bytes_moved == 16


class TestPromotion:
    def test_a_queued_prefetch_becomes_a_demand_and_goes_first(self, make_bench: Any) -> None:
        bench = make_bench()
        bench.begin(0, DEMAND)
        bench.submit(1, PREFETCH)
        late = bench.submit(2, PREFETCH)
        bench.engine.raise_priority(late)
        assert late.priority is DEMAND
        assert late.is_guess, "what began as a guess stays one in the books"
        assert len(bench.end()) == 3
        assert bench.disk.copied == ["0.0", "0.2", "0.1"]

    def test_a_running_prefetch_that_becomes_a_demand_is_not_overtaken(
        self, make_bench: Any
    ) -> None:
        bench = make_bench(pieces=3)
        guess = bench.begin(0)
        bench.engine.raise_priority(guess)
        bench.submit(1, DEMAND)
        bench.end()
        assert [name for name, _ in bench.disk.log] == ["0.0"] * 3 + ["0.1"] * 3

    def test_an_overtaken_prefetch_can_be_promoted_and_goes_on_where_it_stopped(
        self, make_bench: Any
    ) -> None:
        bench = make_bench(pieces=2)
        guess = bench.begin(0)
        bench.submit(1, DEMAND)
        bench.submit(2, PREFETCH, order=-1.0)
        bench.disk.let_go()
        assert bench.disk.wait_begun() == ("0.1", 0)
        bench.engine.raise_priority(guess)
        bench.end()
        assert bench.disk.log == [
            (f"0.{e}", p) for e, p in [(0, 0), (1, 0), (1, 1), (0, 1), (2, 0), (2, 1)]
        ]

    def test_a_cancelled_prefetch_still_running_can_be_saved(self, make_bench: Any) -> None:
        bench = make_bench(pieces=2)
        guess = bench.begin(0)
        assert bench.engine.cancel(guess)
        bench.engine.raise_priority(guess)
        assert bench.end() == [guess]
        assert guess.state is TransferState.DONE
        assert guess.bytes_moved == 16

    def test_promoting_twice_or_what_has_ended_changes_nothing(self, make_bench: Any) -> None:
        bench = make_bench()
        bench.begin(0, DEMAND)
        twice = bench.submit(1, PREFETCH)
        cancelled = bench.submit(2, PREFETCH)
        bench.engine.cancel(cancelled)
        for transfer in (twice, twice, cancelled):
            bench.engine.raise_priority(transfer)
        assert len(bench.end()) == 3
        bench.engine.raise_priority(twice)
        assert bench.disk.copied == ["0.0", "0.1"]
        assert states(twice, cancelled) == ["done", "cancelled"]
        assert bench.engine.num_open == 0


class TestCancellation:
    def test_a_queued_copy_never_begins(self, make_bench: Any) -> None:
        bench = make_bench()
        bench.begin(0, DEMAND)
        guess = bench.submit(1, PREFETCH)
        assert bench.engine.cancel(guess)
        assert guess.state is TransferState.CANCELLED
        assert bench.engine.poll() == [guess]
        assert not bench.engine.cancel(guess)
        bench.end()
        assert bench.disk.copied == ["0.0"]

    def test_a_running_copy_stops_after_its_piece(self, make_bench: Any) -> None:
        bench = make_bench(pieces=3)
        guess = bench.begin(0)
        assert bench.engine.cancel(guess)
        assert guess.state is TransferState.RUNNING, "its slot is in use until the piece ends"
        assert bench.engine.poll() == []
        bench.disk.let_go()
        assert finish(bench.engine.wait) == [guess]
        assert guess.state is TransferState.CANCELLED
        assert bench.disk.log == [("0.0", 0)]
        assert guess.bytes_moved == 16 // 3

    def test_a_copy_in_its_last_piece_is_done_all_the_same(self, make_bench: Any) -> None:
        bench = make_bench(pieces=1)
        guess = bench.begin(0)
        assert bench.engine.cancel(guess)
        assert bench.end() == [guess]
        assert guess.state is TransferState.DONE
        assert not bench.engine.cancel(guess)

    def test_a_cancelled_demand_at_the_head_of_the_queue_stops_nobody(
        self, make_bench: Any
    ) -> None:
        bench = make_bench(pieces=4)
        guess = bench.begin(0)
        demand = bench.submit(1, DEMAND)
        bench.engine.cancel(demand)
        assert set(bench.end()) == {guess, demand}
        assert states(guess, demand) == ["done", "cancelled"]
        assert bench.disk.log == [("0.0", piece) for piece in range(4)]


class TestErrors:
    def test_an_error_ends_one_copy_and_no_worker(self, make_bench: Any) -> None:
        bench = make_bench()
        bench.disk.failing.add("0.0")
        broken = bench.submit(0, DEMAND)
        fine = bench.submit(1, DEMAND)
        assert set(bench.end()) == {broken, fine}
        assert states(broken, fine) == ["failed", "done"]
        assert isinstance(broken.error, TransferError)
        assert "expert 0 of MoE layer 0" in str(broken.error)
        assert isinstance(broken.error.__cause__, OSError)

    def test_a_failed_copy_ends_only_when_no_piece_of_it_is_in_flight(self) -> None:
        second_begun = threading.Event()

        class FirstPieceBroken(SteppedBackend):
            def copy_piece(self, plan: ExpertPlan, slot: int, piece: int) -> int:
                if piece == 0:
                    second_begun.wait(PATIENCE_S)
                    raise OSError(5, "Input/output error")
                second_begun.set()
                return super().copy_piece(plan, slot, piece)

        disk = FirstPieceBroken(SlotArena(1, 4096), pieces=3)
        engine = TransferEngine(disk, num_workers=2)
        key = ExpertKey(0, 0)
        transfer = engine.submit(key, make_plan(key), 0, DEMAND)
        begun = disk.wait_begun()
        while transfer.error is None:
            time.sleep(0.001)
        engine.raise_priority(transfer)  # must not bring it back to life
        assert engine.poll() == [], "another piece still writes to the slot"
        disk.let_all_go()
        assert finish(engine.wait) == [transfer]
        assert transfer.state is TransferState.FAILED
        assert disk.log == [begun], "no piece is begun after a failure"
        finish(engine.close)

    def test_a_transfer_error_is_passed_on_as_it_is(self) -> None:
        error = TransferError("the file is gone", hint="bring it back")

        class Broken(InstantBackend):
            def copy_piece(self, plan: ExpertPlan, slot: int, piece: int) -> int:
                raise error

        engine = TransferEngine(Broken(SlotArena(1, 4096)), num_workers=1)
        key = ExpertKey(0, 0)
        transfer = engine.submit(key, make_plan(key), 0, DEMAND)
        assert finish(engine.wait) == [transfer]
        assert transfer.error is error
        finish(engine.close)


class TestWaiting:
    def test_wait_gives_up_after_its_timeout(self, make_bench: Any) -> None:
        bench = make_bench()
        bench.begin(0)
        start = time.perf_counter()
        assert bench.engine.wait(0.05) == []
        assert 0.04 < time.perf_counter() - start < PATIENCE_S

    def test_wait_returns_at_once_when_there_is_nothing_to_wait_for(self, make_bench: Any) -> None:
        assert finish(make_bench().engine.wait, within_s=5) == []

    def test_wait_wakes_up_for_a_cancellation_by_another_thread(self, make_bench: Any) -> None:
        bench = make_bench()
        bench.begin(0)
        queued = bench.submit(1, PREFETCH)
        timer = threading.Timer(0.05, bench.engine.cancel, (queued,))
        timer.start()
        assert finish(bench.engine.wait) == [queued]
        timer.join()


class TestClosing:
    def test_close_cancels_the_queue_and_lets_the_running_piece_end(self, make_bench: Any) -> None:
        bench = make_bench(pieces=2)
        running = bench.begin(0)
        queued = [bench.submit(expert, DEMAND) for expert in (1, 2)]
        closing = threading.Thread(target=bench.engine.close)
        closing.start()
        bench.disk.let_go()
        closing.join(PATIENCE_S)
        assert not closing.is_alive()
        assert states(running, *queued) == ["cancelled"] * 3
        assert set(bench.engine.poll()) == {running, *queued}
        assert bench.engine.num_open == 0
        assert bench.disk.is_closed
        assert bench.disk.log == [("0.0", 0)]

    def test_close_wakes_who_waits(self, make_bench: Any) -> None:
        bench = make_bench(pieces=2)
        running = bench.begin(0)
        woken: list[list[Transfer]] = []
        waiting = threading.Thread(target=lambda: woken.append(bench.engine.wait()))
        waiting.start()
        bench.disk.let_all_go()
        finish(bench.engine.close)
        waiting.join(PATIENCE_S)
        assert not waiting.is_alive()
        assert woken == [[running]]

    def test_a_closed_engine_takes_no_copies_and_closes_again(self, make_bench: Any) -> None:
        bench = make_bench()
        finish(bench.engine.close)
        finish(bench.engine.close)
        with pytest.raises(ForeloadError, match="closed"):
            bench.submit(0, DEMAND)
        assert bench.engine.num_open == 0
        assert bench.engine.wait() == []


class JitteryBackend(InstantBackend):
    """Takes a random while for each piece, and fails now and then."""

    def __init__(self, arena: SlotArena, seed: int) -> None:
        super().__init__(arena)
        self.random = random.Random(seed)
        self.begun: set[tuple[int, int]] = set()
        self.flying: Counter[int] = Counter()
        self.faults: list[str] = []

    def num_pieces(self, plan: ExpertPlan) -> int:
        return 1 + int(plan.spans[0].path.split(".")[1]) % 4

    def copy_piece(self, plan: ExpertPlan, slot: int, piece: int) -> int:
        with self._lock:
            if (slot, piece) in self.begun:
                self.faults.append(f"piece {piece} of {slot} is copied twice")
            self.begun.add((slot, piece))
            self.flying[slot] += 1
            luck = self.random.random()
        if luck < 0.3:
            time.sleep(luck / 1000)
        with self._lock:
            self.flying[slot] -= 1
        if luck > 0.97:
            raise OSError(5, "Input/output error")
        return 1


@pytest.mark.parametrize(("seed", "num_workers"), [(0, 1), (1, 2), (2, 2), (3, 4)])
def test_under_random_use_every_copy_ends_exactly_once(seed: int, num_workers: int) -> None:
    """Submit, promote, cancel, poll and wait at random: no copy is lost, no wait hangs."""
    chance = random.Random(seed)
    disk = JitteryBackend(SlotArena(1, 4096), seed)
    engine = TransferEngine(disk, num_workers=num_workers)
    open_transfers: dict[int, Transfer] = {}
    ended: list[Transfer] = []
    submitted = 0

    def book(finished: list[Transfer]) -> None:
        for transfer in finished:
            assert transfer.state.value in ("done", "cancelled", "failed")
            assert (transfer.error is not None) is (transfer.state is TransferState.FAILED)
            assert open_transfers.pop(transfer.slot) is transfer, "reported twice"
            assert disk.flying[transfer.slot] == 0, "its slot is still written to"
            ended.append(transfer)

    def use() -> None:
        nonlocal submitted
        deadline = time.perf_counter() + 1.0
        while time.perf_counter() < deadline:
            match chance.choice(["submit", "submit", "promote", "cancel", "poll", "wait"]):
                case "submit" if len(open_transfers) < 12:
                    key = ExpertKey(0, submitted)
                    priority = chance.choice([DEMAND, PREFETCH])
                    open_transfers[submitted] = engine.submit(
                        key, make_plan(key), submitted, priority, order=chance.random()
                    )
                    submitted += 1
                case "promote" if open_transfers:
                    engine.raise_priority(chance.choice(list(open_transfers.values())))
                case "cancel" if open_transfers:
                    engine.cancel(chance.choice(list(open_transfers.values())))
                case "poll":
                    book(engine.poll())
                case "wait":
                    book(engine.wait())
                    assert engine.num_open <= len(open_transfers)
        while open_transfers:
            book(engine.wait())

    finish(use)
    assert disk.faults == []
    assert len(ended) == submitted > 100
    assert {transfer.state.value for transfer in ended} == {"done", "cancelled", "failed"}
    for transfer in ended:
        if transfer.state is TransferState.DONE:
            assert transfer.bytes_moved == disk.num_pieces(transfer.plan)
    assert engine.num_open == 0
    finish(engine.close)
