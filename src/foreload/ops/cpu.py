"""What makes quantised experts fast on a CPU: torch's packed int4 and int8 products.

The readable truth beside it is `ops.quantise.dequantise` and `ops.reference.expert_forward`.
Everything is computed in bfloat16: torch's kernels for other types are tens of times slower.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F

from foreload.ops.quantise import Quantised, choose_group, dequantise, quantise
from foreload.ops.reference import group_by_expert

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = [
    "LayerDraft",
    "MatrixFormat",
    "PackedMatrix",
    "UnpackedMatrix",
    "draft_forward",
    "matrix_format",
    "nibble_places",
    "pack",
    "unpack",
]

_ROWS, _COLUMNS = 16, 32
"""torch's packed kernels want rows and columns in multiples of these: matrices are padded."""


class MatrixFormat(NamedTuple):
    """How a matrix of a given shape is quantised and laid out.

    Attributes:
        bits: 4 or 8.
        num_rows: N.
        num_columns: K.
        group: Columns that share a scale: all of them with 8 bits.
    """

    bits: int
    num_rows: int
    num_columns: int
    group: int

    @property
    def padded_rows(self) -> int:
        """Give the rows as stored."""
        return math.ceil(self.num_rows / _ROWS) * _ROWS

    @property
    def padded_columns(self) -> int:
        """Give the columns as stored."""
        return math.ceil(self.num_columns / _COLUMNS) * _COLUMNS

    @property
    def weight_shape(self) -> tuple[int, int]:
        """Give the shape of the packed codes, bytes."""
        return self.padded_rows, self.padded_columns * self.bits // 8

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """Give the shape of the scales (with zeros beside them for 4 bits), bfloat16."""
        if self.bits == 8:
            return (self.padded_rows,)
        return self.padded_columns // self.group, self.padded_rows, 2

    @property
    def num_bytes(self) -> int:
        """Give the bytes of a matrix in this format."""
        return math.prod(self.weight_shape) + 2 * math.prod(self.scale_shape)


class PackedMatrix(NamedTuple):
    """A quantised matrix as torch's kernels want it; the layout depends on the processor."""

    format: MatrixFormat
    weight: Tensor
    scales: Tensor

    def __call__(self, rows: Tensor) -> Tensor:
        """Give rows (n, K) bfloat16 times the matrix, (n, N) bfloat16."""
        shape = self.format
        if shape.num_columns != shape.padded_columns:
            rows = F.pad(rows, (0, shape.padded_columns - shape.num_columns))
        if shape.bits == 4:
            product = torch.ops.aten._weight_int4pack_mm_for_cpu(
                rows, self.weight, shape.group, self.scales
            )
        else:
            product = torch.ops.aten._weight_int8pack_mm(rows, self.weight, self.scales)
        if shape.num_rows != shape.padded_rows:
            product = product[:, : shape.num_rows]
        result: Tensor = product
        return result


class UnpackedMatrix(NamedTuple):
    """A quantised matrix as codes and scales, dequantised for every product: no packed kernel."""

    format: MatrixFormat
    matrix: Quantised

    def __call__(self, rows: Tensor) -> Tensor:
        """Give rows (n, K) bfloat16 times the matrix, (n, N) bfloat16."""
        shape = self.format
        weight = dequantise(self.matrix, shape.group).to(rows.dtype)
        return F.linear(rows, weight[: shape.num_rows, : shape.num_columns])


class LayerDraft(NamedTuple):
    """The quantised experts of one MoE layer, by expert.

    Attributes:
        first: Gate and up projections, or the up projection alone.
        down: Down projections.
        first_bias: (E, N) or None.
        down_bias: (E, H) or None.
    """

    first: Sequence[PackedMatrix | UnpackedMatrix]
    down: Sequence[PackedMatrix | UnpackedMatrix]
    first_bias: Tensor | None = None
    down_bias: Tensor | None = None


def matrix_format(num_rows: int, num_columns: int, bits: int) -> MatrixFormat:
    """Choose the format of a matrix (N, K)."""
    padded = math.ceil(num_columns / _COLUMNS) * _COLUMNS
    return MatrixFormat(bits, num_rows, num_columns, padded if bits == 8 else choose_group(padded))


