"""Boil a model down to the numbers memory and scheduling decide by."""

from __future__ import annotations

from typing import TYPE_CHECKING

from foreload.model.sites import MoeSite, expert_parameters
from foreload.types import ExpertPlan, ModelSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from foreload.memory.checkpoint import CheckpointIndex
    from foreload.model.architecture import Architecture

__all__ = ["make_spec"]


def make_spec(
    architecture: Architecture,
    model: nn.Module,
    sites: Sequence[MoeSite],
    plans: Sequence[Sequence[ExpertPlan]],
    index: CheckpointIndex,
) -> ModelSpec:
    """Give the numbers about a model, whether loaded without experts or on the meta device."""
    experts = {id(tensor) for site in sites for tensor in expert_parameters(site.experts).values()}
    dense = sum(
        tensor.numel() * tensor.element_size()
        for tensor in (*model.parameters(), *model.buffers())
        if id(tensor) not in experts
    )
    sizes = [plan.num_bytes for layer in plans for plan in layer]
    return ModelSpec(
        architecture=architecture.model_class.__name__,
        model_type=architecture.model_type,
        num_moe_layers=len(sites),
        num_experts=max(site.num_experts for site in sites),
        top_k=max(site.top_k or 1 for site in sites),
        hidden_size=int(architecture.text_config.hidden_size),
        expert_bytes=max(sizes),
        total_expert_bytes=sum(sizes),
        dense_bytes=dense,
        dtype=str(architecture.dtype).removeprefix("torch."),
        identity=index.identity,
    )
