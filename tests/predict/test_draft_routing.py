"""The buffer keeps where each drafted token went, and how likely each expert is wanted."""

from __future__ import annotations

import pytest

from foreload.predict.draft_routing import DraftRouting, LookaheadBuffer


def test_an_empty_buffer_knows_nothing() -> None:
    buffer = LookaheadBuffer(2)
    assert buffer.num_tokens == 0
    assert buffer.uses(0) == buffer.uses(1) == {}
    assert buffer.routing(0, 0) is None
    assert buffer.routing(5, 1) is None


def test_routing_is_kept_by_token_and_layer() -> None:
    buffer = LookaheadBuffer(2)
    buffer.note(0, [3, 1], [0.75, 0.25], 1.0)
    buffer.note(1, [2, 0], [0.5, 0.5], 1.0)
    buffer.end_token()
    buffer.note(0, (1, 4), (0.9, 0.1), 0.8)
    assert buffer.routing(0, 0) == DraftRouting((3, 1), (0.75, 0.25))
    assert buffer.routing(0, 1) == DraftRouting((2, 0), (0.5, 0.5))
    assert buffer.routing(1, 0) == DraftRouting((1, 4), (0.9, 0.1))
    assert buffer.routing(1, 1) is None, "it has not come there yet"


def test_tokens_count_when_they_are_drafted_to_their_end() -> None:
    buffer = LookaheadBuffer(1)
    buffer.note(0, [1], [1.0], 1.0)
    assert buffer.num_tokens == 0
    buffer.end_token()
    assert buffer.num_tokens == 1
    assert buffer.routing(1, 0) is None
    buffer.end_token()
    assert buffer.num_tokens == 2


def test_uses_add_up_the_chances_of_the_tokens_that_want_an_expert() -> None:
    buffer = LookaheadBuffer(2)
    for experts, chance in (([3, 1], 1.0), ([1, 4], 0.8), ([1, 3], 0.5)):
        buffer.note(1, experts, [0.5, 0.5], chance)
        buffer.end_token()
    assert buffer.uses(1) == pytest.approx({3: 1.5, 1: 2.3, 4: 0.8})
    assert buffer.uses(0) == {}


def test_an_expert_chosen_twice_by_one_token_is_wanted_once() -> None:
    buffer = LookaheadBuffer(1)
    buffer.note(0, [2, 2, 5], [0.4, 0.4, 0.2], 0.5)
    assert buffer.uses(0) == {2: 0.5, 5: 0.5}


def test_a_token_without_experts_wants_none() -> None:
    buffer = LookaheadBuffer(1)
    buffer.note(0, [], [], 1.0)
    assert buffer.uses(0) == {}
    assert buffer.routing(0, 0) == DraftRouting((), ())


def test_the_buffer_does_not_change_with_what_it_was_given() -> None:
    buffer, experts = LookaheadBuffer(1), [1, 2]
    buffer.note(0, experts, [0.5, 0.5], 1.0)
    experts[0] = 9
    routing = buffer.routing(0, 0)
    assert routing is not None
    assert routing.experts == (1, 2)
