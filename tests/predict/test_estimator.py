"""Networks correct what a router is asked with; the router answers, and files are checked."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from foreload.errors import CheckpointError
from foreload.ops.scores import ScoreRule
from foreload.predict import estimator
from foreload.predict.estimator import (
    CorrectedRouter,
    Estimator,
    LayerNetwork,
    TrainedEstimator,
    estimator_path,
    read_estimator,
    save_whole,
)
from foreload.predict.lookahead import DefaultVectors, Lookahead
from foreload.types import RouterOutput, RoutingEvent

if TYPE_CHECKING:
    from pathlib import Path

LAYERS, EXPERTS, HIDDEN, TOP_K, WIDTH = 4, 6, 8, 2, 5


class Router:
    """A linear router behind a norm, which remembers what it was asked."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.randn(EXPERTS, HIDDEN, generator=generator).to(dtype)
        self.asked: list[Tensor] = []

    def quasi_hidden(self, residual: Tensor) -> Tensor:
        return torch.nn.functional.rms_norm(residual, (HIDDEN,))

    def route(self, hidden: Tensor) -> RouterOutput:
        self.asked.append(hidden.detach())
        logits = hidden @ self.weight.T
        weights, index = logits.softmax(-1).topk(TOP_K)
        return RouterOutput(index, weights, logits)

    def __call__(self, residual: Tensor) -> RouterOutput:
        return self.route(self.quasi_hidden(residual))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network(seed: int | None = None) -> LayerNetwork:
    made = LayerNetwork(HIDDEN, EXPERTS, WIDTH)
    if seed is not None:
        for parameter in made.parameters():
            parameter.data = random(*parameter.shape, seed=seed)
    return made.requires_grad_(False)


def corrected(
    router: Router, made: LayerNetwork, dtype: torch.dtype = torch.float32
) -> CorrectedRouter:
    rule = ScoreRule.SOFTMAX
    return CorrectedRouter(router, made, rule, num_experts=EXPERTS, hidden_size=HIDDEN, dtype=dtype)


def event(layer: int, step: int = 0, num_tokens: int = 1, *, is_seen: bool = True) -> RoutingEvent:
    residual = random(num_tokens, HIDDEN, seed=100 * step + layer) if is_seen else None
    index = torch.tensor([[0, 1]] * num_tokens)
    return RoutingEvent(step, layer, residual, index, torch.full(index.shape, 0.5))


class TestCorrection:
    def test_an_untrained_network_changes_nothing(self) -> None:
        router = Router(0)
        hidden = random(3, HIDDEN)
        answer = corrected(router, network()).ask(hidden, random(3, HIDDEN, seed=1))
        assert torch.equal(answer.logits, hidden @ router.weight.T)

    @pytest.mark.parametrize("scale", [0.01, 1.0, 300.0])
    def test_scores_change_by_what_the_network_says_in_units_of_the_input(
        self, scale: float
    ) -> None:
        router, made = Router(0), network(seed=3)
        hidden, previous = scale * random(4, HIDDEN), random(4, HIDDEN, seed=1)
        answer = corrected(router, made).ask(hidden, previous)
        said = made(hidden, previous) * hidden.pow(2).mean(-1, keepdim=True).sqrt()
        change = answer.logits - hidden @ router.weight.T
        # Softmax routers do not care for what all experts gain alike.
        difference = (change - change.mean(-1, keepdim=True)) - (said - said.mean(-1, keepdim=True))
        assert difference.abs().max() < 0.02 * said.abs().max()

    def test_the_previous_token_matters(self) -> None:
        made = network(seed=3)
        hidden = random(1, HIDDEN)
        assert not torch.allclose(made(hidden, random(1, HIDDEN, seed=1)), made(hidden, 0 * hidden))

    def test_gradients_reach_the_network(self) -> None:
        made = network(seed=3).requires_grad_()
        answer = corrected(Router(0), made).ask(random(2, HIDDEN), random(2, HIDDEN, seed=1))
        answer.logits.log_softmax(-1)[:, 0].sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in made.parameters())

    def test_the_router_is_asked_in_its_own_type(self) -> None:
        router = Router(0, torch.bfloat16)
        bound = corrected(router, network(seed=3), torch.bfloat16)
        bound.ask(random(2, HIDDEN).bfloat16(), random(2, HIDDEN, seed=1).bfloat16())
        assert router.asked[-1].dtype == torch.bfloat16

    def test_it_can_be_made_and_asked_in_inference_mode(self) -> None:
        router, made = Router(0), network(seed=3)
        with torch.inference_mode():
            bound = corrected(router, made)
            bound.ask(random(1, HIDDEN), random(1, HIDDEN))


