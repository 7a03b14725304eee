"""A draft built and read in a test, and how far it is from the true experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from streaming import StreamedExperts

from foreload.model.draft_files import build_draft, read_draft
from foreload.model.draft_layout import DRAFT_BITS

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from foreload.model.draft import DraftExperts
    from foreload.model.hf import LoadedModel


KINDS = tuple(DRAFT_BITS)
# Of random weights, the worst there are; relative to the true experts' output.
MOST_ERROR = {"int4": 0.25, "int8": 0.03}


def build(loaded: LoadedModel, folder: Path, kind: str = "int4", **settings: Any) -> None:
    build_draft(loaded.sites, loaded.plans, loaded.spec.identity, folder, kind, **settings)


def read(loaded: LoadedModel, folder: Path, kind: str = "int4") -> DraftExperts:
    return read_draft(loaded.sites, loaded.plans, loaded.spec.identity, folder, kind)


def make_inputs(loaded: LoadedModel, layer: int, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Give hidden states and a routing that takes every expert in turn."""
    site = loaded.sites[layer]
    down = next(t for t in loaded.plans[layer][0].tensors if t.name == "down_proj")
    width = down.shape[1] if site.experts.is_transposed else down.shape[0]
    generator = torch.Generator().manual_seed(layer)
    hidden = torch.randn(num_tokens, width, generator=generator).to(loaded.model.dtype)
    index = torch.arange(2 * num_tokens).view(num_tokens, 2) % site.num_experts
    weights = 0.2 + torch.rand(num_tokens, 2, generator=generator)
    return hidden, index, weights.to(loaded.model.dtype)


def errors_of(loaded: LoadedModel, draft: DraftExperts, num_tokens: int) -> list[float]:
    """Give, per layer, the draft's distance from the true experts, as a share of their output."""
    run_true = StreamedExperts(loaded.plans)
    errors = []
    for site in loaded.sites:
        inputs = make_inputs(loaded, site.layer, num_tokens)
        with torch.no_grad():
            wanted = run_true(site.layer, site.experts, *inputs).float()
            found = draft.run_layer(site.layer, site.experts, *inputs)
        assert found.dtype == loaded.model.dtype
        errors.append(float((found.float() - wanted).norm() / wanted.norm()))
    return errors
