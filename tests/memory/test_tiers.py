"""What is demanded arrives, whatever was guessed, failed or called off before."""

from __future__ import annotations

import random
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes import (
    PATIENCE_S,
    SteppedBackend,
    assert_settled,
    finish,
    make_plans,
    make_tiers,
    mark_of,
)
from foreload.errors import CapacityError, ForeloadError, TransferError
from foreload.memory.eviction import LRU
from foreload.memory.tiers import ExpertTiers
from foreload.memory.transfer import TransferState
from foreload.metrics import Metrics, Timeline
from foreload.trace.virtual import VirtualClock, VirtualSlots, VirtualTransfers
from foreload.types import ExpertKey, Lookup

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray


@pytest.fixture
def build() -> Iterator[Any]:
    """Build tiers; at the end they must have settled."""
    made: list[tuple[ExpertTiers, Any]] = []

    def build_one(*args: Any, **settings: Any) -> tuple[ExpertTiers, Any, Metrics]:
        tiers, disk, metrics = make_tiers(*args, **settings)
        made.append((tiers, disk))
        return tiers, disk, metrics

    yield build_one
    for tiers, disk in made:
        if isinstance(disk, SteppedBackend):
            disk.let_all_go()
        assert_settled(tiers)
        finish(tiers.close)


def take(tiers: ExpertTiers, layer: int, experts: Sequence[int]) -> list[int]:
    """Visit a layer as the runtime does; give the experts in the order they were computed."""

    def visit() -> list[int]:
        tiers.observe(layer, dict.fromkeys(experts, 1), 1)
        order = []
        for key, parameters in tiers.demand(layer, experts):
            assert (parameters["weight"] == mark_of(key)).all(), f"{key} shows other bytes"
            order.append(key.expert)
            tiers.cache.check()
        return order

    return finish(visit)


def counts(metrics: Metrics) -> tuple[int, int, int]:
    return metrics.num_hits, metrics.num_late, metrics.num_misses


def guess(tiers: ExpertTiers, layer: int, expert: int, wait: float = 0.1, order: float = 0) -> bool:
    return tiers.prefetch(ExpertKey(layer, expert), expected_wait=wait, order=order)


class FixedWait:
    """Waits that the test sets."""

    def __init__(self, waits: Mapping[tuple[int, int], float], num_experts: int = 8) -> None:
        self.waits = np.full(4 * num_experts, 1.0)
        for (layer, expert), wait in waits.items():
            self.waits[layer * num_experts + expert] = wait

    def observe(
        self, layer: int, counts: Mapping[int, int], num_tokens: int, routing: object = None
    ) -> None:
        pass

    def expected_wait(self) -> NDArray[np.float64]:
        return self.waits


