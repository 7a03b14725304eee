"""A coming layer is asked early, and what it answers is ranked as the layer would."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from foreload.predict.lookahead import (
    DefaultVectors,
    Lookahead,
    default_vector_estimate,
    rank_experts,
)
from foreload.types import RouterOutput, RoutingEvent

EXPERTS, HIDDEN, TOP_K = 6, 4, 2


class Router:
    """A linear router that remembers what it was asked."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.randn(EXPERTS, HIDDEN, generator=generator)
        self.asked: list[Tensor] = []

    def __call__(self, residual: Tensor) -> RouterOutput:
        self.asked.append(residual)
        logits = residual @ self.weight.T
        weights, index = logits.softmax(-1).topk(TOP_K)
        return RouterOutput(index, weights, logits)


def event(layer: int, num_tokens: int = 1, *, is_seen: bool = True) -> RoutingEvent:
    generator = torch.Generator().manual_seed(layer)
    residual = torch.randn(num_tokens, HIDDEN, generator=generator) if is_seen else None
    index = torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(num_tokens)])
    return RoutingEvent(0, layer, residual, index, torch.full((num_tokens, TOP_K), 0.5))


def output(index: Any, logits: Any = None) -> RouterOutput:
    return RouterOutput(torch.tensor(index), None, None if logits is None else torch.tensor(logits))


class TestLookahead:
    def test_the_next_layers_are_asked_with_this_layers_residual(self) -> None:
        routers = [Router(seed) for seed in range(4)]
        seen = event(1)
        guesses = Lookahead(routers, max_distance=2).predict(seen)
        assert [(guess.layer, guess.distance) for guess in guesses] == [(2, 1), (3, 2)]
        assert [len(router.asked) for router in routers] == [0, 0, 1, 1]
        assert torch.equal(routers[2].asked[0], seen.residual)
        for guess, router in zip(guesses, routers[2:], strict=True):
            wanted = router(seen.residual).top_k_index[0].tolist()
            assert list(guess.experts) == wanted
            assert len(guess.confidence) == len(wanted)
            assert min(guess.confidence) > 0
            assert guess.num_expected == TOP_K

    def test_extra_experts_are_the_next_by_logit(self) -> None:
        router = Router(0)
        seen = event(0)
        (guess,) = Lookahead([Router(1), router], num_extra=3).predict(seen)
        ranking = (seen.residual @ router.weight.T)[0].argsort(descending=True).tolist()
        assert list(guess.experts) == ranking[: TOP_K + 3]
        assert guess.num_expected == TOP_K

    def test_nothing_is_said_beyond_the_last_layer(self) -> None:
        routers = [Router(seed) for seed in range(3)]
        lookahead = Lookahead(routers, max_distance=5)
        assert [guess.layer for guess in lookahead.predict(event(0))] == [1, 2]
        assert lookahead.predict(event(2)) == []

    def test_nothing_is_said_without_a_residual(self) -> None:
        routers = [Router(0), Router(1)]
        assert Lookahead(routers).predict(event(0, is_seen=False)) == []
        assert routers[1].asked == []

    def test_layers_that_cannot_be_asked_are_passed_over(self) -> None:
        routers = [Router(0), lambda residual: None, Router(2)]
        guesses = Lookahead(routers, max_distance=2).predict(event(0))
        assert [(guess.layer, guess.distance) for guess in guesses] == [(2, 2)]

    def test_several_tokens_are_predicted_together(self) -> None:
        router, seen = Router(1), event(0, num_tokens=5)
        (guess,) = Lookahead([Router(0), router], num_extra=2).predict(seen)
        chosen = router(seen.residual).top_k_index.flatten().tolist()
        assert set(guess.experts) == set(chosen)
        assert guess.num_expected == len(set(chosen))


class TestDefaultVectors:
    def test_the_estimate_is_the_weighted_sum_of_the_experts_vectors(self) -> None:
        vectors = torch.arange(12.0).view(3, 4)
        estimate = default_vector_estimate(
            torch.tensor([[2, 0], [1, 1]]), torch.tensor([[0.5, 2.0], [1.0, 0.25]]), vectors
        )
        wanted = [0.5 * vectors[2] + 2 * vectors[0], 1.25 * vectors[1]]
        assert torch.equal(estimate, torch.stack(wanted))

    def test_the_coming_layer_is_asked_with_the_estimate_added(self) -> None:
        routers = [Router(0), Router(1)]
        vectors = torch.randn(EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(5))
        seen = event(0, num_tokens=3)
        guesses = DefaultVectors(routers, [vectors, None]).predict(seen)
        stream = seen.residual + default_vector_estimate(
            seen.top_k_index, seen.top_k_weights, vectors
        )
        assert torch.equal(routers[1].asked[0], stream)
        assert not torch.equal(stream, seen.residual)
        assert len(guesses) == 1

    def test_low_precision_streams_stay_in_their_type(self) -> None:
        routers = [Router(0), Router(1)]
        routers[1].weight = routers[1].weight.bfloat16()
        seen = event(0)
        seen = seen._replace(
            residual=seen.residual.bfloat16(), top_k_weights=seen.top_k_weights.bfloat16()
        )
        DefaultVectors(routers, [torch.ones(EXPERTS, HIDDEN)] * 2).predict(seen)
        assert routers[1].asked[0].dtype == torch.bfloat16

    def test_layers_without_vectors_are_predicted_from_the_residual(self) -> None:
        seen = event(0)
        plain, routers = [Router(0), Router(1)], [Router(0), Router(1)]
        assert DefaultVectors(routers, [None, None]).predict(seen) == Lookahead(plain).predict(seen)

    def test_without_a_residual_nothing_is_said(self) -> None:
        vectors = [torch.ones(EXPERTS, HIDDEN)] * 2
        routers = [Router(0), Router(1)]
        assert DefaultVectors(routers, vectors).predict(event(0, is_seen=False)) == []


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


def test_the_names_are_those_of_the_settings() -> None:
    assert (Lookahead.name, DefaultVectors.name) == ("lookahead", "default-vectors")
