"""Light experts that are missing are done without; the best that are there take their places."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from foreload.ops.present import choose_present
from foreload.ops.scores import LayerScores, ScoreRule
from foreload.types import Routing

EXPERTS = 8
SOFTMAX = LayerScores(ScoreRule.SOFTMAX, is_normalised=True)
LOGITS = torch.tensor([[1.0, 3.0, 2.0, 2.7, 2.6, 2.3, 2.5, 1.6]])


def route(experts: list[int], weights: list[float]) -> Routing:
    return Routing(torch.tensor([experts]), torch.tensor([weights]))


FOUR = route([1, 3, 5, 7], [0.4, 0.3, 0.2, 0.1])


def here(*experts: int) -> torch.Tensor:
    slots = [experts.index(e) if e in experts else -1 for e in range(EXPERTS)]
    return torch.tensor(slots, dtype=torch.int32)


def choose(true: Routing, slot_of: torch.Tensor, **how: Any) -> Routing:
    """Choose, and check what was counted."""
    pairs = torch.tensor([100, 10])
    found = choose_present(true, slot_of, pairs, **how)
    routed, executed = true.top_k_index[0].tolist(), found.top_k_index[0].tolist()
    lost = sum(e < EXPERTS and e not in executed for e in routed)
    assert pairs.tolist() == [100 + len(routed), 10 + lost]
    return found


def executed(routing: Routing) -> dict[int, float]:
    """Give whom a routing executes; where nobody is there is no weight either."""
    index, weights = routing.top_k_index[0].tolist(), routing.top_k_weights[0].tolist()
    assert all(w == 0 for e, w in zip(index, weights, strict=True) if e == EXPERTS)
    return {e: w for e, w in zip(index, weights, strict=True) if e != EXPERTS}


def test_what_is_all_there_stays_as_it_is() -> None:
    found = choose(FOUR, here(1, 3, 5, 7), most_lost=0.9, rule=SOFTMAX, logits=LOGITS)
    assert torch.equal(found.top_k_index, FOUR.top_k_index)
    assert torch.equal(found.top_k_weights, FOUR.top_k_weights)


@pytest.mark.parametrize(
    ("most_lost", "kept"),
    [(0.09, [1, 3, 5, 7]), (0.11, [1, 3, 5]), (0.31, [1, 3]), (0.999999, [1])],
)
def test_the_lightest_missing_go_first_until_enough_is_lost(
    most_lost: float, kept: list[int]
) -> None:
    found = executed(choose(FOUR, here(), most_lost=most_lost))
    assert list(found) == kept
    assert sum(found.values()) == pytest.approx(1.0), "without a rule the others share the weight"


def test_the_best_that_are_there_get_the_weight_the_router_would_give() -> None:
    found = executed(choose(FOUR, here(0, 1, 2, 3), most_lost=0.35, rule=SOFTMAX, logits=LOGITS))
    assert set(found) == {0, 1, 2, 3}, "4 and 6 would be better"
    assert sum(found.values()) == pytest.approx(1.0)
    assert found[2] / found[1] == pytest.approx(math.exp(2.0 - 3.0), rel=1e-4)
    assert found[3] / found[1] == pytest.approx(0.3 / 0.4, rel=1e-4)


def test_a_router_that_does_not_normalise_keeps_its_weights() -> None:
    rule = LayerScores(ScoreRule.SIGMOID, is_normalised=False)
    logits = torch.logit(torch.tensor([[0.05, 0.4, 0.08, 0.3, 0.1, 0.2, 0.1, 0.1]]))
    found = executed(choose(FOUR, here(0, 1, 2, 3), most_lost=0.35, rule=rule, logits=logits))
    assert found == pytest.approx({1: 0.4, 3: 0.3, 2: 0.08, 0: 0.05})


def test_of_equal_ones_the_lower_is_better() -> None:
    found = choose(
        FOUR, here(0, 1, 3, 4, 6), most_lost=0.35, rule=SOFTMAX, logits=torch.zeros(1, EXPERTS)
    )
    assert set(executed(found)) == {0, 1, 3, 4}


@pytest.mark.parametrize("shape", [(2, EXPERTS), (1, EXPERTS + 1)])
def test_logits_of_something_else_are_not_used(shape: tuple[int, int]) -> None:
    found = choose(FOUR, here(0, 1, 2, 3), most_lost=0.35, rule=SOFTMAX, logits=torch.zeros(shape))
    assert executed(found) == pytest.approx({1: 4 / 7, 3: 3 / 7})


def test_placeholders_are_neither_missing_nor_dropped() -> None:
    true = route([1, EXPERTS, 3, EXPERTS + 5], [0.4, 0.3, 0.2, 0.1])
    found = choose(true, here(1), most_lost=0.25, rule=SOFTMAX, logits=LOGITS)
    assert found.top_k_index.tolist()[0][:3] == [1, EXPERTS, EXPERTS]
    assert found.top_k_weights[0].tolist() == pytest.approx([0.5, 0.375, 0.0, 0.125])
    # Where nothing real is left there is no unit to weigh others in.
    true = route([EXPERTS, 3], [0.9, 0.1])
    found = choose(true, here(1), most_lost=0.25, rule=SOFTMAX, logits=LOGITS)
    assert found.top_k_index.tolist() == [[EXPERTS, EXPERTS]]


def test_a_token_without_weight_is_left_alone() -> None:
    true = route([1, 2], [0.0, 0.0])
    found = choose(true, here(), most_lost=0.9, rule=SOFTMAX, logits=LOGITS)
    assert torch.equal(found.top_k_index, true.top_k_index)
    assert torch.equal(found.top_k_weights, true.top_k_weights)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32, torch.float64])
def test_types_stay(index: torch.dtype, weights: torch.dtype) -> None:
    true = Routing(FOUR.top_k_index.to(index), FOUR.top_k_weights.to(weights))
    found = choose(true, here(0, 1), most_lost=0.35, rule=SOFTMAX, logits=LOGITS)
    assert (found.top_k_index.dtype, found.top_k_weights.dtype) == (index, weights)
