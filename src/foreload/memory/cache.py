"""Slots and who is in them. Bookkeeping only: no bytes, no torch, no threads.

lookup(key)            changes nothing, counts nothing
reserve(key)           evicts if needed; None changes nothing; the slot is PENDING
commit(key)            the bytes are readable; PENDING -> HIT
abort(key)             the copy was cancelled or failed; the slot is free
pin(key) / unpin(key)  pinned and PENDING slots are never evicted
evict(key)             an unpinned HIT gives its slot back
foresee(layer, waits)  what is known to come at a layer, until it has been observed
grow(num)              more slots
check()                raises if slots leak, alias or exceed capacity
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from foreload.errors import ForeloadError
from foreload.types import ExpertKey, Lookup

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from foreload.memory.eviction import EvictionPolicy

__all__ = ["ExpertCache", "Reservation"]

_ABSENT, _PENDING, _READY = 0, 1, 2
_LOOKUP = (Lookup.MISS, Lookup.PENDING, Lookup.HIT)


class Reservation(NamedTuple):
    """A slot taken, and who had to leave it."""

    slot: int
    evicted: ExpertKey | None


class ExpertCache:
    """A fixed number of slots for experts of all layers, host-managed.

    Args:
        num_slots: Slots, each one expert large.
        num_layers: MoE layers.
        num_experts: Experts per layer.
        policy: Estimates each expert's wait until next use; the longest wait is evicted.
    """

    def __init__(
        self, num_slots: int, num_layers: int, num_experts: int, policy: EvictionPolicy
    ) -> None:
        self.num_slots = num_slots
        self._num_experts = num_experts
        self._policy = policy
        size = num_layers * num_experts
        self._state = np.zeros(size, dtype=np.uint8)
        self._slot = np.full(size, -1, dtype=np.int64)
        self._pins = np.zeros(size, dtype=np.int32)
        self._promise = np.full(size, np.inf)
        self._foreseen = np.full(size, np.inf)
        self._delay = np.zeros(size)
        self._free = list(range(num_slots - 1, -1, -1))

    def lookup(self, key: ExpertKey) -> Lookup:
        """Tell whether `key` is readable, on its way, or absent."""
        return _LOOKUP[self._state[self._flat(key)]]

    def slot_of(self, key: ExpertKey) -> int:
        """Give the slot of a HIT or PENDING key.

        Raises:
            ForeloadError: The key has no slot.
        """
        slot = int(self._slot[self._flat(key)])
        if slot < 0:
            raise ForeloadError(f"{key} has no slot")
        return slot

    def observe(
        self,
        layer: int,
        counts: Mapping[int, int],
        num_tokens: int,
        routing: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """Tell the policy the true routing at `layer`, and forget guesses about that layer."""
        self._policy.observe(layer, counts, num_tokens, routing)
        self._promise[self._row(layer)] = np.inf
        self._foreseen[self._row(layer)] = np.inf
        self._delay[self._row(layer)] = 0.0

    def foresee(self, layer: int, waits: Mapping[int, float], *, is_complete: bool) -> None:
        """Know what a layer is going to demand, until it is observed or foreseen again.

        Nothing foreseen ends what was known.

        Args:
            layer: MoE layer.
            waits: Tokens until use of each expert that is known to come.
            is_complete: Whether no other expert of the layer comes before the token after: then
                all others wait one token longer than the policy expects.
        """
        row = self._foreseen[self._row(layer)]
        row[:] = np.inf
        row[list(waits)] = list(waits.values())
        self._delay[self._row(layer)] = float(is_complete)

    def grow(self, num_slots: int) -> None:
        """Add free slots behind the last one."""
        self._free = [*range(self.num_slots + num_slots - 1, self.num_slots - 1, -1), *self._free]
        self.num_slots += num_slots

    def reserve(self, key: ExpertKey, *, expected_wait: float | None = None) -> Reservation | None:
        """Take a slot for an absent key, evicting the longest wait if none is free.

        Args:
            key: The expert that is to come.
            expected_wait: For a guess: tokens until the expert is expected to be used. It evicts
                only what is expected to wait longer, and is kept on that expectation until its
                layer has been observed.

        Returns:
            The slot, now PENDING, and who left it; None where nothing may be evicted, and then
            nothing has changed.
        """
        flat = self._flat(key)
        if self._state[flat] != _ABSENT:
            raise ForeloadError(f"{key} already has a slot")
        evicted = None
        if not self._free:
            victim = self._victim(expected_wait)
            if victim is None:
                return None
            self._release(victim)
            evicted = self._key(victim)
        slot = self._free.pop()
        self._state[flat] = _PENDING
        self._slot[flat] = slot
        if expected_wait is not None:
            self._promise[flat] = expected_wait
        return Reservation(slot, evicted)

    def commit(self, key: ExpertKey) -> None:
        """Mark a PENDING key readable."""
        flat = self._require(key, _PENDING)
        self._state[flat] = _READY

    def abort(self, key: ExpertKey) -> None:
        """Free the slot of a PENDING key."""
        flat = self._require(key, _PENDING)
        if self._pins[flat]:
            raise ForeloadError(f"{key} is pinned")
        self._release(flat)

    def pin(self, key: ExpertKey) -> None:
        """Protect a HIT or PENDING key from eviction, until unpinned as often."""
        self.slot_of(key)
        self._pins[self._flat(key)] += 1

    def unpin(self, key: ExpertKey) -> None:
        """Take one pin back."""
        flat = self._flat(key)
        if self._pins[flat] <= 0:
            raise ForeloadError(f"{key} is not pinned")
        self._pins[flat] -= 1

    def evict(self, key: ExpertKey) -> bool:
        """Free the slot of an unpinned HIT; False where it is pinned, and nothing changed."""
        flat = self._require(key, _READY)
        if self._pins[flat]:
            return False
        self._release(flat)
        return True

    def keys(self) -> list[ExpertKey]:
        """Give every key that has a slot."""
        return [self._key(int(flat)) for flat in np.flatnonzero(self._state)]

    def check(self) -> None:
        """Verify that no slot leaks, aliases or exceeds capacity.

        Raises:
            ForeloadError: The first broken invariant.
        """
        held = self._slot[self._state != _ABSENT].tolist()
        if sorted(held + self._free) != list(range(self.num_slots)):
            raise ForeloadError("slots leak or alias")
        if (self._slot[self._state == _ABSENT] != -1).any():
            raise ForeloadError("an absent expert holds a slot")
        if (self._pins < 0).any() or self._pins[self._state == _ABSENT].any():
            raise ForeloadError("an absent expert is pinned, or pins are negative")

    def _victim(self, guess_wait: float | None) -> int | None:
        wait = np.minimum(self._policy.expected_wait() + self._delay, self._promise)
        np.minimum(wait, self._foreseen, out=wait)
        wait[(self._state != _READY) | (self._pins > 0)] = -np.inf
        victim = int(wait.argmax())
        if wait[victim] == -np.inf or (guess_wait is not None and wait[victim] <= guess_wait):
            return None
        return victim

    def _release(self, flat: int) -> None:
        self._free.append(int(self._slot[flat]))
        self._slot[flat] = -1
        self._state[flat] = _ABSENT
        self._promise[flat] = np.inf

    def _require(self, key: ExpertKey, state: int) -> int:
        flat = self._flat(key)
        if self._state[flat] != state:
            raise ForeloadError(f"{key} is {self.lookup(key).value}")
        return flat

    def _row(self, layer: int) -> slice:
        return slice(layer * self._num_experts, (layer + 1) * self._num_experts)

    def _key(self, flat: int) -> ExpertKey:
        return ExpertKey(*divmod(flat, self._num_experts))

    def _flat(self, key: ExpertKey) -> int:
        return key[0] * self._num_experts + key[1]
