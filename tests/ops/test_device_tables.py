"""Tables on the device: no slot leaks, what is wanted is there as far as there are slots for it."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from foreload.errors import ForeloadError
from foreload.ops.device_tables import (
    ABSENT,
    Counters,
    DeviceTables,
    WorkList,
    assign_prefetch,
    assign_slots,
    make_tables,
)


def ids(*rows: list[int]) -> Tensor:
    return torch.tensor(rows)


def listed(work: WorkList) -> list[tuple[int, int, int]]:
    """Give (expert, slot, is_hit) of what is no padding."""
    rows = zip(work.expert.tolist(), work.slot.tolist(), work.is_hit.tolist(), strict=True)
    return [row for row in rows if row[0] != ABSENT]


def held(tables: DeviceTables, layer: int = 0) -> set[int]:
    return {expert for expert in tables.expert_of[layer].tolist() if expert != ABSENT}


@given(st.data())
def test_any_sequence_of_demands_and_guesses_keeps_the_tables_whole(data: st.DataObject) -> None:
    num_experts = data.draw(st.integers(1, 9), label="E")
    top_k = data.draw(st.integers(1, min(4, num_experts)), label="K")
    most_tokens = data.draw(st.integers(1, 3), label="T")
    slots = data.draw(st.lists(st.integers(1, num_experts + 2), min_size=1, max_size=2))
    tables = make_tables(slots, num_experts)
    # Ids of E and above stand for no expert.
    one = st.integers(0, num_experts + 2)
    for _ in range(data.draw(st.integers(1, 8), label="steps")):
        layer = data.draw(st.integers(0, len(slots) - 1))
        num_tokens = data.draw(st.integers(1, most_tokens))
        row = st.lists(one, min_size=top_k, max_size=top_k)
        index = data.draw(st.lists(row, min_size=num_tokens, max_size=num_tokens))
        wanted = {expert for some in index for expert in some if expert < num_experts}
        before = held(tables, layer)
        stamps = tables.stamp[layer].tolist()
        stamp_of = {
            expert: stamps[slot]
            for slot, expert in enumerate(tables.expert_of[layer].tolist())
            if expert != ABSENT
        }
        if data.draw(st.booleans(), label="is demand"):
            work = assign_slots(tables, layer, torch.tensor(index))
            tables.check()
            assert len(work.expert) == min(num_tokens * top_k, num_experts)
            assert [expert for expert, _, _ in listed(work)] == sorted(wanted)
            assert {expert for expert, _, is_hit in listed(work) if is_hit} == wanted & before
            kept_now = {e: slot for e, slot, _ in listed(work) if slot != ABSENT}
            assert all(tables.expert_of[layer, slot] == e for e, slot in kept_now.items())
            assert all(is_hit <= (slot != ABSENT) for _, slot, is_hit in listed(work))
            # As many as there is room for, and none leaves while something wanted has no slot.
            assert len(kept_now) == min(len(wanted), slots[layer])
            assert set(kept_now) == wanted & held(tables, layer)
            asked = Counter(expert for some in index for expert in some if expert < num_experts)
            with_slot = {asked[e] for e in wanted - before if e in kept_now}
            without = {asked[e] for e in wanted if e not in kept_now}
            assert min(with_slot, default=99) >= max(without, default=0), "most wanted, most kept"
            hits = [work.is_hit[place].item() for place in work.order.tolist()][: len(wanted)]
            assert hits == sorted(hits), "misses come first"
            assert sorted(work.order.tolist()) == list(range(len(work.order)))
            gone, kept = before - held(tables, layer), before & held(tables, layer) - wanted
        else:
            most = data.draw(st.integers(0, 3), label="max_fetches")
            work = assign_prefetch(tables, layer, torch.tensor(index), max_fetches=most)
            tables.check()
            assert len(work.expert) == most
            brought = [expert for expert, _, _ in listed(work)]
            assert set(brought) <= wanted - before
            assert all(tables.expert_of[layer, slot] == e for e, slot, _ in listed(work))
            gone = before - held(tables, layer)
            assert not gone & wanted, "a guess pushes out no other guess"
            room = slots[layer] - len(wanted & before)
            assert len(brought) == min(most, room, len(wanted - before))
            kept = before - gone - wanted
        if gone and kept:
            assert max(stamp_of[e] for e in gone) <= min(stamp_of[e] for e in kept)


def test_the_stalest_expert_goes_and_a_wanted_one_never() -> None:
    tables = make_tables([3], 8)
    for expert in (0, 1, 2):
        assign_slots(tables, 0, ids([expert]))
    assign_slots(tables, 0, ids([0]))
    assert listed(assign_slots(tables, 0, ids([5]))) == [(5, 1, 0)]
    assert held(tables) == {0, 2, 5}
    # Expert 2 is the stalest now, but wanted itself.
    assert listed(assign_slots(tables, 0, ids([2, 7]))) == [(2, 2, 1), (7, 0, 0)]
    assert held(tables) == {2, 5, 7}


def test_layers_have_slots_of_their_own() -> None:
    tables = make_tables([1, 4], 4)
    assign_slots(tables, 0, ids([3]))
    assign_slots(tables, 1, ids([0, 1, 2, 3]))
    assert held(tables, 0) == {3}
    assert held(tables, 1) == {0, 1, 2, 3}
    assert tables.expert_of[0].tolist() == [3, ABSENT, ABSENT, ABSENT]


def test_what_most_tokens_want_has_a_slot_where_not_all_can() -> None:
    tables = make_tables([3], 8)
    work = assign_slots(tables, 0, ids([7, 2], [1, 5], [2, 4]))
    # Expert 2 is wanted twice; of the others 7 and 1 are their tokens' likeliest.
    assert listed(work) == [(1, 2, 0), (2, 0, 0), (4, ABSENT, 0), (5, ABSENT, 0), (7, 1, 0)]
    assert tables.read_counters() == [Counters(0, 5, 0, 0)]
    assert [work.expert[place].item() for place in work.order.tolist()][:3] == [2, 7, 1]
    # What is there stays while it is wanted, however many want something else.
    work = assign_slots(tables, 0, ids([1, 6], [2, 6], [7, 6]))
    assert listed(work) == [(1, 2, 1), (2, 0, 1), (6, ABSENT, 0), (7, 1, 1)]
    assert tables.slot_of[0].tolist() == [-1, 2, 0, -1, -1, -1, -1, 1]
    assert tables.read_counters() == [Counters(3, 6, 0, 0)]


@pytest.mark.parametrize(("slots", "experts"), [([], 4), ([2, 0], 4), ([2], 0)])
def test_tables_without_slots_are_refused(slots: list[int], experts: int) -> None:
    with pytest.raises(ValueError, match="too few"):
        make_tables(slots, experts)


def test_counters_tell_hits_misses_and_guesses_that_paid() -> None:
    tables = make_tables([4, 4], 8)
    assign_prefetch(tables, 0, ids([0, 1, 2]), max_fetches=2)
    assert tables.read_counters() == [Counters(0, 0, 2, 0), Counters(0, 0, 0, 0)]
    assign_slots(tables, 0, ids([0, 2]))
    assert tables.read_counters()[0] == Counters(1, 1, 2, 1)
    # A guess pays once; expert 1 was never wanted.
    assign_slots(tables, 0, ids([0, 2]))
    assert tables.read_counters()[0] == Counters(3, 1, 2, 1)


def test_guesses_come_likeliest_first_and_every_tokens_best_before_any_seconds() -> None:
    tables = make_tables([8], 8)
    work = assign_prefetch(tables, 0, ids([5, 1], [3, 5], [7, 2]), max_fetches=4)
    assert [expert for expert, _, _ in listed(work)] == [5, 3, 7, 1]


def test_a_guess_takes_the_stalest_slot_of_what_is_not_guessed() -> None:
    tables = make_tables([3], 8)
    for expert in (0, 1, 2):
        assign_slots(tables, 0, ids([expert]))
    assert listed(assign_prefetch(tables, 0, ids([0, 4]), max_fetches=1)) == [(4, 1, 0)]
    # Even what was wanted just now: with slots for one token there is nothing else.
    work = assign_prefetch(tables, 0, ids([0, 4, 5, 6]), max_fetches=2)
    assert listed(work) == [(5, 2, 0)]
    assert held(tables) == {0, 4, 5}
    assert listed(assign_prefetch(tables, 0, ids([0, 4, 5, 6]), max_fetches=2)) == []


def test_one_slot_serves_any_number_of_tokens() -> None:
    tables = make_tables([1], 8)
    for index in ([[3, 5]], [[5, 3], [1, 3]], [[3, 0]]):
        work = assign_slots(tables, 0, ids(*index))
        tables.check()
        assert sum(slot != ABSENT for _, slot, _ in listed(work)) == 1
    assert held(tables) == {3}
    assert tables.read_counters() == [Counters(2, 5, 0, 0)]
    assert listed(assign_prefetch(tables, 0, ids([6, 7]), max_fetches=2)) == [(6, 0, 0)]


def test_a_broken_table_is_found() -> None:
    def tables() -> DeviceTables:
        made = make_tables([2, 1], 4)
        assign_slots(made, 0, ids([0, 1]))
        assign_slots(made, 1, ids([3]))
        made.check()
        return made

    aliased = tables()
    aliased.slot_of[0, 1] = 0
    leaked = tables()
    leaked.slot_of[0, 1] = ABSENT
    beyond = tables()
    beyond.expert_of[1] = torch.tensor([ABSENT, 3])
    beyond.slot_of[1, 3] = 1
    unstamped = tables()
    unstamped.stamp[0, 1] = -1
    for broken in (aliased, leaked, beyond, unstamped):
        with pytest.raises(ForeloadError):
            broken.check()