class TestDemand:
    def test_every_expert_comes_once_with_its_own_bytes(self, build: Any) -> None:
        tiers, disk, metrics = build(8)
        assert sorted(take(tiers, 1, [0, 3, 5])) == [0, 3, 5]
        assert sorted(disk.copied) == ["1.0", "1.3", "1.5"]
        assert counts(metrics) == (0, 0, 3)
        assert metrics.demand_bytes == 3 * 16
        assert metrics.prefetch_bytes == 0

    def test_what_is_resident_is_not_copied_again(self, build: Any) -> None:
        tiers, disk, metrics = build(8)
        take(tiers, 0, [0, 1])
        take(tiers, 0, [0, 1, 2])
        assert sorted(disk.copied) == ["0.0", "0.1", "0.2"]
        assert counts(metrics) == (2, 0, 3)

    def test_residents_are_computed_while_the_others_come(self, build: Any) -> None:
        tiers, disk, _ = build(8, backend=SteppedBackend)
        disk.let_go(2)
        take(tiers, 0, [4, 6])
        demand = iter(tiers.demand(0, [1, 4, 6]))
        first = [finish(lambda: next(demand))[0].expert for _ in range(2)]
        assert first == [4, 6], "nothing has been copied, and two experts are computed"
        disk.let_go()
        assert finish(lambda: next(demand))[0].expert == 1
        assert next(demand, None) is None

    @pytest.mark.parametrize("num_slots", [1, 2, 3])
    @pytest.mark.parametrize("num_workers", [1, 3])
    def test_a_layer_gets_through_in_waves_when_slots_are_few(
        self, build: Any, num_slots: int, num_workers: int
    ) -> None:
        tiers, disk, metrics = build(num_slots, num_workers=num_workers)
        for _ in range(2):
            assert sorted(take(tiers, 0, range(8))) == list(range(8))
        assert metrics.num_misses == 16 - metrics.num_hits
        assert len(disk.copied) == metrics.num_misses

    def test_residents_survive_the_waves_until_they_were_computed(self, build: Any) -> None:
        tiers, _, metrics = build(2)
        take(tiers, 0, [6, 7])
        assert take(tiers, 0, range(8))[:2] == [6, 7]
        assert metrics.num_hits == 2

    def test_parameters_are_pinned_while_they_are_used(self, build: Any) -> None:
        tiers, _, _ = build(2)
        demand = iter(tiers.demand(0, [0, 1, 2]))
        key, parameters = finish(lambda: next(demand))
        assert not tiers.cache.evict(key)
        assert (parameters["weight"] == mark_of(key)).all()
        assert finish(lambda: len(list(demand))) == 2

    def test_an_empty_demand_is_over_at_once(self, build: Any) -> None:
        tiers, _, metrics = build(1)
        assert take(tiers, 0, []) == []
        assert counts(metrics) == (0, 0, 0)

    def test_waiting_is_booked_as_stall(self, build: Any) -> None:
        tiers, disk, metrics = build(4, backend=SteppedBackend)
        tiers._timeline.is_on = True
        demand = iter(tiers.demand(0, [0]))
        disk.wait_begun()
        threading.Timer(0.05, disk.let_go).start()
        finish(lambda: next(demand))
        assert 0.02 < metrics.stall_s < PATIENCE_S
        lanes = {span.lane: span for span in tiers._timeline.spans}
        assert lanes["stall"].end_s - lanes["stall"].start_s == pytest.approx(metrics.stall_s)
        assert lanes["disk"].name == "0.0"
        demand.close()


class TestAbandonedDemands:
    def test_an_iteration_that_stops_early_leaves_nothing_pinned(self, build: Any) -> None:
        tiers, _, _ = build(4)
        take(tiers, 0, [0, 1])
        for key, _ in tiers.demand(0, [0, 1, 2]):
            assert key.expert == 0
            break
        assert_settled(tiers)
        assert sorted(take(tiers, 1, [0, 1, 2, 3])) == [0, 1, 2, 3]

    def test_an_error_in_the_loop_leaves_nothing_pinned(self, build: Any) -> None:
        tiers, _, _ = build(4)
        take(tiers, 0, [0, 1])

        def compute() -> None:
            for _ in tiers.demand(0, [0, 1, 2]):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            compute()
        assert_settled(tiers)

    def test_a_demand_nobody_iterates_is_let_go_by_the_next(self, build: Any) -> None:
        tiers, _, _ = build(3)
        take(tiers, 0, [0, 1, 2])
        tiers.demand(0, [0, 1, 2])  # an error came before the loop
        assert sorted(take(tiers, 1, [4, 5, 6])) == [4, 5, 6], "the pins would fill every slot"
        assert_settled(tiers)

    def test_flush_lets_go_of_a_demand_nobody_iterates(self, build: Any) -> None:
        tiers, _, _ = build(3)
        take(tiers, 0, [0, 1])
        tiers.demand(0, [0, 1])
        finish(tiers.flush)
        assert tiers.cache.keys() == []


