"""The parts of a model whose device decides about its experts, built and taken down together.

    checkpoint -> host arena -> slots on the device -> runtime at every MoE layer -> steps

The counterpart of tiers and runtime on the host. Decides nothing at run time.
"""

from __future__ import annotations

import functools
import logging
from contextlib import nullcontext
from typing import TYPE_CHECKING

from foreload.memory import cuda
from foreload.memory.expert_stream import ExpertStream
from foreload.memory.host_arena import HostArena
from foreload.model.device_plan import block_bytes, device_layouts
from foreload.model.device_runtime import DeviceRuntime
from foreload.model.graph import StepGraphs
from foreload.model.kv_cache import can_be_static, make_static_cache
from foreload.model.sites import silenced_experts
from foreload.ops.device_experts import DeviceExperts
from foreload.ops.device_layout import pack_expert

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    import torch

    from foreload.metrics import Metrics
    from foreload.model.device_runtime import NameExperts
    from foreload.model.graph import ForwardAll, StepGraph
    from foreload.model.hf import LoadedModel
    from foreload.ops.device_experts import ExpertKernels
    from foreload.ops.reference import SumRule

__all__ = ["DevicePath"]

logger = logging.getLogger(__name__)


class DevicePath:
    """Experts in host memory, slots on the device, and the steps that use them.

    Args:
        loaded: The model, on `device`.
        device: Where it computes.
        num_slots: Slots of every MoE layer.
        sum_rules: Per MoE layer, the element type its experts are summed in.
        forward: From token ids (1, T) and a KV cache to logits (T, V).
        metrics: Where steps and lookups are counted.
        name_experts: Names the next layer's likely experts without a host sync, or None.
        num_workers: Experts read from the checkpoint at once.
        limit_bytes: What the host tier may take.
        progress: Called with (done, total) bytes while the host tier is filled.

    Attributes:
        runtime: What happens at each MoE layer.
        num_slots: Experts that fit, over all layers.

    Raises:
        CapacityError: The experts do not fit into host memory.
        TransferError: The checkpoint could not be read.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        device: torch.device,
        *,
        num_slots: int,
        sum_rules: Sequence[SumRule],
        forward: ForwardAll,
        metrics: Metrics,
        name_experts: NameExperts | None = None,
        num_workers: int = 2,
        limit_bytes: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        spec = loaded.spec
        layouts = device_layouts(loaded)
        size = block_bytes(layouts)
        self._host = HostArena(spec.num_moe_layers, spec.num_experts, size, limit_bytes=limit_bytes)
        self._steps: StepGraphs | None = None
        try:
            self._host.fill(
                loaded.plans,
                lambda layer, weights, block: pack_expert(layouts[layer], weights, block),
                num_workers=num_workers,
                progress=progress,
                cpus=cuda.cpus_near(device),
            )
            if device.type == "cuda":
                self._host.page_lock()
            self._experts = DeviceExperts(
                layouts,
                self._host.blocks,
                num_slots=[num_slots] * spec.num_moe_layers,
                sum_rules=sum_rules,
                device=device,
                kernels=_make_kernels(device),
                max_prefetches=spec.top_k,
            )
            self.num_slots = num_slots * spec.num_moe_layers
            self.runtime = DeviceRuntime(
                self._experts,
                ExpertStream(self._host.blocks, device),
                layouts,
                sum_rules,
                block_bytes=size,
                metrics=metrics,
                device=device,
                name_experts=name_experts,
            )
            self._steps = self._make_steps(loaded, device, forward)
        except BaseException:
            self.release()
            raise

    @property
    def num_bytes(self) -> int:
        """Give the bytes of the device tier."""
        return self._experts.num_bytes

    def lend_step(self, num_positions: int) -> AbstractContextManager[StepGraph | None]:
        """Lend a step with an empty KV cache for so many tokens; None where there can be none."""
        return nullcontext() if self._steps is None else self._steps.lend(num_positions)

    def release(self) -> None:
        """Let go of steps and memory; may be called twice."""
        if self._steps is not None:
            self._steps.release()
        self._host.release()

    def _make_steps(
        self, loaded: LoadedModel, device: torch.device, forward: ForwardAll
    ) -> StepGraphs | None:
        model = loaded.model
        with silenced_experts(loaded.sites):
            is_static = can_be_static(model)
        if not is_static:
            logger.warning(
                "%s keeps more than keys and values between tokens: its steps are not captured",
                loaded.spec.architecture,
            )
            return None
        return StepGraphs(
            forward,
            functools.partial(make_static_cache, model),
            device,
            is_captured=device.type == "cuda",
            most_positions=loaded.generation.max_positions,
            on_broken=self.runtime.abandon,
        )


def _make_kernels(device: torch.device) -> ExpertKernels | None:
    """Give what computes on a device; None for the twins in plain torch.

    Raises:
        MissingExtraError: A CUDA device, and no triton.
    """
    if device.type != "cuda":
        return None
    # Triton is an extra, and nothing but a CUDA device needs it.
    from foreload.ops.triton import TritonKernels

    return TritonKernels()
