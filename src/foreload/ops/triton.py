"""Launches the Triton kernels: `DeviceExperts` without ever waiting for the host.

Needs the `triton` extra. Everything a launch is told comes from shapes, layouts and addresses, so a
step can be captured once it has run: a first run compiles.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from foreload.errors import MissingExtraError

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise MissingExtraError("triton", "triton") from error

from foreload.errors import UnsupportedModelError
from foreload.ops import triton_kernels as kernels
from foreload.ops import triton_slots as slot_kernels
from foreload.ops.device_layout import StoredFormat
from foreload.ops.device_tables import WorkList
from foreload.ops.gating import KnownGatings
from foreload.ops.reference import SumRule

if TYPE_CHECKING:
    from torch import Tensor

    from foreload.ops.device_experts import LayerMemory
    from foreload.ops.device_layout import ExpertLayout, MatrixLayout
    from foreload.ops.device_tables import DeviceTables
    from foreload.ops.gating import Gating
    from foreload.types import Routing

__all__ = [
    "Tile",
    "TritonKernels",
    "choose_tile",
    "gating_constants",
    "matrix_constants",
    "require_dtype",
    "sum_types",
]

_STORED = {
    StoredFormat.INT8: kernels.INT8.value,
    StoredFormat.FP8: kernels.FP8.value,
    StoredFormat.INT4: kernels.INT4.value,
    StoredFormat.MXFP4: kernels.MXFP4.value,
}
_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
_CHUNK = 32
_COPY_WORDS = 4096
_SUM_COLUMNS = 512


class Tile(NamedTuple):
    """What one program multiplies at a time.

    Attributes:
        num_rows: Rows of the matrix, gate and up together.
        num_columns: Columns of it.
        num_warps: Warps that share the work.
    """

    num_rows: int
    num_columns: int
    num_warps: int


def choose_tile(matrix: MatrixLayout, num_tokens: int) -> Tile:
    """Choose a tile by what is in flight: 16 KB of 16-bit weights per program and step.

    Args:
        matrix: Layout of the matrix.
        num_tokens: T; a single one is multiplied elementwise.
    """
    widest = triton.next_power_of_2(matrix.num_columns)
    if num_tokens > 1:
        columns = min(widest, 128)
        least = 16 * (2 if matrix.stored.is_packed else 1)
        return Tile(64, max(columns, least, _group(matrix)), 4)
    if matrix.is_transposed:
        return Tile(64, min(widest, 128), 4)
    columns = min(widest, 512)
    while columns > 256 and matrix.num_columns % columns:
        columns //= 2
    columns = max(columns, _group(matrix))
    return Tile(max(8192 // columns, 4), columns, 4)


class TritonKernels:
    """The kernels of `ops.device_experts.ExpertKernels`, compiled.

    Args:
        num_copy_programs: Programs of a prefetch: few, so that experts can be computed meanwhile.
        tile: Chooses tiles.
    """

    def __init__(self, *, num_copy_programs: int = 16, tile: Any = choose_tile) -> None:
        self._num_copy_programs = num_copy_programs
        self._tile = tile
        self._gatings = KnownGatings()

    def assign_slots(
        self, tables: DeviceTables, layer: int, top_k_index: Tensor, *, num_experts: int
    ) -> WorkList:
        """Give wanted experts their slots."""
        length = min(top_k_index.numel(), tables.num_experts)
        return self._assign(tables, layer, top_k_index, length, num_experts)

    def assign_prefetch(
        self,
        tables: DeviceTables,
        layer: int,
        predicted_index: Tensor,
        *,
        max_fetches: int,
    ) -> WorkList:
        """Make room for guessed experts."""
        return self._assign(
            tables, layer, predicted_index, max_fetches, tables.num_experts, is_prefetch=True
        )

    def forward(
        self,
        memory: LayerMemory,
        work: WorkList,
        experts: Any,
        hidden_states: Tensor,
        routing: Routing,
    ) -> Tensor:
        """Fetch what missed, compute, and sum over the top-k, (T, H).

        Raises:
            UnsupportedModelError: The hidden states have another element type than the experts.
        """
        layout = memory.layout
        require_dtype(layout, hidden_states)
        gating = self._gatings.of(experts)
        hidden_states = hidden_states.contiguous()
        num_tokens = hidden_states.shape[0]
        if _is_copied_first(memory):
            self.fetch(memory, work)
        inner = self._multiply(memory, layout.first, work, hidden_states, num_tokens, gating)
        if gating is None:
            function = experts._apply_gate if layout.has_gate else experts.act_fn
            inner = function(inner).contiguous()
        outputs = self._multiply(memory, layout.down, work, inner, num_tokens, None)
        if getattr(experts, "has_post_expert_norm", False):
            outputs = experts.post_expert_norm(outputs).contiguous()
        return self._sum(memory.sum_rule, work, outputs, routing, num_tokens)

    def fetch(self, memory: LayerMemory, work: WorkList) -> None:
        """Copy the blocks of a work list's misses to their slots."""
        slot_kernels.copy_blocks[(self._num_copy_programs,)](
            work.expert,
            work.slot,
            work.is_hit,
            memory.slots.data_ptr(),
            memory.host_address,
            BLOCK_BYTES=memory.slots.shape[1],
            LENGTH=len(work.expert),
            NUM_PROGRAMS=self._num_copy_programs,
            BLOCK=_COPY_WORDS,
            num_warps=8,
        )

    def _assign(
        self,
        tables: DeviceTables,
        layer: int,
        index: Tensor,
        length: int,
        num_experts: int,
        *,
        is_prefetch: bool = False,
    ) -> WorkList:
        columns = torch.empty(4, length, dtype=torch.int32, device=tables.slot_of.device)
        work = WorkList(*columns)
        scratch = tables.scratch[layer]
        num_slots = tables.num_slots[layer]
        slot_kernels.assign_slots[(1,)](
            index.contiguous(),
            *index.shape,
            tables.slot_of[layer],
            tables.expert_of[layer],
            tables.stamp[layer],
            tables.is_fresh[layer],
            tables.clock[layer:],
            tables.counters[layer],
            scratch,
            scratch.stride(0),
            *work,
            num_slots,
            tables.num_experts,
            min(num_experts, tables.num_experts),
            length,
            IS_PREFETCH=is_prefetch,
            BLOCK_I=triton.next_power_of_2(index.numel()),
            BLOCK_E=triton.next_power_of_2(tables.num_experts),
            BLOCK_S=triton.next_power_of_2(num_slots),
            BLOCK_W=triton.next_power_of_2(max(length, 1)),
            CHUNK=_CHUNK,
            num_warps=4 if tables.num_experts <= 128 else 8,
        )
        return work

    def _multiply(
        self,
        memory: LayerMemory,
        matrix: MatrixLayout,
        work: WorkList,
        inputs: Tensor,
        num_tokens: int,
        gating: Gating | None,
    ) -> Tensor:
        """Multiply (T, K), or (W, T, K), by one matrix of each expert, (W, T, outputs)."""
        layout = memory.layout
        length = len(work.expert)
        is_pair = gating is not None and gating.has_gate
        num_outputs = matrix.num_rows // 2 if is_pair else matrix.num_rows
        tile = self._tile(matrix, num_tokens)
        block_n = max(tile.num_rows // 2, 1) if is_pair else tile.num_rows
        outputs = inputs.new_empty(length, num_tokens, num_outputs)
        kernels.expert_products[(triton.cdiv(num_outputs, block_n), length)](
            inputs,
            inputs.stride(-2),
            inputs.stride(0) if inputs.ndim == 3 else 0,
            outputs,
            *work,
            memory.slots.data_ptr(),
            memory.host_address,
            memory.slots.shape[1],
            num_tokens,
            **matrix_constants(layout, matrix),
            **gating_constants(gating),
            IS_COPIED=_is_copied_first(memory),
            BLOCK_T=1 if num_tokens == 1 else 16,
            BLOCK_N=block_n,
            BLOCK_K=tile.num_columns,
            num_warps=tile.num_warps,
        )
        return outputs

    def _sum(
        self, rule: SumRule, work: WorkList, outputs: Tensor, routing: Routing, num_tokens: int
    ) -> Tensor:
        length, _, num_columns = outputs.shape
        weights = routing.top_k_weights.contiguous()
        top_k = weights.shape[1]
        result = outputs.new_empty(num_tokens, num_columns)
        block = min(triton.next_power_of_2(num_columns), _SUM_COLUMNS)
        kernels.sum_experts[(num_tokens, triton.cdiv(num_columns, block))](
            outputs,
            routing.top_k_index.contiguous(),
            weights,
            work.expert,
            result,
            num_tokens,
            top_k,
            num_columns,
            LENGTH=length,
            **sum_types(rule, outputs, weights),
            BLOCK_K=triton.next_power_of_2(top_k),
            BLOCK_H=block,
            num_warps=4,
        )
        return result


def require_dtype(layout: ExpertLayout, hidden_states: Tensor) -> None:
    """Make sure that hidden states have the element type that experts compute in.

    Raises:
        UnsupportedModelError: They have another one.
    """
    if hidden_states.dtype != layout.dtype:
        raise UnsupportedModelError(
            f"hidden states in {hidden_states.dtype}, experts in {layout.dtype}"
        )


def _is_copied_first(memory: LayerMemory) -> bool:
    """Tell whether misses are copied to their slots whole, and computed from there.

    MXFP4's rows are short: read by tiles, the link carries 4 bytes of scales in requests of 32, at
    76 % of a plain copy's rate for one token and 26 % for five (H200, 2026-11-26), where copies of
    blocks reach 94 %. Where every expert has a slot misses end, and a launch would be for nothing.
    """
    num_slots, num_experts = memory.slots.shape[0], memory.host.shape[0]
    return memory.layout.first.stored is StoredFormat.MXFP4 and num_slots < num_experts


def _group(matrix: MatrixLayout) -> int:
    """Give the columns that must be read at a time: whole groups, 1 without."""
    return 1 if matrix.stored.is_plain else matrix.scale_columns


def sum_types(rule: SumRule, outputs: Tensor, weights: Tensor) -> dict[str, Any]:
    """Give the element types that a kernel rounds to when it weights and sums."""
    summed = {
        SumRule.HIDDEN: outputs.dtype,
        SumRule.WEIGHTS: weights.dtype,
        SumRule.FLOAT32: torch.float32,
    }[rule]
    product = torch.promote_types(outputs.dtype, weights.dtype)
    return {"PRODUCT": _TYPES[product], "SUM": _TYPES[summed]}


def matrix_constants(layout: ExpertLayout, matrix: MatrixLayout) -> dict[str, Any]:
    """Give what a kernel is told of a matrix."""
    stored = matrix.stored
    code = _TYPES.get(stored.code_dtype, tl.int8 if stored is StoredFormat.INT8 else tl.uint8)
    return {
        "OFFSET": matrix.offset,
        "SCALE_OFFSET": matrix.scale_offset,
        "BIAS_OFFSET": matrix.bias_offset,
        "NUM_ROWS": matrix.num_rows,
        "NUM_COLUMNS": matrix.num_columns,
        "STORED": _STORED.get(stored, kernels.PLAIN.value),
        "CODE": code,
        "DTYPE": _TYPES[layout.dtype],
        "IS_TRANSPOSED": matrix.is_transposed,
        "PART_ROWS": matrix.num_rows // matrix.num_parts,
        "GRID_ROWS": matrix.scale_shape[0] // matrix.num_parts,
        "SCALE_ROWS": matrix.scale_rows,
        "GROUP": _group(matrix),
    }


def gating_constants(gating: Gating | None) -> dict[str, Any]:
    """Give what a kernel is told of an activation; None for not computing it."""
    if gating is None:
        gating_values: tuple[Any, ...] = (-1, False, False, 1.0, math.inf, math.inf, 0.0)
    else:
        gating_values = (int(gating.curve), *gating[1:])
    names = ("CURVE", "HAS_GATE", "IS_INTERLEAVED", "ALPHA", "GATE_MAX", "UP_MAX", "UP_OFFSET")
    return dict(zip(names, gating_values, strict=True))
