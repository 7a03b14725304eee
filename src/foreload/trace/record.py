"""Routing as it happened: which experts every layer of every forward demanded.

Kept in memory; what replays and limits are computed from.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from foreload.types import RoutingEvent

__all__ = ["LayerVisit", "RoutingRecorder", "RoutingTrace"]


@dataclass(frozen=True, slots=True)
class LayerVisit:
    """One MoE layer of one forward.

    Attributes:
        experts: Distinct experts demanded, ascending.
        counts: Tokens that want each of them.
        num_tokens: Tokens in the forward.
        routing: The experts of each token, (T, K); empty for a single token.
    """

    experts: tuple[int, ...]
    counts: tuple[int, ...]
    num_tokens: int
    routing: tuple[tuple[int, ...], ...] = ()


@dataclass(slots=True)
class RoutingTrace:
    """The layer visits of consecutive forwards, `steps[step][layer]`."""

    num_layers: int
    num_experts: int
    steps: list[list[LayerVisit]] = field(default_factory=list)

    def demands(self) -> list[list[tuple[int, ...]]]:
        """Give the demanded experts alone, [step][layer]."""
        return [[visit.experts for visit in step] for step in self.steps]


class RoutingRecorder:
    """Fills a trace from a runtime's `on_routing`."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.trace = RoutingTrace(num_layers, num_experts)
        self._last_layer = num_layers

    def __call__(self, event: RoutingEvent, wanted: list[int]) -> None:
        """Record one layer visit."""
        if event.layer <= self._last_layer:
            self.trace.steps.append([])
        self._last_layer = event.layer
        ids, counts = torch.unique(event.top_k_index, return_counts=True)
        by_id = dict(zip(ids.tolist(), counts.tolist(), strict=True))
        num_tokens = event.top_k_index.shape[0]
        routing = event.top_k_index.tolist() if num_tokens > 1 else ()
        visit = LayerVisit(
            tuple(wanted),
            tuple(by_id[expert] for expert in wanted),
            num_tokens,
            tuple(tuple(experts) for experts in routing),
        )
        self.trace.steps[-1].append(visit)
