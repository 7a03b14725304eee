"""The draft of a model on a device whose experts come as the host decides: resident there, whole.

Quantised experts, made from the checkpoint when the engine is opened: each is read once, crosses
to the device, and is quantised there. They are kept in no folder. The counterpart of
`model.draft`, which maps experts packed for the processor; decides nothing and verifies nothing.
"""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Any

import torch

from foreload.errors import ForeloadError
from foreload.memory.cuda import on_device
from foreload.memory.expert_reader import read_experts
from foreload.model.device_path import make_kernels
from foreload.model.device_plan import block_bytes, device_layouts, draft_layouts
from foreload.ops.device_experts import ResidentExperts
from foreload.ops.device_layout import pack_expert
from foreload.types import Routing

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from foreload.model.hf import LoadedModel
    from foreload.ops.device_layout import ExpertLayout
    from foreload.ops.reference import SumRule

__all__ = ["ResidentDraft", "make_resident_draft"]


class ResidentDraft:
    """The quantised experts of every MoE layer, on the device of the model.

    Args:
        kind: "int4" or "int8".
        experts: What computes them.
        num_bytes: Device memory they take.
    """

    def __init__(self, kind: str, experts: ResidentExperts, num_bytes: int) -> None:
        self.kind = kind
        self.num_bytes = num_bytes
        self._experts: ResidentExperts | None = experts

    def run_layer(
        self,
        layer: int,
        experts: Any,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
    ) -> Tensor:
        """Compute one MoE layer on the quantised experts; arguments as transformers gives them."""
        if self._experts is None:
            raise ForeloadError("the draft is gone: its engine is closed", hint="open a new one")
        routing = Routing(top_k_index, top_k_weights)
        with on_device(hidden_states.device):
            return self._experts.run(layer, experts, hidden_states, routing)

    def release(self) -> None:
        """Let go of the memory; it cannot run afterwards."""
        self._experts = None
        self.num_bytes = 0


def make_resident_draft(
    loaded: LoadedModel,
    kind: str,
    device: torch.device,
    *,
    sum_rules: Sequence[SumRule],
    progress: Callable[[int, int], None] | None = None,
) -> ResidentDraft:
    """Quantise every expert of the checkpoint into device memory.

    Args:
        loaded: The model.
        kind: "int4" or "int8".
        device: Where the model is.
        sum_rules: Per MoE layer, the element type its experts are summed in.
        progress: Called with (done, total) bytes of experts.

    Raises:
        MissingExtraError: A CUDA device, and no triton.
        UnsupportedModelError: These experts cannot be laid out quantised.
        TransferError: An expert cannot be read.

    Cost:
        Reads every expert once; beside the draft host memory for two experts, and device memory
        for one and what quantising it takes.
    """
    kernels = make_kernels(device)
    layouts = draft_layouts(loaded, device_layouts(loaded), kind)
    shape = (len(layouts), loaded.spec.num_experts, block_bytes(layouts))
    # As in slots: reading what was never written shows.
    blocks = torch.full(shape, 0xFF, dtype=torch.uint8, device=device)
    _quantise(loaded, layouts, blocks, progress)
    experts = ResidentExperts(layouts, blocks, sum_rules=sum_rules, kernels=kernels)
    return ResidentDraft(kind, experts, blocks.numel())


def _quantise(
    loaded: LoadedModel,
    layouts: Sequence[ExpertLayout],
    blocks: Tensor,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Read, quantise and keep one expert after the other."""
    order = [
        (layer, expert) for layer, row in enumerate(loaded.plans) for expert in range(len(row))
    ]
    plans = [loaded.plans[layer][expert] for layer, expert in order]
    done, total = 0, sum(plan.read_bytes for plan in plans)
    with closing(read_experts(plans)) as read:
        for (layer, expert), plan, tensors in zip(order, plans, read, strict=True):
            weights = {name: value.to(blocks.device) for name, value in tensors.items()}
            pack_expert(layouts[layer], weights, blocks[layer, expert], search=True)
            done += plan.read_bytes
            if progress is not None:
                progress(done, total)