def make_estimator(
    choices: tuple[str, ...] = ("default-vectors", "estimator", "estimator", "estimator"),
) -> tuple[Estimator, list[Router], DefaultVectors, Lookahead]:
    routers = [Router(seed) for seed in range(LAYERS)]
    lookahead = Lookahead(routers, max_distance=2)
    defaults = DefaultVectors(routers, list(random(LAYERS, EXPERTS, HIDDEN)), max_distance=2)
    bound = [None, *(corrected(router, network(seed=3)) for router in routers[1:])]
    made = Estimator(bound, choices, lookahead=lookahead, default_vectors=defaults, num_extra=1)
    return made, routers, defaults, lookahead


class TestEstimator:
    def test_the_next_layer_is_guessed_by_the_network_and_further_ones_without(self) -> None:
        made, routers, defaults, _ = make_estimator()
        seen = event(1)
        near, far = made.predict(seen)
        assert (near.layer, near.distance, far.layer, far.distance) == (2, 1, 3, 2)
        hidden = routers[2].quasi_hidden(defaults.estimate(seen))
        wanted = corrected(routers[2], network(seed=3)).ask(hidden, torch.zeros_like(hidden))
        assert near.routing is not None
        assert torch.equal(near.routing.top_k_index, wanted.top_k_index)
        assert torch.equal(near.routing.top_k_weights, wanted.top_k_weights)
        assert len(near.experts) == TOP_K + 1
        assert far.experts == defaults.predict(seen)[1].experts

    def test_the_token_before_is_remembered_for_one_step_only(self) -> None:
        made, routers, defaults, _ = make_estimator()
        before = event(2, step=4)
        made.predict(before)
        now = event(1, step=5)
        near = made.predict(now)[0]
        hidden = routers[2].quasi_hidden(defaults.estimate(now))
        bound = corrected(routers[2], network(seed=3))
        wanted = bound.ask(hidden, routers[2].quasi_hidden(before.residual))
        assert torch.equal(near.routing.top_k_weights, wanted.top_k_weights)
        late = event(1, step=6)
        hidden = routers[2].quasi_hidden(defaults.estimate(late))
        forgotten = bound.ask(hidden, torch.zeros_like(hidden))
        assert torch.equal(made.predict(late)[0].routing.top_k_weights, forgotten.top_k_weights)

    def test_after_a_prompt_its_last_token_is_the_one_before(self) -> None:
        made, routers, defaults, _ = make_estimator()
        prompt = event(2, step=0, num_tokens=5)
        made.predict(prompt)
        now = event(1, step=1)
        hidden = routers[2].quasi_hidden(defaults.estimate(now))
        previous = routers[2].quasi_hidden(prompt.residual[-1:])
        wanted = corrected(routers[2], network(seed=3)).ask(hidden, previous)
        guess = made.predict(now)[0]
        assert torch.equal(guess.routing.top_k_weights, wanted.top_k_weights)

    def test_several_tokens_are_guessed_about_without_networks(self) -> None:
        made, _, defaults, _ = make_estimator()
        seen = event(0, num_tokens=3)
        assert [g.experts for g in made.predict(seen)] == [
            g.experts for g in defaults.predict(seen)
        ]

    def test_each_layer_is_guessed_by_its_choice(self) -> None:
        made, _, defaults, lookahead = make_estimator(
            ("default-vectors", "lookahead", "default-vectors", "estimator")
        )
        assert made.predict(event(0))[0].confidence == lookahead.predict(event(0))[0].confidence
        assert made.predict(event(1))[0].confidence == defaults.predict(event(1))[0].confidence
        assert made.predict(event(2))[0].confidence != defaults.predict(event(2))[0].confidence
        pure = made.make_pure()
        assert pure.choices[1:] == ("estimator",) * 3
        assert pure.predict(event(0))[0].confidence != lookahead.predict(event(0))[0].confidence

    def test_guesses_that_stay_on_the_device_are_the_same(self) -> None:
        host, device = make_estimator()[0], make_estimator()[0]
        memories = {layer: kept.data_ptr() for layer, kept in device._previous.items()}
        for step, num_tokens in enumerate((5, 1, 1, 3, 1)):
            for layer in range(LAYERS):
                seen = event(layer, step, num_tokens)
                guesses = host.predict(seen)
                found = device.route_next(seen._replace(step=0))
                if num_tokens > 1 or layer == LAYERS - 1:
                    assert found is None
                    continue
                assert found is not None
                wanted = guesses[0].routing
                assert wanted is not None
                assert torch.equal(found.top_k_index, wanted.top_k_index)
                assert torch.equal(found.top_k_weights, wanted.top_k_weights)
        assert {layer: kept.data_ptr() for layer, kept in device._previous.items()} == memories

    def test_memories_of_inference_mode_are_written_outside_it(self) -> None:
        made = make_estimator()[0]
        with torch.inference_mode():
            pure = made.make_pure()
            pure.route_next(event(1))
        assert pure.route_next(event(1)) is not None

    def test_each_layer_has_its_choice_on_the_device_too(self) -> None:
        made, _, defaults, lookahead = make_estimator(
            ("default-vectors", "lookahead", "default-vectors", "estimator")
        )
        for layer, wanted in ((0, lookahead), (1, defaults)):
            found, other = made.route_next(event(layer)), wanted.route_next(event(layer))
            assert torch.equal(found.logits, other.logits)
        assert not torch.equal(
            made.route_next(event(2)).logits, defaults.route_next(event(2)).logits
        )

    def test_there_is_nothing_to_say_without_a_residual_or_after_the_last_layer(self) -> None:
        made = make_estimator()[0]
        assert made.predict(event(1, is_seen=False)) == []
        assert made.predict(event(LAYERS - 1)) == []
        assert made.route_next(event(1, is_seen=False)) is None


