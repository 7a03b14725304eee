"""Predict the next layer's routing with small trained networks.

A network corrects what the coming router is asked with; the model's own router still gives the
answer, so that weights, groups and biases stay its business. Trained by `foreload
train-estimator`. Never changes what is computed.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from foreload.errors import CheckpointError
from foreload.ops.scores import ScoreRule
from foreload.predict.ranking import make_prediction

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from foreload.types import Prediction, RouterOutput, RoutingEvent

__all__ = [
    "CorrectedRouter",
    "Estimator",
    "LayerNetwork",
    "TrainedEstimator",
    "estimator_path",
    "read_estimator",
    "save_whole",
]

CHOICES = ("lookahead", "default-vectors", "estimator")
_DAMPING = 1e-4


class _Router(Protocol):
    """What is asked of a coming router; `model.sites.EarlyRouter` is one."""

    def quasi_hidden(self, residual: Tensor) -> Tensor: ...

    def route(self, hidden: Tensor) -> RouterOutput | None: ...


class _Base(Protocol):
    """What is asked of a predictor that a network corrects."""

    def predict(self, event: RoutingEvent, *, nearest: int = 1) -> list[Prediction]: ...

    def route_next(self, event: RoutingEvent) -> RouterOutput | None: ...

    def estimate(self, event: RoutingEvent) -> Tensor: ...


class LayerNetwork(nn.Module):
    """Guesses how wrong one layer's early answer is.

    What an early guess cannot see is above all the coming layer's attention, and that looks back:
    the previous token's true router input says much of what it will bring.

    Args:
        hidden_size: H.
        num_experts: E of the layer that is guessed about.
        width: Hidden units.

    Cost:
        2*T*width*(2*H + E) FLOP.
    """

    def __init__(self, hidden_size: int, num_experts: int, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(2 * hidden_size, width)
        self.outer = nn.Linear(width, num_experts)
        # Silent at first: training starts from the guess that is corrected.
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, hidden: Tensor, previous: Tensor) -> Tensor:
        """Give what to add to the router's logits, (T, E) float32.

        Args:
            hidden: (T, H) the router's input as estimated.
            previous: (T, H) its true input at the token before; zero where there is none.
        """
        size = hidden.shape[-1:]
        both = [F.rms_norm(part.float(), size) for part in (hidden, previous)]
        corrections: Tensor = self.outer(F.gelu(self.inner(torch.cat(both, -1))))
        return corrections


class CorrectedRouter:
    """A model's own router, asked with a corrected estimate of its input.

    The network speaks of experts; the correction is the smallest change of the input that changes
    their scores so, which needs no more parameters and lets the router answer for itself.

    Args:
        router: The router, ahead of time.
        network: Its network, where the router is.
        rule: How the router makes scores of logits.
        num_experts: E.
        hidden_size: H.
        dtype: Element type the router computes in.
    """

    def __init__(
        self,
        router: _Router,
        network: LayerNetwork,
        rule: ScoreRule,
        *,
        num_experts: int,
        hidden_size: int,
        dtype: torch.dtype,
    ) -> None:
        self.router = router
        self.network = network
        self.rule = rule
        device = network.outer.weight.device
        self._directions = _directions(router, rule, (num_experts, hidden_size), dtype, device)

    def make_memory(self) -> Tensor:
        """Make room for one token's true input, (1, H) float32; zero as before the first token."""
        # Of inference mode its contents could not be replaced outside it.
        with torch.inference_mode(False):
            return torch.zeros_like(self._directions[:1])

    def ask(self, hidden: Tensor, previous: Tensor) -> RouterOutput:
        """Give the router's answer; differentiable in the logits.

        Args:
            hidden: (T, H) its input as estimated.
            previous: (T, H) its true input at the token before.
        """
        scale = hidden.float().pow(2).mean(-1, keepdim=True).sqrt()
        correction = scale * (self.network(hidden, previous) @ self._directions)
        output = self.router.route((hidden.float() + correction).to(hidden.dtype))
        if output is None:
            raise ValueError("this router cannot be asked early")
        return output


