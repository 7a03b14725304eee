"""What happens at one MoE layer: decide, demand, predict, prefetch, compute, sum.

Called by the model's forward through the experts interface. The true router has answered before
this is reached; only a policy that was asked for executes anything else, predictions otherwise
only move bytes earlier. Imports neither predictors nor transformers.
"""

from __future__ import annotations

import sys
import threading
import time
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

from foreload.ops.reference import accumulate, expert_forward, group_by_expert
from foreload.schedule.policy import Exact, Speculate, SpeculateWhen
from foreload.schedule.prefetch import Prefetcher
from foreload.types import ExpertKey, Routing, RoutingEvent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from foreload.memory.tiers import Demand, ExpertTiers
    from foreload.metrics import Metrics, Timeline
    from foreload.ops.reference import ExpertGroup, SumRule
    from foreload.ops.scores import LayerScores
    from foreload.schedule.orchestrator import PrefetchRound
    from foreload.schedule.policy import ExecutionPolicy
    from foreload.schedule.prefetch import PrefetchSwitch
    from foreload.types import Prediction, Predictor

    RunDraft = Callable[[int, Any, Tensor, Tensor, Tensor], Tensor]
    Observer = Callable[[RoutingEvent, list[int]], None]
    OutputObserver = Callable[[int, int, Tensor], None]
    PredictionObserver = Callable[[RoutingEvent, list[Prediction]], None]

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

    Attributes:
        policy: Who decides what is executed; may be changed between forwards.
        score_rules: Per MoE layer, how its router makes weights, None where that is not known;
            empty until a policy needs it.
        on_routing: Told of every layer visit and the distinct experts that are executed.
        on_output: Told every expert's output before its weights.
        on_predictions: Told what was predicted at a layer.
        lock: Held while the tiers are touched: forwards of several threads take turns.
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
        self.policy: ExecutionPolicy = Exact()
        self.score_rules: Sequence[LayerScores | None] = ()
        self.on_routing: Observer | None = None
        self.on_output: OutputObserver | None = None
        self.on_predictions: PredictionObserver | None = None
        self._tiers = tiers
        self._metrics = metrics
        self._timeline = timeline
        self._sum_rules = sum_rules
        self._switch = switch
        self._prefetcher = Prefetcher(
            tiers,
            metrics,
            num_layers=len(sum_rules),
            max_prefetches=max_prefetches,
            min_odds=min_odds,
        )
        # By thread: forwards of several threads may take turns layer by layer.
        self._guessed: dict[int, tuple[int, Routing]] = {}
        self._residuals: dict[tuple[int, int], Tensor] = {}
        self._logits: dict[tuple[int, int], Tensor] = {}
        self._prefilling: set[int] = set()
        self._drafting: dict[int, tuple[RunDraft, PrefetchRound]] = {}
        self._verifying: dict[int, PrefetchRound] = {}
        self._step_start_s: float | None = None
        self._last_layer = len(sum_rules)
        self.lock = threading.RLock()

    @property
    def is_prefetching(self) -> bool:
        """Tell whether guesses are being prefetched at the moment."""
        if self.predictor is None:
            return False
        # Other policies execute what was prefetched: without it they are faster, and worse.
        if self._switch is None or not isinstance(self.policy, Exact):
            return True
        return self._switch.is_on

    def limit_prefetches(self, max_prefetches: int) -> None:
        """Set how many guessed experts may be queued or on their way at once."""
        self._prefetcher.max_prefetches = max_prefetches

    @contextmanager
    def prefilling(self) -> Iterator[None]:
        """Take this thread's forwards for parts of a prompt, single tokens too."""
        thread = threading.get_ident()
        self._prefilling.add(thread)
        # Between two requests nobody computes: the last step of the one before is not timed.
        self._step_start_s = None
        try:
            yield
        finally:
            self._prefilling.discard(thread)

    @contextmanager
    def drafting(self, run: RunDraft, prefetches: PrefetchRound) -> Iterator[None]:
        """Let `run` compute the experts of this thread's forwards, and keep where it was sent."""
        thread = threading.get_ident()
        self._drafting[thread] = (run, prefetches)
        try:
            yield
        finally:
            del self._drafting[thread]

    @contextmanager
    def verifying(self, prefetches: PrefetchRound) -> Iterator[None]:
        """Take this thread's forwards for the verification of what was drafted."""
        thread = threading.get_ident()
        self._verifying[thread] = prefetches
        try:
            yield
        finally:
            del self._verifying[thread]

    def see_residual(self, layer: int, residual: Tensor) -> None:
        """Keep the residual stream that enters a layer's MoE block, for its prediction."""
        if self.predictor is not None and threading.get_ident() not in self._drafting:
            self._residuals[threading.get_ident(), layer] = residual

    def see_logits(self, layer: int, logits: Tensor) -> None:
        """Keep a router's logits, (T, E), for a policy that chooses among other experts."""
        self._logits[threading.get_ident(), layer] = logits

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
            (T, H); under the exact policy bit for bit what transformers' eager experts give on the
            CPU.

        Raises:
            TransferError: A copy failed; the engine stays usable.
        """
        drafting = self._drafting.get(threading.get_ident())
        if drafting is not None:
            return self._run_draft(
                drafting, layer, experts, hidden_states, top_k_index, top_k_weights
            )
        with self.lock:
            num_tokens = hidden_states.shape[0]
            self._begin_layer(layer, num_tokens)
            true = Routing(top_k_index, top_k_weights)
            executed = self._decide(layer, true, experts.num_experts)
            groups = group_by_expert(executed.top_k_index, experts.num_experts)
            wanted = [group.expert for group in groups]
            routed = wanted
            if executed is not true:
                routed = [g.expert for g in group_by_expert(top_k_index, experts.num_experts)]
            self._prefetcher.score(layer, routed)
            self._count(true, executed)
            counts = {group.expert: len(group.token) for group in groups}
            routing = executed.top_k_index.tolist() if num_tokens > 1 else None
            self._tiers.observe(layer, counts, num_tokens, routing)
            residual = self._residuals.pop((threading.get_ident(), layer), None)
            event = RoutingEvent(
                self._metrics.num_steps - 1,
                layer,
                residual,
                top_k_index,
                top_k_weights,
                None if executed is true else executed,
            )
            with closing(self._tiers.demand(layer, wanted)) as demand:
                if self.on_routing is not None:
                    self.on_routing(event, wanted)
                verifying = self._verifying.get(threading.get_ident())
                if verifying is not None:
                    verifying.reach(layer)
                self._predict(event)
                outputs = self._compute(
                    demand, experts, hidden_states, executed.top_k_weights, groups
                )
            rule = self._sum_rules[layer]
            return accumulate(hidden_states, top_k_weights.dtype, groups, outputs, rule)

    def _run_draft(
        self,
        drafting: tuple[RunDraft, PrefetchRound],
        layer: int,
        experts: Any,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
    ) -> Tensor:
        """Compute one MoE layer of the draft, once the target's experts have begun to come."""
        run, prefetches = drafting
        with self.lock:
            # A single-token step that drafting interrupts is not timed: where it ended is unknown.
            self._step_start_s = None
            self._tiers.poll()
            wanted = [expert for expert in top_k_index[-1].tolist() if expert < experts.num_experts]
            prefetches.note(layer, wanted, top_k_weights[-1].tolist())
        start = time.perf_counter()
        output = run(layer, experts, hidden_states, top_k_index, top_k_weights)
        self._timeline.add("draft", f"{layer}", start, time.perf_counter())
        return output

    def _policy_applies(self, num_tokens: int) -> bool:
        """Tell whether this thread's forward may execute something else than the true routing."""
        is_prefill = threading.get_ident() in self._prefilling
        return self.policy.applies(num_tokens, is_prefill=is_prefill)

    def _decide(self, layer: int, true: Routing, num_experts: int) -> Routing:
        """Give the routing to execute; `true` itself where the true router decides."""
        thread = threading.get_ident()
        logits = self._logits.pop((thread, layer), None)
        guess = self._guessed.pop(thread, None)
        num_tokens = true.top_k_index.shape[0]
        policy = self.policy
        if not self._policy_applies(num_tokens):
            return true
        if isinstance(policy, Speculate):
            if guess is None or guess[0] != layer or guess[1].top_k_index.shape[0] != num_tokens:
                return true
            index, weights = guess[1]
            return Routing(index, weights.to(true.top_k_weights.dtype))
        if isinstance(policy, SpeculateWhen):
            return self._choose_present(policy, layer, true, logits, num_experts)
        return true

    def _choose_present(
        self,
        policy: SpeculateWhen,
        layer: int,
        true: Routing,
        logits: Tensor | None,
        num_experts: int,
    ) -> Routing:
        """Replace light experts that are missing by the best that are in memory."""
        tiers = self._tiers
        tiers.poll()

        def is_here(expert: int) -> bool:
            # Placeholders stand for no expert: nothing is waited for.
            return expert >= num_experts or tiers.is_arriving(ExpertKey(layer, expert))

        experts, weights = true.top_k_index[0].tolist(), true.top_k_weights[0].tolist()
        dropped = policy.drop(experts, weights, is_here)
        if not dropped:
            return true
        kept = [(e, w) for e, w in zip(experts, weights, strict=True) if e not in dropped]
        rule = self.score_rules[layer] if self.score_rules else None
        if rule is not None and logits is not None and logits.shape == (1, num_experts):
            scores = rule.scores(logits[0])
            # In the router's own unit: the weight its heaviest kept expert got.
            real = [pair for pair in kept if pair[0] < num_experts]
            heaviest, weight = max(real, key=lambda pair: pair[1], default=(0, 0.0))
            unit = weight / max(scores[heaviest], sys.float_info.min)
            others = policy.substitute(
                experts, len(dropped), scores, lambda e: tiers.is_ready(ExpertKey(layer, e))
            )
            if unit > 0:
                kept += [(expert, scores[expert] * unit) for expert in others]
        if rule is None or rule.is_normalised:
            share = sum(weights) / sum(weight for _, weight in kept)
            kept = [(expert, weight * share) for expert, weight in kept]
        index = true.top_k_index.new_tensor([[expert for expert, _ in kept]])
        return Routing(index, true.top_k_weights.new_tensor([[weight for _, weight in kept]]))

    def _count(self, true: Routing, executed: Routing) -> None:
        """Count pairs of token and expert, and those of the true router that are not executed."""
        self._metrics.num_executed += true.top_k_index.numel()
        if executed is not true:
            same = true.top_k_index[:, :, None] == executed.top_k_index[:, None, :]
            self._metrics.num_speculated += int((~same.any(-1)).sum())

    def _predict(self, event: RoutingEvent) -> None:
        """Predict coming layers, and start the copies that are worth it."""
        if self.predictor is None or not self.is_prefetching:
            return
        num_tokens = event.top_k_index.shape[0]
        guesses = self.predictor.predict(event)
        if self.on_predictions is not None:
            self.on_predictions(event, guesses)
        is_single = num_tokens == 1
        if isinstance(self.policy, Speculate) and self._policy_applies(num_tokens):
            guesses = self._commit(event.layer + 1, guesses, is_single=is_single)
        self._prefetcher.prefetch(guesses, is_single=is_single)

    def _commit(
        self, layer: int, guesses: list[Prediction], *, is_single: bool
    ) -> list[Prediction]:
        """Settle what the next layer will execute; give the other guesses."""
        for number, guess in enumerate(guesses):
            if guess.layer == layer and guess.routing is not None:
                self._guessed[threading.get_ident()] = (layer, guess.routing)
                executed = guess.experts[: guess.num_expected]
                self._prefetcher.commit(guess, executed, is_single=is_single)
                return guesses[:number] + guesses[number + 1 :]
        return guesses

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
        is_timed = num_tokens == 1 and isinstance(self.policy, Exact)
        self._step_start_s = now if is_timed else None
        self._metrics.num_steps += 1
        self._last_layer = layer
        self._prefetcher.begin_step(layer)
