"""The draft of a model whose device decides: quantised experts, all of them on the device.

Everything but the routed experts is the target's own. They are quantised from the host tier when
the engine is opened, expert by expert and on the device, and are kept nowhere else. What drafting
reveals about the routing is kept on the device too, so that a draft's step asks nothing of the
host. Decides nothing about how far to draft, and verifies nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from foreload.ops.device_experts import ResidentExperts
from foreload.ops.device_layout import pack_expert, unpack_expert
from foreload.ops.device_tables import ABSENT

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from foreload.ops.device_experts import ExpertKernels
    from foreload.ops.device_layout import ExpertLayout
    from foreload.ops.reference import SumRule
    from foreload.types import Routing

__all__ = ["DeviceDraft", "quantise_experts"]


class DeviceDraft:
    """The quantised experts of every MoE layer, and where a round's drafted tokens were sent.

    Args:
        kind: "int4" or "int8".
        layouts: How the experts of each MoE layer lie in their blocks.
        blocks: (L, E, block bytes) uint8 on the device, as `quantise_experts` gives them.
        sum_rules: Per MoE layer, the element type its experts are summed in.
        most_tokens: Most tokens that a round drafts.
        top_k: Most experts of one token, K.
        kernels: What computes; the twins in plain torch by default.

    Attributes:
        num_bytes: Device memory the experts take.
    """

    def __init__(
        self,
        kind: str,
        layouts: Sequence[ExpertLayout],
        blocks: Tensor,
        *,
        sum_rules: Sequence[SumRule],
        most_tokens: int,
        top_k: int,
        kernels: ExpertKernels | None = None,
    ) -> None:
        self.kind = kind
        self.num_bytes = blocks.numel()
        self._experts = ResidentExperts(layouts, blocks, sum_rules=sum_rules, kernels=kernels)
        shape = (len(layouts), max(most_tokens, 1), top_k)
        self._index = torch.full(shape, ABSENT, dtype=torch.int64, device=blocks.device)
        self._position = torch.zeros(1, dtype=torch.int64, device=blocks.device)

    def run(self, layer: int, experts: Any, hidden_states: Tensor, routing: Routing) -> Tensor:
        """Compute one MoE layer on the quantised experts, (T, H)."""
        return self._experts.run(layer, experts, hidden_states, routing)

    def restart(self) -> None:
        """Forget where tokens were sent: another round begins. No host sync."""
        self._index.fill_(ABSENT)
        self._position.zero_()

    def note(self, layer: int, top_k_index: Tensor) -> Tensor:
        """Keep where the token being drafted was sent.

        Args:
            layer: MoE layer.
            top_k_index: (1, K) int64.

        Returns:
            (most tokens, K) int64, the layer's experts of the round's tokens so far, `ABSENT` in
            the rows of those to come. No host sync.
        """
        rows = self._index[layer, :, : top_k_index.shape[1]]
        rows.index_copy_(0, self._position, top_k_index)
        return rows

    def end_token(self) -> None:
        """Go on to the next drafted token. No host sync."""
        # Rounds of several threads may be mixed: their guesses get worse, and nothing else.
        self._position.add_(1).clamp_(max=self._index.shape[1] - 1)


def quantise_experts(
    host: Tensor,
    layouts: Sequence[ExpertLayout],
    draft_layouts: Sequence[ExpertLayout],
    num_experts: Sequence[int],
    device: torch.device,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Quantise every expert of the host tier into device memory, one at a time.

    Args:
        host: (L, E, block bytes) uint8, the host tier.
        layouts: Per MoE layer, how its experts lie there.
        draft_layouts: Per MoE layer, how they are to lie, quantised.
        num_experts: Experts of each layer, at most E.
        device: Where they are quantised, and stay.
        progress: Called with (done, total) bytes of the host tier.

    Returns:
        (L, E, draft block bytes) uint8 on the device.

    Cost:
        Each expert crosses the bus once; about 20 element-wise operations per weight.
    """
    size = max(layout.num_bytes for layout in draft_layouts)
    # As in slots: reading what was never written shows.
    blocks = torch.full((*host.shape[:2], size), 0xFF, dtype=torch.uint8, device=device)
    done, total = 0, sum(num_experts) * host.shape[2]
    for layer, number in enumerate(num_experts):
        for expert in range(number):
            weights = unpack_expert(layouts[layer], host[layer, expert].to(device))
            pack_expert(draft_layouts[layer], weights, blocks[layer, expert], search=True)
            done += host.shape[2]
            if progress is not None:
                progress(done, total)
    return blocks
