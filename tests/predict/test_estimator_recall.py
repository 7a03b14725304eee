"""Recall counts what is named, by predictor and n; asking costs more with a network."""

from __future__ import annotations

import pytest
import torch
from test_estimator import EXPERTS, HIDDEN, Router, corrected, network, random

from foreload.predict.estimator_recall import count_right, measure_recall, time_routers
from foreload.predict.fitting import FeatureBuffer
from foreload.types import RouterOutput

TOP_K, TOKENS = 2, 700


@pytest.fixture
def router() -> Router:
    return Router(0)


@pytest.fixture
def features(router: Router) -> FeatureBuffer:
    """Tokens whose routing the router knows, and of whose plain estimate nothing can be known."""
    made = FeatureBuffer({1: EXPERTS}, TOKENS, HIDDEN, TOP_K, torch.float32, has_plain=True)
    made.size = TOKENS
    made.hidden[1] = random(TOKENS, HIDDEN, seed=0)
    made.plain[1] = random(TOKENS, HIDDEN, seed=1)
    made.previous[1] = torch.zeros(TOKENS, HIDDEN)
    made.index[1] = router.route(made.hidden[1]).top_k_index
    return made


def test_the_share_of_true_experts_among_the_named(router: Router, features: FeatureBuffer) -> None:
    # More tokens than are ranked at a time.
    found = measure_recall({1: corrected(router, network())}, features, (1, TOP_K, EXPERTS))
    assert set(found) == {"lookahead", "default-vectors", "estimator"}
    assert found["default-vectors"][1] == {1: 0.5, TOP_K: 1.0, EXPERTS: 1.0}
    assert 0.1 < found["lookahead"][1][TOP_K] < 0.9
    assert found["lookahead"][1][EXPERTS] == 1


def test_without_plain_estimates_lookahead_is_not_measured(
    router: Router, features: FeatureBuffer
) -> None:
    features.plain.clear()
    found = measure_recall({1: corrected(router, network(3))}, features, (TOP_K,))
    assert set(found) == {"default-vectors", "estimator"}
    assert found["estimator"][1][TOP_K] < 1


def test_every_router_is_asked_with_its_network_and_without(
    router: Router, features: FeatureBuffer
) -> None:
    routers = {1: corrected(router, network(3))}
    router.asked.clear()
    times = time_routers(routers, features)
    assert min(times) > 0
    assert len(router.asked) == 2 * 32


def test_the_routers_own_choice_ranks_first() -> None:
    logits = torch.tensor([[0.9, 0.1, 0.8, 0.7]])  # routers with biases or groups choose otherwise
    answer = RouterOutput(torch.tensor([[1, 3]]), None, logits)
    assert count_right(answer, torch.tensor([[1, 0]]), (1, 2, 3)) == [0, 1, 2]
    assert count_right(answer, torch.tensor([[1, 2]]), (2, 3, 4)) == [1, 1, 2]
