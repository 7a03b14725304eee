"""What happens at one MoE layer: route, demand, predict, prefetch, compute, sum.

Called by the model's forward through the experts interface. The true router has decided before
this is reached: predictions only move bytes earlier. Imports neither predictors nor transformers.
"""

from __future__ import annotations

import threading
import time
from contextlib import closing
from typing import TYPE_CHECKING, Any, NamedTuple

from foreload.ops.reference import accumulate, expert_forward, group_by_expert
from foreload.schedule.prefetch import GuessOdds, PrefetchSwitch
from foreload.types import ExpertKey, RoutingEvent

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from foreload.memory.tiers import Demand, ExpertTiers
    from foreload.metrics import Metrics, Timeline
    from foreload.ops.reference import ExpertGroup, SumRule
    from foreload.types import Prediction, Predictor

    Observer = Callable[[RoutingEvent, list[int]], None]
    OutputObserver = Callable[[int, int, Tensor], None]

__all__ = ["ExpertRuntime"]


class ExpertRuntime:
    """Runs the experts of every MoE layer from the tiers.

    Args:
        tiers: Where experts come from.
        metrics: Where steps and predictions are counted.
        timeline: Where computation is drawn.
        sum_rules: Per MoE layer, the element type its experts are summed in.
        predictor: Guesses coming layers, or None.
        max_prefetches: Most guessed experts queued or on their way at once: the byte cap.
        min_odds: Guesses less probable than this are not prefetched.
        switch: Turns prefetching off where it loses; None leaves it always on.
    """

    def __init__(
        self,
        tiers: ExpertTiers,
        metrics: Metrics,
        timeline: Timeline,
        *,
        sum_rules: Sequence[SumRule],
        predictor: Predictor | None,
        max_prefetches: int,
        min_odds: float = 0.5,
        switch: PrefetchSwitch | None = None,
    ) -> None:
        self.predictor = predictor
        self.on_routing: Observer | None = None
        self.on_output: OutputObserver | None = None
        self._tiers = tiers
        self._metrics = metrics
        self._timeline = timeline
        self._sum_rules = sum_rules
        self._num_layers = num_layers = len(sum_rules)
        self._max_prefetches = max_prefetches
        self._min_odds = min_odds
        self._switch = switch
        self._odds = GuessOdds()
        self._guesses: dict[int, list[_OpenGuess]] = {}
        self._residuals: dict[tuple[int, int], Tensor] = {}
        self._step_start_s: float | None = None
        self._last_layer = num_layers
        self._lock = threading.RLock()

    @property
    def is_prefetching(self) -> bool:
        """Tell whether guesses are being prefetched at the moment."""
        return self.predictor is not None and (self._switch is None or self._switch.is_on)

    def see_residual(self, layer: int, residual: Tensor) -> None:
        """Keep the residual stream that enters a layer's MoE block, for its prediction."""
        if self.predictor is not None:
            self._residuals[threading.get_ident(), layer] = residual

    def run_layer(
        self,
        layer: int,
        experts: Any,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
    ) -> Tensor:
        """Compute one MoE layer; the experts function that transformers calls.

        Args:
            layer: MoE layer.
            experts: transformers' experts module.
            hidden_states: (T, H).
            top_k_index: (T, K) int64, the true routing.
            top_k_weights: (T, K), final weights.

        Returns:
            (T, H), bit for bit what transformers' eager experts give on the CPU.

        Raises:
            TransferError: A copy failed; the engine stays usable.
        """
        with self._lock:
            num_tokens = hidden_states.shape[0]
            groups = group_by_expert(top_k_index, experts.num_experts)
            wanted = [group.expert for group in groups]
            self._begin_layer(layer, num_tokens)
            self._score_guesses(layer, wanted)
            counts = {group.expert: len(group.token) for group in groups}
            routing = top_k_index.tolist() if num_tokens > 1 else None
            self._tiers.observe(layer, counts, num_tokens, routing)
            residual = self._residuals.pop((threading.get_ident(), layer), None)
            event = RoutingEvent(
                self._metrics.num_steps - 1, layer, residual, top_k_index, top_k_weights
            )
            with closing(self._tiers.demand(layer, wanted)) as demand:
                if self.on_routing is not None:
                    self.on_routing(event, wanted)
                self._prefetch(event)
                outputs = self._compute(demand, experts, hidden_states, top_k_weights, groups)
            rule = self._sum_rules[layer]
            return accumulate(hidden_states, top_k_weights.dtype, groups, outputs, rule)

    def _compute(
        self,
        demand: Demand,
        experts: Any,
        hidden_states: Tensor,
        top_k_weights: Tensor,
        groups: list[ExpertGroup],
    ) -> dict[int, Tensor]:
        """Run each expert as soon as it is readable; give its weighted outputs (n, H)."""
        by_expert = {group.expert: group for group in groups}
        is_single = hidden_states.shape[0] == 1
        outputs: dict[int, Tensor] = {}
        for key, weights in demand:
            start = time.perf_counter()
            group = by_expert[key.expert]
            rows = hidden_states if is_single else hidden_states[group.token]
            output = expert_forward(experts, rows, weights)
            if self.on_output is not None:
                self.on_output(key.layer, key.expert, output)
            outputs[key.expert] = output * top_k_weights[group.token, group.position, None]
            self._timeline.add("compute", f"{key.layer}.{key.expert}", start, time.perf_counter())
        return outputs

    def _begin_layer(self, layer: int, num_tokens: int) -> None:
        """Notice the start of a forward, and time single-token ones for the switch."""
        if layer > self._last_layer:
            self._last_layer = layer
            return
        now = time.perf_counter()
        if self._step_start_s is not None and self._switch is not None:
            self._switch.record(now - self._step_start_s)
        self._step_start_s = now if num_tokens == 1 else None
        self._metrics.num_steps += 1
        self._last_layer = layer
        self._guesses = {at: old for at, old in self._guesses.items() if at <= layer}

    def _score_guesses(self, layer: int, wanted: list[int]) -> None:
        """Learn from what came true."""
        true = set(wanted)
        for guess, absent, is_single in self._guesses.pop(layer, ()):
            place = (layer, guess.distance)
            metrics = self._metrics
            right = true.intersection(guess.experts[: len(wanted)])
            metrics.num_predicted[place] = metrics.num_predicted.get(place, 0) + len(wanted)
            metrics.num_predicted_right[place] = metrics.num_predicted_right.get(place, 0) + len(
                right
            )
            for expert, confidence in absent:
                self._odds.learn(guess.distance, is_single, confidence, was_right=expert in true)

    def _prefetch(self, event: RoutingEvent) -> None:
        """Predict, and start the copies that are worth it: near layers and likely experts first."""
        if self.predictor is None or not self.is_prefetching:
            return
        is_single = event.top_k_index.shape[0] == 1
        room = self._max_prefetches - self._tiers.num_open_prefetches
        for guess in self.predictor.predict(event):
            absent = [
                (expert, confidence)
                for expert, confidence in zip(guess.experts, guess.confidence, strict=True)
                if self._tiers.is_absent(ExpertKey(guess.layer, expert))
            ]
            self._guesses.setdefault(guess.layer, []).append(_OpenGuess(guess, absent, is_single))
            for expert, confidence in absent:
                odds = self._odds.get(guess.distance, is_single, confidence)
                if room <= 0 or odds < self._min_odds:
                    break
                # Used with probability p per visit, an expert waits (1 - p) / p visits on average.
                wait = guess.distance / self._num_layers + (1 - odds) / odds
                order = self._metrics.num_steps * self._num_layers + guess.layer - odds
                room -= self._tiers.prefetch(
                    ExpertKey(guess.layer, expert), expected_wait=wait, order=order
                )


class _OpenGuess(NamedTuple):
    """A guess whose layer has not been reached, and what of it was absent when it was made."""

    guess: Prediction
    absent: list[tuple[int, float]]
    is_single: bool
