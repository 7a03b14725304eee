"""How one expert lies in one aligned block of bytes, in host memory and in a slot alike.

Pure description and plain torch. A block holds the first matrix (gate and up, or up alone), the
down matrix, and what belongs to them: scales and biases. Copying an expert is copying its block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch

from foreload.errors import ShapeError, UnsupportedModelError
from foreload.ops.quantise import Quantised, choose_group, dequantise, quantise

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

__all__ = [
    "ExpertLayout",
    "MatrixLayout",
    "StoredFormat",
    "expert_layout",
    "pack_expert",
    "store_expert",
    "stored_parts",
    "unpack_expert",
]

_PART_ALIGNMENT = 256
"""Bytes; any vector load of a kernel is aligned where a matrix begins on such a multiple."""
_BLOCK_ALIGNMENT = 4096
"""Bytes; direct reads and page-locked memory come in pages."""
_FP8_BLOCK = 128
_FP8_LARGEST = 448.0
_MXFP4_GROUP = 32
_MXFP4_BIAS = 127
_MXFP4_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


class StoredFormat(Enum):
    """How the elements of a matrix are stored.

    The quantised ones are stored row by row of outputs, whatever the module wants: INT8 and INT4
    with a bfloat16 scale per group of columns, FP8 with a float32 scale per block, MXFP4
    with a power of two per 32 columns. Two 4-bit codes share a byte, the even column low.
    """

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"
    INT8 = "int8"
    INT4 = "int4"
    FP8 = "fp8"
    MXFP4 = "mxfp4"

    @property
    def is_plain(self) -> bool:
        """Tell whether elements are floating-point numbers without scales."""
        return self in (StoredFormat.BFLOAT16, StoredFormat.FLOAT16, StoredFormat.FLOAT32)

    @property
    def is_packed(self) -> bool:
        """Tell whether two elements share a byte."""
        return self in (StoredFormat.INT4, StoredFormat.MXFP4)

    @property
    def code_dtype(self) -> torch.dtype:
        """Give the element type of the matrix as stored."""
        return {
            StoredFormat.BFLOAT16: torch.bfloat16,
            StoredFormat.FLOAT16: torch.float16,
            StoredFormat.FLOAT32: torch.float32,
            StoredFormat.INT8: torch.int8,
            StoredFormat.INT4: torch.uint8,
            StoredFormat.FP8: torch.float8_e4m3fn,
            StoredFormat.MXFP4: torch.uint8,
        }[self]

    @property
    def scale_dtype(self) -> torch.dtype | None:
        """Give the element type of the scales, None without scales."""
        return {
            StoredFormat.INT8: torch.bfloat16,
            StoredFormat.INT4: torch.bfloat16,
            StoredFormat.FP8: torch.float32,
            StoredFormat.MXFP4: torch.uint8,
        }.get(self)


@dataclass(frozen=True, slots=True)
class MatrixLayout:
    """One matrix of an expert in its block.

    Attributes:
        name: The parameter's name, such as `gate_up_proj`.
        num_rows: Outputs, N.
        num_columns: Inputs, K.
        stored: How elements are stored.
        is_transposed: Whether it is stored (K, N); quantised ones never are.
        num_parts: Matrices above each other that have scales of their own: 2 for gate and up.
        scale_rows: Rows that share a scale.
        scale_columns: Columns that share a scale.
        offset: First byte of the elements.
        scale_offset: First byte of the scales, -1 without.
        bias_offset: First byte of the bias, -1 without.
    """

    name: str
    num_rows: int
    num_columns: int
    stored: StoredFormat
    is_transposed: bool
    num_parts: int = 1
    scale_rows: int = 1
    scale_columns: int = 1
    offset: int = 0
    scale_offset: int = -1
    bias_offset: int = -1

    @property
    def code_shape(self) -> tuple[int, int]:
        """Give the shape of the elements as stored."""
        if self.is_transposed:
            return self.num_columns, self.num_rows
        return self.num_rows, self.num_columns // (2 if self.stored.is_packed else 1)

    @property
    def scale_shape(self) -> tuple[int, int]:
        """Give the shape of the scales."""
        part_rows = math.ceil(self.num_rows // self.num_parts / self.scale_rows)
        return self.num_parts * part_rows, math.ceil(self.num_columns / self.scale_columns)


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """One expert in its block.

    Attributes:
        hidden_size: H.
        intermediate_size: I.
        dtype: Element type that experts compute in, and of biases.
        has_gate: Whether the first matrix is gate and up.
        is_interleaved: Whether gate and up alternate row by row, rather than gate above up.
        is_transposed: Whether the module wants its matrices as (K, N).
        has_bias: Whether both matrices have biases.
        first: (2I, H) gated, (I, H) otherwise.
        down: (H, I).
        num_bytes: Bytes of a block, a multiple of 4,096.
    """

    hidden_size: int
    intermediate_size: int
    dtype: torch.dtype
    has_gate: bool
    is_interleaved: bool
    is_transposed: bool
    has_bias: bool
    first: MatrixLayout
    down: MatrixLayout
    num_bytes: int


def expert_layout(
    experts: Any,
    shapes: Mapping[str, tuple[int, ...]],
    stored: StoredFormat,
    *,
    dtype: torch.dtype,
    group: int | None = None,
    scale_block: tuple[int, int] = (_FP8_BLOCK, _FP8_BLOCK),
) -> ExpertLayout:
    """Lay one expert out.

    Args:
        experts: transformers' experts module: layout flags, no weights.
        shapes: Shape of each parameter without the experts dimension, as the module wants it.
        stored: How matrices are stored.
        dtype: Element type that experts compute in; of plain matrices it must be the stored one.
        group: Columns that share a scale, for INT8 and INT4, half as many where that is a whole row
            of INT4; by default the largest of 128, 64 and 32 that divides the columns.
        scale_block: Rows and columns that share a scale, for FP8.

    Raises:
        UnsupportedModelError: The expert cannot be laid out so.
        ShapeError: The parameters' shapes do not belong together.
    """
    if stored.is_plain and stored.code_dtype != dtype:
        raise UnsupportedModelError(
            f"experts that compute in {dtype} cannot be stored as {stored.value}",
            hint=f"convert them to {dtype}, or quantise them",
        )
    if not dtype.is_floating_point or dtype.itemsize not in (2, 4):
        raise UnsupportedModelError(f"experts cannot compute in {dtype} on a device")
    first_name = "gate_up_proj" if experts.has_gate else "up_proj"
    wanted = {first_name, "down_proj"}
    if experts.has_bias:
        wanted |= {f"{name}_bias" for name in wanted}
    if set(shapes) != wanted:
        raise UnsupportedModelError(
            f"experts have the parameters {sorted(shapes)}, and {sorted(wanted)} can be laid out"
        )
    is_transposed = bool(experts.is_transposed)
    rows, hidden = _matrix_shape(first_name, shapes[first_name], is_transposed)
    down_rows, intermediate = _matrix_shape("down_proj", shapes["down_proj"], is_transposed)
    if (down_rows, intermediate * (2 if experts.has_gate else 1)) != (hidden, rows):
        raise ShapeError(f"{first_name} {shapes[first_name]} and down_proj {shapes['down_proj']}")
    for name, length in ((first_name, rows), ("down_proj", hidden)):
        if experts.has_bias and shapes[f"{name}_bias"] != (length,):
            raise ShapeError(f"{name}_bias has the shape {shapes[f'{name}_bias']}, not ({length},)")
    is_interleaved = experts.has_gate and not experts.is_concatenated
    num_parts = 2 if experts.has_gate and not is_interleaved else 1
    at = 0
    matrices = []
    for name, shape, parts in (
        (first_name, (rows, hidden), num_parts),
        ("down_proj", (hidden, intermediate), 1),
    ):
        matrix = _matrix_layout(name, shape, stored, is_transposed, parts, group, scale_block)
        offset, at = at, at + _padded(math.prod(matrix.code_shape) * stored.code_dtype.itemsize)
        matrix = replace(matrix, offset=offset)
        if stored.scale_dtype is not None:
            matrix = replace(matrix, scale_offset=at)
            at += _padded(math.prod(matrix.scale_shape) * stored.scale_dtype.itemsize)
        if experts.has_bias:
            matrix = replace(matrix, bias_offset=at)
            at += _padded(matrix.num_rows * dtype.itemsize)
        matrices.append(matrix)
    return ExpertLayout(
        hidden,
        intermediate,
        dtype,
        bool(experts.has_gate),
        is_interleaved,
        is_transposed,
        bool(experts.has_bias),
        first=matrices[0],
        down=matrices[1],
        num_bytes=_padded(at, _BLOCK_ALIGNMENT),
    )


def stored_parts(layout: ExpertLayout, block: Tensor) -> dict[str, Tensor]:
    """View a block as what is stored in it.

    Args:
        layout: Its layout.
        block: (`layout.num_bytes`,) uint8, or more.

    Returns:
        By name: each matrix as stored, its `*_scales`, its `*_bias`. Writing to them writes to the
        block.
    """
    parts = {}
    for matrix in (layout.first, layout.down):
        stored = matrix.stored
        parts[matrix.name] = _view(block, matrix.offset, stored.code_dtype, matrix.code_shape)
        if stored.scale_dtype is not None:
            parts[f"{matrix.name}_scales"] = _view(
                block, matrix.scale_offset, stored.scale_dtype, matrix.scale_shape
            )
        if matrix.bias_offset >= 0:
            parts[f"{matrix.name}_bias"] = _view(
                block, matrix.bias_offset, layout.dtype, (matrix.num_rows,)
            )
    return parts


def store_expert(layout: ExpertLayout, parts: Mapping[str, Tensor], block: Tensor) -> None:
    """Write an expert to its block as it is stored, element by element.

    Args:
        layout: Its layout.
        parts: What `stored_parts` names, in the same shapes.
        block: (`layout.num_bytes`,) uint8.
    """
    for name, place in stored_parts(layout, block).items():
        place.copy_(parts[name])


def pack_expert(
    layout: ExpertLayout, weights: Mapping[str, Tensor], block: Tensor, *, search: bool = False
) -> None:
    """Write an expert's parameters to its block, quantised where the layout says so.

    Args:
        layout: Its layout.
        weights: The expert's parameters by name, as the module wants them.
        block: (`layout.num_bytes`,) uint8, on the same device.
        search: Whether INT8 and INT4 look for the best scales.

    Cost:
        That of `ops.quantise.quantise` for INT8 and INT4.
    """
    parts = stored_parts(layout, block)
    for matrix in (layout.first, layout.down):
        weight = weights[matrix.name]
        if matrix.stored.is_plain:
            parts[matrix.name].copy_(weight)
        else:
            rows = weight.t() if layout.is_transposed else weight
            codes, scales = _encode(matrix, rows.float(), search=search)
            parts[matrix.name].copy_(codes)
            parts[f"{matrix.name}_scales"].copy_(scales)
        if matrix.bias_offset >= 0:
            parts[f"{matrix.name}_bias"].copy_(weights[f"{matrix.name}_bias"])


def unpack_expert(layout: ExpertLayout, block: Tensor) -> dict[str, Tensor]:
    """Give an expert's parameters by name, as the module wants them and in its element type.

    Plain matrices and biases are views of the block; others are dequantised.
    """
    parts = stored_parts(layout, block)
    weights = {}
    for matrix in (layout.first, layout.down):
        weight = parts[matrix.name]
        if not matrix.stored.is_plain:
            weight = _decode(matrix, weight, parts[f"{matrix.name}_scales"]).to(layout.dtype)
            weight = weight.t().contiguous() if layout.is_transposed else weight
        weights[matrix.name] = weight
        if matrix.bias_offset >= 0:
            weights[f"{matrix.name}_bias"] = parts[f"{matrix.name}_bias"]
    return weights


def _matrix_shape(name: str, shape: tuple[int, ...], is_transposed: bool) -> tuple[int, int]:
    if len(shape) != 2 or min(shape) < 1:
        raise ShapeError(f"{name} has the shape {shape}, which is no matrix")
    return (shape[1], shape[0]) if is_transposed else (shape[0], shape[1])


def _matrix_layout(
    name: str,
    shape: tuple[int, int],
    stored: StoredFormat,
    is_transposed: bool,
    num_parts: int,
    group: int | None,
    scale_block: tuple[int, int],
) -> MatrixLayout:
    rows, columns = shape
    matrix = MatrixLayout(name, rows, columns, stored, is_transposed and stored.is_plain)
    if stored.is_plain:
        return matrix
    if stored is StoredFormat.FP8:
        block_rows, block_columns = scale_block
        if block_columns & (block_columns - 1):
            raise UnsupportedModelError(
                f"{name} shares scales among {block_columns} columns, which is no power of two"
            )
        return replace(
            matrix, num_parts=num_parts, scale_rows=block_rows, scale_columns=block_columns
        )
    size = _MXFP4_GROUP if stored is StoredFormat.MXFP4 else group or choose_group(columns)
    if stored is StoredFormat.INT4 and size == columns:
        # Compiled for an H200 by Triton 3.6, products of one token and such rows are wrong.
        size //= 2
    if columns % size or size < 2 or size & (size - 1):
        raise UnsupportedModelError(
            f"{name} has {columns} columns, which cannot be stored as {stored.value} in groups of "
            f"{size}: whole groups of a power of two are needed",
            hint="store these experts as bfloat16",
        )
    return replace(matrix, scale_columns=size)


def _padded(num_bytes: int, alignment: int = _PART_ALIGNMENT) -> int:
    return math.ceil(num_bytes / alignment) * alignment


def _view(block: Tensor, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    num_bytes = math.prod(shape) * dtype.itemsize
    return block[offset : offset + num_bytes].view(dtype).view(shape)


def _encode(matrix: MatrixLayout, rows: Tensor, *, search: bool) -> tuple[Tensor, Tensor]:
    """Give codes and scales of a matrix (N, K) float32, as stored."""
    if matrix.stored is StoredFormat.FP8:
        places = _scale_places(matrix)
        flat = torch.zeros(math.prod(matrix.scale_shape))
        largest = flat.scatter_reduce(0, places.flatten(), rows.abs().flatten(), "amax")
        scales = torch.where(largest == 0, 1.0, largest / _FP8_LARGEST)
        return (rows / scales[places]).to(torch.float8_e4m3fn), scales.view(matrix.scale_shape)
    if matrix.stored is StoredFormat.MXFP4:
        return _encode_mxfp4(rows)
    bits = 8 if matrix.stored is StoredFormat.INT8 else 4
    found = quantise(rows, bits=bits, group=matrix.scale_columns, search=search)
    return (found.codes if bits == 8 else _join_nibbles(found.codes + 8)), found.scales


def _decode(matrix: MatrixLayout, codes: Tensor, scales: Tensor) -> Tensor:
    """Give what codes and scales stand for, (N, K) float32."""
    match matrix.stored:
        case StoredFormat.FP8:
            return codes.float().mul_(_spread_scales(matrix, scales))
        case StoredFormat.MXFP4:
            magnitudes = torch.tensor(_MXFP4_MAGNITUDES, device=codes.device)
            values = torch.cat([magnitudes, -magnitudes])[_split_nibbles(codes).long()]
            powers = torch.pow(2.0, scales.double() - _MXFP4_BIAS)
            groups = values.view(len(values), -1, _MXFP4_GROUP)
            return (groups * powers[..., None]).flatten(1).float()
        case StoredFormat.INT4:
            codes = _split_nibbles(codes).to(torch.int8) - 8
    return dequantise(Quantised(codes, scales), matrix.scale_columns)


def _spread_scales(matrix: MatrixLayout, scales: Tensor) -> Tensor:
    """Give each element its scale, (N, K), where the scales are."""
    part_rows = matrix.num_rows // matrix.num_parts
    parts = scales.view(matrix.num_parts, -1, scales.shape[1])
    rows = parts.repeat_interleave(matrix.scale_rows, 1)[:, :part_rows].flatten(0, 1)
    return rows.repeat_interleave(matrix.scale_columns, 1)[:, : matrix.num_columns]


def _scale_places(matrix: MatrixLayout) -> Tensor:
    """Give the flat place of each element's scale, (N, K) int64."""
    part_rows = matrix.num_rows // matrix.num_parts
    row = torch.arange(matrix.num_rows)
    grid_rows, grid_columns = matrix.scale_shape
    grid_row = row // part_rows * (grid_rows // matrix.num_parts)
    grid_row += row % part_rows // matrix.scale_rows
    grid_column = torch.arange(matrix.num_columns) // matrix.scale_columns
    return grid_row[:, None] * grid_columns + grid_column


def _encode_mxfp4(rows: Tensor) -> tuple[Tensor, Tensor]:
    groups = rows.reshape(len(rows), -1, _MXFP4_GROUP)
    # The largest magnitude is 6 = 1.5 * 2 ** 2: two powers below the largest element.
    exponents = (torch.frexp(groups.abs().amax(-1)).exponent - 3).clamp(-126, 127)
    scaled = groups / torch.pow(2.0, exponents)[..., None]
    distances = (scaled.abs()[..., None] - torch.tensor(_MXFP4_MAGNITUDES)).abs()
    codes = distances.argmin(-1) + 8 * (scaled < 0)
    return _join_nibbles(codes.flatten(1)), (exponents + _MXFP4_BIAS).to(torch.uint8)


def _join_nibbles(codes: Tensor) -> Tensor:
    """Put columns 2j and 2j + 1 into the low and the high half of byte j."""
    return (codes[:, ::2].int() | codes[:, 1::2].int() << 4).to(torch.uint8)


def _split_nibbles(codes: Tensor) -> Tensor:
    return torch.stack((codes & 15, codes >> 4), -1).flatten(1)
