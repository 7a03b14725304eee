"""Describe a checkpoint from its headers and configuration, without reading a tensor.

Backs `foreload inspect`: what the model is, how its experts are stored, what they cost to read,
and whether foreload can run it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from foreload.errors import UnsupportedModelError
from foreload.memory.checkpoint import CheckpointIndex, read_json
from foreload.model.architecture import (
    Architecture,
    build_meta_model,
    find_sites,
    quiet_transformers,
    read_architecture,
)
from foreload.model.plans import CheckpointPlan, plan_checkpoint
from foreload.model.spec import make_spec

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import nn

    from foreload.model.sites import MoeSite

__all__ = ["CheckpointReport", "describe"]


@dataclass(frozen=True, slots=True)
class CheckpointReport:
    """What `describe` found out; None where the model is not supported and it stayed unknown.

    Attributes:
        architecture: transformers' class name.
        model_type: transformers' short name.
        supported: Whether foreload can run it.
        reason: Why not, or empty.
        hint: What would work instead, or empty.
        identity: Hex digest of configuration and headers.
        checkpoint_bytes: Bytes of all tensors on disk.
        num_files: Number of safetensors files.
        quantization: `fp8`, `mxfp4` or None.
        dtype: Element type of the weights in memory.
        num_layers: Decoder layers.
        num_moe_layers: Decoder layers with experts.
        num_experts: Experts per layer.
        top_k: Experts per token and layer.
        has_shared_experts: Whether some experts see every token; they count as dense.
        hidden_size: Width of the residual stream.
        intermediate_size: Width inside an expert.
        layout: `per-expert` files, `packed` in one tensor per layer, or `mixed`.
        is_direct: Whether experts are read without a conversion.
        spans_per_expert: Separate reads for one expert, at most.
        stored_expert_bytes: Bytes of the largest expert on disk.
        expert_bytes: Bytes of the largest expert in memory.
        stored_experts_bytes: Bytes of all experts on disk.
        total_expert_bytes: Bytes of all experts in memory.
        dense_bytes: Bytes of everything else in memory.
        token_bytes: Bytes read from disk for each token if nothing were cached.
    """

    architecture: str
    model_type: str
    supported: bool
    reason: str
    hint: str
    identity: str
    checkpoint_bytes: int
    num_files: int
    quantization: str | None = None
    dtype: str | None = None
    num_layers: int | None = None
    num_moe_layers: int | None = None
    num_experts: int | None = None
    top_k: int | None = None
    has_shared_experts: bool | None = None
    hidden_size: int | None = None
    intermediate_size: int | None = None
    layout: str | None = None
    is_direct: bool | None = None
    spans_per_expert: int | None = None
    stored_expert_bytes: int | None = None
    expert_bytes: int | None = None
    stored_experts_bytes: int | None = None
    total_expert_bytes: int | None = None
    dense_bytes: int | None = None
    token_bytes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Give the report as plain values, ready for JSON."""
        return dataclasses.asdict(self)


def describe(directory: str | Path, *, dtype: str | torch.dtype = "auto") -> CheckpointReport:
    """Tell what the checkpoint in `directory` is and what its experts cost.

    Args:
        directory: Folder of the checkpoint.
        dtype: Element type it would have in memory.

    Returns:
        A report; a model foreload refuses is reported with the reason, not raised.

    Raises:
        CheckpointError: The checkpoint is damaged or incomplete.

    Cost:
        Headers and `config.json` are read, and the model is built on the meta device: seconds
        for the largest checkpoints.
    """
    index = CheckpointIndex.open(directory)
    raw = read_json(index.directory / "config.json")
    names = raw.get("architectures")
    known: dict[str, Any] = {
        "architecture": str(names[0]) if isinstance(names, list) and names else "unknown",
        "model_type": str(raw.get("model_type", "unknown")),
        "identity": index.identity,
        "checkpoint_bytes": index.total_bytes,
        "num_files": len(index.files),
    }
    try:
        with quiet_transformers():
            architecture = read_architecture(index, dtype=dtype)
            model = build_meta_model(architecture)
            sites = find_sites(model, architecture)
            plan = plan_checkpoint(model, sites, index, architecture)
    except UnsupportedModelError as error:
        return CheckpointReport(**known, supported=False, reason=str(error), hint=error.hint or "")
    known |= _measure(architecture, model, sites, plan, index)
    return CheckpointReport(**known, supported=True, reason="", hint="")


def _measure(
    architecture: Architecture,
    model: nn.Module,
    sites: list[MoeSite],
    plan: CheckpointPlan,
    index: CheckpointIndex,
) -> dict[str, Any]:
    spec = make_spec(architecture, model, sites, plan.experts, index)
    stored = [expert.read_bytes for layer in plan.experts for expert in layer]
    experts: Any = sites[0].experts
    down_shape = experts.down_proj.shape[1:]
    return {
        "architecture": spec.architecture,
        "model_type": spec.model_type,
        "quantization": architecture.quantization,
        "dtype": spec.dtype,
        "num_layers": int(architecture.text_config.num_hidden_layers),
        "num_moe_layers": spec.num_moe_layers,
        "num_experts": spec.num_experts,
        "top_k": spec.top_k,
        "has_shared_experts": any("shared" in name for name, _ in sites[0].decoder.named_modules()),
        "hidden_size": spec.hidden_size,
        "intermediate_size": int(down_shape[0 if experts.is_transposed else 1]),
        "layout": plan.layout,
        "is_direct": plan.is_direct,
        "spans_per_expert": max(len(e.spans) for layer in plan.experts for e in layer),
        "stored_expert_bytes": max(stored),
        "expert_bytes": spec.expert_bytes,
        "stored_experts_bytes": sum(stored),
        "total_expert_bytes": spec.total_expert_bytes,
        "dense_bytes": spec.dense_bytes,
        "token_bytes": sum(
            (site.top_k or 1) * max(expert.read_bytes for expert in layer)
            for site, layer in zip(sites, plan.experts, strict=True)
        ),
    }
