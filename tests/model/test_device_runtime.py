"""A layer whose device decides: prefetches are waited for, and what was counted is told once."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from foreload.memory.expert_stream import ExpertStream
from foreload.metrics import Metrics
from foreload.model.device_policy import DevicePolicy
from foreload.model.device_prefill import DevicePrefill
from foreload.model.device_runtime import DeviceRuntime
from foreload.ops.device_experts import MAX_TOKENS, DeviceExperts
from foreload.ops.device_layout import StoredFormat, expert_layout, pack_expert
from foreload.ops.grouped import TwinGrouped
from foreload.ops.reference import SumRule, accumulate, expert_forward, group_by_expert
from foreload.schedule.policy import Exact, Speculate, SpeculateWhen
from foreload.types import RouterOutput

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from foreload.schedule.policy import ExecutionPolicy
    from foreload.types import RoutingEvent

    Guess = Callable[[RoutingEvent], RouterOutput | None]

LAYERS, EXPERTS, TOP_K, HIDDEN, INNER = 3, 8, 2, 16, 8
CPU = torch.device("cpu")

MODULE: Any = SimpleNamespace(
    num_experts=EXPERTS,
    has_gate=True,
    has_bias=False,
    is_transposed=False,
    is_concatenated=True,
    act_fn=torch.nn.functional.silu,
    _apply_gate=lambda both: torch.nn.functional.silu(both.chunk(2, -1)[0]) * both.chunk(2, -1)[1],
)


class Guesser:
    """Asks a function, and remembers what it was told of."""

    name = "guesser"

    def __init__(self, guess: Guess) -> None:
        self.guess = guess
        self.told: list[RoutingEvent] = []

    def route_next(self, event: RoutingEvent) -> RouterOutput | None:
        self.told.append(event)
        return self.guess(event) if len(event.top_k_index) == 1 else None


def one_further(event: RoutingEvent) -> RouterOutput | None:
    """Guess that the next layer wants the neighbours, where there is one."""
    assert event.residual is not None
    if event.layer + 1 == LAYERS:
        return None
    index = (event.top_k_index + 1) % EXPERTS
    return RouterOutput(index, torch.full((1, TOP_K), 0.5), None)


class Setup:
    """A runtime over random experts, and what it should compute."""

    def __init__(
        self,
        num_slots: int,
        predictor: Guesser | None = None,
        policy: ExecutionPolicy = Exact(),  # noqa: B008
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        shapes = {"gate_up_proj": (2 * INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
        layout = expert_layout(MODULE, shapes, StoredFormat.FLOAT32, dtype=torch.float32)
        self.host = torch.zeros((LAYERS, EXPERTS, layout.num_bytes), dtype=torch.uint8)
        self.weights = [
            [
                {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
                for _ in range(EXPERTS)
            ]
            for _ in range(LAYERS)
        ]
        for layer, row in enumerate(self.weights):
            for expert, weights in enumerate(row):
                pack_expert(layout, weights, self.host[layer, expert])
        layouts, rules = [layout] * LAYERS, [SumRule.HIDDEN] * LAYERS
        self.metrics = Metrics()
        self.block_bytes = layout.num_bytes
        self.experts = DeviceExperts(
            layouts, self.host, num_slots=[num_slots] * LAYERS, sum_rules=rules, device=CPU
        )
        self.runtime = DeviceRuntime(
            self.experts,
            DevicePrefill(
                self.experts,
                ExpertStream(self.host, CPU, chunk_blocks=3),
                TwinGrouped(),
                block_bytes=layout.num_bytes,
                metrics=self.metrics,
            ),
            block_bytes=layout.num_bytes,
            metrics=self.metrics,
            device=CPU,
            policy=DevicePolicy(policy, CPU),
            predictor=predictor,
        )

    def run(self, layer: int, index: Tensor, *, residual: bool = True) -> None:
        """Run a layer, and check what it gives."""
        generator = torch.Generator().manual_seed(int(index.sum()))
        hidden = torch.randn((len(index), HIDDEN), generator=generator)
        weights = torch.rand(index.shape, generator=generator)
        if residual:
            self.runtime.see_residual(layer, hidden)
        found = self.runtime.run_layer(layer, MODULE, hidden, index, weights)
        groups = group_by_expert(index, EXPERTS)
        outputs = {
            g.expert: expert_forward(MODULE, hidden[g.token], self.weights[layer][g.expert])
            * weights[g.token, g.position, None]
            for g in groups
        }
        assert torch.equal(found, accumulate(hidden, weights.dtype, groups, outputs))
        self.experts.tables.check()

    def is_in_slot(self, layer: int, expert: int) -> bool:
        return bool(self.experts.tables.slot_of[layer, expert] >= 0)


def ids(*rows: tuple[int, ...]) -> Tensor:
    return torch.tensor(rows)


@pytest.mark.parametrize("num_slots", [1, TOP_K, EXPERTS])
@pytest.mark.parametrize("num_tokens", [1, 2, 4, MAX_TOKENS, MAX_TOKENS + 1, 40])
def test_any_number_of_tokens_any_number_of_slots(num_slots: int, num_tokens: int) -> None:
    setup = Setup(num_slots)
    generator = torch.Generator().manual_seed(num_tokens)
    for _ in range(3):
        for layer in range(LAYERS):
            rows = [torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(num_tokens)]
            setup.run(layer, torch.stack(rows))


def test_placeholders_stand_for_no_expert() -> None:
    setup = Setup(TOP_K)
    setup.run(0, ids((3, EXPERTS)))
    setup.run(0, ids(*[(3, EXPERTS)] * 20))


@pytest.mark.parametrize("num_slots", [1, TOP_K, EXPERTS])
def test_the_likeliest_of_the_named_is_there_when_its_layer_comes(num_slots: int) -> None:
    setup = Setup(num_slots, Guesser(one_further))
    # Whatever these layers wanted last: where memory is tight all of it was wanted just now.
    for layer in range(1, LAYERS):
        setup.run(layer, ids((6, 7)), residual=False)
    setup.runtime.count()
    before = setup.metrics.snapshot()
    with setup.runtime.turns.taken():
        setup.run(0, ids((0, 1)))
        assert set(setup.runtime._open) == {1}
        setup.run(1, ids((1, 2)))
        assert set(setup.runtime._open) == {2}
    assert not setup.runtime._open, "what nobody has waited for is behind the turn"
    setup.runtime.count()
    metrics = setup.metrics.since(before)
    assert (metrics.num_hits, metrics.num_misses) == (1, 3)
    # Layer 2 has been prefetched for, and not been reached.
    assert (metrics.num_prefetched, metrics.num_prefetched_used, metrics.wasted_bytes) == (2, 1, 0)
    with setup.runtime.turns.taken():
        setup.run(0, ids((0, 1)))
        setup.runtime.abandon()
        assert not setup.runtime._open
        setup.run(2, ids((5, 6)))
        assert not setup.runtime._open, "behind the last layer there is none"


def test_the_likeliest_is_brought_where_a_router_does_not_sort() -> None:
    index, weights = torch.tensor([[4, 6, 5, 7]]), torch.tensor([[0.1, 0.3, 0.2, 0.4]])
    for given, brought in ((weights, {7}), (None, {4})):
        setup = Setup(2, Guesser(lambda event, w=given: RouterOutput(index, w, None)))
        setup.run(0, ids((0, 1)))
        assert {e for e in range(EXPERTS) if setup.is_in_slot(1, e)} == brought


def test_predictors_are_told_of_everything_that_was_seen() -> None:
    guesser = Guesser(lambda event: None)
    setup = Setup(EXPERTS, guesser)
    setup.run(0, ids((0, 1)), residual=False)
    assert not guesser.told
    forwards = [(0, 1), (0, 2), (LAYERS - 1, 1), (0, MAX_TOKENS + 1)]
    with setup.runtime.turns.taken():
        for layer, num_tokens in forwards:
            setup.run(layer, ids(*[(0, 1)] * num_tokens))
        assert set(setup.runtime._open) == {1}, "for one token, and where there is a next layer"
    assert [(event.layer, len(event.top_k_index)) for event in guesser.told] == forwards
    assert not setup.runtime._residuals
    setup.runtime.count()
    assert not setup.metrics.num_prefetched, "nothing was guessed"


class PaperDraft:
    """Gives zeros, and wants what it is told."""

    def __init__(self, named: Tensor) -> None:
        self.named = named
        self.noted: list[int] = []
        self.ran: list[int] = []

    def run(self, layer: int, experts: Any, hidden_states: Tensor, routing: Any) -> Tensor:
        self.ran.append(layer)
        return torch.zeros_like(hidden_states)

    def note(self, layer: int, top_k_index: Tensor) -> Tensor:
        self.noted.append(layer)
        return self.named


def test_a_draft_computes_and_brings_the_targets_experts() -> None:
    guesser = Guesser(one_further)
    setup = Setup(4, guesser)
    setup.run(0, ids((0, 1), (2, 3)))
    guesser.told.clear()
    draft = PaperDraft(ids((4, 1), (5, -1)))
    hidden = torch.ones(1, HIDDEN)
    with setup.runtime.drafting(draft):
        for layer in range(LAYERS):
            setup.runtime.see_residual(layer, hidden)
            output = setup.runtime.run_layer(layer, MODULE, hidden, ids((4, 1)), torch.ones(1, 2))
            assert not output.any()
    assert draft.noted == draft.ran == [0, 1, 2]
    assert not guesser.told, "nothing is guessed while drafting"
    assert not setup.runtime._residuals
    # What was wanted just now leaves for what was named, and what was named does not.
    assert [setup.is_in_slot(0, e) for e in range(6)] == [False, True, False, True, True, True]
    setup.experts.tables.check()
    setup.runtime.count()
    assert setup.metrics.num_steps == 1, "the draft's steps are none"
    setup.run(0, ids((4, 5), (1, 4)))
    setup.runtime.count()
    assert setup.metrics.num_prefetched_used == 2


def test_a_guess_is_executed_where_it_was_made_for() -> None:
    for prompt in (False, True):
        setup = Setup(EXPERTS, Guesser(one_further), Speculate())
        hidden = torch.ones(1, HIDDEN)
        with setup.runtime.prefilling() if prompt else nullcontext():
            for layer in range(LAYERS):
                setup.runtime.see_residual(layer, hidden)
                setup.runtime.run_layer(layer, MODULE, hidden, ids((0, 1)), torch.ones(1, 2))
        # Whoever was executed was wanted in its layer's last visit.
        stamps = [setup.experts.tables.stamp[layer] for layer in range(LAYERS)]
        slots = [setup.experts.tables.slot_of[layer].tolist() for layer in range(LAYERS)]
        executed = [
            {e for e in range(EXPERTS) if slot[e] >= 0 and stamp[slot[e]] == 1}
            for slot, stamp in zip(slots, stamps, strict=True)
        ]
        assert executed == ([{0, 1}] * 3 if prompt else [{0, 1}, {1, 2}, {1, 2}])
        setup.runtime.count()
        metrics = setup.metrics
        assert (metrics.num_executed, metrics.num_speculated) == (6, 0 if prompt else 2)
        assert metrics.num_prefetched == 2 * TOP_K, "all that will be executed is brought"


@pytest.mark.parametrize("how", ["decoding", "a prompt", "two tokens"])
def test_who_is_missing_is_done_without_in_decoding_only(how: str) -> None:
    guesser = Guesser(lambda event: None)
    setup = Setup(4, guesser, SpeculateWhen(0.5))
    with setup.runtime.prefilling():
        setup.run(0, ids((0, 1)))
    true = ids((0, 5), (0, 5)) if how == "two tokens" else ids((0, 5))
    hidden, weights = torch.ones(len(true), HIDDEN), torch.tensor([[0.75, 0.25]])
    with setup.runtime.prefilling() if how == "a prompt" else nullcontext():
        setup.runtime.see_residual(0, hidden)
        weights = weights.expand(len(true), -1)
        found = setup.runtime.run_layer(0, MODULE, hidden, true, weights)
    is_exact = how != "decoding"
    assert setup.is_in_slot(0, 5) is is_exact
    executed = guesser.told[-1].executed
    assert (executed is None) is is_exact
    if executed is not None:
        assert (executed.top_k_index.tolist(), executed.top_k_weights.tolist()) == (
            [[0, EXPERTS]],
            [[1.0, 0.0]],
        )
        assert torch.equal(found, expert_forward(MODULE, hidden, setup.weights[0][0]))
    setup.runtime.count()
    metrics = setup.metrics
    assert metrics.num_executed == 2 + true.numel()
    assert metrics.num_speculated == (0 if is_exact else 1)
    setup.experts.tables.check()


def test_a_long_input_leaves_the_last_tokens_experts_behind() -> None:
    setup = Setup(3)
    setup.run(0, ids(*[(0, 1)] * 20, (6, 7)))
    assert setup.is_in_slot(0, 6)
    assert setup.is_in_slot(0, 7)
    assert setup.is_in_slot(0, 0) != setup.is_in_slot(0, 1), "one slot was empty"


def test_what_was_counted_is_told_once() -> None:
    setup = Setup(4)
    for _ in range(2):
        setup.run(0, ids((0, 1)))
    for _ in range(2):
        setup.runtime.count()
    metrics, size = setup.metrics, setup.block_bytes
    assert (metrics.num_steps, metrics.num_hits, metrics.num_misses) == (2, 2, 2)
    assert metrics.demand_bytes == 2 * size
    setup.run(0, ids(*[(4, 5)] * 20))
    setup.runtime.count()
    assert (metrics.num_steps, metrics.num_misses) == (3, 4)
    assert metrics.demand_bytes == 4 * size
    assert metrics.num_prefetched == 0
    # A long input counts those in slots as hits.
    setup.run(0, ids(*[(0, 6)] * 20, (4, 5)))
    setup.runtime.count()
    assert (metrics.num_steps, metrics.num_hits, metrics.num_misses) == (4, 5, 5)
    assert metrics.demand_bytes == 5 * size
    setup.experts.prefetch(0, ids((6, 7)))
    setup.runtime.count()
    assert (metrics.num_prefetched, metrics.prefetch_bytes) == (2, 2 * size)
    # Pushed out by what was wanted after them: brought in vain.
    for pair in ((0, 1), (2, 3)):
        setup.run(0, ids(pair))
    setup.runtime.count()
    assert metrics.wasted_bytes == 2 * size
