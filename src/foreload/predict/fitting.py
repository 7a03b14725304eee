"""Fit the networks of an estimator to features that were collected from a model.

Knows features, networks and routers; where features come from and where networks go is the
business of `foreload.train_estimator`.
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from foreload.predict.estimator import CorrectedRouter

__all__ = ["FeatureBuffer", "Fitter"]

_BATCH = 256
_LEARNING_RATE = 2e-3
_WARM_UP = 0.05
_WEIGHT_DECAY = 0.01


class FeatureBuffer:
    """What is known of tokens before a layer runs, and what its router then chose.

    Args:
        layers: By MoE layer that is guessed about, its E.
        num_tokens: Room.
        hidden_size: H.
        top_k: K.
        dtype: Element type of the residual stream.
        has_plain: Whether to keep the estimate without default vectors too, for comparisons.

    Attributes:
        size: Tokens filled in.
        hidden: By layer, (N, H) its router's input as estimated.
        plain: The same, estimated without default vectors.
        previous: Its router's true input at the token before; zero where there is none.
        target: (N, E) its router's true distribution.
        index: (N, K) its router's true choice.
    """

    def __init__(
        self,
        layers: Mapping[int, int],
        num_tokens: int,
        hidden_size: int,
        top_k: int,
        dtype: torch.dtype,
        *,
        has_plain: bool = False,
    ) -> None:
        self.size = 0
        self.plain: dict[int, Tensor] = {}
        self.hidden: dict[int, Tensor] = {}
        self.previous: dict[int, Tensor] = {}
        self.target: dict[int, Tensor] = {}
        self.index: dict[int, Tensor] = {}
        for layer, num_experts in layers.items():
            self.hidden[layer] = torch.zeros(num_tokens, hidden_size, dtype=dtype)
            self.previous[layer] = torch.zeros(num_tokens, hidden_size, dtype=dtype)
            if has_plain:
                self.plain[layer] = torch.zeros(num_tokens, hidden_size, dtype=dtype)
            self.target[layer] = torch.zeros(num_tokens, num_experts)
            self.index[layer] = torch.zeros(num_tokens, top_k, dtype=torch.int64)

    def rows(self, start: int, stop: int) -> FeatureBuffer:
        """Give a part of the tokens; shares memory."""
        part = copy.copy(self)
        part.size = stop - start
        for name in ("hidden", "plain", "previous", "target", "index"):
            whole: dict[int, Tensor] = getattr(self, name)
            setattr(part, name, {layer: rows[start:stop] for layer, rows in whole.items()})
        return part

    @staticmethod
    def bytes_per_token(
        layers: Mapping[int, int], hidden_size: int, top_k: int, dtype: torch.dtype
    ) -> int:
        """Give the memory that the features of one token take."""
        return sum(2 * hidden_size * dtype.itemsize + 4 * e + 8 * top_k for e in layers.values())


class Fitter:
    """Trains networks by the divergence of their routers' answers from the true ones.

    Args:
        routers: By MoE layer that is guessed about; the networks in them are trained in place.
        num_batches: Batches there will be in all, for the learning rate's course.
        seed: Seed of the order of tokens.

    Reference:
        arXiv:2603.19289: KL(true router distribution || estimator), model frozen.
    """

    def __init__(
        self, routers: Mapping[int, CorrectedRouter], *, num_batches: int, seed: int
    ) -> None:
        self._routers = routers
        self._num_batches = max(1, num_batches)
        self._seed = seed
        self.num_done = 0
        self._parameters = [p for r in routers.values() for p in r.network.parameters()]
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=_WEIGHT_DECAY
        )

    @staticmethod
    def batches_in(num_tokens: int) -> int:
        """Give the batches of one pass over so many tokens."""
        return math.ceil(num_tokens / _BATCH)

    def run_pass(self, features: FeatureBuffer, report: Callable[[int], None]) -> float:
        """Train on every token once, in random order; give the mean divergence in nats.

        Args:
            features: The tokens.
            report: Told the batches done since the beginning.
        """
        # A pass begun again after an interruption sees the tokens in the same order.
        generator = torch.Generator().manual_seed(1_000_003 * self._seed + self.num_done)
        order = torch.randperm(features.size, generator=generator)
        total = 0.0
        for start in range(0, features.size, _BATCH):
            rows = order[start : start + _BATCH]
            for group in self._optimizer.param_groups:
                group["lr"] = self._learning_rate()
            loss = torch.stack(
                [self._divergence(layer, features, rows).mean() for layer in self._routers]
            ).mean()
            self._optimizer.zero_grad(set_to_none=True)
            # Only the networks: the model's routers stay as they are, and get no gradients.
            loss.backward(inputs=self._parameters)  # type: ignore[no-untyped-call]
            self._optimizer.step()
            total += float(loss.detach()) * len(rows)
            self.num_done += 1
            report(self.num_done)
        return total / features.size

    def measure(self, features: FeatureBuffer) -> float:
        """Give the divergence on other tokens, mean over tokens and layers, in nats."""
        total = 0.0
        with torch.no_grad():
            for start in range(0, features.size, _BATCH):
                rows = torch.arange(start, min(start + _BATCH, features.size))
                for layer in self._routers:
                    total += float(self._divergence(layer, features, rows).sum())
        return total / (features.size * len(self._routers))

    def state(self) -> dict[str, Tensor]:
        """Give the optimiser's memory by name."""
        state = self._optimizer.state_dict()["state"]
        return {f"{i}.{name}": value for i, kept in state.items() for name, value in kept.items()}

    def load_state(self, tensors: Mapping[str, Tensor], num_done: int) -> None:
        """Go on from a memory given by `state`."""
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            number, _, name = key.partition(".")
            state.setdefault(int(number), {})[name] = value
        whole = self._optimizer.state_dict()
        self._optimizer.load_state_dict({**whole, "state": state})
        self.num_done = num_done

    def _learning_rate(self) -> float:
        done = self.num_done / self._num_batches
        return (
            _LEARNING_RATE
            * min(1.0, (done + 1e-3) / _WARM_UP)
            * 0.5
            * (1 + math.cos(math.pi * min(done, 1.0)))
        )

    def _divergence(self, layer: int, features: FeatureBuffer, rows: Tensor) -> Tensor:
        """Give KL(true || guessed) of some tokens, (T,)."""
        router = self._routers[layer]
        output = router.ask(features.hidden[layer][rows], features.previous[layer][rows])
        if output.logits is None:
            raise ValueError("this router gives no logits")
        guessed = torch.log_softmax(router.rule.log_scores(output.logits), -1)
        true = features.target[layer][rows]
        return (torch.xlogy(true, true) - true * guessed).sum(-1)
