"""A throttled link is as slow as it is told to be, and no slower."""

from __future__ import annotations

import math

import pytest

from fakes import make_plan
from foreload.errors import ConfigError, TransferError
from foreload.memory.throttle import ThrottledBackend
from foreload.types import ExpertKey, ExpertPlan

PLAN = make_plan(ExpertKey(0, 0))


class Clock:
    """Time that passes where somebody sleeps or copies."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.slept.append(seconds)
        self.now_s += seconds


class Copies:
    """Moves a hundred bytes per piece, in the time that the test says."""

    def __init__(self, clock: Clock, takes_s: float = 0.0) -> None:
        self.clock = clock
        self.takes_s = takes_s
        self.is_failing = False
        self.is_closed = False
        self.copied: list[tuple[ExpertPlan, int, int]] = []

    def num_pieces(self, plan: ExpertPlan) -> int:
        return 7

    def copy_piece(self, plan: ExpertPlan, slot: int, piece: int) -> int:
        self.clock.now_s += self.takes_s
        if self.is_failing:
            raise TransferError("the disk has gone")
        self.copied.append((plan, slot, piece))
        return 100

    def close(self) -> None:
        self.is_closed = True


class Bench:
    def __init__(self, link_bytes_s: float = 50.0, takes_s: float = 0.0) -> None:
        self.clock = Clock()
        self.copies = Copies(self.clock, takes_s)
        self.backend = ThrottledBackend(
            self.copies, link_bytes_s, clock=self.clock, sleep=self.clock.sleep
        )

    def copy(self, number: int = 1) -> float:
        """Copy pieces one after the other; give the seconds that took."""
        begun = self.clock()
        for piece in range(number):
            assert self.backend.copy_piece(PLAN, 3, piece) == 100
        return self.clock() - begun


def test_a_copy_takes_its_bytes_over_the_bandwidth() -> None:
    assert Bench(50.0).copy() == pytest.approx(2.0)
    assert Bench(200.0).copy(3) == pytest.approx(1.5)


def test_the_time_the_copy_itself_takes_is_part_of_it() -> None:
    bench = Bench(50.0, takes_s=0.5)
    assert bench.copy() == pytest.approx(2.0)
    assert bench.clock.slept == [pytest.approx(1.5)]


def test_a_copy_that_is_slower_anyway_is_not_held() -> None:
    bench = Bench(50.0, takes_s=3.0)
    assert bench.copy(4) == pytest.approx(12.0)
    assert bench.clock.slept == []


def test_an_idle_link_saves_up_nothing() -> None:
    bench = Bench(50.0)
    bench.copy()
    bench.clock.now_s += 100.0
    assert bench.copy() == pytest.approx(2.0)


def test_copies_that_begin_together_share_the_link() -> None:
    bench = Bench(50.0)
    waits: list[float] = []
    # Time stands still: both threads begin at the same moment.
    backend = ThrottledBackend(bench.copies, 50.0, clock=bench.clock, sleep=waits.append)
    for piece in range(3):
        backend.copy_piece(PLAN, 0, piece)
    assert waits == pytest.approx([2.0, 4.0, 6.0])


def test_a_copy_that_fails_costs_the_others_nothing() -> None:
    bench = Bench(50.0)
    bench.copies.is_failing = True
    with pytest.raises(TransferError, match="gone"):
        bench.copy()
    bench.copies.is_failing = False
    assert bench.copy() == pytest.approx(2.0)


def test_everything_else_is_the_backends_own() -> None:
    bench = Bench()
    bench.copy(2)
    assert bench.copies.copied == [(PLAN, 3, 0), (PLAN, 3, 1)]
    assert bench.backend.num_pieces(PLAN) == 7
    assert not bench.copies.is_closed
    bench.backend.close()
    assert bench.copies.is_closed


@pytest.mark.parametrize("link_bytes_s", [0, -1.0, math.nan])
def test_a_link_that_carries_nothing_is_refused(link_bytes_s: float) -> None:
    with pytest.raises(ConfigError, match="link_bytes_s"):
        Bench(link_bytes_s)


def test_a_link_without_limits_holds_nothing() -> None:
    bench = Bench(math.inf)
    assert bench.copy(5) == 0.0