class TestPrefetch:
    def test_a_guess_in_time_is_a_hit(self, build: Any) -> None:
        tiers, _, metrics = build(4)
        assert guess(tiers, 1, 2)
        finish(tiers.wait_idle)
        assert tiers.cache.lookup(ExpertKey(1, 2)) is Lookup.HIT
        take(tiers, 1, [2])
        assert counts(metrics) == (1, 0, 0)
        assert (metrics.num_prefetched, metrics.num_prefetched_used) == (1, 1)
        assert (metrics.prefetch_bytes, metrics.demand_bytes) == (16, 0)
        assert metrics.wasted_bytes == 0

    def test_a_guess_on_its_way_is_late_and_hurried(self, build: Any) -> None:
        tiers, disk, metrics = build(8, backend=SteppedBackend)
        guess(tiers, 0, 7)
        disk.wait_begun()
        guess(tiers, 1, 1, order=1)
        guess(tiers, 1, 2, order=2)
        tiers.observe(1, {2: 1}, 1)
        demand = tiers.demand(1, [2])
        disk.let_all_go()
        assert finish(lambda: [key.expert for key, _ in demand]) == [2]
        assert counts(metrics) == (0, 1, 0)
        assert disk.copied[:2] == ["0.7", "1.2"]
        assert metrics.num_prefetched_used == 1
        assert metrics.demand_bytes == 0

    def test_what_is_here_or_coming_is_not_guessed_again(self, build: Any) -> None:
        tiers, disk, metrics = build(4, backend=SteppedBackend)
        assert guess(tiers, 0, 0)
        assert not guess(tiers, 0, 0)
        disk.let_all_go()
        finish(tiers.wait_idle)
        assert not guess(tiers, 0, 0)
        assert metrics.num_prefetched == 1
        assert disk.copied == ["0.0"]

    def test_a_guess_never_evicts_what_is_wanted_sooner(self, build: Any) -> None:
        policy = FixedWait({(0, 0): 0.5, (0, 1): 2.0})
        tiers, _, metrics = build(2, policy=policy)
        take(tiers, 0, [0, 1])
        assert not guess(tiers, 1, 0, wait=2.0)
        assert guess(tiers, 1, 0, wait=1.9)
        finish(tiers.wait_idle)
        assert set(tiers.cache.keys()) == {(0, 0), (1, 0)}
        assert not guess(tiers, 1, 1, wait=1.0), "a guess evicts no likelier guess either"
        assert metrics.num_prefetched == 1

    def test_a_demand_takes_the_slot_of_any_guess(self, build: Any) -> None:
        tiers, _, metrics = build(1)
        guess(tiers, 1, 0, wait=0.0)
        finish(tiers.wait_idle)
        assert take(tiers, 0, [3]) == [3]
        assert metrics.wasted_bytes == 16
        assert metrics.num_prefetched_used == 0

    def test_guesses_that_hold_every_slot_are_called_off_for_a_demand(self, build: Any) -> None:
        tiers, disk, metrics = build(3, backend=SteppedBackend, pieces=2)
        for expert in range(3):
            assert guess(tiers, 2, expert)
        disk.wait_begun()
        tiers.observe(0, {5: 1, 6: 1}, 1)
        demand = tiers.demand(0, [5, 6])
        disk.let_all_go()
        assert finish(lambda: sorted(key.expert for key, _ in demand)) == [5, 6]
        assert counts(metrics) == (0, 0, 2)

    def test_wrong_guesses_are_called_off_when_the_truth_is_known(self, build: Any) -> None:
        tiers, disk, metrics = build(8, backend=SteppedBackend, pieces=2)
        guess(tiers, 1, 0)
        disk.wait_begun()
        for expert in (1, 2):
            guess(tiers, 1, expert)
        guess(tiers, 2, 0)
        tiers.observe(1, {2: 1}, 1)
        assert tiers.cache.lookup(ExpertKey(1, 1)) is Lookup.MISS, "queued: gone at once"
        assert tiers.cache.lookup(ExpertKey(1, 0)) is Lookup.PENDING, "running: after its piece"
        disk.let_all_go()
        finish(tiers.wait_idle)
        assert set(tiers.cache.keys()) == {(1, 2), (2, 0)}
        assert sorted(set(disk.log)) == [
            ("1.0", 0), ("1.2", 0), ("1.2", 1), ("2.0", 0), ("2.0", 1)
        ]  # fmt: skip
        assert metrics.wasted_bytes == 8, "one piece of the one that was running"

    def test_an_expert_arrives_from_its_first_piece_on(self, build: Any) -> None:
        tiers, disk, _ = build(8, backend=SteppedBackend, pieces=2)
        key, queued = ExpertKey(1, 0), ExpertKey(1, 1)
        assert not tiers.is_arriving(key)
        guess(tiers, *key)
        disk.wait_begun()
        guess(tiers, *queued)
        assert tiers.is_arriving(key)
        assert not tiers.is_ready(key)
        assert not tiers.is_arriving(queued), "nothing of it is on its way yet"
        transfer = tiers._open[key]
        disk.let_all_go()
        while transfer.state is not TransferState.DONE:
            pass
        assert tiers.is_arriving(key), "it has come, and nobody has booked it yet"
        assert not tiers.is_ready(key)
        finish(tiers.wait_idle)
        assert tiers.is_ready(key)
        assert tiers.is_arriving(key)

    def test_a_demand_is_never_called_off_by_the_truth(self, build: Any) -> None:
        tiers, disk, _ = build(8, backend=SteppedBackend)
        tiers.demand(1, [0])
        tiers.observe(1, {3: 1}, 1)
        disk.let_all_go()
        finish(tiers.wait_idle)
        assert tiers.cache.lookup(ExpertKey(1, 0)) is Lookup.HIT

    def test_a_guess_called_off_while_running_can_still_be_demanded(self, build: Any) -> None:
        tiers, disk, metrics = build(8, backend=SteppedBackend, pieces=3)
        guess(tiers, 1, 0)
        disk.wait_begun()
        tiers.observe(1, {}, 1)
        demand = tiers.demand(1, [0])
        disk.let_all_go()
        assert finish(lambda: [key.expert for key, _ in demand]) == [0]
        assert metrics.num_late == 1
        assert disk.log == [("1.0", piece) for piece in range(3)], "nothing is copied twice"

    def test_a_guess_called_off_just_before_its_demand_is_copied_again(self, build: Any) -> None:
        tiers, disk, _ = build(8, backend=SteppedBackend)
        guess(tiers, 0, 0)
        disk.wait_begun()
        guess(tiers, 1, 0)
        tiers._transfers.cancel(tiers._open[ExpertKey(1, 0)])  # ended, and not yet booked
        demand = tiers.demand(1, [0])
        disk.let_all_go()
        assert finish(lambda: [key.expert for key, _ in demand]) == [0]

    def test_a_guess_at_what_is_just_being_demanded_does_no_harm(self, build: Any) -> None:
        tiers, disk, metrics = build(20, num_experts=20, backend=SteppedBackend)
        experts = list(range(tiers._window + 1))  # the last is guessed before it is admitted
        tiers.observe(0, dict.fromkeys(experts, 1), 1)
        demand = tiers.demand(0, experts)
        assert guess(tiers, 0, experts[-1])
        disk.let_all_go()
        assert finish(lambda: sorted(key.expert for key, _ in demand)) == experts
        assert sorted(disk.copied) == sorted(f"0.{expert}" for expert in experts)
        assert counts(metrics) == (0, 0, len(experts))
        assert (metrics.num_prefetched, metrics.num_prefetched_used) == (1, 1)

    def test_open_prefetches_are_counted_until_they_are_demanded(self, build: Any) -> None:
        tiers, disk, _ = build(8, backend=SteppedBackend)
        for expert in range(3):
            guess(tiers, 1, expert)
        assert tiers.num_open_prefetches == 3
        demand = tiers.demand(1, [1])
        assert tiers.num_open_prefetches == 2
        disk.let_all_go()
        finish(lambda: list(demand))
        finish(tiers.wait_idle)
        assert tiers.num_open_prefetches == 0


