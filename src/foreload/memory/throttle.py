"""A link slower than the one there is, to see what another machine would make of a model.

Wraps a backend; every copy pays for its bytes. Moves nothing itself.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from foreload.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from foreload.memory.transfer import CopyBackend
    from foreload.types import ExpertPlan

__all__ = ["ThrottledBackend"]


class ThrottledBackend:
    """Copies no faster than a given bandwidth, over all threads together.

    Args:
        backend: Moves the bytes.
        link_bytes_s: Bytes per second.
        clock: Tells the seconds.
        sleep: Waits.

    Raises:
        ConfigError: The bandwidth is not above zero.
    """

    def __init__(
        self,
        backend: CopyBackend,
        link_bytes_s: float,
        *,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if not link_bytes_s > 0:
            raise ConfigError(f"link_bytes_s={link_bytes_s!r} must be more than nothing")
        self._backend = backend
        self._link_bytes_s = link_bytes_s
        self._clock = clock
        self._sleep = sleep
        self._free_at_s = 0.0
        self._lock = threading.Lock()

    def num_pieces(self, plan: ExpertPlan) -> int:
        """Give how many pieces a copy takes."""
        return self._backend.num_pieces(plan)

    def copy_piece(self, plan: ExpertPlan, slot: int, piece: int) -> int:
        """Copy one piece, and hold it until the slower link would have brought it."""
        begun = self._clock()
        moved = self._backend.copy_piece(plan, slot, piece)
        with self._lock:
            # The link takes one piece after the other; while nothing was asked for it was idle.
            self._free_at_s = max(self._free_at_s, begun) + moved / self._link_bytes_s
            wait_s = self._free_at_s - self._clock()
        if wait_s > 0:
            self._sleep(wait_s)
        return moved

    def close(self) -> None:
        """Release what the backend holds."""
        self._backend.close()
