"""A queue of copies with priorities, promotion and cancellation, worked off by threads.

    submit(key, plan, slot, priority, order) -> Transfer   QUEUED RUNNING DONE CANCELLED FAILED
    raise_priority(transfer)                               a queued prefetch becomes a demand
    cancel(transfer) -> bool                               False once it has finished
    poll() -> list[Transfer]                               finished since last poll; never blocks
    wait(timeout) -> list[Transfer]                        blocks until at least one has finished

Copies run piece by piece, and every worker takes the most urgent piece there is: a demand gets
the whole bandwidth, and waits for at most one piece per worker of a prefetch. Which piece that is
says `PieceQueue`, without threads or a clock. Moves bytes and decides nothing: no cache, no
predictions.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from enum import Enum
from typing import TYPE_CHECKING, Protocol

from foreload.errors import ForeloadError, TransferError
from foreload.types import ExpertKey, Priority

if TYPE_CHECKING:
    from foreload.types import ExpertPlan

__all__ = [
    "CopyBackend",
    "PieceQueue",
    "Transfer",
    "TransferEngine",
    "TransferState",
    "Transfers",
]


class TransferState(Enum):
    """Where a transfer is in its life."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    CANCELLED = "cancelled"
    FAILED = "failed"


class CopyBackend(Protocol):
    """Moves the bytes of one expert, piece by piece. Called from several threads."""

    def num_pieces(self, plan: ExpertPlan) -> int:
        """Give how many pieces a copy takes."""

    def copy_piece(self, plan: ExpertPlan, slot: int, piece: int) -> int:
        """Copy one piece; give the bytes moved."""

    def close(self) -> None:
        """Release what the backend holds."""


class Transfers(Protocol):
    """Works off copies; `TransferEngine` is one, and a simulated link can be another."""

    @property
    def num_workers(self) -> int:
        """Give how many pieces are in flight at once."""

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

    def raise_priority(self, transfer: Transfer) -> None:
        """Turn a prefetch into a demand, cancelled or not; what is copied stays copied."""

    def cancel(self, transfer: Transfer) -> bool:
        """Stop a copy; a running one stops after its pieces in flight. False once it is over."""

    def poll(self) -> list[Transfer]:
        """Give what has finished since the last call; never blocks."""

    def wait(self, timeout: float | None = None) -> list[Transfer]:
        """Block until something has finished, and give it; empty after `timeout` seconds."""

    def close(self) -> None:
        """Cancel what is queued and let pieces in flight end."""


class Transfer:
    """One copy of one expert into one slot.

    Attributes:
        key: The expert.
        state: Where it is in its life.
        priority: Demand or prefetch, as of now.
        is_guess: Whether it began as a prefetch.
        bytes_moved: Bytes copied so far.
        error: Why it failed.
        busy: Begin and end of every piece, as (start_s, end_s).
    """

    __slots__ = (
        "_num_done",
        "_num_flying",
        "_num_issued",
        "_num_pieces",
        "_stop",
        "busy",
        "bytes_moved",
        "error",
        "is_guess",
        "key",
        "order",
        "plan",
        "priority",
        "slot",
        "state",
    )

    def __init__(
        self,
        key: ExpertKey,
        plan: ExpertPlan,
        slot: int,
        priority: Priority,
        order: float,
        pieces: int,
    ) -> None:
        self.key = key
        self.plan = plan
        self.slot = slot
        self.priority = priority
        self.is_guess = priority is Priority.PREFETCH
        self.order = order
        self.state = TransferState.QUEUED
        self.bytes_moved = 0
        self.error: TransferError | None = None
        self.busy: list[tuple[float, float]] = []
        self._num_pieces = pieces
        self._num_issued = 0
        self._num_flying = 0
        self._num_done = 0
        self._stop = False

    @property
    def _is_issuable(self) -> bool:
        return not self._stop and self._num_issued < self._num_pieces


