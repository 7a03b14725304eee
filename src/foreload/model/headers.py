"""Read from a checkpoint's headers what planning needs: its numbers, its plans, a token's work.

The model is built on the meta device; no tensor is read. Judges nothing about any machine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from foreload.cost import DecodeWork
from foreload.memory.arena import slot_bytes
from foreload.memory.checkpoint import CheckpointIndex
from foreload.model.architecture import (
    build_meta_model,
    find_sites,
    quiet_transformers,
    read_architecture,
)
from foreload.model.hf import strip_experts
from foreload.model.plans import plan_checkpoint
from foreload.model.sites import MoeSite, expert_parameters
from foreload.model.spec import make_spec

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch

    from foreload.types import ExpertPlan, ModelSpec

__all__ = ["ModelHeaders", "read_headers"]


@dataclass(frozen=True, slots=True)
class ModelHeaders:
    """A model known by its headers.

    Attributes:
        spec: The numbers about it.
        plans: How to read each expert, by layer and expert.
        work: What a decoded token reads and computes.
        experts: The first MoE layer's experts module on the CPU, without the experts' weights.
    """

    spec: ModelSpec
    plans: list[list[ExpertPlan]]
    work: DecodeWork
    experts: Any

    @property
    def slot_bytes(self) -> int:
        """Give the bytes of the slots an engine would make."""
        return max(slot_bytes(plan) for layer in self.plans for plan in layer)

    @property
    def num_experts(self) -> int:
        """Give how many experts the model has in all its layers."""
        return sum(len(layer) for layer in self.plans)


def read_headers(directory: str | Path, *, dtype: str | torch.dtype = "auto") -> ModelHeaders:
    """Read the headers of the checkpoint in `directory`.

    Args:
        directory: Folder of the checkpoint; its weights may be holes.
        dtype: Element type it would have in memory.

    Raises:
        CheckpointError: The checkpoint is damaged or incomplete.
        UnsupportedModelError: foreload cannot run it.
    """
    index = CheckpointIndex.open(directory)
    with quiet_transformers():
        architecture = read_architecture(index, dtype=dtype)
        model = build_meta_model(architecture)
        sites = find_sites(model, architecture)
        plans = plan_checkpoint(model, sites, index, architecture).experts
    spec = make_spec(architecture, model, sites, plans, index)
    work = _count_work(model, sites, plans, spec)
    strip_experts(model)
    return ModelHeaders(spec, plans, work, sites[0].experts.to_empty(device="cpu"))


def _count_work(
    model: Any, sites: Sequence[MoeSite], plans: Sequence[Sequence[ExpertPlan]], spec: ModelSpec
) -> DecodeWork:
    every = [plan for layer in plans for plan in layer]
    matrices = [t.shape for t in plans[0][0].tensors if len(t.shape) > 1]
    dense_bytes, dense_elements = _count_dense(model, sites)
    return DecodeWork(
        num_layers=spec.num_moe_layers,
        num_experts=spec.num_experts,
        top_k=spec.top_k,
        expert_bytes=sum(plan.num_bytes for plan in every) // len(every),
        stored_bytes=sum(plan.read_bytes for plan in every) // len(every),
        expert_flop=2 * sum(math.prod(shape) for shape in matrices),
        dense_bytes=dense_bytes,
        dense_flop=2 * dense_elements,
    )


def _count_dense(model: Any, sites: Sequence[MoeSite]) -> tuple[int, int]:
    """Give bytes and elements of what a token reads beside the experts.

    That is the decoder layers that hold experts, or stand in line with those that do, and the
    output embedding; of the input embedding it reads one row.
    """
    decoders = {id(site.decoder) for site in sites}
    lines = [
        line for line in model.modules() if any(id(child) in decoders for child in line.children())
    ]
    read = [tensor for line in lines for tensor in line.parameters()]
    output = model.get_output_embeddings()
    if output is not None:
        read.append(output.weight)
    experts = {id(tensor) for site in sites for tensor in expert_parameters(site.experts).values()}
    dense = {id(tensor): tensor for tensor in read if id(tensor) not in experts}.values()
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in dense)
    return num_bytes, sum(tensor.numel() for tensor in dense)
