"""Runs text through a model, and keeps what an estimator of its routing learns from.

The model may itself be streamed. Each window of the text knows nothing of the others. Trains
nothing: `foreload.train_estimator` does.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from foreload.errors import UnsupportedModelError
from foreload.predict.fitting import FeatureBuffer
from foreload.predict.lookahead import DefaultVectors
from foreload.predict.ranking import make_prediction
from foreload.schedule.policy import Speculate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor

    from foreload.engine import Engine
    from foreload.predict.estimator import CorrectedRouter
    from foreload.types import Prediction, RoutingEvent

__all__ = ["FeatureCollector", "restored", "window_tokens"]

_WINDOW_TOKENS = 512


def window_tokens(engine: Engine) -> int:
    """Give the tokens of a context that runs in one forward."""
    context = engine.max_positions or _WINDOW_TOKENS
    return min(_WINDOW_TOKENS, context, engine.config.prefill_chunk)


@contextmanager
def restored(engine: Engine) -> Iterator[None]:
    """Put the runtime's predictor, policy and observer back after the block."""
    runtime = engine.runtime
    before = runtime.predictor, runtime.policy, runtime.on_routing
    try:
        yield
    finally:
        runtime.predictor, runtime.policy, runtime.on_routing = before


class FeatureCollector:
    """Runs text through the model, and keeps what predictions are made of."""

    def __init__(
        self,
        engine: Engine,
        vectors: Tensor,
        routers: Mapping[int, CorrectedRouter],
        experts: Mapping[int, int],
    ) -> None:
        self._engine = engine
        self._own_predictor = engine.runtime.predictor
        self._own_policy = engine.runtime.policy
        self._routers = routers
        self._experts = experts
        self._base = DefaultVectors(engine.early_routers(), list(vectors))
        self._early = engine.early_routers()
        self._buffer: FeatureBuffer | None = None

    def collect(
        self,
        token_ids: Sequence[int],
        report: Callable[[int], None],
        *,
        is_on_policy: bool = False,
        has_plain: bool = False,
    ) -> FeatureBuffer:
        """Run a text in windows that know nothing of each other.

        Args:
            token_ids: The text.
            report: Told the tokens done.
            is_on_policy: Run each window a second time with the networks' predictions executed;
                its features follow those of the first time, in the second half of the buffer.
            has_plain: Keep the estimate without default vectors too.
        """
        spec, runtime = self._engine.spec, self._engine.runtime
        times = 2 if is_on_policy else 1
        buffer = FeatureBuffer(
            self._experts,
            times * len(token_ids),
            spec.hidden_size,
            spec.top_k,
            self._engine.model.dtype,
            has_plain=has_plain,
        )
        window = window_tokens(self._engine)
        runtime.on_routing = lambda event, wanted: self._see(buffer, event)
        for start in range(0, len(token_ids), window):
            ids = torch.tensor([list(token_ids[start : start + window])])
            runtime.predictor, runtime.policy = self._own_predictor, self._own_policy
            self._row = start
            self._run(ids)
            if is_on_policy:
                # The token before has been computed when its successor is decoded: its input is
                # taken from the first time, because the second knows no token before its successor.
                previous = {
                    layer: kept[start : start + ids.shape[1]].clone()
                    for layer, kept in buffer.previous.items()
                }
                runtime.predictor = _WindowPredictor(self._routers, self._base, previous)
                runtime.policy = Speculate(in_prefill=True)
                self._row = len(token_ids) + start
                self._run(ids)
            report(min(start + window, len(token_ids)))
        buffer.size = times * len(token_ids)
        return buffer

    def _run(self, ids: Tensor) -> None:
        self._pending: tuple[Tensor, Tensor] | None = None
        self._engine.forward(ids, self._engine.make_cache())

    def _see(self, buffer: FeatureBuffer, event: RoutingEvent) -> None:
        """Keep the truth about this layer, and estimate the next one's input."""
        spec = self._engine.spec
        if event.residual is None or event.residual.shape[-1] != spec.hidden_size:
            raise UnsupportedModelError(
                f"no estimator for {spec.architecture}: the stream before MoE layer {event.layer} "
                f"is not {spec.hidden_size} wide",
                hint='use predictor="auto", which takes what this model allows',
            )
        layer, router = event.layer, self._early[event.layer]
        if layer in self._experts and self._pending is not None:
            rows = slice(self._row, self._row + event.residual.shape[0])
            true = router.quasi_hidden(event.residual)
            answer = router.route(true)
            if answer is None or answer.logits is None:
                raise UnsupportedModelError(f"the router of MoE layer {layer} gives no logits")
            scores = self._routers[layer].rule.log_scores(answer.logits)
            buffer.hidden[layer][rows], plain = self._pending
            if buffer.plain:
                buffer.plain[layer][rows] = plain
            buffer.previous[layer][rows][1:] = true[:-1]
            buffer.target[layer][rows] = torch.softmax(scores, -1)
            buffer.index[layer][rows] = event.top_k_index
        self._pending = None
        if layer + 1 in self._experts:
            coming = self._early[layer + 1]
            self._pending = (
                coming.quasi_hidden(self._base.estimate(event)),
                coming.quasi_hidden(event.residual),
            )


class _WindowPredictor:
    """Guesses about all tokens of a window as if each were decoded."""

    name = "window"

    def __init__(
        self,
        routers: Mapping[int, CorrectedRouter],
        base: DefaultVectors,
        previous: Mapping[int, Tensor],
    ) -> None:
        self._routers = routers
        self._base = base
        self._previous = previous

    def predict(self, event: RoutingEvent) -> list[Prediction]:
        """Guess the next layer's routing, token by token."""
        layer = event.layer + 1
        if layer not in self._routers or event.residual is None:
            return []
        router = self._routers[layer]
        with torch.no_grad():
            hidden = router.router.quasi_hidden(self._base.estimate(event))
            output = router.ask(hidden, self._previous[layer])
        return [make_prediction(output, layer, 1, 0)]