class TestForesight:
    def test_what_is_foreseen_is_not_evicted_for_a_guess(self, build: Any) -> None:
        policy = FixedWait({(0, 0): 9.0, (0, 1): 5.0})
        tiers, _, _ = build(2, policy=policy)
        take(tiers, 0, [0, 1])
        tiers.foresee(0, {0: 0.001}, is_complete=False)
        assert guess(tiers, 1, 0, wait=0.5)
        finish(tiers.wait_idle)
        assert set(tiers.cache.keys()) == {(0, 0), (1, 0)}
        assert not guess(tiers, 1, 1, wait=0.5)

    def test_what_is_known_not_to_come_makes_room(self, build: Any) -> None:
        tiers, _, _ = build(1, policy=FixedWait({(0, 0): 0.2}))
        take(tiers, 0, [0])
        assert not guess(tiers, 1, 0, wait=0.5)
        tiers.foresee(0, {}, is_complete=True)
        assert guess(tiers, 1, 0, wait=0.5)

    def test_the_layers_visit_ends_it(self, build: Any) -> None:
        tiers, _, _ = build(2, policy=FixedWait({(0, 0): 9.0}))
        take(tiers, 0, [0])
        tiers.foresee(0, {0: 0.001}, is_complete=True)
        take(tiers, 0, [0, 1])
        assert guess(tiers, 1, 0, wait=0.5)
        finish(tiers.wait_idle)
        assert set(tiers.cache.keys()) == {(0, 1), (1, 0)}


