"""A layer computes the true routing or what a policy puts there; guesses only move bytes."""

from __future__ import annotations

import math
from contextlib import nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fakes import InstantBackend, assert_settled, finish
from foreload.errors import TransferError
from foreload.memory.arena import SlotArena
from foreload.memory.eviction import LRU
from foreload.memory.tiers import ExpertTiers
from foreload.memory.transfer import TransferEngine
from foreload.metrics import Metrics, Timeline
from foreload.model.runtime import ExpertRuntime
from foreload.ops.reference import SumRule
from foreload.ops.scores import LayerScores, ScoreRule
from foreload.schedule.policy import Exact, Speculate, SpeculateWhen
from foreload.types import (
    ExpertKey,
    ExpertPlan,
    ExpertTensor,
    Prediction,
    Routing,
    RoutingEvent,
    Span,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LAYERS, EXPERTS, TOP_K = 3, 8, 2

MODULE = SimpleNamespace(
    num_experts=EXPERTS, has_gate=False, has_bias=False, is_transposed=False, act_fn=torch.relu
)
"""What the runtime wants of transformers' experts module."""


def plan(layer: int, expert: int) -> ExpertPlan:
    tensors = tuple(
        ExpertTensor(name, "float32", (2, 2), 16, span=0, start=start)
        for name, start in (("up_proj", 0), ("down_proj", 16))
    )
    return ExpertPlan((Span(f"{layer}.{expert}", 0, 32),), tensors)


def up(layer: int, expert: int) -> torch.Tensor:
    return torch.tensor([[1.0 + layer, expert], [-expert, 2.0]])


def down(layer: int, expert: int) -> torch.Tensor:
    return torch.tensor([[0.5, expert], [layer, 0.25]])


class Weights(InstantBackend):
    def copy_piece(self, plan: ExpertPlan, slot: int, piece: int) -> int:
        name = plan.spans[0].path
        if name in self.failing:
            raise OSError(5, "Input/output error")
        layer, expert = map(int, name.split("."))
        self.arena.write(
            slot, plan, {"up_proj": up(layer, expert), "down_proj": down(layer, expert)}
        )
        self.copied.append(name)
        return 32


class Scripted:
    """Predicts what the test says, and remembers what it was shown."""

    name = "scripted"

    def __init__(self, answer: Callable[[RoutingEvent], list[Prediction]]) -> None:
        self.answer = answer
        self.events: list[RoutingEvent] = []

    def predict(self, event: RoutingEvent) -> list[Prediction]:
        self.events.append(event)
        return self.answer(event)


class Bench:
    def __init__(self, answer: Any = None, *, num_slots: int = 24, **settings: Any) -> None:
        plans = [[plan(layer, expert) for expert in range(EXPERTS)] for layer in range(LAYERS)]
        arena = SlotArena(num_slots, 4096)
        arena.poison()
        self.metrics = Metrics()
        self.timeline = Timeline()
        self.disk = Weights(arena)
        transfers = TransferEngine(self.disk, num_workers=2)
        self.tiers = ExpertTiers(
            arena, plans, transfers, LRU(LAYERS, EXPERTS), self.metrics, self.timeline
        )
        self.predictor = Scripted(answer) if answer is not None else None
        self.runtime = ExpertRuntime(
            self.tiers,
            self.metrics,
            self.timeline,
            sum_rules=[SumRule.HIDDEN] * LAYERS,
            predictor=self.predictor,
            **{"max_prefetches": 8, **settings},
        )

    def run(self, layer: int, *routing: list[int]) -> None:
        """Run a layer on made-up tokens and compare with the plain sum."""
        generator = torch.Generator().manual_seed(layer)
        hidden = torch.randn(len(routing), 2, generator=generator)
        index = torch.tensor(routing)
        weights = torch.rand(index.shape, generator=generator)
        result = self.runtime.run_layer(layer, MODULE, hidden, index, weights)
        wanted = plain_sum(layer, hidden, Routing(index, weights))
        assert torch.allclose(result, wanted, rtol=1e-5, atol=1e-6)

    def execute(self, layer: int, true: Routing) -> Routing:
        """Run a layer, check that it computed what it says it executed, and give that."""
        events: list[RoutingEvent] = []
        self.runtime.on_routing = lambda event, wanted: events.append(event)
        hidden = torch.randn(len(true.top_k_index), 2, generator=torch.Generator().manual_seed(9))
        result = self.runtime.run_layer(layer, MODULE, hidden, *true)
        executed = events[0].executed_routing
        assert torch.equal(events[0].top_k_index, true.top_k_index)
        assert torch.equal(events[0].top_k_weights, true.top_k_weights)
        wanted = plain_sum(layer, hidden, executed)
        assert torch.allclose(result, wanted, rtol=1e-4, atol=1e-5)
        return executed

    def load(self, layer: int, *experts: int) -> None:
        """Bring experts into memory."""
        for _ in self.tiers.demand(layer, experts):
            pass

    def settle(self) -> set[tuple[int, int]]:
        """Wait for all copies, and give what is resident."""
        finish(self.tiers.wait_idle)
        return set(self.tiers.cache.keys())


def plain_sum(layer: int, hidden: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Give what a layer's experts add up to, expert by expert; placeholders add nothing."""
    total = torch.zeros_like(hidden)
    for token, chosen in enumerate(routing.top_k_index.tolist()):
        for expert, weight in zip(chosen, routing.top_k_weights[token], strict=True):
            if expert < EXPERTS:
                inner = torch.relu(up(layer, expert) @ hidden[token])
                total[token] += weight * (down(layer, expert) @ inner)
    return total


@pytest.fixture
def make_bench() -> Iterator[Any]:
    made: list[Bench] = []

    def make(*args: Any, **settings: Any) -> Bench:
        made.append(Bench(*args, **settings))
        return made[-1]

    yield make
    for bench in made:
        assert_settled(bench.tiers)
        finish(bench.tiers.close)


def sure(layer: int, distance: int, *experts: int) -> Prediction:
    return Prediction(layer, distance, experts, (math.inf,) * len(experts), len(experts))


@pytest.mark.parametrize("num_slots", [1, 3, 24])
def test_one_token_and_several_get_their_weighted_experts(make_bench: Any, num_slots: int) -> None:
    bench = make_bench(num_slots=num_slots)
    for _ in range(2):
        bench.run(0, [3, 1])
        bench.run(1, [0, 7], [7, 2], [5, 0])
        bench.run(2, *([[0, 1], [2, 3], [4, 5], [6, 7]] * 2))


def test_forwards_are_counted_also_when_one_was_broken_off(make_bench: Any) -> None:
    bench = make_bench(lambda event: [])
    for layer in (0, 1, 2, 0, 1, 0, 0, 1, 2):
        bench.run(layer, [0, 1])
    assert bench.metrics.num_steps == 4
    assert [event.step for event in bench.predictor.events] == [0, 0, 0, 1, 1, 2, 3, 3, 3]


def test_a_sure_guess_is_there_when_its_layer_comes(make_bench: Any) -> None:
    bench = make_bench(lambda event: [sure(event.layer + 1, 1, 4, 5)] if event.layer < 2 else [])
    bench.run(0, [0, 1])
    assert bench.settle() == {(0, 0), (0, 1), (1, 4), (1, 5)}
    bench.run(1, [4, 5])
    assert bench.metrics.num_hits == 2
    assert bench.metrics.recall_at_n == {1: {1: 1.0}}


def test_recall_counts_as_many_guesses_as_were_demanded(make_bench: Any) -> None:
    def answer(event: RoutingEvent) -> list[Prediction]:
        return [sure(1, 1, 6, 4, 5)] if event.layer == 0 else []

    bench = make_bench(answer)
    bench.run(0, [0, 1])
    bench.run(1, [5, 6])  # 6 is among the first two guesses, 5 is the third
    assert bench.metrics.num_predicted == {(1, 1): 2}
    assert bench.metrics.num_predicted_right == {(1, 1): 1}


def test_guesses_of_a_forward_that_was_broken_off_are_not_scored(make_bench: Any) -> None:
    bench = make_bench(
        lambda event: [sure(2, 2, 0)] if event.layer == 0 and event.step == 0 else []
    )
    bench.run(0, [0, 1])
    bench.run(0, [0, 1])
    bench.run(2, [5, 6])
    assert bench.metrics.num_predicted == {}


def test_a_guess_about_the_next_forward_is_scored_there(make_bench: Any) -> None:
    bench = make_bench(lambda event: [sure(0, 1, 3, 4)] if event.layer == 2 else [])
    for layer in range(LAYERS):
        bench.run(layer, [0, 1])
    bench.run(0, [3, 7])
    assert bench.metrics.recall_at_n == {0: {1: 0.5}}


def test_unlikely_guesses_are_not_copied_until_they_prove_right(make_bench: Any) -> None:
    def answer(event: RoutingEvent) -> list[Prediction]:
        guess = Prediction(1, 1, (2,), (-0.2,), 1)
        return [guess] if event.layer == 0 else []

    bench = make_bench(answer, min_odds=0.5)
    bench.run(0, [0, 1])
    assert (1, 2) not in bench.settle()
    for _ in range(60):
        finish(bench.tiers.flush)  # only what is absent when guessed is learned from
        bench.run(0, [0, 1])
        bench.run(1, [2, 3])
    assert bench.metrics.num_prefetched > 0


def test_open_prefetches_are_capped(make_bench: Any) -> None:
    bench = make_bench(
        lambda event: [sure(1, 1, *range(8))] if event.layer == 0 else [], max_prefetches=3
    )
    bench.run(0, [0, 1])
    assert bench.metrics.num_prefetched == 3
    assert {key for key in bench.settle() if key[0] == 1} == {(1, 0), (1, 1), (1, 2)}


def test_residents_are_not_prefetched_and_take_no_room(make_bench: Any) -> None:
    bench = make_bench(
        lambda event: [sure(1, 1, *range(8))] if event.layer == 0 else [], max_prefetches=2
    )
    bench.run(1, [0, 1])
    bench.run(0, [0, 1])
    bench.settle()
    assert bench.disk.copied.count("1.0") == 1
    assert bench.metrics.num_prefetched == 2
    assert {(1, 2), (1, 3)} <= bench.settle()


def test_while_the_switch_is_off_nobody_is_asked(make_bench: Any) -> None:
    switch = SimpleNamespace(is_on=False, record=lambda step_s: None)
    bench = make_bench(lambda event: [sure(1, 1, 4)] if event.layer == 0 else [], switch=switch)
    assert not bench.runtime.is_prefetching
    bench.run(0, [0, 1])
    assert bench.predictor.events == []
    assert bench.metrics.num_prefetched == 0
    switch.is_on = True
    assert bench.runtime.is_prefetching
    bench.run(0, [0, 1])
    assert bench.metrics.num_prefetched == 1


def test_only_whole_single_token_forwards_are_timed(make_bench: Any) -> None:
    times: list[float] = []
    switch = SimpleNamespace(is_on=True, record=times.append)
    bench = make_bench(lambda event: [], switch=switch)
    for tokens in (1, 1, 5, 1, 1):
        for layer in range(LAYERS):
            bench.run(layer, *([[0, 1]] * tokens))
    assert len(times) == 3, "the last is still open, the one of five tokens does not count"
    assert all(step_s > 0 for step_s in times)
    for tokens in (4, 1, 1):
        with bench.runtime.prefilling() if tokens > 1 else nullcontext():
            for layer in range(LAYERS):
                bench.run(layer, *([[0, 1]] * tokens))
    assert len(times) == 4, "nor what lies between two requests"


def test_a_residual_is_shown_once_at_its_layer(make_bench: Any) -> None:
    bench = make_bench(lambda event: [])
    residual = torch.ones(1, 2)
    bench.runtime.see_residual(1, residual)
    for layer in (0, 1, 1):
        bench.run(layer, [0, 1])
    assert [event.residual is residual for event in bench.predictor.events] == [False, True, False]


def test_the_residual_of_another_threads_forward_is_not_shown(make_bench: Any) -> None:
    bench = make_bench(lambda event: [])
    own, other = torch.ones(1, 2), torch.ones(5, 2)

    def run_on_a_thread_of_its_own() -> None:
        bench.runtime.see_residual(0, own)
        finish(lambda: bench.runtime.see_residual(0, other))  # another forward comes between
        weights = torch.ones(1, 1)
        bench.runtime.run_layer(0, MODULE, own, torch.tensor([[1]]), weights)

    finish(run_on_a_thread_of_its_own)
    assert bench.predictor.events[0].residual is not other


def test_without_a_predictor_residuals_are_not_kept(make_bench: Any) -> None:
    bench = make_bench()
    bench.runtime.see_residual(0, torch.ones(1, 2))
    assert bench.runtime._residuals == {}
    assert not bench.runtime.is_prefetching


def test_observers_see_the_routing_and_every_output(make_bench: Any) -> None:
    bench = make_bench()
    seen, outputs = [], []
    bench.runtime.on_routing = lambda event, wanted: seen.append((event.layer, wanted))
    bench.runtime.on_output = lambda *what: outputs.append(what)
    bench.run(1, [5, 2], [2, 0])
    assert seen == [(1, [0, 2, 5])]
    assert {(layer, expert): len(output) for layer, expert, output in outputs} == {
        (1, 0): 1,
        (1, 2): 2,
        (1, 5): 1,
    }


def test_compute_is_drawn_when_the_timeline_is_on(make_bench: Any) -> None:
    bench = make_bench()
    bench.timeline.is_on = True
    bench.run(2, [5, 3])
    computed = {span.name for span in bench.timeline.spans if span.lane == "compute"}
    assert computed == {"2.3", "2.5"}


@pytest.mark.parametrize("error", [RuntimeError("bad guess"), KeyboardInterrupt()], ids=repr)
def test_an_error_while_predicting_leaves_the_layer_runnable(
    make_bench: Any, error: BaseException
) -> None:
    errors = [error]

    def answer(event: RoutingEvent) -> list[Prediction]:
        if event.step == 1 and errors:
            raise errors.pop()
        return []

    bench = make_bench(answer, num_slots=2)
    bench.run(0, [0, 1])
    with pytest.raises(type(error)):
        bench.run(0, [0, 1])  # both are resident, and pinned when the error comes
    for layer in range(LAYERS):
        bench.run(layer, [4, 5])


def test_a_failed_copy_leaves_the_layer_runnable(make_bench: Any) -> None:
    bench = make_bench(num_slots=3)
    bench.disk.failing.add("1.4")
    bench.run(0, [0, 1])
    with pytest.raises(TransferError):
        bench.run(1, [3, 4])
    assert_settled(bench.tiers)
    bench.disk.failing.clear()
    bench.run(1, [3, 4])
    assert bench.tiers.cache.slot_of(ExpertKey(1, 4)) >= 0


def route(experts: list[int], weights: list[float]) -> Routing:
    """Make the routing of one token."""
    return Routing(torch.tensor([experts]), torch.tensor([weights]))


def same(one: Routing, other: Routing) -> bool:
    return torch.equal(one.top_k_index, other.top_k_index) and torch.allclose(
        one.top_k_weights, other.top_k_weights
    )


TRUE = route([4, 5], [0.75, 0.25])
GUESS = route([5, 6], [0.625, 0.375])


def guess(routing: Routing | None, layer: int = 1, distance: int = 1) -> Prediction:
    """Make a prediction whose experts are too unsure to be prefetched."""
    experts = () if routing is None else tuple(routing.top_k_index.unique().tolist())
    unsure = (-5.0,) * len(experts)
    return Prediction(layer, distance, experts, unsure, len(experts), routing)


class TestSpeculate:
    @pytest.fixture
    def bench(self, make_bench: Any) -> Bench:
        """Speculates with one guess about layer 1, made at layer 0."""
        bench = make_bench(lambda event: [guess(GUESS)] if event.layer == 0 else [])
        bench.runtime.policy = Speculate()
        return bench

    def test_the_first_layer_is_true_and_the_next_executes_its_guess(self, bench: Bench) -> None:
        assert same(bench.execute(0, TRUE), TRUE)
        assert same(bench.execute(1, TRUE), GUESS)
        assert same(bench.execute(2, TRUE), TRUE), "nothing was predicted for it"

    def test_what_will_be_executed_is_on_its_way_whatever_its_odds(self, bench: Bench) -> None:
        bench.execute(0, TRUE)
        assert {(1, 5), (1, 6)} <= bench.settle()
        bench.execute(1, TRUE)
        assert bench.metrics.num_hits == 2
        assert (1, 4) not in bench.settle(), "what the true router wanted is not fetched"

    def test_eviction_learns_what_is_executed(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen = []
        observe = bench.tiers.observe
        monkeypatch.setattr(
            bench.tiers, "observe", lambda layer, *a: seen.append((layer, *a)) or observe(layer, *a)
        )
        bench.execute(0, TRUE)
        bench.execute(1, TRUE)
        assert seen == [(0, {4: 1, 5: 1}, 1, None), (1, {5: 1, 6: 1}, 1, None)]

    def test_pairs_the_router_did_not_get_are_counted(self, bench: Bench) -> None:
        bench.execute(0, TRUE)
        assert (bench.metrics.num_executed, bench.metrics.num_speculated) == (2, 0)
        bench.execute(1, TRUE)
        assert (bench.metrics.num_executed, bench.metrics.num_speculated) == (4, 1)
        assert bench.metrics.speculated_fraction == 0.25

    def test_recall_compares_with_the_true_router(self, bench: Bench) -> None:
        bench.execute(0, TRUE)
        bench.execute(1, TRUE)
        assert bench.metrics.recall_at_n == {1: {1: 0.5}}

    def test_predictors_see_both_routings(self, bench: Bench) -> None:
        bench.execute(0, TRUE)
        bench.execute(1, TRUE)
        first, second = bench.predictor.events
        assert first.executed is None
        assert same(first.executed_routing, TRUE)
        assert same(second.executed, GUESS)

    def test_weights_are_executed_in_the_routers_element_type(self, bench: Bench) -> None:
        true = Routing(TRUE.top_k_index, TRUE.top_k_weights.bfloat16())
        bench.execute(0, true)
        events = []
        bench.runtime.on_routing = lambda event, wanted: events.append(event)
        bench.runtime.run_layer(1, MODULE, torch.ones(1, 2), *true)
        assert events[0].executed.top_k_weights.dtype is torch.bfloat16

    def test_forwards_of_several_tokens_follow_the_router(self, make_bench: Any) -> None:
        two = Routing(torch.tensor([[5, 6], [0, 1]]), torch.tensor([[0.5, 0.5], [0.9, 0.1]]))
        other = Routing(two.top_k_index + 1, two.top_k_weights)
        bench = make_bench(lambda event: [guess(other, event.layer + 1)])
        bench.runtime.policy = Speculate()
        assert same(bench.execute(0, two), two)
        assert same(bench.execute(1, two), two)
        bench.runtime.policy = Speculate(in_prefill=True)
        assert same(bench.execute(0, two), two)
        assert same(bench.execute(1, two), other)
        assert bench.metrics.num_speculated == 2

    @pytest.mark.parametrize(
        "guesses",
        [
            [],
            [guess(None)],
            [guess(GUESS, layer=2)],
            [guess(Routing(GUESS.top_k_index.expand(2, 2), GUESS.top_k_weights.expand(2, 2)))],
        ],
        ids=["none", "without weights", "about another layer", "of another number of tokens"],
    )
    def test_without_a_guess_that_fits_the_router_decides(
        self, make_bench: Any, guesses: list[Prediction]
    ) -> None:
        bench = make_bench(lambda event: guesses if event.layer == 0 else [])
        bench.runtime.policy = Speculate()
        for layer in range(LAYERS):
            assert same(bench.execute(layer, TRUE), TRUE)
        assert bench.metrics.num_speculated == 0

    def test_a_guess_from_further_away_is_prefetched_at_most(self, make_bench: Any) -> None:
        far = sure(2, 2, 5, 6)._replace(routing=GUESS)
        bench = make_bench(lambda event: [far] if event.layer == 0 else [])
        bench.runtime.policy = Speculate()
        for layer in range(LAYERS):
            assert same(bench.execute(layer, TRUE), TRUE)
        assert {(2, 5), (2, 6)} <= bench.settle()

    def test_a_guess_of_a_forward_that_was_broken_off_is_not_executed(
        self, make_bench: Any
    ) -> None:
        bench = make_bench(lambda event: [guess(GUESS)] if event.step == 0 else [])
        bench.runtime.policy = Speculate()
        bench.execute(0, TRUE)
        assert same(bench.execute(0, TRUE), TRUE)
        assert same(bench.execute(1, TRUE), TRUE)

    def test_a_guess_about_the_next_forward_is_not_executed(self, make_bench: Any) -> None:
        bench = make_bench(lambda event: [guess(GUESS, layer=0)] if event.layer == 2 else [])
        bench.runtime.policy = Speculate()
        for layer in (0, 1, 2, 0):
            assert same(bench.execute(layer, TRUE), TRUE)

    def test_a_guess_of_another_threads_forward_is_not_executed(self, make_bench: Any) -> None:
        bench = make_bench(lambda event: [guess(GUESS)] if event.step == 0 else [])
        bench.runtime.policy = Speculate()
        done: list[Routing] = []

        def run_on_a_thread_of_its_own() -> None:
            finish(lambda: bench.execute(0, TRUE))  # another forward begins
            done.append(bench.execute(1, TRUE))

        finish(run_on_a_thread_of_its_own)
        assert same(done[0], TRUE)

    def test_an_error_leaves_no_guess_behind(self, bench: Bench) -> None:
        bench.execute(0, TRUE)
        bench.disk.failing.add("1.6")
        finish(bench.tiers.flush)
        with pytest.raises(TransferError):
            bench.execute(1, TRUE)
        bench.disk.failing.clear()
        assert same(bench.execute(1, TRUE), TRUE)

    def test_the_policy_may_change_between_layers(self, bench: Bench) -> None:
        bench.execute(0, TRUE)
        bench.runtime.policy = Exact()
        assert same(bench.execute(1, TRUE), TRUE)
        bench.runtime.policy = Speculate()
        assert same(bench.execute(1, TRUE), TRUE), "the guess is gone"

    def test_a_single_token_of_a_prompt_is_no_decoding(self, bench: Bench) -> None:
        with bench.runtime.prefilling():
            assert same(bench.execute(0, TRUE), TRUE)
            assert same(bench.execute(1, TRUE), TRUE)
        bench.execute(0, TRUE)
        assert same(bench.execute(1, TRUE), GUESS)

    def test_another_threads_prompt_changes_nothing(self, bench: Bench) -> None:
        done: list[Routing] = []

        def decode() -> None:
            bench.execute(0, TRUE)
            done.append(bench.execute(1, TRUE))

        with bench.runtime.prefilling():
            finish(decode)
        assert same(done[0], GUESS)

    def test_guessing_is_not_switched_off(self, make_bench: Any) -> None:
        times: list[float] = []
        switch = SimpleNamespace(is_on=False, record=times.append)
        bench = make_bench(lambda event: [guess(GUESS)] if event.layer == 0 else [], switch=switch)
        bench.runtime.policy = Speculate()
        assert bench.runtime.is_prefetching
        for _ in range(2):
            bench.execute(0, TRUE)
            assert same(bench.execute(1, TRUE), GUESS)
        assert times == []


FOUR = route([1, 3, 5, 7], [0.4, 0.3, 0.2, 0.1])
SOFTMAX = LayerScores(ScoreRule.SOFTMAX, is_normalised=True)


class TestSpeculateWhen:
    @pytest.fixture
    def bench(self, make_bench: Any) -> Bench:
        """Drops up to 35 % of the weight; experts 0, 1, 2, and 3 of layer 1 are in memory."""
        bench = make_bench()
        bench.runtime.policy = SpeculateWhen(0.65)
        bench.load(1, 0, 1, 2, 3)
        return bench

    def choose(self, bench: Bench, rule: LayerScores | None, logits: torch.Tensor) -> Routing:
        bench.runtime.score_rules = [rule] * LAYERS
        bench.runtime.see_logits(1, logits)
        return bench.execute(1, FOUR)

    def test_what_is_all_in_memory_is_executed_as_routed(self, bench: Bench) -> None:
        bench.load(1, 5, 7)
        assert bench.execute(1, FOUR) is not None
        assert bench.metrics.num_speculated == 0
        assert same(bench.execute(1, FOUR), FOUR)

    def test_the_best_in_memory_get_the_weight_the_router_would_give(self, bench: Bench) -> None:
        logits = torch.tensor([[1.0, 3.0, 2.0, 2.7, 2.6, 2.3, 2.5, 1.6]])
        executed = self.choose(bench, SOFTMAX, logits)
        assert executed.top_k_index.tolist() == [[1, 3, 2, 0]], "4 and 6 would be better"
        weights = executed.top_k_weights[0]
        assert weights.sum() == pytest.approx(1.0)
        assert weights[2] / weights[0] == pytest.approx(math.exp(2.0 - 3.0), rel=1e-4)
        assert weights[3] / weights[0] == pytest.approx(math.exp(1.0 - 3.0), rel=1e-4)
        assert weights[1] / weights[0] == pytest.approx(0.3 / 0.4, rel=1e-4)
        assert bench.metrics.num_misses == 4, "nothing was fetched but what the test loaded"
        assert (bench.metrics.num_executed, bench.metrics.num_speculated) == (4, 2)

    def test_a_router_that_does_not_normalise_keeps_its_weights(self, bench: Bench) -> None:
        rule = LayerScores(ScoreRule.SIGMOID, is_normalised=False)
        logits = torch.logit(torch.tensor([[0.05, 0.4, 0.08, 0.3, 0.1, 0.2, 0.1, 0.1]]))
        executed = self.choose(bench, rule, logits)
        assert same(executed, route([1, 3, 2, 0], [0.4, 0.3, 0.08, 0.05]))

    def test_without_a_rule_the_others_share_the_weight(self, bench: Bench) -> None:
        executed = self.choose(bench, None, torch.zeros(1, EXPERTS))
        assert same(executed, route([1, 3], [4 / 7, 3 / 7]))
        assert bench.metrics.speculated_fraction == 0.5, "what is dropped counts"

    @pytest.mark.parametrize("shape", [(2, EXPERTS), (1, EXPERTS + 1)])
    def test_logits_of_something_else_are_not_used(
        self, bench: Bench, shape: tuple[int, int]
    ) -> None:
        executed = self.choose(bench, SOFTMAX, torch.zeros(shape))
        assert same(executed, route([1, 3], [4 / 7, 3 / 7]))

    def test_logits_are_used_once(self, bench: Bench) -> None:
        self.choose(bench, SOFTMAX, torch.zeros(1, EXPERTS))
        assert same(bench.execute(1, FOUR), route([1, 3], [4 / 7, 3 / 7]))

    def test_a_heavy_expert_is_waited_for(self, bench: Bench) -> None:
        true = route([1, 3, 7, 5], [0.1, 0.2, 0.3, 0.4])
        assert same(bench.execute(1, true), route([1, 3, 5], [1 / 7, 2 / 7, 4 / 7]))
        assert (1, 5) in bench.settle()
        assert (1, 7) not in bench.settle()

    def test_what_is_arriving_is_waited_for(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        is_arriving = bench.tiers.is_arriving
        monkeypatch.setattr(
            bench.tiers, "is_arriving", lambda key: key == (1, 7) or is_arriving(key)
        )
        assert bench.execute(1, FOUR).top_k_index.tolist() == [[1, 3, 7]]

    def test_a_finished_copy_counts_before_it_was_booked(self, bench: Bench) -> None:
        for expert in (5, 7):
            bench.tiers.prefetch(ExpertKey(1, expert), expected_wait=1.0, order=0.0)
        while bench.tiers._transfers.num_open:
            pass
        assert same(bench.execute(1, FOUR), FOUR)

    def test_where_all_are_missing_the_heaviest_is_waited_for(self, bench: Bench) -> None:
        bench.runtime.policy = SpeculateWhen(0.0)
        executed = bench.execute(2, FOUR)
        assert same(executed, route([1], [1.0]))
        assert bench.metrics.speculated_fraction == 0.75

    def test_placeholders_are_neither_waited_for_nor_dropped(self, bench: Bench) -> None:
        true = route([1, EXPERTS, 3, 7], [0.4, 0.3, 0.2, 0.1])
        assert bench.execute(1, true).top_k_index.tolist() == [[1, EXPERTS, 3]]

    @pytest.mark.parametrize("heaviest", [1, EXPERTS])
    def test_others_are_weighed_by_real_experts_only(self, bench: Bench, heaviest: int) -> None:
        bench.runtime.score_rules = [SOFTMAX] * LAYERS
        bench.runtime.see_logits(1, torch.zeros(1, EXPERTS))
        executed = bench.execute(1, route([heaviest, EXPERTS, 7], [0.3, 0.4, 0.3]))
        wanted = ([1, EXPERTS, 0], [0.3, 0.4, 0.3])
        if heaviest == EXPERTS:
            wanted = ([EXPERTS, EXPERTS], [3 / 7, 4 / 7])
        assert same(executed, route(*wanted))

    def test_a_single_token_of_a_prompt_is_exact(self, bench: Bench) -> None:
        with bench.runtime.prefilling():
            assert same(bench.execute(1, FOUR), FOUR)

    @pytest.mark.parametrize("confidence", [1.0, 0.0])
    def test_forwards_of_several_tokens_and_full_confidence_are_exact(
        self, make_bench: Any, confidence: float
    ) -> None:
        bench = make_bench()
        bench.runtime.policy = SpeculateWhen(confidence)
        for _ in range(2):
            two = Routing(FOUR.top_k_index.view(2, 2), FOUR.top_k_weights.view(2, 2))
            assert same(bench.execute(0, two), two)
            if confidence == 1:
                assert same(bench.execute(1, FOUR), FOUR)
        assert bench.metrics.num_speculated == 0

    def test_eviction_learns_what_is_executed(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen = []
        observe = bench.tiers.observe
        monkeypatch.setattr(
            bench.tiers, "observe", lambda layer, *a: seen.append(a) or observe(layer, *a)
        )
        bench.execute(1, FOUR)
        assert seen == [({1: 1, 3: 1}, 1, None)]

    def test_logits_of_another_threads_forward_are_not_used(self, bench: Bench) -> None:
        bench.runtime.score_rules = [SOFTMAX] * LAYERS
        finish(lambda: bench.runtime.see_logits(1, torch.zeros(1, EXPERTS)))
        assert same(bench.execute(1, FOUR), route([1, 3], [4 / 7, 3 / 7]))
