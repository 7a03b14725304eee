"""Launches the Triton kernels of inputs of many tokens: one launch per matrix and chunk.

Needs the `triton` extra. Never waits for the device, but is not made to be captured: the host was
told how many tokens each expert has.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton

from foreload.ops import triton_grouped_kernels as kernels
from foreload.ops.gating import KnownGatings
from foreload.ops.grouped import send_numbers
from foreload.ops.triton import (
    Tile,
    choose_tile,
    gating_constants,
    matrix_constants,
    require_dtype,
    sum_types,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from foreload.ops.device_experts import LayerMemory
    from foreload.ops.device_layout import ExpertLayout, MatrixLayout
    from foreload.ops.gating import Gating
    from foreload.ops.grouped import Chunk, SortedPairs
    from foreload.ops.reference import SumRule
    from foreload.types import Routing

__all__ = ["TritonGrouped", "choose_grouped_tile"]

_LEAST_ROWS, _MOST_ROWS = 16, 64
_ROW_BYTES = 128
_SUM_COLUMNS = 512


def choose_grouped_tile(matrix: MatrixLayout, dtype: torch.dtype) -> Tile:
    """Choose a tile by what several steps of it take of shared memory: 72 KB for three.

    Args:
        matrix: Layout of the matrix.
        dtype: Element type that experts compute in.
    """
    tile = choose_tile(matrix, _LEAST_ROWS)
    if not matrix.stored.is_plain:
        return tile
    return Tile(128, min(tile.num_columns, _ROW_BYTES // dtype.itemsize), 8)


class TritonGrouped:
    """The kernels of `ops.grouped.GroupedKernels`, compiled.

    Args:
        tile: Chooses tiles.
    """

    def __init__(self, *, tile: Any = choose_grouped_tile) -> None:
        self._tile = tile
        self._gatings = KnownGatings()

    def forward(
        self,
        memory: LayerMemory,
        pairs: SortedPairs,
        chunks: Iterable[Chunk],
        experts: Any,
        hidden_states: Tensor,
        routing: Routing,
    ) -> Tensor:
        """Compute every wanted expert as its chunk comes, and sum over the top-k, (T, H).

        Raises:
            UnsupportedModelError: The hidden states have another element type than the experts.

        Cost:
            Every block is read once per 64 of its tokens, and hidden states are copied K times.
        """
        layout = memory.layout
        require_dtype(layout, hidden_states)
        gating = self._gatings.of(experts)
        inputs = hidden_states[pairs.order // routing.top_k_index.shape[1]]  # (T * K, H)
        is_fused = gating is not None
        activated = inputs.new_empty(len(inputs), layout.down.num_columns)
        inner = activated if is_fused else inputs.new_empty(len(inputs), layout.first.num_rows)
        outputs = torch.empty_like(inputs)
        num_rows = _block_rows(pairs)
        for chunk in chunks:
            if not chunk.experts:
                continue
            table = _block_table(chunk, pairs, num_rows, inputs.device)
            self._multiply(layout, layout.first, table, inputs, inner, gating, num_rows)
            if not is_fused:
                _activate(experts, chunk, pairs, inner, activated)
            self._multiply(layout, layout.down, table, activated, outputs, None, num_rows)
        if getattr(experts, "has_post_expert_norm", False):
            outputs = experts.post_expert_norm(outputs).contiguous()
        return _sum(memory.sum_rule, pairs, outputs, routing, experts.num_experts)

    def _multiply(
        self,
        layout: ExpertLayout,
        matrix: MatrixLayout,
        table: Tensor,
        inputs: Tensor,
        outputs: Tensor,
        gating: Gating | None,
        num_rows: int,
    ) -> None:
        """Multiply the rows (P, K) of a chunk's experts by one matrix of each, (P, outputs)."""
        is_pair = gating is not None and gating.has_gate
        tile = self._tile(matrix, layout.dtype)
        block_n = max(tile.num_rows // 2, 1) if is_pair else tile.num_rows
        num_blocks = table.shape[1]
        kernels.grouped_products[(triton.cdiv(outputs.shape[1], block_n), num_blocks)](
            inputs,
            inputs.stride(0),
            outputs,
            table,
            num_blocks,
            **matrix_constants(layout, matrix),
            **gating_constants(gating),
            BLOCK_T=num_rows,
            BLOCK_N=block_n,
            BLOCK_K=tile.num_columns,
            num_warps=tile.num_warps,
        )


def _block_rows(pairs: SortedPairs) -> int:
    """Give the rows that a program multiplies at a time, near those of an expert."""
    mean = pairs.starts[-1] // max(len(pairs.starts) - 1, 1)
    return min(max(int(triton.next_power_of_2(max(mean, 1))), _LEAST_ROWS), _MOST_ROWS)


def _block_table(chunk: Chunk, pairs: SortedPairs, num_rows: int, device: torch.device) -> Tensor:
    """Cut a chunk's rows into blocks: where their expert lies, first row, end, (3, N) int64."""
    first, stride = chunk.blocks.data_ptr(), chunk.blocks.stride(0)
    blocks = [
        (first + place * stride, row, min(row + num_rows, pairs.starts[expert + 1]))
        for expert, place in zip(chunk.experts, chunk.places, strict=True)
        for row in range(pairs.starts[expert], pairs.starts[expert + 1], num_rows)
    ]
    return send_numbers(list(zip(*blocks, strict=True)), device)


def _activate(
    experts: Any, chunk: Chunk, pairs: SortedPairs, products: Tensor, activated: Tensor
) -> None:
    """Let a module apply the activation that no kernel knows, expert by expert."""
    function = experts._apply_gate if experts.has_gate else experts.act_fn
    for expert in chunk.experts:
        rows = slice(pairs.starts[expert], pairs.starts[expert + 1])
        activated[rows] = function(products[rows])


def _sum(
    rule: SumRule, pairs: SortedPairs, outputs: Tensor, routing: Routing, num_experts: int
) -> Tensor:
    """Weight and sum each token's outputs, ascending by expert, (T, H)."""
    index, weights = routing
    num_tokens, top_k = index.shape
    num_columns = outputs.shape[1]
    by_expert, position = torch.sort(index, dim=1, stable=True)
    row_of = torch.empty_like(pairs.order)
    row_of[pairs.order] = torch.arange(len(row_of), device=row_of.device)
    rows = row_of.view(index.shape).gather(1, position)
    rows = torch.where(by_expert < num_experts, rows, -1)
    weights = weights.gather(1, position)
    result = outputs.new_empty(num_tokens, num_columns)
    block = min(triton.next_power_of_2(num_columns), _SUM_COLUMNS)
    kernels.sum_pairs[(num_tokens, triton.cdiv(num_columns, block))](
        outputs,
        rows,
        weights,
        result,
        num_columns,
        TOP_K=top_k,
        **sum_types(rule, outputs, weights),
        BLOCK_H=block,
        num_warps=4,
    )
    return result
