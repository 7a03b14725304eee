"""A queue of copies with priorities, promotion and cancellation, worked off by threads.

    submit(key, plan, slot, priority, order) -> Transfer   QUEUED RUNNING DONE CANCELLED FAILED
    raise_priority(transfer)                               a queued prefetch becomes a demand
    cancel(transfer) -> bool                               False once it has finished
    poll() -> list[Transfer]                               finished since last poll; never blocks
    wait(timeout) -> list[Transfer]                        blocks until at least one has finished

Copies run piece by piece, and every worker takes the most urgent piece there is: a demand gets
the whole bandwidth, and waits for at most one piece per worker of a prefetch. Moves bytes and
decides nothing: no cache, no predictions.
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

__all__ = ["CopyBackend", "Transfer", "TransferEngine", "TransferState"]


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


class Transfer:
    """One copy of one expert into one slot.

    Attributes:
        key: The expert.
        state: Where it is in its life.
        priority: Demand or prefetch, as of now.
        is_guess: Whether it began as a prefetch.
        bytes_moved: Bytes copied so far.
        error: Why it failed.
        submitted_s: Clock when it was submitted.
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
        "submitted_s",
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
        self.submitted_s = time.perf_counter()
        self.busy: list[tuple[float, float]] = []
        self._num_pieces = pieces
        self._num_issued = 0
        self._num_flying = 0
        self._num_done = 0
        self._stop = False

    @property
    def _is_issuable(self) -> bool:
        return not self._stop and self._num_issued < self._num_pieces


class TransferEngine:
    """Works off copies on `num_workers` threads, the most urgent piece first.

    Args:
        backend: Moves the bytes.
        num_workers: Pieces in flight at once.
    """

    def __init__(self, backend: CopyBackend, *, num_workers: int = 2) -> None:
        self._backend = backend
        self._queue: list[tuple[int, float, int, Transfer]] = []
        self._finished: list[Transfer] = []
        self._sequence = itertools.count()
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._news = threading.Condition(self._lock)
        self._closed = False
        self._num_open = 0
        self._threads = [
            threading.Thread(target=self._run, name=f"foreload-copy-{index}", daemon=True)
            for index in range(num_workers)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def num_open(self) -> int:
        """Give how many transfers are queued or running."""
        return self._num_open

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
            self._num_open += 1
            self._push(transfer)
            self._work.notify()
        return transfer

    def raise_priority(self, transfer: Transfer) -> None:
        """Turn a prefetch into a demand, cancelled or not; what is copied stays copied."""
        with self._lock:
            if transfer.state not in (TransferState.QUEUED, TransferState.RUNNING):
                return
            if transfer.error is None:
                transfer._stop = False
            transfer.priority = Priority.DEMAND
            # An older queue entry is skipped when it surfaces: its priority no longer agrees.
            self._push(transfer)
            self._work.notify()

    def cancel(self, transfer: Transfer) -> bool:
        """Stop a copy; a running one stops after its pieces in flight. False once it has finished.

        Its end is reported by `poll` like any other: the slot is in use until then.
        """
        with self._lock:
            if transfer.state not in (TransferState.QUEUED, TransferState.RUNNING):
                return False
            transfer._stop = True
            self._finish_if_over(transfer)
            return True

    def poll(self) -> list[Transfer]:
        """Give what has finished since the last call; never blocks."""
        if not self._finished:
            return []
        with self._lock:
            finished, self._finished = self._finished, []
            return finished

    def wait(self, timeout: float | None = None) -> list[Transfer]:
        """Block until something has finished, and give it; empty after `timeout` seconds."""
        with self._lock:
            self._news.wait_for(lambda: bool(self._finished) or self._num_open == 0, timeout)
            finished, self._finished = self._finished, []
            return finished

    def close(self) -> None:
        """Cancel what is queued, let pieces in flight end, stop the threads."""
        with self._lock:
            self._closed = True
            for *_, transfer in self._queue:
                if transfer.state in (TransferState.QUEUED, TransferState.RUNNING):
                    transfer._stop = True
                    self._finish_if_over(transfer)
            self._queue.clear()
            self._work.notify_all()
        for thread in self._threads:
            thread.join()
        self._backend.close()

    def _push(self, transfer: Transfer) -> None:
        entry = (transfer.priority.value, transfer.order, next(self._sequence), transfer)
        heapq.heappush(self._queue, entry)

    def _take(self) -> tuple[Transfer, int] | None:
        """Wait for the most urgent piece; None when closing."""
        with self._lock:
            while True:
                while self._queue:
                    priority, _, _, transfer = self._queue[0]
                    if not transfer._is_issuable or transfer.priority.value != priority:
                        heapq.heappop(self._queue)
                        continue
                    piece = transfer._num_issued
                    transfer._num_issued += 1
                    transfer._num_flying += 1
                    transfer.state = TransferState.RUNNING
                    if transfer._is_issuable:
                        self._work.notify()
                    return transfer, piece
                if self._closed:
                    return None
                self._work.wait()

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
                transfer._num_flying -= 1
                if failure is None:
                    transfer.busy.append((start, end))
                    transfer.bytes_moved += moved
                    transfer._num_done += 1
                else:
                    transfer.error = transfer.error or failure
                    transfer._stop = True
                self._finish_if_over(transfer)

    def _finish_if_over(self, transfer: Transfer) -> None:
        """End a transfer that has all its pieces, or stopped and has none in flight."""
        if transfer._num_done == transfer._num_pieces:
            state = TransferState.DONE
        elif transfer._stop and transfer._num_flying == 0:
            state = TransferState.CANCELLED if transfer.error is None else TransferState.FAILED
        else:
            return
        transfer.state = state
        self._num_open -= 1
        self._finished.append(transfer)
        self._news.notify_all()


def _as_transfer_error(key: ExpertKey, error: Exception) -> TransferError:
    if isinstance(error, TransferError):
        return error
    wrapped = TransferError(f"loading expert {key.expert} of MoE layer {key.layer}: {error!r}")
    wrapped.__cause__ = error
    return wrapped
