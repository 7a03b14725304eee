"""Exact stays exact whatever is predicted, and the other policies do what they say, not more.

`speculate` is compared with a reference in plain transformers, `speculate-when` with exact where
it must be the same and with its own promise where it must not.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest
import torch

import zoo
from fakes import NoisePredictor, assert_settled, make_engine
from foreload.model.kv_cache import pass_cache
from foreload.model.runtime import ExpertRuntime
from foreload.model.sites import EarlyRouter
from foreload.predict.calibration import calibration_path, read_default_vectors
from foreload.schedule.policy import Exact, Speculate, SpeculateWhen
from foreload.types import Prediction, RouterOutput, Routing

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from foreload import Engine
    from foreload.types import RoutingEvent

FAMILIES = ["qwen3_moe", "olmoe", "mixtral", "deepseek_v3", "gpt_oss"]
DECODED = [11, 16, 21, 26]


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> zoo.TinyCheckpoint:
    return zoo.save_family(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def exact(checkpoint: zoo.TinyCheckpoint) -> list[Tensor]:
    """The logits of transformers, prompt and decoded tokens."""
    return run(checkpoint.load_reference(), checkpoint.input_ids)


def run(model: PreTrainedModel, prompt: Tensor, cache: Any = None) -> list[Tensor]:
    """Give the logits of the prompt and of each token after it; the tokens are fixed."""
    logits = []
    with torch.no_grad():
        for ids in (prompt, *(torch.tensor([[token]]) for token in DECODED)):
            output = model(input_ids=ids, **pass_cache(model, cache), use_cache=True)
            logits.append(output.logits)
            cache = output.past_key_values
    return logits


def run_engine(engine: Engine, checkpoint: zoo.TinyCheckpoint) -> list[Tensor]:
    logits = run(engine.model, checkpoint.input_ids, engine.make_cache())
    assert_settled(engine.tiers)
    return logits


def are_equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def load_all(engine: Engine) -> None:
    for layer in range(engine.spec.num_moe_layers):
        for _ in engine.tiers.demand(layer, range(engine.spec.num_experts)):
            pass


class TestExactPolicy:
    """The true router is authoritative: noise in every predictor changes no token and no logit."""

    @pytest.fixture
    def noise(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """Let every router that is asked early answer at random; gives who was asked."""
        generator = torch.Generator().manual_seed(3)
        asked: list[int] = []

        def answer(router: EarlyRouter, residual: Tensor) -> RouterOutput:
            site, num_tokens = router.site, residual.reshape(-1, residual.shape[-1]).shape[0]
            asked.append(site.layer)
            logits = torch.randn(num_tokens, site.num_experts, generator=generator)
            weights, index = torch.rand(logits.shape, generator=generator).topk(site.top_k, -1)
            return RouterOutput(index, weights, logits)

        monkeypatch.setattr(EarlyRouter, "__call__", answer)
        return asked

    @pytest.mark.parametrize("predictor", ["lookahead", "default-vectors", "auto"])
    def test_predictors_that_hear_noise_change_no_logit(
        self,
        checkpoint: zoo.TinyCheckpoint,
        exact: list[Tensor],
        noise: list[int],
        predictor: str,
        tmp_path: Path,
    ) -> None:
        with make_engine(
            checkpoint.path,
            predictor=predictor,
            expert_memory="minimum",
            cache_dir=tmp_path if predictor != "lookahead" else None,
        ) as engine:
            assert are_equal(run_engine(engine, checkpoint), exact)
            assert engine.metrics.num_speculated == 0
            assert engine.metrics.num_prefetched > 0
        assert noise

    @pytest.mark.parametrize("seed", range(2))
    def test_noise_changes_no_token(self, checkpoint: zoo.TinyCheckpoint, seed: int) -> None:
        prompt = checkpoint.input_ids[0].tolist()
        with make_engine(checkpoint.path, predictor="none") as engine:
            wanted = engine.generate(prompt, max_new_tokens=16).token_ids
        with make_engine(
            checkpoint.path,
            predictor=lambda spec: NoisePredictor(spec.num_moe_layers, spec.num_experts, seed),
            expert_memory="minimum",
        ) as engine:
            assert engine.generate(prompt, max_new_tokens=16).token_ids == wanted
            assert engine.metrics.num_predicted

    def test_observing_routers_changes_no_logit(
        self, checkpoint: zoo.TinyCheckpoint, exact: list[Tensor]
    ) -> None:
        with make_engine(checkpoint.path, predictor="lookahead") as engine:
            engine.watch_routers()
            engine.watch_routers()
            assert are_equal(run_engine(engine, checkpoint), exact)


class Reference:
    """The paper's method in plain transformers: experts that are called with what was guessed.

    Of the second MoE layer and later, a single token's experts and weights are those of the
    layer's router on norm(r + d): r the residual before the previous MoE layer, d the weighted
    default vectors of what was executed there.
    """

    def __init__(self, model: PreTrainedModel, vectors: Tensor | None = None) -> None:
        self.vectors = vectors
        self.residual: Tensor
        self.guess: tuple[Tensor, Tensor] | None = None
        self.layers = [
            layer
            for layer in model.model.layers
            if any(zoo.is_experts(module) for module in layer.modules())
        ]
        for number, layer in enumerate(self.layers):
            layer.post_attention_layernorm.register_forward_pre_hook(self.see)
            experts = layer.mlp.experts
            experts.forward = self.overrule(number, experts.forward)

    def see(self, norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.residual = args[0].flatten(0, -2)

    def overrule(self, number: int, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            is_decode = len(hidden) == 1
            if is_decode and number > 0:
                assert self.guess is not None
                index, weights = self.guess
            self.guess = self.predict(number + 1, index, weights) if is_decode else None
            return forward(hidden, index, weights)

        return run

    def predict(self, number: int, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor] | None:
        if number == len(self.layers):
            return None
        stream = self.residual
        if self.vectors is not None:
            chosen = self.vectors[number - 1][index]
            stream = stream + torch.einsum("tk,tkh->th", weights, chosen)
        layer = self.layers[number]
        router = layer.mlp.gate if hasattr(layer.mlp, "gate") else layer.mlp.router
        # Not called as modules: the hooks are for the true forward.
        _, weights, index = router.forward(layer.post_attention_layernorm.forward(stream))
        return index, weights


class TrueRouting:
    """Predicts what the router will say: recorded in an exact run, in the order it was said."""

    name = "true"

    def __init__(self, recorded: list[RoutingEvent], num_layers: int) -> None:
        self._routing = {(event.step, event.layer): event for event in recorded}
        self._num_layers = num_layers

    def predict(self, event: RoutingEvent) -> list[Prediction]:
        layer = event.layer + 1
        if layer == self._num_layers:
            return []
        true = self._routing[event.step, layer]
        experts = tuple(true.top_k_index.unique().tolist())
        routing = Routing(true.top_k_index, true.top_k_weights)
        return [Prediction(layer, 1, experts, (1.0,) * len(experts), len(experts), routing)]


class TestSpeculate:
    def test_it_is_the_papers_method_bit_for_bit(
        self, checkpoint: zoo.TinyCheckpoint, exact: list[Tensor]
    ) -> None:
        model = checkpoint.load_reference()
        Reference(model)
        wanted = run(model, checkpoint.input_ids)
        with make_engine(
            checkpoint.path, policy="speculate", predictor="lookahead", expert_memory="minimum"
        ) as engine:
            assert are_equal(run_engine(engine, checkpoint), wanted)
            spec = engine.spec
            pairs = (len(zoo.prompt()[0]) + len(DECODED)) * spec.num_moe_layers * spec.top_k
            assert engine.metrics.num_executed == pairs
        assert torch.equal(wanted[0], exact[0]), "the prompt is exact"
        assert not torch.equal(wanted[1], exact[1]), "the test would show nothing"

    def test_default_vectors_stand_in_for_the_executed_experts(
        self, checkpoint: zoo.TinyCheckpoint, tmp_path: Path
    ) -> None:
        with make_engine(
            checkpoint.path,
            policy="speculate",
            predictor="default-vectors",
            expert_memory="25%",
            cache_dir=tmp_path,
        ) as engine:
            logits = run_engine(engine, checkpoint)
            spec = engine.spec
        shape = (spec.num_moe_layers, spec.num_experts, spec.hidden_size)
        vectors = read_default_vectors(
            calibration_path(tmp_path, spec.identity), spec.identity, shape
        )
        model = checkpoint.load_reference()
        Reference(model, vectors)
        assert are_equal(logits, run(model, checkpoint.input_ids))

    def test_true_predictions_make_it_exact_bit_for_bit(
        self, checkpoint: zoo.TinyCheckpoint, exact: list[Tensor]
    ) -> None:
        recorded: list[RoutingEvent] = []
        with make_engine(checkpoint.path, predictor="none") as engine:
            engine.runtime.on_routing = lambda event, wanted: recorded.append(event)
            run_engine(engine, checkpoint)
        executed = []
        for policy in (Speculate(), Speculate(in_prefill=True)):
            with make_engine(
                checkpoint.path,
                predictor=lambda spec: TrueRouting(recorded, spec.num_moe_layers),
                expert_memory="minimum",
            ) as engine:
                engine.runtime.policy = policy
                engine.runtime.on_routing = lambda event, wanted: executed.append(event.executed)
                assert are_equal(run_engine(engine, checkpoint), exact)
                assert engine.metrics.num_speculated == 0
            assert any(routing is not None for routing in executed)

    def test_noise_is_executed_if_that_is_what_is_predicted(
        self, checkpoint: zoo.TinyCheckpoint, exact: list[Tensor]
    ) -> None:
        with make_engine(
            checkpoint.path,
            policy="speculate",
            predictor=lambda spec: NoisePredictor(spec.num_moe_layers, spec.num_experts),
            expert_memory="minimum",
        ) as engine:
            logits = run_engine(engine, checkpoint)
            assert torch.equal(logits[0], exact[0])
            assert not torch.equal(logits[1], exact[1])
            assert engine.metrics.num_speculated > 0

    def test_the_first_layer_and_the_prompt_are_true(self, checkpoint: zoo.TinyCheckpoint) -> None:
        places: list[tuple[int, int, bool]] = []
        with make_engine(checkpoint.path, policy="speculate", predictor="lookahead") as engine:
            engine.runtime.on_routing = lambda event, wanted: places.append(
                (event.step, event.layer, event.executed is not None)
            )
            run_engine(engine, checkpoint)
            num_layers = engine.spec.num_moe_layers
        steps = itertools.product(range(1 + len(DECODED)), range(num_layers))
        assert places == [(step, layer, step > 0 and layer > 0) for step, layer in steps]


class TestSpeculateWhen:
    @pytest.mark.parametrize("predictor", ["none", "lookahead"])
    def test_full_confidence_is_exact_bit_for_bit(
        self, checkpoint: zoo.TinyCheckpoint, exact: list[Tensor], predictor: str
    ) -> None:
        with make_engine(
            checkpoint.path,
            policy="speculate-when",
            confidence=1.0,
            predictor=predictor,
            expert_memory="minimum",
        ) as engine:
            assert are_equal(run_engine(engine, checkpoint), exact)
            assert engine.metrics.num_speculated == 0

    @pytest.mark.parametrize("confidence", [0.0, 0.5, 0.9])
    def test_with_everything_in_memory_it_is_exact_bit_for_bit(
        self, checkpoint: zoo.TinyCheckpoint, exact: list[Tensor], confidence: float
    ) -> None:
        with make_engine(
            checkpoint.path,
            policy="speculate-when",
            confidence=confidence,
            predictor="lookahead",
            expert_memory="100%",
        ) as engine:
            load_all(engine)
            assert are_equal(run_engine(engine, checkpoint), exact)
            assert engine.metrics.num_speculated == 0
            assert engine.metrics.num_executed > 0

    @pytest.mark.parametrize("confidence", [0.0, 0.6, 0.85])
    @pytest.mark.parametrize("budget", ["minimum", "30%"])
    def test_no_more_weight_is_lost_than_is_allowed(
        self, checkpoint: zoo.TinyCheckpoint, budget: str, confidence: float
    ) -> None:
        events: list[RoutingEvent] = []
        with make_engine(
            checkpoint.path,
            policy="speculate-when",
            confidence=confidence,
            predictor="none",
            expert_memory=budget,
        ) as engine:
            engine.runtime.on_routing = lambda event, wanted: events.append(event)
            logits = run_engine(engine, checkpoint)
            metrics = engine.metrics
        assert all(bool(torch.isfinite(row).all()) for row in logits)
        num_lost = 0
        for event in events:
            if len(event.top_k_index) > 1:
                assert event.executed is None
                continue
            index, weights = event.top_k_index[0], event.top_k_weights[0]
            chosen, given = (rows[0] for rows in event.executed_routing)
            is_lost = ~torch.isin(index, chosen)
            num_lost += int(is_lost.sum())
            assert weights[is_lost].sum() <= (1 - confidence) * weights.sum() * (1 + 1e-6)
            assert not is_lost.all()
            assert len(set(chosen.tolist())) == len(chosen) <= len(index)
            assert bool((given > 0).all())
        assert metrics.num_speculated == num_lost
        assert num_lost > 0 or confidence > 0.6, "tiny models weigh their experts alike"
        assert metrics.num_executed == sum(event.top_k_index.numel() for event in events)
        assert metrics.speculated_fraction == num_lost / metrics.num_executed

    def test_without_confidence_a_layer_waits_for_one_expert_at_most(
        self, checkpoint: zoo.TinyCheckpoint
    ) -> None:
        with make_engine(
            checkpoint.path,
            policy="speculate-when",
            confidence=0.0,
            predictor="none",
            expert_memory="30%",
        ) as engine:
            run(engine.model, checkpoint.input_ids, cache := engine.make_cache())
            for token in DECODED:
                before = engine.metrics.snapshot()
                engine.forward(torch.tensor([[token]]), cache)
                step = engine.metrics.since(before)
                assert step.num_misses <= engine.spec.num_moe_layers
                assert step.num_lookups > step.num_misses

    def test_substitutes_get_the_weight_their_router_would_give(
        self, checkpoint: zoo.TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: dict[int, Tensor] = {}
        events: list[tuple[RoutingEvent, Tensor]] = []
        see = ExpertRuntime.see_logits

        def note(self: ExpertRuntime, layer: int, logits: Tensor) -> None:
            seen[layer] = logits
            see(self, layer, logits)

        monkeypatch.setattr(ExpertRuntime, "see_logits", note)
        with make_engine(
            checkpoint.path,
            policy="speculate-when",
            confidence=0.3,
            predictor="none",
            expert_memory="50%",
        ) as engine:
            engine.runtime.on_routing = lambda event, wanted: events.append(
                (event, seen[event.layer])
            )
            run_engine(engine, checkpoint)
        changed = [pair for pair in events if pair[0].executed is not None]
        num_new = 0
        for event, logits in changed:
            (index,), (weights,) = event.top_k_index, event.top_k_weights
            (chosen,), (given,) = event.executed_routing
            num_new += int((~torch.isin(chosen, index)).sum())
            scores = logits[0].sigmoid() if self.is_sigmoid(checkpoint) else logits[0].softmax(-1)
            unit = given / scores[chosen]
            assert torch.allclose(unit, unit[:1].expand(len(unit)), rtol=1e-4)
            if checkpoint.arch == "olmoe":
                assert unit[0] == pytest.approx(1.0, rel=1e-4)
            else:
                assert given.sum() == pytest.approx(float(weights.sum()), rel=1e-4)
        assert num_new > 0

    def is_sigmoid(self, checkpoint: zoo.TinyCheckpoint) -> bool:
        return checkpoint.arch == "deepseek_v3"


class TestChangingThePolicy:
    def test_an_engine_is_exact_again_after_speculating(
        self, checkpoint: zoo.TinyCheckpoint, exact: list[Tensor]
    ) -> None:
        with make_engine(
            checkpoint.path, policy="speculate", predictor="lookahead", expert_memory="minimum"
        ) as engine:
            first = run_engine(engine, checkpoint)
            engine.runtime.policy = SpeculateWhen(0.5)
            engine.watch_routers()
            run_engine(engine, checkpoint)
            engine.runtime.policy = Exact()
            assert are_equal(run_engine(engine, checkpoint), exact)
            engine.runtime.policy = Speculate()
            assert are_equal(run_engine(engine, checkpoint), first)

    def test_batches_are_exact_under_any_policy(self, checkpoint: zoo.TinyCheckpoint) -> None:
        batch = torch.cat([checkpoint.input_ids, checkpoint.input_ids + 1])
        wanted = run_batch(checkpoint.load_reference(), batch)
        for settings in ({"policy": "speculate"}, {"policy": "speculate-when", "confidence": 0}):
            with make_engine(checkpoint.path, predictor="lookahead", **settings) as engine:
                assert are_equal(run_batch(engine.model, batch), wanted)
                assert engine.metrics.num_speculated == 0


def run_batch(model: PreTrainedModel, batch: Tensor) -> list[Tensor]:
    with torch.no_grad():
        output = model(input_ids=batch, use_cache=True)
        again = model(
            input_ids=torch.tensor([[11], [16]]),
            **pass_cache(model, output.past_key_values),
            use_cache=True,
        )
    return [output.logits, again.logits]
