"""The cache keeps its books under any sequence of operations."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foreload.errors import ForeloadError
from foreload.memory.cache import ExpertCache
from foreload.memory.eviction import LRU
from foreload.types import ExpertKey, Lookup

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

LAYERS, EXPERTS = 3, 5


class FixedWait:
    """Waits that the test sets."""

    def __init__(self, waits: Mapping[ExpertKey, float] | None = None) -> None:
        self.waits = np.full(LAYERS * EXPERTS, 1.0)
        for key, wait in (waits or {}).items():
            self.waits[key.layer * EXPERTS + key.expert] = wait
        self.seen: list[tuple[int, dict[int, int], int]] = []

    def observe(
        self, layer: int, counts: Mapping[int, int], num_tokens: int, routing: object = None
    ) -> None:
        self.seen.append((layer, dict(counts), num_tokens))

    def expected_wait(self) -> NDArray[np.float64]:
        return self.waits


def key(layer: int, expert: int) -> ExpertKey:
    return ExpertKey(layer, expert)


def make_cache(num_slots: int, waits: Mapping[ExpertKey, float] | None = None) -> ExpertCache:
    return ExpertCache(num_slots, LAYERS, EXPERTS, FixedWait(waits))


def fill(cache: ExpertCache, *keys: ExpertKey) -> None:
    for one in keys:
        assert cache.reserve(one) is not None
        cache.commit(one)


def books(cache: ExpertCache) -> tuple[object, ...]:
    """Give everything the cache knows, to see that nothing changed."""
    state = (cache._state, cache._slot, cache._pins, cache._promise, cache._foreseen, cache._delay)
    return (*(array.tobytes() for array in state), tuple(cache._free))


class TestOneSlotsLife:
    def test_reserve_makes_pending_and_commit_makes_hit(self) -> None:
        cache = make_cache(2)
        assert cache.lookup(key(0, 1)) is Lookup.MISS
        reservation = cache.reserve(key(0, 1))
        assert reservation is not None
        assert reservation.evicted is None
        assert cache.lookup(key(0, 1)) is Lookup.PENDING
        assert cache.slot_of(key(0, 1)) == reservation.slot
        cache.commit(key(0, 1))
        assert cache.lookup(key(0, 1)) is Lookup.HIT
        assert cache.slot_of(key(0, 1)) == reservation.slot
        assert cache.keys() == [key(0, 1)]

    def test_abort_gives_the_slot_back(self) -> None:
        cache = make_cache(1)
        first = cache.reserve(key(0, 1))
        cache.abort(key(0, 1))
        assert cache.lookup(key(0, 1)) is Lookup.MISS
        assert cache.reserve(key(1, 1)) == first
        cache.check()

    def test_lookup_changes_nothing(self) -> None:
        cache = make_cache(2)
        fill(cache, key(0, 0))
        cache.reserve(key(1, 0))
        before = books(cache)
        for layer in range(LAYERS):
            for expert in range(EXPERTS):
                cache.lookup(key(layer, expert))
        assert books(cache) == before

    def test_keys_of_different_layers_do_not_meet(self) -> None:
        cache = make_cache(LAYERS * EXPERTS)
        every = [key(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]
        fill(cache, *every)
        assert len({cache.slot_of(one) for one in every}) == len(every)
        assert cache.keys() == every
        cache.check()


class TestEviction:
    def test_the_longest_wait_leaves(self) -> None:
        cache = make_cache(2, {key(0, 0): 5.0, key(0, 1): 7.0})
        fill(cache, key(0, 0), key(0, 1))
        reservation = cache.reserve(key(2, 2))
        assert reservation is not None
        assert reservation.evicted == key(0, 1)
        assert cache.lookup(key(0, 1)) is Lookup.MISS
        assert cache.lookup(key(0, 0)) is Lookup.HIT

    def test_nobody_leaves_while_a_slot_is_free(self) -> None:
        cache = make_cache(3, {key(0, 0): 1e9})
        fill(cache, key(0, 0), key(0, 1))
        reservation = cache.reserve(key(0, 2))
        assert reservation is not None
        assert reservation.evicted is None

    def test_pinned_and_pending_experts_stay(self) -> None:
        cache = make_cache(2, {key(0, 0): 100.0, key(0, 1): 50.0})
        fill(cache, key(0, 0))
        cache.pin(key(0, 0))
        cache.reserve(key(0, 1))
        before = books(cache)
        assert cache.reserve(key(0, 2)) is None
        assert books(cache) == before

    def test_a_pin_counts(self) -> None:
        cache = make_cache(1)
        fill(cache, key(0, 0))
        cache.pin(key(0, 0))
        cache.pin(key(0, 0))
        cache.unpin(key(0, 0))
        assert cache.reserve(key(0, 1)) is None
        assert not cache.evict(key(0, 0))
        cache.unpin(key(0, 0))
        assert cache.evict(key(0, 0))
        assert cache.lookup(key(0, 0)) is Lookup.MISS

    def test_no_slots_at_all_refuse_every_key(self) -> None:
        assert make_cache(0).reserve(key(0, 0)) is None


class TestGuesses:
    @pytest.mark.parametrize(("wait", "may"), [(4.9, True), (5.0, False), (5.1, False)])
    def test_a_guess_evicts_only_what_waits_longer(self, wait: float, may: bool) -> None:
        cache = make_cache(1, {key(0, 0): 5.0})
        fill(cache, key(0, 0))
        before = books(cache)
        assert (cache.reserve(key(1, 0), expected_wait=wait) is not None) is may
        if not may:
            assert books(cache) == before

    def test_a_guess_is_kept_on_its_promise_until_its_layer_was_seen(self) -> None:
        cache = make_cache(2, {key(0, 0): 3.0, key(1, 0): 9.0})
        fill(cache, key(0, 0))
        assert cache.reserve(key(1, 0), expected_wait=0.5) is not None
        cache.commit(key(1, 0))
        cache.observe(0, {}, 1)
        # The policy would let the guess go (9 > 3); the promise keeps it.
        reservation = cache.reserve(key(2, 0))
        assert reservation is not None
        assert reservation.evicted == key(0, 0)
        cache.abort(key(2, 0))
        fill(cache, key(0, 0))
        cache.observe(1, {}, 1)
        reservation = cache.reserve(key(2, 0))
        assert reservation is not None
        assert reservation.evicted == key(1, 0)

    def test_a_promise_dies_with_its_slot(self) -> None:
        cache = make_cache(1, {key(0, 0): 9.0, key(1, 0): 1.0})
        cache.reserve(key(0, 0), expected_wait=0.1)
        cache.abort(key(0, 0))
        fill(cache, key(0, 0))
        reservation = cache.reserve(key(1, 0), expected_wait=1.0)
        assert reservation is not None, "the promise of an aborted guess still protects the key"
        assert reservation.evicted == key(0, 0)

    def test_observe_tells_the_policy(self) -> None:
        policy = FixedWait()
        ExpertCache(1, LAYERS, EXPERTS, policy).observe(2, {3: 4}, 7)
        assert policy.seen == [(2, {3: 4}, 7)]


def leaves(cache: ExpertCache, *, for_guess: float | None = None) -> ExpertKey | None:
    """Give who would leave its slot for another expert now."""
    reservation = cache.reserve(key(2, 4), expected_wait=for_guess)
    if reservation is None:
        return None
    cache.abort(key(2, 4))
    if reservation.evicted is not None:
        fill(cache, reservation.evicted)
    return reservation.evicted


class TestForesight:
    def test_what_is_foreseen_stays_whatever_the_policy_expects(self) -> None:
        cache = make_cache(2, {key(0, 0): 9.0, key(0, 1): 3.0})
        fill(cache, key(0, 0), key(0, 1))
        assert leaves(cache) == key(0, 0)
        cache.foresee(0, {0: 0.001}, is_complete=False)
        assert leaves(cache) == key(0, 1)

    def test_of_what_is_foreseen_the_latest_leaves_if_one_must(self) -> None:
        cache = make_cache(2)
        fill(cache, key(0, 0), key(1, 0))
        cache.foresee(0, {0: 0.001}, is_complete=True)
        cache.foresee(1, {0: 0.002}, is_complete=True)
        assert leaves(cache, for_guess=0.5) is None, "a guess evicts neither"
        assert leaves(cache) == key(1, 0)

    def test_a_policy_that_expects_it_sooner_is_believed(self) -> None:
        cache = make_cache(2, {key(0, 0): 0.1, key(0, 1): 0.5})
        fill(cache, key(0, 0), key(0, 1))
        cache.foresee(0, {0: 2.0}, is_complete=False)
        assert leaves(cache) == key(0, 1)

    def test_where_all_is_known_the_others_wait_a_token_longer(self) -> None:
        cache = make_cache(3, {key(0, 0): 3.0, key(0, 1): 3.2, key(1, 0): 3.5})
        fill(cache, key(0, 0), key(0, 1), key(1, 0))
        cache.foresee(0, {}, is_complete=False)
        assert leaves(cache) == key(1, 0)
        cache.foresee(0, {1: 0.5}, is_complete=True)
        assert leaves(cache) == key(0, 0)
        assert leaves(cache, for_guess=3.9) == key(0, 0)
        assert leaves(cache, for_guess=4.1) is None

    def test_a_promise_still_holds_where_all_is_known(self) -> None:
        cache = make_cache(2, {key(0, 0): 9.0, key(1, 0): 2.0})
        assert cache.reserve(key(0, 0), expected_wait=0.5) is not None
        cache.commit(key(0, 0))
        fill(cache, key(1, 0))
        cache.foresee(0, {}, is_complete=True)
        assert leaves(cache) == key(1, 0)

    @pytest.mark.parametrize("ending", ["observed", "nothing foreseen", "foreseen again"])
    def test_foresight_ends_with_its_layer(self, ending: str) -> None:
        cache = make_cache(2, {key(0, 0): 9.0, key(0, 1): 3.0, key(1, 1): 3.5})
        before = books(cache)
        cache.foresee(0, {0: 0.001, 3: 0.002}, is_complete=True)
        assert books(cache) != before
        if ending == "observed":
            cache.observe(0, {0: 1}, 1)
        else:
            again = {} if ending == "nothing foreseen" else {1: 0.001}
            cache.foresee(0, again, is_complete=False)
        assert (books(cache) == before) is (ending != "foreseen again")
        fill(cache, key(0, 0), key(0, 1))
        assert leaves(cache) == key(0, 0)

    def test_layers_are_foreseen_apart(self) -> None:
        cache = make_cache(2, {key(0, 0): 9.0, key(1, 0): 8.0})
        fill(cache, key(0, 0), key(1, 0))
        cache.foresee(0, {0: 0.001}, is_complete=True)
        cache.observe(1, {0: 1}, 1)
        cache.foresee(1, {}, is_complete=False)
        assert leaves(cache) == key(1, 0)

    def test_pinned_and_pending_experts_stay_all_the_same(self) -> None:
        cache = make_cache(2, {key(0, 0): 1.0, key(0, 1): 9.0})
        fill(cache, key(0, 0), key(0, 1))
        cache.pin(key(0, 1))
        cache.foresee(0, {0: 0.001}, is_complete=True)
        assert leaves(cache) == key(0, 0)


class TestGrowing:
    def test_new_slots_are_taken_before_anybody_leaves(self) -> None:
        cache = make_cache(2)
        fill(cache, key(0, 0), key(0, 1))
        cache.grow(2)
        cache.check()
        assert cache.num_slots == 4
        for expert in (2, 3):
            reservation = cache.reserve(key(0, expert))
            assert reservation is not None
            assert reservation.evicted is None
        assert {cache.slot_of(key(0, expert)) for expert in range(4)} == {0, 1, 2, 3}
        cache.check()
        cache.commit(key(0, 2))
        assert leaves(cache) is not None

    def test_slots_that_were_free_are_taken_first(self) -> None:
        cache = make_cache(3)
        fill(cache, key(0, 0))
        cache.grow(5)
        slots = []
        for expert in range(1, 5):
            reservation = cache.reserve(key(0, expert))
            assert reservation is not None
            slots.append(reservation.slot)
        assert slots == [1, 2, 3, 4]
        cache.check()

    def test_growing_by_nothing_changes_nothing(self) -> None:
        cache = make_cache(2)
        fill(cache, key(0, 0))
        before = books(cache)
        cache.grow(0)
        assert books(cache) == before


class TestMisuse:
    def test_what_makes_no_sense_is_refused_and_changes_nothing(self) -> None:
        cache = make_cache(2)
        fill(cache, key(0, 0))
        cache.reserve(key(0, 1))
        cache.pin(key(0, 1))
        before = books(cache)
        for misuse in (
            lambda: cache.reserve(key(0, 0)),
            lambda: cache.reserve(key(0, 1)),
            lambda: cache.commit(key(0, 0)),
            lambda: cache.commit(key(2, 0)),
            lambda: cache.abort(key(0, 0)),
            lambda: cache.abort(key(0, 1)),  # pinned
            lambda: cache.abort(key(2, 0)),
            lambda: cache.pin(key(2, 0)),
            lambda: cache.unpin(key(0, 0)),
            lambda: cache.evict(key(0, 1)),
            lambda: cache.evict(key(2, 0)),
            lambda: cache.slot_of(key(2, 0)),
        ):
            with pytest.raises(ForeloadError):
                misuse()
            assert books(cache) == before

    @pytest.mark.parametrize(
        ("damage", "words"),
        [
            (lambda cache: cache._free.append(0), "leak or alias"),
            (lambda cache: cache._free.pop(), "leak or alias"),
            (lambda cache: cache._state.__setitem__(0, 0), "leak or alias"),
            (lambda cache: cache._slot.__setitem__(9, 1), "absent expert holds"),
            (lambda cache: cache._pins.__setitem__(9, 1), "pinned"),
            (lambda cache: cache._pins.__setitem__(0, -1), "negative"),
        ],
    )
    def test_check_finds_damage(self, damage: object, words: str) -> None:
        cache = make_cache(3)
        fill(cache, key(0, 0), key(0, 1))
        cache.check()
        damage(cache)  # type: ignore[operator]
        with pytest.raises(ForeloadError, match=words):
            cache.check()


KEYS = st.builds(ExpertKey, st.integers(0, LAYERS - 1), st.integers(0, EXPERTS - 1))
OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(
            [
                "reserve",
                "guess",
                "commit",
                "abort",
                "pin",
                "unpin",
                "evict",
                "observe",
                "foresee",
                "grow",
            ]
        ),
        KEYS,
        st.floats(0, 5),
    ),
    max_size=60,
)


class Model:
    """What the cache should be, written down the slow way."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.held: dict[ExpertKey, Lookup] = {}
        self.pins: dict[ExpertKey, int] = {}

    def may_leave(self) -> set[ExpertKey]:
        return {k for k, state in self.held.items() if state is Lookup.HIT and not self.pins.get(k)}