class PieceQueue:
    """Says which piece is copied next, and when a copy is over. Not thread-safe, knows no time."""

    def __init__(self) -> None:
        self.num_open = 0
        self._heap: list[tuple[int, float, int, Transfer]] = []
        self._finished: list[Transfer] = []
        self._sequence = itertools.count()

    @property
    def has_finished(self) -> bool:
        """Tell whether `drain` has something to give."""
        return bool(self._finished)

    def add(self, transfer: Transfer) -> None:
        """Queue a new copy."""
        self.num_open += 1
        self._push(transfer)

    def raise_priority(self, transfer: Transfer) -> bool:
        """Turn a prefetch into a demand; False where the copy is over."""
        if transfer.state not in (TransferState.QUEUED, TransferState.RUNNING):
            return False
        if transfer.error is None:
            transfer._stop = False
        transfer.priority = Priority.DEMAND
        # An older queue entry is skipped when it surfaces: its priority no longer agrees.
        self._push(transfer)
        return True

    def cancel(self, transfer: Transfer) -> bool:
        """Begin no further piece of a copy; False where it is over."""
        if transfer.state not in (TransferState.QUEUED, TransferState.RUNNING):
            return False
        transfer._stop = True
        self._finish_if_over(transfer)
        return True

    def cancel_all(self) -> None:
        """Begin no further piece of anything."""
        for *_, transfer in self._heap:
            self.cancel(transfer)
        self._heap.clear()

    def take(self) -> tuple[Transfer, int] | None:
        """Begin the most urgent piece; None where there is none."""
        while self._heap:
            priority, _, _, transfer = self._heap[0]
            if not transfer._is_issuable or transfer.priority.value != priority:
                heapq.heappop(self._heap)
                continue
            piece = transfer._num_issued
            transfer._num_issued += 1
            transfer._num_flying += 1
            transfer.state = TransferState.RUNNING
            return transfer, piece
        return None

    def land(self, transfer: Transfer, moved: int, start_s: float, end_s: float) -> None:
        """Book a piece that was copied."""
        transfer._num_flying -= 1
        transfer.busy.append((start_s, end_s))
        transfer.bytes_moved += moved
        transfer._num_done += 1
        self._finish_if_over(transfer)

    def fail(self, transfer: Transfer, error: TransferError) -> None:
        """Book a piece that could not be copied; the first error is the copy's."""
        transfer._num_flying -= 1
        transfer.error = transfer.error or error
        transfer._stop = True
        self._finish_if_over(transfer)

    def drain(self) -> list[Transfer]:
        """Give what is over and has not been given yet."""
        finished, self._finished = self._finished, []
        return finished

    def _push(self, transfer: Transfer) -> None:
        entry = (transfer.priority.value, transfer.order, next(self._sequence), transfer)
        heapq.heappush(self._heap, entry)

    def _finish_if_over(self, transfer: Transfer) -> None:
        """End a transfer that has all its pieces, or stopped and has none in flight."""
        if transfer._num_done == transfer._num_pieces:
            state = TransferState.DONE
        elif transfer._stop and transfer._num_flying == 0:
            state = TransferState.CANCELLED if transfer.error is None else TransferState.FAILED
        else:
            return
        transfer.state = state
        self.num_open -= 1
        self._finished.append(transfer)


class TransferEngine:
    """Works off copies on `num_workers` threads, the most urgent piece first.

    Args:
        backend: Moves the bytes.
        num_workers: Pieces in flight at once.
    """

    def __init__(self, backend: CopyBackend, *, num_workers: int = 2) -> None:
        self.num_workers = num_workers
        self._backend = backend
        self._queue = PieceQueue()
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._news = threading.Condition(self._lock)
        self._closed = False
        self._threads = [
            threading.Thread(target=self._run, name=f"foreload-copy-{index}", daemon=True)
            for index in range(num_workers)
        ]
        for thread in self._threads:
            thread.start()

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
        transfer = Transfer(key, plan, slot, priority, order, self._backend.num_pieces(plan))
        with self._lock:
            if self._closed:
                raise ForeloadError("the transfer engine is closed")
            self._queue.add(transfer)
            self._work.notify()
        return transfer

    def raise_priority(self, transfer: Transfer) -> None:
        """Turn a prefetch into a demand, cancelled or not; what is copied stays copied."""
        with self._lock:
            if self._queue.raise_priority(transfer):
                self._work.notify()

    def cancel(self, transfer: Transfer) -> bool:
        """Stop a copy; a running one stops after its pieces in flight. False once it has finished.

        Its end is reported by `poll` like any other: the slot is in use until then.
        """
        with self._lock:
            was_open = self._queue.cancel(transfer)
            self._tell_news()
            return was_open

    def poll(self) -> list[Transfer]:
        """Give what has finished since the last call; never blocks."""
        if not self._queue.has_finished:
            return []
        with self._lock:
            return self._queue.drain()

    def wait(self, timeout: float | None = None) -> list[Transfer]:
        """Block until something has finished, and give it; empty after `timeout` seconds."""
        queue = self._queue
        with self._lock:
            self._news.wait_for(lambda: queue.has_finished or queue.num_open == 0, timeout)
            return queue.drain()

    def close(self) -> None:
        """Cancel what is queued, let pieces in flight end, stop the threads."""
        with self._lock:
            self._closed = True
            self._queue.cancel_all()
            self._tell_news()
            self._work.notify_all()
        for thread in self._threads:
            thread.join()
        self._backend.close()

    def _tell_news(self) -> None:
        """Wake who waits for a copy to be over."""
        if self._queue.has_finished:
            self._news.notify_all()

    def _take(self) -> tuple[Transfer, int] | None:
        """Wait for the most urgent piece; None when closing."""
        with self._lock:
            while (taken := self._queue.take()) is None:
                if self._closed:
                    return None
                self._work.wait()
            # One submission wakes one worker; the others are woken piece by piece.
            if taken[0]._is_issuable:
                self._work.notify()
            return taken

    def _run(self) -> None:
        while (taken := self._take()) is not None:
            transfer, piece = taken
            start = time.perf_counter()
            moved, failure = 0, None
            try:
                moved = self._backend.copy_piece(transfer.plan, transfer.slot, piece)
            except Exception as error:  # reaches the caller through poll
                failure = _as_transfer_error(transfer.key, error)
            end = time.perf_counter()
            with self._lock:
                if failure is None:
                    self._queue.land(transfer, moved, start, end)
                else:
                    self._queue.fail(transfer, failure)
                self._tell_news()


def _as_transfer_error(key: ExpertKey, error: Exception) -> TransferError:
    if isinstance(error, TransferError):
        return error
    wrapped = TransferError(f"loading expert {key.expert} of MoE layer {key.layer}: {error!r}")
    wrapped.__cause__ = error
    return wrapped
