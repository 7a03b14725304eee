"""A clock, a link and slots that exist only in a simulation.

`VirtualTransfers` stands in for `memory.transfer.TransferEngine`: the same queue of pieces, with
workers that are numbers instead of threads. Time passes only where somebody advances the clock,
computes or waits for a copy. Moves no bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from foreload.errors import ForeloadError
from foreload.memory.transfer import PieceQueue, Transfer

if TYPE_CHECKING:
    from torch import Tensor

    from foreload.types import ExpertKey, ExpertPlan, Priority

__all__ = ["VirtualClock", "VirtualSlots", "VirtualTransfers"]


class VirtualClock:
    """Tells the simulated time."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        """Give the seconds since the clock was made."""
        return self.now_s

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now_s += seconds


class VirtualSlots:
    """Slots without memory."""

    def __init__(self, num_slots: int, slot_bytes: int) -> None:
        self.num_slots = num_slots
        self.slot_bytes = slot_bytes

    def tensors(self, slot: int, plan: ExpertPlan) -> dict[str, Tensor]:
        """Give no parameters: there are none."""
        return {}

    def before_reads(self) -> None:
        """Do nothing: nothing is read."""

    def before_write(self, slot: int) -> None:
        """Do nothing, as above."""


@dataclass(slots=True)
class _Worker:
    """One piece in flight: what is left of its latency, then of its bytes."""

    transfer: Transfer
    num_bytes: int
    latency_s: float
    bytes_left: float
    start_s: float


class VirtualTransfers:
    """Works off copies over a link of a given bandwidth, piece by piece, in simulated time.

    As in the engine, every worker that is free takes the most urgent piece. Pieces in flight share
    the bandwidth equally; a piece that waits out the copy's latency leaves it to the others.

    Args:
        clock: The simulation's.
        bandwidth_bytes_s: What the link carries; infinite is allowed.
        latency_s: Before the first byte of each copy.
        num_workers: Pieces in flight at once.
        piece_bytes: Largest piece.
        compute_share: Share of its speed that computing keeps while a copy is in flight.
        copy_share: Share of its bandwidth that the link keeps while something is computed.
        call_s: What a copy costs who computes: asking for it, waking up, booking it.
    """

    def __init__(
        self,
        clock: VirtualClock,
        *,
        bandwidth_bytes_s: float,
        latency_s: float = 0.0,
        num_workers: int = 2,
        piece_bytes: int = 2 << 20,
        compute_share: float = 1.0,
        copy_share: float = 1.0,
        call_s: float = 0.0,
    ) -> None:
        self.num_workers = num_workers
        self._clock = clock
        self._bandwidth_bytes_s = bandwidth_bytes_s
        self._latency_s = latency_s
        self._piece_bytes = piece_bytes
        self._compute_share = compute_share
        self._copy_share = copy_share
        self._call_s = call_s
        self._queue = PieceQueue()
        self._flying: list[_Worker] = []
        self._now_s = clock.now_s
        self._is_closed = False

    @property
    def num_open(self) -> int:
        """Give how many transfers are queued or running."""
        return self._queue.num_open

    def submit(
        self,
        key: ExpertKey,
        plan: ExpertPlan,
        slot: int,
        priority: Priority,
        *,
        order: float = 0.0,
    ) -> Transfer:
        """Queue a copy. Among equal priorities the smaller `order` goes first."""
        if self._is_closed:
            raise ForeloadError("the transfers are closed")
        self._catch_up()
        pieces = max(1, math.ceil(plan.read_bytes / self._piece_bytes))
        transfer = Transfer(key, plan, slot, priority, order, pieces)
        self._queue.add(transfer)
        self._hire()
        self.compute(self._call_s)
        return transfer

    def raise_priority(self, transfer: Transfer) -> None:
        """Turn a prefetch into a demand, cancelled or not; what is copied stays copied."""
        self._catch_up()
        self._queue.raise_priority(transfer)
        self._hire()

    def cancel(self, transfer: Transfer) -> bool:
        """Stop a copy; a running one stops after its pieces in flight. False once it is over."""
        self._catch_up()
        return self._queue.cancel(transfer)

    def poll(self) -> list[Transfer]:
        """Give what has finished by now and was not given before."""
        self._catch_up()
        return self._queue.drain()

    def wait(self, timeout: float | None = None) -> list[Transfer]:
        """Let time pass until something has finished, and give it; at most `timeout` seconds."""
        self._catch_up()
        end_s = math.inf if timeout is None else self._now_s + timeout
        while not self._queue.has_finished and self._flying and self._run_until(end_s):
            pass
        self._clock.now_s = self._now_s
        return self._queue.drain()

    def compute(self, seconds: float) -> None:
        """Let a computation run that takes `seconds` where no copy is in its way."""
        self._catch_up()
        left_s, is_more = seconds, True
        while is_more:
            start_s = self._now_s
            speed = self._compute_share if self._flying else 1.0
            is_more = self._run_until(start_s + left_s / speed, share=self._copy_share)
            left_s = max(0.0, left_s - (self._now_s - start_s) * speed)
        self._clock.now_s = self._now_s

    def close(self) -> None:
        """Cancel what is queued and let pieces in flight end."""
        self._is_closed = True
        self._queue.cancel_all()
        while self._flying:
            self._run_until(math.inf)

    def _catch_up(self) -> None:
        """Let the link do what it has done by now."""
        while self._run_until(self._clock.now_s):
            pass

    def _run_until(self, end_s: float, *, share: float = 1.0) -> bool:
        """Go to the next event, or to `end_s` where that comes first; tell whether one happened.

        Args:
            end_s: When to stop.
            share: Of the link's bandwidth.
        """
        moving = sum(worker.latency_s <= 0 for worker in self._flying)
        rate = share * self._bandwidth_bytes_s / max(moving, 1)
        step_s = min(
            (
                worker.latency_s if worker.latency_s > 0 else worker.bytes_left / rate
                for worker in self._flying
            ),
            default=math.inf,
        )
        if self._now_s + step_s > end_s:
            self._pass_time(end_s - self._now_s, rate)
            self._now_s = end_s
            return False
        self._pass_time(step_s, rate)
        self._now_s += step_s
        self._land()
        self._hire()
        return True

    def _pass_time(self, seconds: float, rate: float) -> None:
        for worker in self._flying:
            if worker.latency_s > 0:
                left_s = worker.latency_s - seconds
                # What rounding leaves over would be an event of its own, and never end.
                worker.latency_s = left_s if left_s > 1e-15 else 0.0
            elif rate == math.inf:
                worker.bytes_left = 0.0
            else:
                worker.bytes_left -= seconds * rate

    def _land(self) -> None:
        """Book the pieces whose last byte has arrived."""
        landed = [w for w in self._flying if w.latency_s <= 0 and w.bytes_left <= 1e-3]
        for worker in landed:
            self._flying.remove(worker)
            self._queue.land(worker.transfer, worker.num_bytes, worker.start_s, self._now_s)

    def _hire(self) -> None:
        """Give free workers the most urgent pieces."""
        while len(self._flying) < self.num_workers and (taken := self._queue.take()):
            transfer, piece = taken
            whole = transfer.plan.read_bytes
            size = max(0, min(self._piece_bytes, whole - piece * self._piece_bytes))
            latency_s = self._latency_s if piece == 0 else 0.0
            self._flying.append(_Worker(transfer, size, latency_s, float(size), self._now_s))
