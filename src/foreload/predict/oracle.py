"""Replays a recorded trace as predictions: the upper bound of any predictor."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from foreload.types import Prediction

if TYPE_CHECKING:
    from collections.abc import Sequence

    from foreload.types import RoutingEvent

__all__ = ["Oracle"]


class Oracle:
    """Knows what a replayed forward will demand.

    Args:
        trace: Demanded experts, [step][layer], of the very forwards that are about to run.
        max_distance: How many MoE layers ahead to tell; crosses into the next forward.
        first_step: The engine's step count at which the replay begins.
    """

    name = "oracle"

    def __init__(
        self,
        trace: Sequence[Sequence[Sequence[int]]],
        *,
        max_distance: int = 2,
        first_step: int = 0,
    ) -> None:
        self._trace = trace
        self._max_distance = max_distance
        self._first_step = first_step

    def predict(self, event: RoutingEvent) -> list[Prediction]:
        """Read the coming layers off the trace."""
        predictions = []
        num_layers = len(self._trace[0])
        for distance in range(1, self._max_distance + 1):
            ahead, layer = divmod(event.layer + distance, num_layers)
            step = event.step - self._first_step + ahead
            if 0 <= step < len(self._trace):
                experts = tuple(self._trace[step][layer])
                sure = (math.inf,) * len(experts)
                predictions.append(Prediction(layer, distance, experts, sure, len(experts)))
        return predictions
