"""Dequantise one expert fast: the same numbers as transformers' operations, in a fraction of time.

Each class is a guess at what a chain of operations computes, made from the shapes and types of its
sources alone. `model.recipes` uses a guess only after it gave the same bits as the chain itself on
noise, so a guess that is wrong costs nothing but speed.

Measured on one core, 2026-11-21: a 50 MB expert of gpt-oss-20b takes 24 ms instead of 228 ms, a
9 MB expert of Qwen3-30B-A3B-FP8 takes 4 ms instead of 16 ms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from foreload.ops.device_layout import StoredFormat

if TYPE_CHECKING:
    from collections.abc import Sequence

    from foreload.model.recipes import Source

__all__ = ["BlockFp8", "Dequantiser", "PackedFp4", "guess_dequantiser"]

# rows dequantised at a time; keeps the scratch inside the caches of the processor
ROWS_PER_STEP = 256
_FP4_BLOCK = 32
_LARGEST_EXPONENT = 255
_FP4_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def guess_dequantiser(
    sources: Sequence[Source],
    patterns: Sequence[str],
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> Dequantiser | None:
    """Guess how `sources` become one parameter, or give None.

    Args:
        sources: What is read, in the order of the parts.
        patterns: Names of the sources in the order transformers joins them.
        shape: Shape of the parameter.
        dtype: Element type of the parameter.
    """
    return PackedFp4.guess(sources, shape, dtype) or BlockFp8.guess(sources, patterns, shape, dtype)


@dataclass(frozen=True, slots=True)
class PackedFp4:
    """MXFP4: two four-bit numbers in a byte, 32 numbers to a scale, the result transposed.

    Attributes:
        blocks: Number of the source that holds the numbers, (O, G, 16) bytes.
        scales: Number of the source that holds the exponents, (O, G) bytes.
        shape: (32 G, O).
        pairs: The two bfloat16 a byte stands for, side by side in an int32.
        powers: The bfloat16 scale an exponent stands for.
        stored: Format of what `codes` gives.
        is_transposed: Whether codes lie the other way round than the parameter.
        scale_block: Rows and columns of codes that share a scale.
    """

    stored: ClassVar = StoredFormat.MXFP4
    is_transposed: ClassVar = True
    scale_block: ClassVar = (1, _FP4_BLOCK)

    blocks: int
    scales: int
    shape: tuple[int, int]
    pairs: Tensor
    powers: Tensor

    @classmethod
    def guess(
        cls, sources: Sequence[Source], shape: tuple[int, ...], dtype: torch.dtype
    ) -> PackedFp4 | None:
        """Give the dequantiser where the sources look like MXFP4."""
        if len(sources) != 2 or len(shape) != 2 or dtype != torch.bfloat16:
            return None
        sizes = [source.num_bytes for source in sources]
        numbers = shape[0] * shape[1]
        if any(source.dtype != torch.uint8 for source in sources) or shape[0] % _FP4_BLOCK:
            return None
        if sorted(sizes) != sorted((numbers // 2, numbers // _FP4_BLOCK)):
            return None
        byte = torch.arange(256)
        values = torch.tensor(_FP4_MAGNITUDES, dtype=torch.bfloat16)
        values = torch.cat([values, -values])
        pairs = torch.stack([values[byte & 15], values[byte >> 4]], 1).view(torch.int32)
        # two to the power of 128 is no bfloat16, so the last exponent is applied in two steps
        exponents = byte.clamp(max=_LARGEST_EXPONENT - 1) - 127
        powers = torch.pow(2.0, exponents.double()).to(torch.bfloat16)
        blocks = sizes.index(numbers // 2)
        return cls(blocks, 1 - blocks, (shape[0], shape[1]), pairs.flatten(), powers)

    def __call__(self, parts: Sequence[Tensor]) -> Tensor:
        """Make the parameter from one uint8 tensor per source."""
        columns, rows = self.shape
        blocks = parts[self.blocks].view(rows, columns // 2)
        scales = parts[self.scales].view(rows, columns // _FP4_BLOCK)
        result = torch.empty(self.shape, dtype=torch.bfloat16)
        for begin in range(0, rows, ROWS_PER_STEP):
            some = blocks[begin : begin + ROWS_PER_STEP]
            values = torch.index_select(self.pairs, 0, some.reshape(-1).int())
            exponents = scales[begin : begin + ROWS_PER_STEP].reshape(-1)
            powers = torch.index_select(self.powers, 0, exponents.int())
            scaled = values.view(torch.bfloat16).view(-1, _FP4_BLOCK).mul_(powers[:, None])
            too_large = exponents == _LARGEST_EXPONENT
            if too_large.any():
                scaled[too_large] *= 2
            result[:, begin : begin + ROWS_PER_STEP] = scaled.view(len(some), columns).t()
        return result

    def codes(self, parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Give what is stored, codes (O, 16 G) and scales (O, G), both uint8."""
        columns, rows = self.shape
        blocks = parts[self.blocks].view(rows, columns // 2)
        return blocks, parts[self.scales].view(rows, columns // _FP4_BLOCK)


@dataclass(frozen=True, slots=True)
class _Matrix:
    """One FP8 matrix of (rows, columns) with a grid of (scale_rows, scale_columns) scales."""

    weight: int
    scale: int
    rows: int
    columns: int
    scale_rows: int
    scale_columns: int
    scale_dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class BlockFp8:
    """Block-FP8 matrices, each with a grid of scales, one below the other.

    Attributes:
        matrices: The matrices from top to bottom.
        shape: (rows of all matrices, columns).
        dtype: Element type of the result.
        values: The float32 a byte stands for.
        stored: Format of what `codes` gives.
        is_transposed: Whether codes lie the other way round than the parameter.
    """

    stored: ClassVar = StoredFormat.FP8
    is_transposed: ClassVar = False

    matrices: tuple[_Matrix, ...]
    shape: tuple[int, int]
    dtype: torch.dtype
    values: Tensor

    @classmethod
    def guess(
        cls,
        sources: Sequence[Source],
        patterns: Sequence[str],
        shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> BlockFp8 | None:
        """Give the dequantiser where the sources look like block-FP8."""
        places = {source.pattern: number for number, source in enumerate(sources)}
        matrices = []
        for pattern in patterns:
            # transformers 5.17 ends its patterns with an anchor
            scales = pattern.removesuffix("$") + "_scale_inv"
            scales += "$" * pattern.endswith("$")
            if pattern not in places or scales not in places:
                continue
            weight, scale = places[pattern], places[scales]
            height, width = sources[weight].shape[-2:]
            grid = sources[scale].shape[-2:]
            if len(grid) != 2 or 0 in grid or height % grid[0] or width % grid[1]:
                return None
            matrices.append(_Matrix(weight, scale, height, width, *grid, sources[scale].dtype))
        if not matrices or len(shape) != 2 or 2 * len(matrices) != len(sources):
            return None
        kinds = {sources[matrix.weight].dtype for matrix in matrices}
        total = sum(matrix.rows for matrix in matrices)
        if kinds != {torch.float8_e4m3fn} or shape != (total, matrices[0].columns):
            return None
        if not all(matrix.scale_dtype.is_floating_point for matrix in matrices):
            return None
        byte = torch.arange(256, dtype=torch.uint8)
        values = byte.view(torch.float8_e4m3fn).float()
        return cls(tuple(matrices), (total, matrices[0].columns), dtype, values)

    def __call__(self, parts: Sequence[Tensor]) -> Tensor:
        """Make the parameter from one uint8 tensor per source."""
        result = torch.empty(self.shape, dtype=self.dtype)
        top = 0
        for matrix in self.matrices:
            grid = self._grid(matrix, parts)[:, None, :, None]
            numbers = parts[matrix.weight].int()
            whole = torch.index_select(self.values, 0, numbers).view(
                matrix.scale_rows,
                matrix.rows // matrix.scale_rows,
                matrix.scale_columns,
                matrix.columns // matrix.scale_columns,
            )
            result[top : top + matrix.rows] = whole.mul_(grid).view(matrix.rows, matrix.columns)
            top += matrix.rows
        return result

    @property
    def scale_block(self) -> tuple[int, int]:
        """Give the rows and columns that share a scale, of the first matrix."""
        first = self.matrices[0]
        return first.rows // first.scale_rows, first.columns // first.scale_columns

    def codes(self, parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Give what is stored, codes (N, K) float8 and scales (grid rows, grid columns) float32."""
        numbers = [
            parts[matrix.weight].view(torch.float8_e4m3fn).view(matrix.rows, matrix.columns)
            for matrix in self.matrices
        ]
        return torch.cat(numbers), torch.cat(
            [self._grid(matrix, parts) for matrix in self.matrices]
        )

    def _grid(self, matrix: _Matrix, parts: Sequence[Tensor]) -> Tensor:
        """Give a matrix' scales as float32."""
        scale = parts[matrix.scale]
        # torch refuses to see bytes as wider elements from an odd offset
        if scale.storage_offset() % matrix.scale_dtype.itemsize:
            scale = scale.clone()
        return scale.view(matrix.scale_dtype).float().view(matrix.scale_rows, matrix.scale_columns)


Dequantiser = PackedFp4 | BlockFp8
"""What makes a parameter of stored codes and scales."""