def pack(
    weight: Tensor, shape: MatrixFormat, *, importance: Tensor | None = None, search: bool = True
) -> PackedMatrix:
    """Quantise a matrix (N, K) and lay it out for this processor.

    Args:
        weight: (N, K) of any floating type.
        shape: Its format.
        importance: As for `ops.quantise.quantise`.
        search: As for `ops.quantise.quantise`.
    """
    missing = shape.padded_columns - shape.num_columns
    padded = F.pad(weight, (0, missing, 0, shape.padded_rows - shape.num_rows))
    if importance is not None:
        importance = F.pad(importance, (0, missing))
    # With 8 bits a search gains nothing that could be measured.
    search = search and shape.bits == 4
    found = quantise(
        padded, bits=shape.bits, group=shape.group, importance=importance, search=search
    )
    if shape.bits == 8:
        return PackedMatrix(shape, found.codes, found.scales[:, 0].contiguous())
    codes = (found.codes + 8).to(torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales = found.scales.t()
    return PackedMatrix(
        shape, packed, torch.stack((scales, torch.zeros_like(scales)), -1).contiguous()
    )


def nibble_places(shape: MatrixFormat) -> Tensor:
    """Give where each code of a packed int4 matrix lies, whatever the processor's layout.

    Returns:
        (rows * columns / 2, 2) int64: the flat places in (N, K) of the low and the high half of
        each packed byte.

    Cost:
        One packing per bit of the largest place.
    """
    num_rows, num_columns = shape.padded_rows, shape.padded_columns
    every = torch.arange(num_rows * num_columns, dtype=torch.int32).view(num_rows, num_columns)
    places = torch.zeros(num_rows * num_columns // 2, 2, dtype=torch.int64)
    for bit in range((num_rows * num_columns - 1).bit_length()):
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu((every >> bit) & 1, 1)
        halves = torch.stack((packed & 15, packed >> 4), -1).view(-1, 2)
        places |= halves.long() << bit
    return places


def unpack(matrix: PackedMatrix, places: Tensor | None) -> UnpackedMatrix:
    """Read codes and scales back from a packed matrix.

    Args:
        matrix: The packed matrix.
        places: `nibble_places` of its format; None for 8 bits.
    """
    shape = matrix.format
    if places is None:
        return UnpackedMatrix(shape, Quantised(matrix.weight, matrix.scales[:, None]))
    halves = torch.stack((matrix.weight & 15, matrix.weight >> 4), -1).view(-1, 2)
    codes = torch.empty(shape.padded_rows * shape.padded_columns, dtype=torch.int8)
    codes[places] = halves.to(torch.int8) - 8
    scales = matrix.scales[..., 0].t().contiguous()
    return UnpackedMatrix(
        shape, Quantised(codes.view(shape.padded_rows, shape.padded_columns), scales)
    )


def draft_forward(
    layer: LayerDraft,
    experts: Any,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """Run one MoE layer on quantised experts.

    Args:
        layer: The experts.
        experts: transformers' experts module: layout flags, gate and activation, no weights.
        hidden_states: (T, H).
        top_k_index: (T, K) int64; indices of E and above stand for no expert.
        top_k_weights: (T, K).

    Returns:
        (T, H) in the hidden states' dtype, summed in float32.

    Cost:
        Every active expert's codes are read once; one token makes 2 * K kernel calls and a handful
        of others.
    """
    if hidden_states.shape[0] == 1:
        return _forward_one(layer, experts, hidden_states, top_k_index, top_k_weights)
    total = torch.zeros_like(hidden_states, dtype=torch.float32)
    for group in group_by_expert(top_k_index, len(layer.first)):
        rows = hidden_states[group.token].to(torch.bfloat16)
        ids = torch.full_like(group.token, group.expert)
        hidden = _act(layer, experts, layer.first[group.expert](rows), ids, hidden_states.dtype)
        output = _finish(layer, experts, layer.down[group.expert](hidden), ids, hidden_states.dtype)
        weights = top_k_weights[group.token, group.position, None]
        total.index_add_(0, group.token, output.float() * weights.float())
    return total.to(hidden_states.dtype)


def _forward_one(
    layer: LayerDraft,
    experts: Any,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """Run one token: what is not a product is computed once for all of its experts."""
    dtype = hidden_states.dtype
    row = hidden_states.to(torch.bfloat16)
    chosen = top_k_index[0].tolist()
    num_experts = len(layer.first)
    if max(chosen) >= num_experts:
        is_real = top_k_index[0] < num_experts
        top_k_index, top_k_weights = top_k_index[:, is_real], top_k_weights[:, is_real]
        chosen = top_k_index[0].tolist()
        if not chosen:
            return torch.zeros_like(hidden_states)
    ids = top_k_index[0]
    firsts = torch.cat([layer.first[expert](row) for expert in chosen])  # (K, N)
    hidden = _act(layer, experts, firsts, ids, dtype)
    downs = [layer.down[expert](hidden[k : k + 1]) for k, expert in enumerate(chosen)]
    outputs = _finish(layer, experts, torch.cat(downs), ids, dtype)  # (K, H)
    return (top_k_weights.float() @ outputs.float()).to(dtype)


def _act(
    layer: LayerDraft, experts: Any, hidden: Tensor, ids: Tensor, dtype: torch.dtype
) -> Tensor:
    """Add the first bias, gate or activate, and give bfloat16 rows."""
    hidden = hidden.to(dtype)
    if layer.first_bias is not None:
        hidden = hidden + layer.first_bias[ids]
    hidden = experts._apply_gate(hidden) if experts.has_gate else experts.act_fn(hidden)
    return hidden.to(torch.bfloat16)


def _finish(
    layer: LayerDraft, experts: Any, outputs: Tensor, ids: Tensor, dtype: torch.dtype
) -> Tensor:
    outputs = outputs.to(dtype)
    if layer.down_bias is not None:
        outputs = outputs + layer.down_bias[ids]
    if getattr(experts, "has_post_expert_norm", False):
        outputs = experts.post_expert_norm(outputs)
    return outputs