def _directions(
    router: _Router,
    rule: ScoreRule,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Give per expert the least change of a unit input that raises its logit by one, (E, H)."""
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False), torch.enable_grad():
        point = torch.randn(shape[1], generator=generator).to(device)
        points = point.expand(shape).clone().requires_grad_()
        output = router.route(points.to(dtype))
        if output is None or output.logits is None:
            raise ValueError("this router cannot be asked early")
        # Softmax hides what all logits gain alike; of what is already a score, logarithms add up.
        is_score = rule is ScoreRule.GIVEN
        scores = rule.log_scores(output.logits) if is_score else output.logits.float()
        (slopes,) = torch.autograd.grad(scores.diagonal().sum(), points)
    gram = slopes @ slopes.T
    damping = _DAMPING * gram.diagonal().mean() * torch.eye(shape[0], device=device)
    directions: Tensor = torch.linalg.solve(gram + damping, slopes)
    return directions


@dataclass(frozen=True, slots=True)
class TrainedEstimator:
    """What training made.

    Attributes:
        networks: By MoE layer that is guessed about; the first has none.
        choices: Per MoE layer, who guesses about it: "lookahead", "default-vectors" or
            "estimator", whichever was best on held-out text.
        default_vectors: (L, E, H), those the networks were trained with.
    """

    networks: Mapping[int, LayerNetwork]
    choices: tuple[str, ...]
    default_vectors: Tensor

    @property
    def num_parameters(self) -> int:
        """Give the trained parameters."""
        return sum(p.numel() for network in self.networks.values() for p in network.parameters())

    def write(self, path: Path, identity: str) -> None:
        """Save, whole or not at all; in bfloat16.

        Raises:
            CheckpointError: The file cannot be written.
        """
        tensors = {"default_vectors": self.default_vectors.bfloat16()}
        for layer, network in self.networks.items():
            for name, value in network.state_dict().items():
                tensors[f"layers.{layer}.{name}"] = value.bfloat16()
        metadata = {"identity": identity, "choices": json.dumps(self.choices)}
        save_whole(path, tensors, metadata)


def estimator_path(cache_dir: Path, identity: str) -> Path:
    """Give where a checkpoint's estimator lies."""
    return cache_dir / "estimator" / f"{identity[:32]}.safetensors"


def save_whole(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file, whole or not at all.

    Raises:
        CheckpointError: The file cannot be written; an earlier one is left as it was.
    """
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({n: t.contiguous() for n, t in tensors.items()}, part, metadata=metadata)
        part.replace(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot write the estimator to {path}: {error}",
            hint="free some space there, or choose another cache_dir",
        ) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def read_estimator(path: Path, identity: str, shape: tuple[int, int, int]) -> TrainedEstimator:
    """Read an estimator.

    Args:
        path: The file.
        identity: The checkpoint it must belong to.
        shape: L, E and H of the checkpoint.

    Raises:
        CheckpointError: The file is damaged or belongs to another checkpoint.
    """
    hint = "run `foreload train-estimator` again"
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            # Copies: what safetensors gives is the mapped file, and dies with it.
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        if metadata.get("identity") != identity:
            raise CheckpointError(f"{path} was trained on another checkpoint", hint=hint)
        vectors = tensors.pop("default_vectors")
        choices = tuple(json.loads(metadata["choices"]))
        networks = _networks(tensors)
        if tuple(vectors.shape) != shape or len(choices) != shape[0]:
            raise ValueError("its shapes are not the checkpoint's")
        if not set(choices) <= set(CHOICES) or any(
            choice == "estimator" and layer not in networks for layer, choice in enumerate(choices)
        ):
            raise ValueError(f"its choices are {choices}")
        return TrainedEstimator(networks, choices, vectors)
    except (OSError, SafetensorError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"cannot read the estimator {path}: {error}", hint=hint) from error


def _networks(tensors: Mapping[str, Tensor]) -> dict[int, LayerNetwork]:
    """Build the networks of a file's tensors."""
    networks = {}
    for layer in sorted({int(name.split(".")[1]) for name in tensors}):
        prefix = f"layers.{layer}."
        state = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        width, inputs = state["inner.weight"].shape
        network = LayerNetwork(inputs // 2, state["outer.weight"].shape[0], width)
        network.load_state_dict(state)
        networks[layer] = network.requires_grad_(False)
    return networks


class Estimator:
    """Guesses the next layer with a trained network, layers further ahead without.

    Each layer is guessed about by whoever was best on held-out text. Forwards of several tokens
    are guessed about without the networks, because the token before has not been computed yet.

    Args:
        routers: Per MoE layer, its router corrected by its network, or None.
        choices: Per MoE layer, who guesses about it; as in `TrainedEstimator`.
        lookahead: Guesses where the choice is "lookahead".
        default_vectors: Guesses where it is "default-vectors"; the networks correct its estimate.
        num_extra: Experts to name beyond the layer's top_k.

    Reference:
        arXiv:2603.19289, Est-PF, and Hybrid-PF for the choice by layer. The previous token as an
        input, one network per layer and the correction of the router's input are this project's.
    """

    name = "estimator"

    def __init__(
        self,
        routers: Sequence[CorrectedRouter | None],
        choices: Sequence[str],
        *,
        lookahead: _Base,
        default_vectors: _Base,
        num_extra: int = 0,
    ) -> None:
        self.choices = tuple(choices)
        self._routers = routers
        self._lookahead = lookahead
        self._default_vectors = default_vectors
        self._num_extra = num_extra
        # Where they stay: captured steps read and write them.
        self._previous = {
            layer: router.make_memory()
            for layer, router in enumerate(routers)
            if router is not None
        }
        self._steps: dict[int, int] = {}

    def make_pure(self) -> Estimator:
        """Copy with the networks speaking for every layer that has one, whatever was best."""
        pure = [
            "estimator" if router is not None else choice
            for router, choice in zip(self._routers, self.choices, strict=True)
        ]
        return Estimator(
            self._routers,
            pure,
            lookahead=self._lookahead,
            default_vectors=self._default_vectors,
            num_extra=self._num_extra,
        )

    def predict(self, event: RoutingEvent) -> list[Prediction]:
        """Guess the next layers' routing."""
        if event.residual is None:
            return []
        layer = event.layer + 1
        # What was kept is the token before's unless nobody asked in the step before.
        is_before = self._steps.get(layer) == event.step - 1
        self._remember(event.layer, event.residual)
        self._steps[event.layer] = event.step
        router = self._router(layer)
        if router is None or event.top_k_index.shape[0] != 1:
            return self._plain(layer).predict(event)
        previous = self._previous[layer]
        output = self._ask(router, event, previous if is_before else torch.zeros_like(previous))
        guess = make_prediction(output, layer, 1, self._num_extra)
        return [guess, *self._default_vectors.predict(event, nearest=2)]

    def route_next(self, event: RoutingEvent) -> RouterOutput | None:
        """Give the next layer's router's early answer, without waiting for the device.

        None where nothing can be said, as of several tokens. To be asked at every layer of every
        step: the last token there is the one before the next step's.
        """
        if event.residual is None:
            return None
        layer = event.layer + 1
        self._remember(event.layer, event.residual)
        router = self._router(layer)
        if router is None:
            return self._plain(layer).route_next(event)
        if event.top_k_index.shape[0] != 1:
            return None
        return self._ask(router, event, self._previous[layer])

    def _router(self, layer: int) -> CorrectedRouter | None:
        """Give the router with the network that guesses about a layer; None where another does."""
        is_chosen = layer < len(self.choices) and self.choices[layer] == "estimator"
        return self._routers[layer] if is_chosen else None

    def _plain(self, layer: int) -> _Base:
        """Give who guesses about a layer without a network."""
        is_lookahead = layer < len(self.choices) and self.choices[layer] == "lookahead"
        return self._lookahead if is_lookahead else self._default_vectors

    def _ask(self, router: CorrectedRouter, event: RoutingEvent, previous: Tensor) -> RouterOutput:
        with torch.no_grad():
            stream = self._default_vectors.estimate(event)
            hidden = router.router.quasi_hidden(stream).reshape(1, -1)
            return router.ask(hidden, previous)

    def _remember(self, layer: int, residual: Tensor) -> None:
        """Keep the last token's true router input for the next token."""
        router = self._router(layer)
        if router is not None:
            last = residual.reshape(-1, residual.shape[-1])[-1:]
            with torch.no_grad():
                self._previous[layer].copy_(router.router.quasi_hidden(last))