class TestCallingOff:
    def test_guesses_nobody_waits_for_are_not_begun_or_end_after_their_piece(
        self, build: Any
    ) -> None:
        tiers, disk, metrics = build(8, backend=SteppedBackend, pieces=2)
        for expert in range(3):
            guess(tiers, 1, expert, order=expert)
        disk.wait_begun()
        tiers.call_off([ExpertKey(1, 0), ExpertKey(1, 1)])
        assert tiers.cache.lookup(ExpertKey(1, 1)) is Lookup.MISS, "queued: gone at once"
        assert tiers.cache.lookup(ExpertKey(1, 0)) is Lookup.PENDING, "running: after its piece"
        disk.let_all_go()
        finish(tiers.wait_idle)
        assert tiers.cache.keys() == [ExpertKey(1, 2)]
        assert disk.log == [("1.0", 0), ("1.2", 0), ("1.2", 1)]
        assert metrics.wasted_bytes == 8

    def test_what_is_demanded_or_here_or_unknown_is_left_alone(self, build: Any) -> None:
        tiers, disk, _ = build(8, backend=SteppedBackend)
        disk.let_go()
        take(tiers, 0, [0])
        guess(tiers, 1, 1)
        demand = tiers.demand(1, [1, 2])
        tiers.call_off([ExpertKey(0, 0), ExpertKey(1, 1), ExpertKey(1, 2), ExpertKey(3, 7)])
        assert tiers.cache.lookup(ExpertKey(1, 2)) is Lookup.PENDING, "queued as a demand"
        disk.let_all_go()
        assert finish(lambda: sorted(key.expert for key, _ in demand)) == [1, 2]
        assert set(tiers.cache.keys()) == {(0, 0), (1, 1), (1, 2)}

    def test_a_guess_that_was_called_off_can_be_made_again(self, build: Any) -> None:
        tiers, disk, metrics = build(8, backend=SteppedBackend)
        guess(tiers, 0, 0)
        disk.wait_begun()
        guess(tiers, 1, 0)
        tiers.call_off([ExpertKey(1, 0)])
        assert guess(tiers, 1, 0)
        disk.let_all_go()
        finish(tiers.wait_idle)
        take(tiers, 1, [0])
        assert metrics.num_hits == 1


class TestGrowing:
    def test_only_as_many_slots_are_used_as_was_said(self, build: Any) -> None:
        tiers, _, _ = build(6, in_use=2)
        assert tiers.num_slots == 2
        take(tiers, 0, [0, 1, 2, 3])
        assert len(tiers.cache.keys()) == 2
        assert {tiers.cache.slot_of(key) for key in tiers.cache.keys()} == {0, 1}  # noqa: SIM118

    def test_more_slots_hold_more_experts_and_lose_none(self, build: Any) -> None:
        tiers, disk, metrics = build(6, in_use=2)
        take(tiers, 0, [0, 1])
        tiers.grow(4)
        assert tiers.num_slots == 6
        take(tiers, 1, [2, 3, 4, 5])
        assert set(tiers.cache.keys()) == {(0, 0), (0, 1), (1, 2), (1, 3), (1, 4), (1, 5)}
        take(tiers, 0, [0, 1])
        assert metrics.num_hits == 2
        assert len(disk.copied) == 6

    def test_slots_may_come_while_a_demand_waits_for_some(self, build: Any) -> None:
        tiers, _, _ = build(4, in_use=1)
        demand = iter(tiers.demand(0, [0, 1, 2]))
        first = finish(lambda: next(demand))[0]
        tiers.grow(3)
        rest = finish(lambda: [key for key, _ in demand])
        assert sorted([first, *rest]) == [(0, 0), (0, 1), (0, 2)]
        assert len(tiers.cache.keys()) == 3


