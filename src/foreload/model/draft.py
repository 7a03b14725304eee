"""The draft: the same model with quantised experts, all of them in memory.

Everything but the routed experts is the target's own: attention, routers, embeddings, KV cache.
This module decides nothing about how far to draft, and verifies nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from foreload.errors import ForeloadError
from foreload.ops.cpu import (
    LayerDraft,
    MatrixFormat,
    PackedMatrix,
    UnpackedMatrix,
    draft_forward,
    nibble_places,
    unpack,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["DraftExperts"]


class DraftExperts:
    """The quantised experts of every MoE layer.

    Args:
        layers: By MoE layer.
        kind: "int4" or "int8".
        num_bytes: Memory they take.
    """

    def __init__(self, layers: Sequence[LayerDraft], kind: str, num_bytes: int) -> None:
        self.kind = kind
        self.num_bytes = num_bytes
        self._layers = list(layers)

    def run_layer(
        self,
        layer: int,
        experts: Any,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
    ) -> Tensor:
        """Compute one MoE layer on the quantised experts; arguments as transformers gives them."""
        if not self._layers:
            raise ForeloadError("the draft is gone: its engine is closed", hint="open a new one")
        return draft_forward(
            self._layers[layer], experts, hidden_states, top_k_index, top_k_weights
        )

    def without_kernels(self) -> DraftExperts:
        """Copy with plain codes, dequantised at every use: what packed kernels save."""
        known: dict[MatrixFormat, Tensor] = {}

        def bare(matrices: Sequence[PackedMatrix | UnpackedMatrix]) -> list[UnpackedMatrix]:
            found = []
            for matrix in matrices:
                if isinstance(matrix, PackedMatrix):
                    shape = matrix.format
                    if shape.bits == 4 and shape not in known:
                        known[shape] = nibble_places(shape)
                    found.append(unpack(matrix, known.get(shape)))
            return found

        layers = [
            layer._replace(first=bare(layer.first), down=bare(layer.down)) for layer in self._layers
        ]
        return DraftExperts(layers, self.kind, self.num_bytes)

    def release(self) -> None:
        """Let go of the memory; it cannot run afterwards."""
        self._layers = []
        self.num_bytes = 0
