"""How the quantised experts of a draft lie in their bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from foreload.ops.cpu import LayerDraft, MatrixFormat, PackedMatrix, matrix_format, pack

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from foreload.model.sites import MoeSite
    from foreload.types import ExpertPlan, ExpertTensor

    Plans = Sequence[Sequence[ExpertPlan]]

__all__ = [
    "DRAFT_BITS",
    "DraftLayout",
    "draft_bytes",
    "draft_layouts",
    "pack_expert",
    "quantise_expert",
]

DRAFT_BITS: Mapping[str, int] = {"int4": 4, "int8": 8}
"""Bits per weight of each kind of draft."""

_ALIGNMENT = 64


class _Part(NamedTuple):
    """A tensor inside the bytes of one expert."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    position: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class DraftLayout:
    """How the experts of one layer lie in the draft.

    Attributes:
        first: Format of gate and up projections.
        down: Format of down projections.
        parts: The tensors of one expert, in order.
        num_bytes: Bytes of one expert.
    """

    first: MatrixFormat
    down: MatrixFormat
    parts: tuple[_Part, ...]
    num_bytes: int

    def views(self, raw: Tensor) -> dict[str, Tensor]:
        """View the bytes of one expert as its tensors."""
        views = {}
        for part in self.parts:
            piece = raw[part.position : part.position + part.num_bytes]
            views[part.name] = piece.view(part.dtype).view(part.shape)
        return views

    def matrix(self, raw: Tensor, name: str) -> PackedMatrix:
        """View a projection, "first" or "down", in the bytes of one expert."""
        views = self.views(raw)
        return PackedMatrix(getattr(self, name), views[f"{name}.weight"], views[f"{name}.scales"])

    def layer(self, raws: Sequence[Tensor]) -> LayerDraft:
        """View the bytes of a layer's experts as what can be computed with."""
        return LayerDraft(
            [self.matrix(raw, "first") for raw in raws],
            [self.matrix(raw, "down") for raw in raws],
            self._biases(raws, "first"),
            self._biases(raws, "down"),
        )

    def _biases(self, raws: Sequence[Tensor], name: str) -> Tensor | None:
        if all(part.name != f"{name}.bias" for part in self.parts):
            return None
        return torch.stack([self.views(raw)[f"{name}.bias"] for raw in raws])


def draft_bytes(sites: Sequence[MoeSite], plans: Plans, kind: str) -> int:
    """Give the memory a draft will take, from shapes alone."""
    layouts = draft_layouts(sites, plans, kind)
    return sum(layout.num_bytes * len(row) for layout, row in zip(layouts, plans, strict=True))


def draft_layouts(sites: Sequence[MoeSite], plans: Plans, kind: str) -> list[DraftLayout]:
    """Lay out every MoE layer's experts.

    Args:
        sites: The model's MoE layers.
        plans: How to read each expert.
        kind: "int4" or "int8".
    """
    bits = DRAFT_BITS[kind]
    return [
        _layer_layout(site.experts, layer[0], bits)
        for site, layer in zip(sites, plans, strict=True)
    ]


def quantise_expert(
    layout: DraftLayout,
    experts: Any,
    tensors: Mapping[str, Tensor],
    *,
    importance: Callable[[str], Tensor | None] = lambda matrix: None,
    search: bool = True,
) -> Tensor:
    """Quantise one expert into the bytes of a draft.

    Args:
        layout: How its layer lies in the draft.
        experts: The module of transformers that the expert is one of.
        tensors: Its parameters by name.
        importance: Gives, by matrix ("first" or "down"), how much errors in each input column
            count; None counts all alike.
        search: Whether to search for the best scales.

    Returns:
        (layout.num_bytes,) uint8.
    """
    raw = torch.zeros(layout.num_bytes, dtype=torch.uint8)
    views = layout.views(raw)
    for name, shape in (("first", layout.first), ("down", layout.down)):
        matrix = pack(
            _matrix(tensors, experts, name), shape, importance=importance(name), search=search
        )
        views[f"{name}.weight"].copy_(matrix.weight)
        views[f"{name}.scales"].copy_(matrix.scales)
        if f"{name}.bias" in views:
            views[f"{name}.bias"].copy_(tensors[_bias_name(experts, name)])
    return raw


def pack_expert(
    experts: Any, plan: ExpertPlan, tensors: Mapping[str, Tensor], bits: int
) -> LayerDraft:
    """Quantise one expert, as a layer of one: to see what it takes."""
    layout = _layer_layout(experts, plan, bits)
    return layout.layer([quantise_expert(layout, experts, tensors, search=False)])


def _layer_layout(experts: Any, plan: ExpertPlan, bits: int) -> DraftLayout:
    tensors = {tensor.name: tensor for tensor in plan.tensors}
    first = _shape_of(tensors[_first_name(experts)], experts, bits)
    down = _shape_of(tensors["down_proj"], experts, bits)
    wanted: list[tuple[str, tuple[int, ...], torch.dtype]] = []
    for name, shape in (("first", first), ("down", down)):
        kind = torch.uint8 if bits == 4 else torch.int8
        wanted.append((f"{name}.weight", shape.weight_shape, kind))
        wanted.append((f"{name}.scales", shape.scale_shape, torch.bfloat16))
        bias = tensors.get(_bias_name(experts, name)) if experts.has_bias else None
        if bias is not None:
            wanted.append((f"{name}.bias", bias.shape, torch.bfloat16))
    parts, at = [], 0
    for part_name, part_shape, dtype in wanted:
        part = _Part(part_name, tuple(part_shape), dtype, at)
        parts.append(part)
        at += math.ceil(part.num_bytes / _ALIGNMENT) * _ALIGNMENT
    return DraftLayout(first, down, tuple(parts), at)


def _first_name(experts: Any) -> str:
    return "gate_up_proj" if experts.has_gate else "up_proj"


def _bias_name(experts: Any, matrix: str) -> str:
    return f"{_first_name(experts) if matrix == 'first' else 'down_proj'}_bias"


def _shape_of(tensor: ExpertTensor, experts: Any, bits: int) -> MatrixFormat:
    num_rows, num_columns = tensor.shape
    if experts.is_transposed:
        num_rows, num_columns = num_columns, num_rows
    return matrix_format(num_rows, num_columns, bits)


def _matrix(tensors: Mapping[str, Tensor], experts: Any, matrix: str) -> Tensor:
    """Give a projection as (N, K), whichever way the model multiplies with it."""
    weight = tensors[_first_name(experts) if matrix == "first" else "down_proj"]
    return weight.t() if experts.is_transposed else weight
