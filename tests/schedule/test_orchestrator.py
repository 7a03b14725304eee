"""A round's copies come in the order they are needed, as many as the moment has room for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foreload.predict.draft_routing import LookaheadBuffer
from foreload.schedule.orchestrator import Phase, PrefetchRound, foreseen_wait

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from foreload.types import ExpertKey

LAYERS = 4


class Tiers:
    """A target that begins what it is asked for, and lets it arrive when the test says so."""

    def __init__(self, *present: tuple[int, int]) -> None:
        self.present = set(present)
        self.open: list[tuple[int, int]] = []
        self.begun: list[tuple[int, int]] = []
        self.refused: set[tuple[int, int]] = set()
        self.waits: dict[tuple[int, int], float] = {}
        self.orders: dict[tuple[int, int], float] = {}
        self.foreseen: dict[int, tuple[dict[int, float], bool]] = {}
        self.called_off: list[tuple[int, int]] = []

    @property
    def num_open_prefetches(self) -> int:
        return len(self.open)

    def is_absent(self, key: ExpertKey) -> bool:
        return key not in self.present and key not in self.open

    def prefetch(self, key: ExpertKey, *, expected_wait: float, order: float) -> bool:
        assert self.is_absent(key), f"{key} is asked for twice"
        if key in self.refused:
            return False
        self.open.append(tuple(key))
        self.begun.append(tuple(key))
        self.waits[key], self.orders[key] = expected_wait, order
        return True

    def foresee(self, layer: int, waits: Mapping[int, float], *, is_complete: bool) -> None:
        self.foreseen[layer] = (dict(waits), is_complete)

    def call_off(self, keys: Iterable[ExpertKey]) -> None:
        self.called_off += [tuple(key) for key in keys]

    def arrive(self, number: int | None = None) -> None:
        """Let the first copies arrive; None lets all."""
        for key in sorted(self.open, key=self.orders.__getitem__)[:number]:
            self.open.remove(key)
            self.present.add(key)


class Bench:
    """A round over four layers; a layer's experts are noted with equal weights."""

    def __init__(self, *present: tuple[int, int], **settings: Any) -> None:
        self.tiers = Tiers(*present)
        self.buffer = LookaheadBuffer(LAYERS)
        given = {
            "num_layers": LAYERS,
            "chances": (1.0, 0.8, 0.6, 0.4),
            "num_workers": 2,
            "link_experts": 3.0,
            **settings,
        }
        self.round = PrefetchRound(self.tiers, self.buffer, **given)

    def note(self, layer: int, *experts: int) -> list[tuple[int, int]]:
        """Draft one layer of a token; give what was begun for it."""
        before = len(self.tiers.begun)
        self.round.note(layer, experts, [1.0] * len(experts))
        return self.tiers.begun[before:]

    def draft(self, *layers: Sequence[int]) -> None:
        """Draft one token, by layer."""
        for layer, experts in enumerate(layers):
            self.note(layer, *experts)
        self.round.end_token()


class TestPhases:
    def test_at_first_every_copying_thread_has_something_to_do_and_no_more(self) -> None:
        bench = Bench(num_workers=2, link_experts=30.0)
        assert bench.round.phase is Phase.PRIMING
        assert len(bench.note(0, 1, 2, 3, 4)) == 2
        assert bench.note(1, 5, 6) == []
        bench.tiers.arrive(1)
        assert len(bench.note(2, 7)) == 1

    @pytest.mark.parametrize(("link_experts", "most"), [(0.0, 2), (1.5, 2), (3.0, 3), (4.5, 5)])
    def test_then_as_much_is_queued_as_the_link_carries_in_a_token(
        self, link_experts: float, most: int
    ) -> None:
        bench = Bench(link_experts=link_experts)
        bench.draft([0])
        bench.tiers.arrive()
        assert bench.round.phase is Phase.GUIDED
        bench.note(0, 1, 2, 3, 4, 5, 6, 7)
        assert bench.tiers.num_open_prefetches == most
        bench.tiers.arrive(1)
        bench.note(1, 1)
        assert bench.tiers.num_open_prefetches == most

    def test_when_drafting_is_over_everything_missing_is_queued(self) -> None:
        bench = Bench((1, 2))
        bench.draft([1, 2, 3, 4], [1, 2, 3], [5], [6])
        bench.draft([2, 7], [1], [5], [0])
        bench.round.end_draft()
        assert bench.round.phase is Phase.SATURATION
        wanted = {(0, 1), (0, 2), (0, 3), (0, 4), (0, 7), (1, 1), (1, 3), (2, 5), (3, 6), (3, 0)}
        assert set(bench.tiers.begun) == wanted
        assert len(bench.tiers.begun) == len(wanted)

    def test_what_others_have_queued_leaves_less_room(self) -> None:
        bench = Bench(num_workers=2)
        bench.tiers.open = [(9, 9)]
        assert len(bench.note(0, 1, 2, 3)) == 1

    def test_what_is_here_or_coming_is_not_asked_for_again(self) -> None:
        bench = Bench((0, 1))
        assert bench.note(0, 1, 2) == [(0, 2)]
        bench.round.end_token()
        assert bench.note(0, 1, 2) == []
        bench.round.end_draft()
        assert bench.tiers.begun == [(0, 2)]

    def test_what_has_come_in_the_meantime_takes_no_room(self) -> None:
        bench = Bench(num_workers=1, link_experts=0.0)
        bench.note(0, 1, 2, 3)
        assert len(bench.tiers.begun) == 1
        bench.tiers.present |= {(0, 1), (0, 2), (0, 3)}
        bench.tiers.open.clear()
        assert bench.note(1, 4) == [(1, 4)]