class Link:
    """Tiers on a link of 16 bytes, one expert, per simulated second."""

    def __init__(self, *, num_workers: int = 2, piece_bytes: int = 16) -> None:
        self.clock, self.metrics = VirtualClock(), Metrics()
        transfers = VirtualTransfers(
            self.clock, bandwidth_bytes_s=16.0, num_workers=num_workers, piece_bytes=piece_bytes
        )
        self.tiers = ExpertTiers(
            VirtualSlots(8, 16),
            make_plans(4, 8),
            transfers,
            LRU(4, 8),
            self.metrics,
            Timeline(),
            clock=self.clock,
        )

    def take(self, layer: int, *experts: int) -> None:
        assert len(list(self.tiers.demand(layer, experts))) == len(experts)


class TestLinkTime:
    def test_a_link_that_carries_one_copy_after_the_other_is_busy_for_both(self) -> None:
        link = Link(num_workers=1)
        link.take(0, 0, 1)
        assert link.metrics.link_s == pytest.approx(2.0)
        assert link.metrics.link_s == pytest.approx(link.metrics.stall_s)

    def test_pieces_side_by_side_are_counted_once(self) -> None:
        link = Link(num_workers=2)
        link.take(0, 0, 1, 2)  # two share the link, the third follows
        assert link.metrics.link_s == pytest.approx(3.0)
        assert link.metrics.bytes_moved / link.metrics.link_s == pytest.approx(16.0)

    def test_an_idle_link_is_not_counted(self) -> None:
        link = Link()
        link.take(0, 0)
        link.clock.advance(100.0)
        link.take(0, 1)
        assert link.metrics.link_s == pytest.approx(2.0)
        assert link.tiers._link_spans == [], "what is over is not kept"

    def test_a_copy_that_is_overtaken_counts_what_it_had_before(self) -> None:
        link = Link(num_workers=1, piece_bytes=8)
        assert guess(link.tiers, 1, 0)
        link.clock.advance(0.25)
        link.take(0, 0)  # after the guess's first piece, before its second
        link.clock.advance(10.0)
        link.tiers.poll()
        assert link.metrics.bytes_moved == 32
        assert link.metrics.link_s == pytest.approx(2.0)

    def test_a_copy_that_ends_inside_anothers_time_adds_nothing(self) -> None:
        link = Link(num_workers=2, piece_bytes=8)
        guess(link.tiers, 1, 0)
        link.clock.advance(0.2)
        guess(link.tiers, 1, 1)
        link.clock.advance(0.1)
        link.take(0, 0)
        link.clock.advance(10.0)
        link.tiers.poll()
        assert link.metrics.bytes_moved == 48
        assert link.metrics.link_s == pytest.approx(3.0)


