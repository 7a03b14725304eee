"""The parts of a model whose device decides about its experts, built and taken down together.

    checkpoint -> host arena -> slots on the device -> runtime at every MoE layer -> steps

The counterpart of tiers and runtime on the host. Decides nothing at run time.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING

from foreload.errors import ForeloadError, UnsupportedModelError
from foreload.memory import cuda
from foreload.memory.expert_stream import ExpertStream
from foreload.memory.host_arena import HostArena
from foreload.model.device_draft import DeviceDraft, quantise_experts
from foreload.model.device_plan import (
    block_bytes,
    block_plans,
    device_layouts,
    draft_layouts,
    stream_blocks,
)
from foreload.model.device_policy import DevicePolicy
from foreload.model.device_prefill import DevicePrefill
from foreload.model.device_runtime import DeviceRuntime
from foreload.model.device_self_draft import DeviceSelfDraft
from foreload.model.graph import StepGraphs
from foreload.model.kv_cache import can_be_static, make_static_cache
from foreload.model.sites import silenced_experts
from foreload.model.slot_division import divide_slots
from foreload.ops.device_experts import MAX_TOKENS, DeviceExperts
from foreload.ops.device_layout import store_expert
from foreload.ops.grouped import TwinGrouped
from foreload.ops.present import choose_present
from foreload.schedule.governor import Governor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch

    from foreload.metrics import Metrics
    from foreload.model.device_policy import ChoosePresent
    from foreload.model.graph import ForwardAll, StepGraph
    from foreload.model.hf import LoadedModel
    from foreload.model.slot_division import SlotPlan
    from foreload.ops.device_experts import ExpertKernels
    from foreload.ops.grouped import GroupedKernels
    from foreload.ops.reference import SumRule
    from foreload.schedule.policy import ExecutionPolicy
    from foreload.types import TensorPredictor

__all__ = ["DevicePath", "make_kernels"]

logger = logging.getLogger(__name__)

_FILLERS = 8
"""Experts read at once while the host tier is filled, when nothing else is computed."""

_MOST_DRAFTED = 8
"""Tokens a round drafts at most, where the governor chooses."""


class DevicePath:
    """Experts in host memory, slots on the device, and the steps that use them.

    Args:
        loaded: The model, on `device`.
        device: Where it computes.
        slots: Slots of each MoE layer.
        sum_rules: Per MoE layer, the element type its experts are summed in.
        forward: From token ids (1, T) and a KV cache to logits (T, V).
        metrics: Where steps and lookups are counted.
        policy: Who decides what is executed.
        predictor: Guesses the next layer's routing, or None.
        context: Most tokens of a request, None where there is no limit.
        num_workers: Experts read from the checkpoint at once, at least.
        limit_bytes: What the host tier may take.
        progress: Called with (done, total) bytes while the host tier is filled.
        draft: Kind of the draft: "none", "int4" or "int8".
        num_draft_tokens: Tokens drafted per round; None lets the governor choose.
        draft_progress: Called with (done, total) bytes while experts are quantised.

    Attributes:
        policy: What is executed at each MoE layer.
        runtime: What happens there.
        slots: Slots of each MoE layer.
        drafter: Makes the rounds of speculative decoding; None without a draft.
        held: Lets go of threads and memory when it is closed; does not keep the model.

    Raises:
        CapacityError: The experts do not fit into host memory.
        UnsupportedModelError: There can be no draft: steps need a static KV cache.
        TransferError: The checkpoint could not be read.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        device: torch.device,
        *,
        slots: Sequence[int],
        sum_rules: Sequence[SumRule],
        forward: ForwardAll,
        metrics: Metrics,
        policy: ExecutionPolicy,
        predictor: TensorPredictor | None = None,
        context: int | None = None,
        num_workers: int = 2,
        limit_bytes: int | None = None,
        progress: Callable[[int, int], None] | None = None,
        draft: str = "none",
        num_draft_tokens: int | None = None,
        draft_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        spec = loaded.spec
        with silenced_experts(loaded.sites):
            is_static = can_be_static(loaded.model)
        if draft != "none" and not is_static:
            raise UnsupportedModelError(
                f"{spec.architecture} cannot verify a draft on a device: it keeps more than keys "
                "and values between tokens",
                hint="use draft='none'",
            )
        layouts = device_layouts(loaded)
        size = block_bytes(layouts)
        self._spec = spec
        self._device = device
        # A lock of its own: a request that ends waits for nobody's forward.
        self._counting = threading.Lock()
        self._num_requests = 0
        self._steps: StepGraphs | None = None
        self.drafter: DeviceSelfDraft | None = None
        self._host = HostArena(spec.num_moe_layers, spec.num_experts, size, limit_bytes=limit_bytes)
        with ExitStack() as held:
            held.callback(self._host.release)
            self._host.fill(
                block_plans(loaded, layouts),
                lambda layer, parts, block: store_expert(layouts[layer], parts, block),
                num_workers=max(num_workers, min(_FILLERS, os.cpu_count() or 1)),
                progress=progress,
                cpus=cuda.cpus_near(device),
            )
            if device.type == "cuda":
                self._host.page_lock(device)
            kernels = make_kernels(device)
            self._experts = DeviceExperts(
                layouts,
                self._host.blocks,
                num_slots=slots,
                sum_rules=sum_rules,
                device=device,
                kernels=kernels,
                max_prefetches=spec.top_k,
            )
            held.callback(self._experts.release)
            # Two buffers that long inputs stream their experts through.
            chunk = stream_blocks(spec.num_experts, size)
            stream = ExpertStream(self._host.blocks, device, chunk_blocks=chunk)
            held.callback(stream.release)
            # Where a forward was broken off a copy may still be on its way.
            held.callback(cuda.wait_idle, device)
            self.slots, self._num_slots = tuple(slots), sum(slots)
            rules = [site.scores for site in loaded.sites]
            self.policy = DevicePolicy(policy, device, rules, choose=_make_choice(device))
            grouped = _make_grouped_kernels(device)
            self.runtime = DeviceRuntime(
                self._experts,
                DevicePrefill(self._experts, stream, grouped, block_bytes=size, metrics=metrics),
                block_bytes=size,
                metrics=metrics,
                device=device,
                policy=self.policy,
                predictor=predictor,
            )
            if is_static:
                self._steps = StepGraphs(
                    forward,
                    functools.partial(make_static_cache, loaded.model),
                    device,
                    is_captured=device.type == "cuda",
                    most_positions=context,
                    on_broken=self.runtime.abandon,
                    turns=self.runtime.turns,
                )
            else:
                logger.warning(
                    "%s keeps more than keys and values between tokens: its steps are not captured",
                    spec.architecture,
                )
            if self._steps is not None and draft != "none":
                self.drafter = self._make_drafter(
                    loaded,
                    self._steps,
                    draft,
                    metrics,
                    forward,
                    num_draft_tokens=num_draft_tokens,
                    sum_rules=sum_rules,
                    kernels=kernels,
                    progress=draft_progress,
                )
            # From here on `release` lets go, the host tier last.
            self.held = held.pop_all()

    @property
    def num_bytes(self) -> int:
        """Give the bytes of the device tier, a draft included."""
        draft = None if self.drafter is None else self.drafter.draft
        return self._experts.num_bytes + (0 if draft is None else draft.num_bytes)

    @contextmanager
    def lend_step(self, num_positions: int) -> Iterator[StepGraph | None]:
        """Lend a step with an empty KV cache for so many tokens; None where there can be none."""
        with self._counting:
            self._num_requests += 1
        try:
            with nullcontext() if self._steps is None else self._steps.lend(num_positions) as step:
                yield step
        finally:
            with self._counting:
                self._num_requests -= 1

    def divide_slots(self, plan: SlotPlan) -> None:
        """Divide the slots anew over the layers, between requests; all experts leave them.

        Args:
            plan: As for `model.slot_division.divide_slots`.

        Raises:
            ForeloadError: A request is running.
            ConfigError: The plan is not for this model.
            TraceError: A trace cannot be read.
        """
        slots = divide_slots(plan, self._num_slots, self._spec)
        # Whoever begins a request meanwhile waits for the turn to be lent a step.
        with self.runtime.turns.taken():
            if self._num_requests:
                raise ForeloadError(
                    "slots cannot be divided anew while a request is running",
                    hint="let its stream end, or close it",
                )
            if self._steps is not None:
                self._steps.release()
            self.runtime.divide(slots)
            self.slots = slots

    def release(self) -> None:
        """Let go of steps and memory; may be called twice."""
        if self._steps is not None:
            self._steps.release()
        # Between two forwards of whoever is still running.
        with self.runtime.turns.taken():
            self.held.close()

    def _make_drafter(
        self,
        loaded: LoadedModel,
        steps: StepGraphs,
        kind: str,
        metrics: Metrics,
        forward: ForwardAll,
        *,
        num_draft_tokens: int | None,
        sum_rules: Sequence[SumRule],
        kernels: ExpertKernels | None,
        progress: Callable[[int, int], None] | None,
    ) -> DeviceSelfDraft:
        """Quantise the experts, and make what drafts and verifies."""
        if num_draft_tokens is not None and num_draft_tokens >= MAX_TOKENS:
            logger.warning(
                "a step has %d tokens at most: %d drafted ones are verified as a prompt is, which "
                "is slow; use num_draft_tokens=%d or less",
                MAX_TOKENS,
                num_draft_tokens,
                MAX_TOKENS - 1,
            )
        governor = Governor(most=_MOST_DRAFTED, pinned=num_draft_tokens)
        layouts = device_layouts(loaded)
        quantised = draft_layouts(loaded, layouts, kind)
        blocks = quantise_experts(
            self._host.blocks,
            layouts,
            quantised,
            [len(row) for row in loaded.plans],
            loaded.model.device,
            progress=progress,
        )
        draft = DeviceDraft(
            kind,
            quantised,
            blocks,
            sum_rules=sum_rules,
            most_tokens=governor.most,
            top_k=loaded.spec.top_k,
            kernels=kernels,
        )
        return DeviceSelfDraft(self.runtime, steps, metrics, governor, draft, forward)


def make_kernels(device: torch.device) -> ExpertKernels | None:
    """Give what computes on a device; None for the twins in plain torch.

    Raises:
        MissingExtraError: A CUDA device, and no triton.
    """
    if device.type != "cuda":
        return None
    # Triton is an extra, and nothing but a CUDA device needs it.
    from foreload.ops.triton import TritonKernels

    return TritonKernels()


def _make_choice(device: torch.device) -> ChoosePresent:
    """Give what chooses among experts that are in slots; the kernel needs what kernels need."""
    if device.type != "cuda":
        return choose_present
    from foreload.ops import triton_present

    return triton_present.choose_present


def _make_grouped_kernels(device: torch.device) -> GroupedKernels:
    """Give what computes long inputs on a device."""
    if device.type != "cuda":
        return TwinGrouped()
    from foreload.ops.triton_grouped import TritonGrouped

    return TritonGrouped()
