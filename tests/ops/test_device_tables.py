"""Tables on the device: no slot leaks, what is wanted is there, guesses push out nothing better."""

from __future__ import annotations

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
    least = min(most_tokens * top_k, num_experts)
    slots = data.draw(st.lists(st.integers(least, num_experts + 2), min_size=1, max_size=2))
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
            assert all(tables.expert_of[layer, slot] == e for e, slot, _ in listed(work))
            hits = [work.is_hit[place].item() for place in work.order.tolist()][: len(wanted)]
            assert hits == sorted(hits), "misses come first"
            assert sorted(work.order.tolist()) == list(range(len(work.order)))
            gone, kept = before - held(tables, layer), before & held(tables, layer) - wanted
        else:
            age = data.draw(st.integers(0, 2), label="min_age")
            most = data.draw(st.integers(0, 3), label="max_fetches")
            work = assign_prefetch(
                tables, layer, torch.tensor(index), max_fetches=most, min_age=age
            )
            tables.check()
            assert len(work.expert) == most
            brought = [expert for expert, _, _ in listed(work)]
            assert set(brought) <= wanted - before
            assert all(tables.expert_of[layer, slot] == e for e, slot, _ in listed(work))
            clock = int(tables.clock[layer])
            gone = before - held(tables, layer)
            assert not gone & wanted, "a guess pushes out no other guess"
            assert all(stamp_of[expert] <= clock - age for expert in gone)
            kept = {e for e in before - gone - wanted if stamp_of[e] <= clock - age}
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


def test_too_few_slots_for_one_step_are_refused_before_anything_changes() -> None:
    tables = make_tables([5], 16)
    with pytest.raises(ValueError, match=r"layer 0 has 5 expert slots.*can want 6 at once"):
        assign_slots(tables, 0, torch.zeros(3, 2, dtype=torch.int64))
    assert int(tables.clock[0]) == 0
    # No more than there are experts can be wanted.
    assign_slots(make_tables([4], 4), 0, torch.zeros(3, 2, dtype=torch.int64))


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


def test_a_guess_takes_no_slot_of_what_was_just_wanted() -> None:
    tables = make_tables([2], 8)
    assign_slots(tables, 0, ids([0]))
    assign_slots(tables, 0, ids([1]))
    work = assign_prefetch(tables, 0, ids([4, 5]), max_fetches=2)
    assert listed(work) == [(4, 0, 0)], "expert 0 was wanted a visit ago, expert 1 just now"
    assert listed(assign_prefetch(tables, 0, ids([6]), max_fetches=1)) == []
    assert held(tables) == {4, 1}
    assert listed(assign_prefetch(tables, 0, ids([6]), max_fetches=1, min_age=0)) != []


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
