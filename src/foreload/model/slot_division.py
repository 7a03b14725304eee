"""Turns the setting `slot_plan` into slots of each MoE layer, before anything is allocated."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from foreload.config import read_slots
from foreload.errors import ConfigError
from foreload.trace.layer_slots import check_trace, plan_from_trace
from foreload.trace.read import read_trace
from foreload.trace.record import RoutingTrace

if TYPE_CHECKING:
    from collections.abc import Sequence

    from foreload.types import ModelSpec

    SlotPlan = str | Path | Sequence[int] | RoutingTrace

__all__ = ["divide_slots"]


def divide_slots(plan: SlotPlan, num_slots: int, spec: ModelSpec) -> tuple[int, ...]:
    """Divide slots over the MoE layers.

    Args:
        plan: "equal", a trace of this model or its path, or the slots of each layer.
        num_slots: Slots to divide, one for each layer at least.
        spec: The model's numbers.

    Returns:
        Slots of each layer, `num_slots` in all at most.

    Raises:
        ConfigError: The trace is of another model, or the layers' slots make no sense for this one.
        TraceError: The trace cannot be read.
    """
    num_layers = spec.num_moe_layers
    if isinstance(plan, str) and plan == "equal":
        return (min(num_slots // num_layers, spec.num_experts),) * num_layers
    if not isinstance(plan, str | Path | RoutingTrace):
        slots = read_slots(plan)
        _check_slots(slots, num_slots, spec)
        return slots
    trace = plan if isinstance(plan, RoutingTrace) else read_trace(plan)
    check_trace(trace, spec)
    # Below a token's own experts the curves of a trace say nothing.
    return plan_from_trace(trace, num_slots, least=min(spec.top_k, num_slots // num_layers))


def _check_slots(slots: Sequence[int], num_slots: int, spec: ModelSpec) -> None:
    if len(slots) != spec.num_moe_layers:
        raise ConfigError(
            f"slot_plan has slots for {len(slots)} MoE layers, the model has {spec.num_moe_layers}"
        )
    for layer, number in enumerate(slots):
        if not 1 <= number <= spec.num_experts:
            raise ConfigError(
                f"slot_plan gives layer {layer} {number} slots; it needs 1 to {spec.num_experts}"
            )
    if sum(slots) > num_slots:
        raise ConfigError(
            f"slot_plan gives {sum(slots)} slots, and there is memory for {num_slots}",
            hint="raise expert_memory",
        )