class TestOrder:
    def test_the_earliest_layer_goes_first_and_in_it_what_is_wanted_most(self) -> None:
        bench = Bench(num_workers=1, link_experts=0.0)
        bench.tiers.open = [(9, 9)]  # nothing begins before all is known
        bench.draft([1, 2], [6], [], [3])
        bench.draft([2, 5], [6, 4], [], [3])
        bench.draft([2, 5], [4], [1], [3])
        assert bench.tiers.begun == []
        bench.round.end_draft()
        assert bench.tiers.begun == [
            (0, 2), (0, 5), (0, 1), (1, 6), (1, 4), (2, 1), (3, 3)
        ]  # fmt: skip
        orders = [bench.tiers.orders[key] for key in bench.tiers.begun]
        assert orders == sorted(orders)
        assert len(set(orders)) == len(orders)

    def test_ranks_are_those_of_the_step_that_verifies(self) -> None:
        bench = Bench(first_order=40.0)
        bench.draft([1], [1], [1], [1])
        bench.round.end_draft()
        for layer in range(LAYERS):
            # As `schedule.prefetch` ranks guesses about a layer.
            assert 39.0 + layer < bench.tiers.orders[layer, 1] <= 40.0 + layer

    def test_while_drafting_only_what_waits_longer_makes_room(self) -> None:
        bench = Bench()
        bench.note(0, 1)
        bench.round.end_token()
        bench.note(0, 2)
        bench.note(1, 3, 4, 5)
        bench.round.end_draft()
        waits = bench.tiers.waits
        assert waits[0, 1] == waits[0, 2] == 0.5
        assert waits[1, 5] < 0.01, "then everything that nobody drafted does"
        longest = max(max(waits.values()) for waits, _ in bench.tiers.foreseen.values() if waits)
        assert waits[1, 5] > longest, "and nothing that somebody drafted"

    def test_what_cannot_be_had_now_is_tried_again(self) -> None:
        bench = Bench()
        bench.tiers.refused = {(0, 1)}
        assert bench.note(0, 1) == []
        assert bench.note(1, 2) == [], "what is needed later does not overtake it"
        bench.tiers.refused.clear()
        assert bench.note(2, 3) == [(0, 1), (1, 2)]


class TestForeseeing:
    def test_what_is_drafted_is_foreseen_at_once_and_earlier_layers_sooner(self) -> None:
        bench = Bench((0, 1), (3, 2))
        bench.note(0, 1)
        waits, is_complete = bench.tiers.foreseen[0]
        assert set(waits) == {1}
        assert not is_complete, "more may be drafted"
        bench.note(3, 2)
        later, _ = bench.tiers.foreseen[3]
        assert 0 < waits[1] < later[2] <= 1e-3
        assert (waits[1], later[2]) == (foreseen_wait(0, LAYERS), foreseen_wait(3, LAYERS))

    def test_all_drafted_tokens_are_foreseen_together(self) -> None:
        bench = Bench()
        bench.draft([1, 2])
        bench.note(0, 2, 3)
        assert set(bench.tiers.foreseen[0][0]) == {1, 2, 3}

    def test_at_the_end_of_the_draft_nothing_else_is_expected(self) -> None:
        bench = Bench()
        bench.draft([1], [2])
        bench.round.end_draft()
        for layer, wanted in enumerate(({1}, {2}, set(), set())):
            waits, is_complete = bench.tiers.foreseen[layer]
            assert set(waits) == wanted
            assert is_complete

    def test_foresight_takes_the_place_of_the_drafts_routing(self) -> None:
        asked: list[tuple[int, int]] = []

        def foresee(token: int, layer: int) -> list[int]:
            asked.append((token, layer))
            return [10 * token + layer]

        bench = Bench(foresight=foresee)
        bench.draft([1, 2], [3])
        bench.draft([4], [5])
        assert asked == [(0, 0), (0, 1), (1, 0), (1, 1)]
        assert set(bench.buffer.uses(0)) == {0, 10}
        assert set(bench.buffer.uses(1)) == {1, 11}
        bench.round.end_draft()
        assert set(bench.tiers.begun) == {(0, 0), (0, 10), (1, 1), (1, 11)}

    def test_chances_weigh_what_later_tokens_want(self) -> None:
        bench = Bench(chances=(1.0, 0.25))
        bench.draft([1, 2])
        bench.draft([2, 3])
        assert bench.buffer.uses(0) == {1: 1.0, 2: 1.25, 3: 0.25}