class TestFailures:
    def test_a_failed_demand_raises_and_leaves_the_tiers_usable(self, build: Any) -> None:
        tiers, disk, metrics = build(4)
        take(tiers, 0, [0, 1])
        disk.failing.add("0.2")
        with pytest.raises(TransferError, match="expert 2 of MoE layer 0"):
            take(tiers, 0, [0, 1, 2, 3])
        assert_settled(tiers)
        disk.failing.clear()
        assert sorted(take(tiers, 0, [0, 1, 2, 3])) == [0, 1, 2, 3]
        assert metrics.wasted_bytes == 0

    def test_a_failure_that_lasts_fails_every_time(self, build: Any) -> None:
        tiers, disk, _ = build(2)
        disk.failing.add("0.2")
        for _ in range(3):
            with pytest.raises(TransferError):
                take(tiers, 0, [1, 2])
        assert take(tiers, 0, [1]) == [1]

    def test_a_failed_guess_is_no_failure_of_the_demand(self, build: Any) -> None:
        tiers, disk, metrics = build(4)
        disk.failing.add("1.0")
        guess(tiers, 1, 0)
        finish(tiers.wait_idle)
        assert tiers.cache.lookup(ExpertKey(1, 0)) is Lookup.MISS
        disk.failing.clear()
        assert take(tiers, 1, [0]) == [0]
        assert counts(metrics) == (0, 0, 1)
        assert metrics.num_prefetched_used == 0

    def test_all_experts_failing_hang_nobody(self, build: Any) -> None:
        tiers, disk, _ = build(2, num_workers=2)
        disk.failing.update(f"0.{expert}" for expert in range(8))
        with pytest.raises(TransferError):
            take(tiers, 0, range(8))
        assert_settled(tiers)

    def test_no_slot_to_be_had_is_a_capacity_error(self, build: Any) -> None:
        tiers, _, _ = build(1)
        take(tiers, 0, [0])
        tiers.cache.pin(ExpertKey(0, 0))
        with pytest.raises(CapacityError, match="no expert slot"):
            take(tiers, 1, [1])
        tiers.cache.unpin(ExpertKey(0, 0))

    def test_closed_tiers_refuse_and_lose_no_slot(self, build: Any) -> None:
        tiers, _, _ = build(2)
        take(tiers, 0, [0])
        finish(tiers.close)
        with pytest.raises(ForeloadError, match="closed"):
            take(tiers, 1, [1])
        with pytest.raises(ForeloadError, match="closed"):
            guess(tiers, 1, 2)


class TestNotKeeping:
    def test_nothing_stays_after_use(self, build: Any) -> None:
        tiers, disk, metrics = build(8, keep=False)
        for _ in range(3):
            take(tiers, 0, [0, 1])
        assert tiers.cache.keys() == []
        assert len(disk.copied) == 6
        assert counts(metrics) == (0, 0, 6)

    def test_guesses_stay_until_they_are_used(self, build: Any) -> None:
        tiers, _, metrics = build(8, keep=False)
        guess(tiers, 1, 0)
        finish(tiers.wait_idle)
        take(tiers, 0, [0])
        take(tiers, 1, [0])
        assert tiers.cache.keys() == []
        assert metrics.num_hits == 1

    def test_wrong_guesses_leave_when_their_layer_is_reached(self, build: Any) -> None:
        tiers, _, metrics = build(8, keep=False)
        guess(tiers, 1, 0)
        guess(tiers, 2, 3)
        finish(tiers.wait_idle)
        take(tiers, 1, [4])
        assert tiers.cache.keys() == [ExpertKey(2, 3)]
        assert metrics.wasted_bytes > 0
        take(tiers, 1, [0])
        assert metrics.num_hits == 0, "what was guessed for a token serves no later one"


class TestLayerwise:
    @pytest.mark.parametrize("is_layerwise", [False, True])
    def test_residents_wait_for_what_is_on_its_way(
        self, build: Any, monkeypatch: pytest.MonkeyPatch, is_layerwise: bool
    ) -> None:
        tiers, disk, _ = build(8, backend=SteppedBackend)
        disk.let_go()
        take(tiers, 0, [1])
        tiers.is_layerwise = is_layerwise
        events: list[object] = []
        wait_news = tiers.wait_news

        def wait() -> None:
            events.append("wait")
            disk.let_all_go()
            wait_news()

        monkeypatch.setattr(tiers, "wait_news", wait)
        for key, _ in tiers.demand(0, [1, 2]):
            events.append(key.expert)
        assert events == (["wait", 1, 2] if is_layerwise else [1, "wait", 2])

    def test_what_does_not_fit_at_once_comes_all_the_same(self, build: Any) -> None:
        tiers, _, _ = build(3)
        tiers.is_layerwise = True
        assert sorted(take(tiers, 0, [0, 1, 2, 3, 4, 5])) == [0, 1, 2, 3, 4, 5]


class TestFlush:
    def test_flush_empties_everything(self, build: Any) -> None:
        tiers, disk, metrics = build(8, backend=SteppedBackend, pieces=2)
        disk.let_go(2)
        take(tiers, 0, [0])
        guess(tiers, 1, 0)
        guess(tiers, 1, 1)
        while disk.wait_begun() != ("1.0", 0):
            pass
        release = threading.Timer(0.05, disk.let_all_go)
        release.start()
        finish(tiers.flush)
        release.join()
        assert tiers.cache.keys() == []
        assert tiers.num_open_prefetches == 0
        assert metrics.num_prefetched_used == 0
        assert "1.1" not in [name for name, _ in disk.log], "what was queued is called off"
        assert take(tiers, 0, [0]) == [0]
        assert metrics.num_misses == 2