SHAPE = (LAYERS, EXPERTS, HIDDEN)


def trained() -> TrainedEstimator:
    networks = {layer: network(seed=layer) for layer in range(1, LAYERS)}
    choices = ("default-vectors", "lookahead", "estimator", "estimator")
    return TrainedEstimator(networks, choices, random(*SHAPE))


class TestFile:
    def test_what_is_written_is_read_back(self, tmp_path: Path) -> None:
        path = estimator_path(tmp_path / "new", "abc")
        trained().write(path, "abc")
        read = read_estimator(path, "abc", SHAPE)
        assert read.choices == trained().choices
        assert read.num_parameters == 3 * (WIDTH * (2 * HIDDEN + 1 + EXPERTS) + EXPERTS)
        assert torch.equal(read.default_vectors, trained().default_vectors.bfloat16().float())
        for layer, made in trained().networks.items():
            for name, value in made.state_dict().items():
                assert torch.equal(read.networks[layer].state_dict()[name], value.bfloat16())
        assert list(path.parent.iterdir()) == [path], "a part of the writing was left behind"

    def test_another_checkpoints_estimator_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "e.safetensors"
        trained().write(path, "abc")
        with pytest.raises(CheckpointError, match="another checkpoint") as caught:
            read_estimator(path, "other", SHAPE)
        assert "train-estimator" in str(caught.value.hint)
        with pytest.raises(CheckpointError, match="shapes"):
            read_estimator(path, "abc", (LAYERS, EXPERTS, HIDDEN + 1))

    @pytest.mark.parametrize("content", [None, b"", b"not safetensors at all", b"\x00" * 100])
    def test_a_damaged_file_is_refused(self, tmp_path: Path, content: bytes | None) -> None:
        path = tmp_path / "e.safetensors"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(CheckpointError, match="cannot read the estimator"):
            read_estimator(path, "abc", SHAPE)

    def test_a_choice_without_its_network_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "e.safetensors"
        whole = trained()
        TrainedEstimator({1: whole.networks[1]}, whole.choices, whole.default_vectors).write(
            path, "abc"
        )
        with pytest.raises(CheckpointError, match="choices"):
            read_estimator(path, "abc", SHAPE)

    def test_a_file_without_estimator_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "e.safetensors"
        save_whole(path, {"something": torch.zeros(1)}, {"identity": "abc"})
        with pytest.raises(CheckpointError, match="cannot read the estimator"):
            read_estimator(path, "abc", SHAPE)

    def test_a_full_disk_leaves_the_old_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "e.safetensors"
        trained().write(path, "abc")

        def fill_the_disk(tensors: Any, part: Path, **settings: Any) -> None:
            part.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(estimator, "save_file", fill_the_disk)
        with pytest.raises(CheckpointError, match="No space left") as caught:
            trained().write(path, "abc")
        assert "cache_dir" in str(caught.value.hint)
        assert read_estimator(path, "abc", SHAPE).choices == trained().choices
        assert list(tmp_path.iterdir()) == [path]


def test_the_name_is_that_of_the_setting() -> None:
    assert Estimator.name == "estimator"