class TestVerifying:
    def test_layers_that_were_passed_are_dropped_and_later_ones_go_on(self) -> None:
        bench = Bench(num_workers=1, link_experts=0.0)
        bench.draft([1, 2], [3, 4], [5], [6])
        bench.tiers.refused = {(0, 2)}
        bench.round.end_draft()
        assert bench.tiers.begun == [(0, 1)]
        bench.round.reach(0)
        assert bench.tiers.begun == [(0, 1), (1, 3), (1, 4), (2, 5), (3, 6)]

    def test_reaching_a_layer_starts_what_slots_can_be_had_for_by_now(self) -> None:
        bench = Bench()
        bench.tiers.refused = {(2, 1)}
        bench.draft([], [], [1], [2])
        bench.round.end_draft()
        assert bench.tiers.begun == []
        bench.round.reach(0)
        assert bench.tiers.begun == []
        bench.tiers.refused.clear()
        bench.round.reach(1)
        assert bench.tiers.begun == [(2, 1), (3, 2)]

    def test_the_end_forgets_and_calls_off_what_was_not_reached(self) -> None:
        bench = Bench()
        bench.draft([1], [2], [3], [4])
        bench.round.end_draft()
        bench.tiers.foreseen.clear()
        bench.round.reach(0)
        bench.round.reach(1)
        bench.round.close()
        # Layers that were reached have been observed: what was foreseen of them is gone.
        assert bench.tiers.foreseen == {2: ({}, False), 3: ({}, False)}
        assert sorted(bench.tiers.called_off) == [(0, 1), (1, 2), (2, 3), (3, 4)]

    def test_a_round_that_was_never_verified_forgets_every_layer(self) -> None:
        bench = Bench()
        bench.note(0, 1)
        bench.note(1, 2, 3, 4)
        bench.round.close()
        assert bench.tiers.foreseen == {layer: ({}, False) for layer in range(LAYERS)}
        assert bench.tiers.called_off == bench.tiers.begun
        begun = len(bench.tiers.begun)
        bench.tiers.arrive()
        bench.round.reach(0)
        assert len(bench.tiers.begun) == begun, "nothing goes on"

    def test_closing_twice_is_closing_once(self) -> None:
        bench = Bench()
        bench.draft([1])
        bench.round.close()
        bench.round.close()
        assert bench.tiers.called_off == [(0, 1)]


class TestWithoutPrefetching:
    def test_nothing_is_copied_but_eviction_knows_the_future(self) -> None:
        bench = Bench(is_prefetching=False)
        bench.draft([1, 2], [3])
        bench.round.end_draft()
        bench.round.reach(0)
        assert bench.tiers.begun == []
        assert set(bench.tiers.foreseen[0][0]) == {1, 2}
        assert bench.tiers.foreseen[1][1]
        bench.round.close()
        assert bench.tiers.called_off == []
        assert bench.tiers.foreseen[3] == ({}, False)


EXPERT_SETS = st.sets(st.integers(0, 7), max_size=4)
TOKENS = st.lists(st.lists(EXPERT_SETS, min_size=LAYERS, max_size=LAYERS), max_size=4)


@given(TOKENS, st.integers(1, 3), st.floats(0, 6), EXPERT_SETS, st.integers(0, 3))
def test_any_round_brings_all_that_was_drafted_within_its_quotas(
    tokens: list[list[set[int]]],
    num_workers: int,
    link_experts: float,
    present: set[int],
    arriving: int,
) -> None:
    here = {(layer, expert) for layer in range(LAYERS) for expert in present}
    bench = Bench(*here, num_workers=num_workers, link_experts=link_experts)
    most = num_workers
    for token in tokens:
        for layer, experts in enumerate(token):
            bench.note(layer, *sorted(experts))
            assert bench.tiers.num_open_prefetches <= most
            bench.tiers.arrive(arriving)
        bench.round.end_token()
        most = max(num_workers, int(-(-link_experts // 1)))
    bench.round.end_draft()
    wanted = {
        (layer, e) for token in tokens for layer, experts in enumerate(token) for e in experts
    }
    assert set(bench.tiers.begun) == wanted - here
    assert len(bench.tiers.begun) == len(wanted - here)
    for layer in range(LAYERS):
        waits, is_complete = bench.tiers.foreseen[layer]
        assert {(layer, expert) for expert in waits} == {key for key in wanted if key[0] == layer}
        assert is_complete
    bench.round.close()
    assert sorted(bench.tiers.called_off) == sorted(bench.tiers.begun)
