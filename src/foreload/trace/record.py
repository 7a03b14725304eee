"""Routing as it happened: which experts every layer of every forward demanded.

What replays, limits and simulations are computed from. Holds a trace in memory; the files are
`trace.files`' business. Torch-free.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from foreload.types import Prediction, RoutingEvent

__all__ = ["LayerVisit", "RoutingRecorder", "RoutingTrace", "TraceInfo", "VisitTimes"]


class VisitTimes(NamedTuple):
    """How long one layer took; the times of a forward's layers add up to the forward's.

    Attributes:
        dense_s: Everything but the two others: attention, norms, routers, predictions; with the
            first layer what comes before it, with the last what comes after.
        compute_s: Computing the layer's experts.
        stall_s: Waiting for copies.
    """

    dense_s: float
    compute_s: float
    stall_s: float


@dataclass(frozen=True, slots=True)
class LayerVisit:
    """One MoE layer of one forward.

    Attributes:
        experts: Distinct experts demanded, ascending.
        counts: Tokens that want each of them.
        num_tokens: Tokens in the forward.
        routing: The experts of each token, (T, K); may be empty for a single token.
        weights: Their routing weights, (T, K); empty where they were not recorded.
        predictions: What was predicted at this layer about coming ones.
        is_prefill: Whether the forward reads a prompt.
        times: How long it took; None where it was not measured.
    """

    experts: tuple[int, ...]
    counts: tuple[int, ...]
    num_tokens: int
    routing: tuple[tuple[int, ...], ...] = ()
    weights: tuple[tuple[float, ...], ...] = ()
    predictions: tuple[Prediction, ...] = ()
    is_prefill: bool = False
    times: VisitTimes | None = None

    @classmethod
    def from_routing(
        cls, routing: Sequence[Sequence[int]], num_experts: int, **fields: Any
    ) -> LayerVisit:
        """Make a visit from the experts of each token.

        Args:
            routing: (T, K); what is not below `num_experts` stands for no expert.
            num_experts: Experts of the layer.
            **fields: The other fields.
        """
        counts = Counter(expert for experts in routing for expert in experts)
        wanted = tuple(sorted(expert for expert in counts if expert < num_experts))
        return cls(
            wanted,
            tuple(counts[expert] for expert in wanted),
            len(routing),
            tuple(tuple(experts) for experts in routing),
            **fields,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceInfo:
    """What is known about the run a trace was recorded from.

    Attributes:
        model: The checkpoint, as it was named.
        identity: The checkpoint's identity; empty where it is not known.
        top_k: Experts per token and layer.
        expert_bytes: Bytes of one expert on disk, per MoE layer.
        predictor: Who made the predictions; "none" where there are none.
        dense_s: Seconds per MoE layer of a decoded token, experts and stalls left out.
        expert_s: Seconds to compute one expert for one token.
        bandwidth_bytes_s: What the copies of the recording were moved at.
    """

    model: str
    top_k: int
    expert_bytes: tuple[int, ...]
    identity: str = ""
    predictor: str = "none"
    dense_s: float | None = None
    expert_s: float | None = None
    bandwidth_bytes_s: float | None = None


@dataclass(slots=True)
class RoutingTrace:
    """The layer visits of consecutive forwards, `steps[step][layer]`."""

    num_layers: int
    num_experts: int
    steps: list[list[LayerVisit]] = field(default_factory=list)
    info: TraceInfo | None = None

    def demands(self) -> list[list[tuple[int, ...]]]:
        """Give the demanded experts alone, [step][layer]."""
        return [[visit.experts for visit in step] for step in self.steps]

    def is_prefill(self, step: int) -> bool:
        """Tell whether a step reads a prompt."""
        return self.steps[step][0].is_prefill

    def decode_part(self) -> RoutingTrace:
        """Give the trace without its prefills."""
        kept = [visits for visits in self.steps if not visits[0].is_prefill]
        return replace(self, steps=kept)


class RoutingRecorder:
    """Fills a trace from a runtime's `on_routing`, and predictions from its `on_predictions`.

    Args:
        num_layers: MoE layers.
        num_experts: Experts per layer.
        with_weights: Whether to keep the routing weights, and the routing of single tokens.
    """

    def __init__(self, num_layers: int, num_experts: int, *, with_weights: bool = False) -> None:
        self.trace = RoutingTrace(num_layers, num_experts)
        self.is_prefill = False
        self._with_weights = with_weights
        self._last_layer = num_layers

    def __call__(self, event: RoutingEvent, wanted: list[int]) -> None:
        """Record one layer visit."""
        if event.layer <= self._last_layer:
            self.trace.steps.append([])
        self._last_layer = event.layer
        executed = event.executed_routing
        visit = LayerVisit.from_routing(
            executed.top_k_index.tolist(), self.trace.num_experts, is_prefill=self.is_prefill
        )
        if self._with_weights:
            weights = tuple(tuple(row) for row in executed.top_k_weights.tolist())
            visit = replace(visit, weights=weights)
        elif visit.num_tokens == 1:
            visit = replace(visit, routing=())
        self.trace.steps[-1].append(visit)

    def see_predictions(self, event: RoutingEvent, predictions: Sequence[Prediction]) -> None:
        """Add what was predicted at the layer that was recorded last."""
        visits = self.trace.steps[-1]
        # The token-by-token guess is a tensor, and no trace needs it.
        names = tuple(prediction._replace(routing=None) for prediction in predictions)
        visits[-1] = replace(visits[-1], predictions=names)