class TestViews:
    def test_views_follow_an_expert_to_its_next_slot(self, build: Any) -> None:
        tiers, _, _ = build(2)
        take(tiers, 0, [0])
        slot = tiers.cache.slot_of(ExpertKey(0, 0))
        take(tiers, 1, [1])  # takes the other slot
        take(tiers, 2, [2])  # takes this one
        take(tiers, 0, [0])  # checks the bytes
        assert tiers.cache.slot_of(ExpertKey(0, 0)) != slot

    def test_views_are_made_once_per_stay(self, build: Any) -> None:
        tiers, _, _ = build(2)
        take(tiers, 0, [0])
        first = tiers.parameters(ExpertKey(0, 0))
        take(tiers, 0, [0])
        assert tiers.parameters(ExpertKey(0, 0)) is first


def test_bytes_add_up(build: Any) -> None:
    tiers, disk, metrics = build(6, num_workers=2)
    chance = random.Random(0)
    for _ in range(100):
        for layer in range(4):
            take(tiers, layer, sorted(chance.sample(range(8), 2)))
            for expert in chance.sample(range(8), 2):
                guess(tiers, (layer + 1) % 4, expert, wait=chance.random())
    finish(tiers.wait_idle)
    assert metrics.bytes_moved == 16 * len(disk.copied)
    assert 0 < metrics.wasted_bytes < metrics.prefetch_bytes
    assert 0 < metrics.num_prefetched_used < metrics.num_prefetched
    used = metrics.num_prefetched_used * 16
    assert used + metrics.wasted_bytes <= metrics.num_prefetched * 16
    assert metrics.num_lookups == 100 * 4 * 2


VISITS = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.sets(st.integers(0, 5), max_size=6),
        st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5), st.floats(0, 3)), max_size=6),
        st.sets(st.integers(0, 5), max_size=1),
        st.sampled_from(["all", "stop", "raise", "none", "flush"]),
    ),
    max_size=12,
)


@settings(max_examples=60)
@given(
    st.integers(1, 7),
    st.sampled_from(["history", "next-use", "lru", "lfu", "least-stale"]),
    st.booleans(),
    st.integers(1, 2),
    VISITS,
)
def test_any_history_ends_settled(
    num_slots: int, eviction: str, keep: bool, num_workers: int, visits: Any
) -> None:
    tiers, disk, metrics = make_tiers(
        num_slots, 3, 6, eviction=eviction, keep=keep, num_workers=num_workers, pieces=2
    )

    def live() -> None:
        for layer, experts, guesses, failing, ending in visits:
            disk.failing = {f"{layer}.{expert}" for expert in failing}
            tiers.observe(layer, dict.fromkeys(experts, 1), 1)
            demand = tiers.demand(layer, sorted(experts))
            for guessed_layer, expert, wait in guesses:
                guess(tiers, guessed_layer, expert, wait)
                tiers.cache.check()
            seen = []
            try:
                if ending in ("all", "stop", "raise"):
                    for key, parameters in demand:
                        assert (parameters["weight"] == mark_of(key)).all()
                        tiers.cache.check()
                        seen.append(key.expert)
                        if ending == "stop":
                            break
                        if ending == "raise":
                            raise InterruptedError
                    if ending == "all":
                        assert sorted(seen) == sorted(experts)
            except InterruptedError:
                pass
            except TransferError:
                assert failing & experts
            if ending == "flush":
                tiers.flush()
            tiers.cache.check()

    finish(live)
    disk.failing = set()
    tiers.demand(0, [])
    assert_settled(tiers)
    assert metrics.wasted_bytes <= metrics.prefetch_bytes
    assert metrics.num_prefetched_used <= metrics.num_prefetched
    for layer in range(3):
        assert sorted(take(tiers, layer, range(6))) == list(range(6))
    finish(tiers.close)
