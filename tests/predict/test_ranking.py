"""An early answer becomes a guess: the router's choice first, each expert with its confidence."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from foreload.predict.ranking import make_prediction, rank_experts
from foreload.types import RouterOutput


def output(index: Any, logits: Any = None) -> RouterOutput:
    return RouterOutput(torch.tensor(index), None, None if logits is None else torch.tensor(logits))


class TestRanking:
    def test_one_tokens_choice_goes_first_then_the_best_of_the_rest(self) -> None:
        logits = [[0.0, 4.0, 1.0, 3.0, -1.0]]
        ranked, _, expected = rank_experts(output([[3, 1]], logits), 2)
        assert (ranked, expected) == ((1, 3, 2, 0), 2)

    def test_confidence_is_the_distance_from_the_line_between_chosen_and_not(self) -> None:
        logits = torch.tensor([[0.0, 4.0, 1.0, 3.0, -1.0]])
        _, confidence, _ = rank_experts(output([[1, 3]], logits.tolist()), 3)
        line = (3.0 + 1.0) / 2
        wanted = (torch.tensor([4.0, 3.0, 1.0, 0.0, -1.0]) - line) / logits.std()
        assert confidence == pytest.approx(wanted.tolist(), rel=1e-5)

    def test_the_sign_of_confidence_follows_the_choice_where_logits_disagree(self) -> None:
        logits = [[0.9, 0.1, 0.8, 0.7]]  # routers with biases or groups choose otherwise
        ranked, confidence, expected = rank_experts(output([[1, 3]], logits), 2)
        assert (ranked, expected) == ((3, 1, 0, 2), 2)
        assert min(confidence[:2]) > 0 > max(confidence[2:])

    def test_there_are_no_more_extras_than_experts(self) -> None:
        ranked, confidence, expected = rank_experts(output([[1, 0]], [[0.1, 0.2, 0.3]]), 10)
        assert (sorted(ranked), expected) == ([0, 1, 2], 2)
        assert len(confidence) == 3

    def test_every_expert_chosen_leaves_nobody_to_compare_with(self) -> None:
        ranked, confidence, expected = rank_experts(output([[1, 0]], [[0.1, 0.2]]), 1)
        assert (ranked, expected) == ((1, 0), 2)
        assert min(confidence) > 0

    def test_without_logits_there_are_no_extras(self) -> None:
        ranked, confidence, expected = rank_experts(output([[4, 1]]), 3)
        assert (ranked, expected) == ((4, 1), 2)
        assert min(confidence) > 0

    def test_several_tokens_rank_by_how_many_want_an_expert(self) -> None:
        ranked, confidence, expected = rank_experts(output([[5, 1], [2, 5], [2, 5]]), 3)
        assert (ranked, expected) == ((5, 2, 1), 3)
        assert confidence == pytest.approx((1.0, 2 / 3, 1 / 3))

    @pytest.mark.parametrize("shape", [(1, 2), (1, 1, 2)])
    def test_batch_dimensions_do_not_matter(self, shape: tuple[int, ...]) -> None:
        index = torch.tensor([3, 0]).view(shape)
        logits = torch.tensor([2.0, 0.0, 1.0, 5.0]).view(*shape[:-1], 4)
        flat = RouterOutput(index.view(1, 2), None, logits.view(1, 4))
        ranked = rank_experts(RouterOutput(index, None, logits), 1)
        assert ranked == rank_experts(flat, 1)
        assert ranked[0] == (3, 0, 2)


def test_only_an_answer_with_weights_can_be_executed() -> None:
    answer = output([[3, 1]], [[0.0, 4.0, 1.0, 3.0, -1.0]])
    named = make_prediction(answer, 5, 2, 1)
    assert (named.layer, named.distance, named.experts) == (5, 2, (1, 3, 2))
    assert named.routing is None
    weights = torch.tensor([[0.4, 0.6]])
    routing = make_prediction(answer._replace(top_k_weights=weights), 5, 2, 1).routing
    assert routing is not None
    assert routing.top_k_weights is weights
