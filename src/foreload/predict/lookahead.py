"""Predict coming layers' routing from the residual stream of this one.

Training-free: the coming layer's own norm and router are asked early. `DefaultVectors` adds a
stand-in for the MoE output that has not been computed yet. Never changes what is computed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from foreload.predict.ranking import make_prediction

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from foreload.types import Prediction, RouterOutput, RoutingEvent

    EarlyRouter = Callable[[Tensor], RouterOutput | None]

__all__ = ["DefaultVectors", "Lookahead", "default_vector_estimate"]


class Lookahead:
    """Asks the routers of the next layers with this layer's residual.

    The true router input of layer l+1 is norm(residual + MoE output of l + attention of l+1). Only
    the residual is known this early.

    Args:
        routers: Per MoE layer, a callable from a residual (..., H) to the layer's routing: the
            model's own norm and router.
        max_distance: How many MoE layers ahead to guess.
        num_extra: Experts to name beyond the layer's top_k (one token) or demand (several).

    Cost:
        Per guess 2*T*H*E FLOP and H*E*itemsize bytes of router weight.

    Reference:
        Madan et al. 2026, "Speculating Experts Accelerates Inference for Mixture-of-Experts",
        arXiv:2603.19289.
    """

    name = "lookahead"

    def __init__(
        self, routers: Sequence[EarlyRouter], *, max_distance: int = 1, num_extra: int = 0
    ) -> None:
        self._routers = routers
        self._max_distance = max_distance
        self._num_extra = num_extra

    def predict(self, event: RoutingEvent, *, nearest: int = 1) -> list[Prediction]:
        """Guess the routing of the next `max_distance` layers, from the `nearest` on."""
        if event.residual is None or nearest > self._max_distance:
            return []
        stream = self.estimate(event)
        predictions = []
        for distance in range(nearest, self._max_distance + 1):
            layer = event.layer + distance
            if layer >= len(self._routers):
                break
            output = self._routers[layer](stream)
            if output is not None:
                predictions.append(make_prediction(output, layer, distance, self._num_extra))
        return predictions

    def name_experts(self, event: RoutingEvent) -> Tensor | None:
        """Name the next layer's likely experts, (T, K) int64, without waiting for the device.

        None where nothing can be said. Likeliest first, where the router gives weights.
        """
        output = self.route_next(event)
        if output is None:
            return None
        if output.top_k_weights is None:
            return output.top_k_index
        # Not every router sorts its choice.
        order = output.top_k_weights.argsort(-1, descending=True)
        return output.top_k_index.gather(-1, order)

    def route_next(self, event: RoutingEvent) -> RouterOutput | None:
        """Give the next layer's router's early answer, without waiting for the device.

        None where nothing can be said.
        """
        layer = event.layer + 1
        if event.residual is None or layer >= len(self._routers):
            return None
        return self._routers[layer](self.estimate(event))

    def estimate(self, event: RoutingEvent) -> Tensor:
        """Give the stream that stands for the coming layers' router input, (..., H)."""
        if event.residual is None:
            raise ValueError("no residual")
        return event.residual


class DefaultVectors(Lookahead):
    """Lookahead on the residual plus the weighted default vectors of the routed experts.

    Args:
        routers: As for `Lookahead`.
        default_vectors: Per MoE layer (E, H), the mean unweighted output of each expert, or None
            where none was measured.
        max_distance: How many MoE layers ahead to guess.
        num_extra: Experts to name beyond the demand.
    """

    name = "default-vectors"

    def __init__(
        self,
        routers: Sequence[EarlyRouter],
        default_vectors: Sequence[Tensor | None],
        *,
        max_distance: int = 1,
        num_extra: int = 0,
    ) -> None:
        super().__init__(routers, max_distance=max_distance, num_extra=num_extra)
        self._vectors = default_vectors

    def estimate(self, event: RoutingEvent) -> Tensor:
        """Give the residual with the stand-in for the MoE output added, (..., H)."""
        residual = super().estimate(event)
        vectors = self._vectors[event.layer]
        if vectors is None:
            return residual
        estimate = default_vector_estimate(*event.executed_routing, vectors)
        return residual + estimate.to(residual.dtype).view(residual.shape)


def default_vector_estimate(
    top_k_index: Tensor, top_k_weights: Tensor, default_vectors: Tensor
) -> Tensor:
    """Stand in for a layer's MoE output: the weighted default vectors of its experts.

    Args:
        top_k_index: (T, K) int64.
        top_k_weights: (T, K).
        default_vectors: (E, H).

    Returns:
        (T, H), in the default vectors' dtype.

    Reference:
        arXiv:2603.19289, d_l = sum over e of w_{l,e} d_{l,e}.
    """
    chosen = default_vectors[top_k_index]  # (T, K, H)
    weights = top_k_weights.to(default_vectors.dtype)
    return torch.einsum("tk,tkh->th", weights, chosen)