def apply(cache: ExpertCache, model: Model, name: str, one: ExpertKey, number: float) -> None:
    state = model.held.get(one, Lookup.MISS)
    if name in ("reserve", "guess") and state is Lookup.MISS:
        can_leave = model.may_leave()
        before = books(cache)
        got = cache.reserve(one, expected_wait=number if name == "guess" else None)
        if got is None:
            assert len(model.held) == model.num_slots
            assert name == "guess" or not can_leave
            assert books(cache) == before
            return
        if len(model.held) == model.num_slots:
            assert got.evicted in can_leave
            del model.held[got.evicted]
        else:
            assert got.evicted is None
        model.held[one] = Lookup.PENDING
    elif name == "commit" and state is Lookup.PENDING:
        cache.commit(one)
        model.held[one] = Lookup.HIT
    elif name == "abort" and state is Lookup.PENDING and not model.pins.get(one):
        cache.abort(one)
        del model.held[one]
    elif name == "pin" and state is not Lookup.MISS:
        cache.pin(one)
        model.pins[one] = model.pins.get(one, 0) + 1
    elif name == "unpin" and model.pins.get(one):
        cache.unpin(one)
        model.pins[one] -= 1
    elif name == "evict" and state is Lookup.HIT:
        assert cache.evict(one) is not bool(model.pins.get(one))
        if not model.pins.get(one):
            del model.held[one]
    elif name == "observe":
        cache.observe(one.layer, {one.expert: 1}, 1)
    elif name == "foresee":
        cache.foresee(one.layer, {one.expert: number}, is_complete=number > 2)
    elif name == "grow":
        cache.grow(1)
        model.num_slots += 1


@given(st.integers(1, 6), OPERATIONS)
def test_any_sequence_of_operations_keeps_the_books(
    num_slots: int, operations: list[tuple[str, ExpertKey, float]]
) -> None:
    cache, model = ExpertCache(num_slots, LAYERS, EXPERTS, LRU(LAYERS, EXPERTS)), Model(num_slots)
    for operation in operations:
        apply(cache, model, *operation)
        cache.check()
        assert set(cache.keys()) == set(model.held)
        for layer in range(LAYERS):
            for expert in range(EXPERTS):
                one = key(layer, expert)
                assert cache.lookup(one) is model.held.get(one, Lookup.MISS)
