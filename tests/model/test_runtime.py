"""A layer computes the true routing, whatever is predicted; predictions are scored and rationed."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fakes import InstantBackend, assert_settled, finish
from foreload.errors import TransferError
from foreload.memory.arena import SlotArena
from foreload.memory.eviction import LRU
from foreload.memory.tiers import ExpertTiers
from foreload.metrics import Metrics, Timeline
from foreload.model.runtime import ExpertRuntime
from foreload.ops.reference import SumRule
from foreload.types import ExpertKey, ExpertPlan, ExpertTensor, Prediction, RoutingEvent, Span

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
        self.tiers = ExpertTiers(
            arena, plans, self.disk, LRU(LAYERS, EXPERTS), self.metrics, self.timeline
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
        wanted = torch.zeros_like(hidden)
        for token, chosen in enumerate(routing):
            for expert, weight in zip(chosen, weights[token], strict=True):
                inner = torch.relu(up(layer, expert) @ hidden[token])
                wanted[token] += weight * (down(layer, expert) @ inner)
        assert torch.allclose(result, wanted, rtol=1e-5, atol=1e-6)

    def settle(self) -> set[tuple[int, int]]:
        """Wait for all copies, and give what is resident."""
        finish(self.tiers.wait_idle)
        return set(self.tiers.cache.keys())


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
