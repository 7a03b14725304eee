"""A coming layer is asked early, and what it answers is ranked as the layer would."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from foreload.predict.lookahead import (
    DefaultVectors,
    Lookahead,
    default_vector_estimate,
)
from foreload.types import RouterOutput, Routing, RoutingEvent

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

    @pytest.mark.parametrize("num_tokens", [1, 3])
    def test_a_guess_has_what_the_router_would_have_the_experts_called_with(
        self, num_tokens: int
    ) -> None:
        seen, router = event(0, num_tokens), Router(1)
        (guess,) = Lookahead([Router(0), router], num_extra=2).predict(seen)
        answer = router(seen.residual)
        assert torch.equal(guess.routing.top_k_index, answer.top_k_index)
        assert torch.equal(guess.routing.top_k_weights, answer.top_k_weights)

    def test_a_router_that_gives_no_weights_names_experts_only(self) -> None:
        router = Router(1)
        (guess,) = Lookahead(
            [Router(0), lambda residual: router(residual)._replace(top_k_weights=None)]
        ).predict(event(0))
        assert guess.routing is None
        assert len(guess.experts) == TOP_K


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
        (own,) = DefaultVectors(routers, [None, None]).predict(seen)
        (other,) = Lookahead(plain).predict(seen)
        assert own._replace(routing=None) == other._replace(routing=None)
        assert torch.equal(own.routing.top_k_weights, other.routing.top_k_weights)

    def test_the_estimate_is_of_the_experts_that_are_executed(self) -> None:
        routers = [Router(0), Router(1)]
        vectors = torch.randn(EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(5))
        executed = Routing(torch.tensor([[4, 1]]), torch.tensor([[0.9, 0.1]]))
        seen = event(0)._replace(executed=executed)
        DefaultVectors(routers, [vectors, None]).predict(seen)
        stream = seen.residual + default_vector_estimate(*executed, vectors)
        assert torch.equal(routers[1].asked[0], stream)

    def test_without_a_residual_nothing_is_said(self) -> None:
        vectors = [torch.ones(EXPERTS, HIDDEN)] * 2
        routers = [Router(0), Router(1)]
        assert DefaultVectors(routers, vectors).predict(event(0, is_seen=False)) == []


def test_the_names_are_those_of_the_settings() -> None:
    assert (Lookahead.name, DefaultVectors.name) == ("lookahead", "default-vectors")


class TestNaming:
    def test_it_is_what_the_next_router_answers(self) -> None:
        routers = [Router(seed) for seed in range(3)]
        vectors = [torch.randn(EXPERTS, HIDDEN) for _ in routers]
        for num_tokens in (1, 4):
            seen = event(1, num_tokens)
            for predictor in (Lookahead(routers), DefaultVectors(routers, vectors)):
                named = predictor.name_experts(seen)
                assert named is not None
                assert torch.equal(named, routers[2](predictor.estimate(seen)).top_k_index)

    def test_the_likeliest_come_first_where_a_router_does_not_sort(self) -> None:
        index, weights = torch.tensor([[4, 1, 3], [0, 2, 5]]), torch.tensor([[2, 9, 4], [7, 8, 1]])
        outputs = [RouterOutput(index, weights, None), RouterOutput(index, None, None)]
        named = [Lookahead([Router(0), lambda _, o=o: o]).name_experts(event(0)) for o in outputs]
        assert [each.tolist() for each in named] == [[[1, 3, 4], [2, 0, 5]], index.tolist()]

    def test_nothing_is_said_where_nothing_can_be(self) -> None:
        lookahead = Lookahead([Router(0), Router(1), lambda residual: None])
        assert lookahead.name_experts(event(0, is_seen=False)) is None
        assert lookahead.name_experts(event(1)) is None
        assert lookahead.name_experts(event(2)) is None
