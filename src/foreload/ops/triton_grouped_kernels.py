"""The Triton kernels of inputs of many tokens; `ops.triton_grouped` says how they are launched."""

from __future__ import annotations

import triton
import triton.language as tl

from foreload.ops.triton_kernels import activated_products

__all__ = ["grouped_products", "sum_pairs"]


@triton.jit
def grouped_products(
    inputs,
    input_stride,
    outputs,
    table,
    num_blocks,
    OFFSET: tl.constexpr,
    SCALE_OFFSET: tl.constexpr,
    BIAS_OFFSET: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,
    STORED: tl.constexpr,
    CODE: tl.constexpr,
    DTYPE: tl.constexpr,
    IS_TRANSPOSED: tl.constexpr,
    PART_ROWS: tl.constexpr,
    GRID_ROWS: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    CURVE: tl.constexpr,
    HAS_GATE: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr,
    ALPHA: tl.constexpr,
    GATE_MAX: tl.constexpr,
    UP_MAX: tl.constexpr,
    UP_OFFSET: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Multiply rows (P, K), sorted by expert, each by some rows of its expert's matrix.

    The table (3, num_blocks) has, for each block of rows, where its expert lies, its first row and
    the one behind its last. Writes (P, outputs) in the experts' element type, activated unless
    `CURVE` is negative.

    Grid: blocks of `BLOCK_N` outputs, blocks of at most `BLOCK_T` rows.
    """
    block = tl.program_id(1)
    source = tl.load(table + block)
    row = tl.load(table + num_blocks + block)
    num_tokens = (tl.load(table + 2 * num_blocks + block) - row).to(tl.int32)

    is_pair: tl.constexpr = HAS_GATE and CURVE >= 0
    num_outputs: tl.constexpr = NUM_ROWS // 2 if is_pair else NUM_ROWS
    first = tl.program_id(0) * BLOCK_N
    # Nothing is written through: the block is where it was meant to be.
    result = activated_products(
        inputs + row * input_stride,
        input_stride,
        num_tokens,
        first,
        source,
        source,
        False,
        OFFSET,
        SCALE_OFFSET,
        BIAS_OFFSET,
        NUM_ROWS,
        NUM_COLUMNS,
        STORED,
        CODE,
        DTYPE,
        IS_TRANSPOSED,
        PART_ROWS,
        GRID_ROWS,
        SCALE_ROWS,
        GROUP,
        CURVE,
        HAS_GATE,
        IS_INTERLEAVED,
        ALPHA,
        GATE_MAX,
        UP_MAX,
        UP_OFFSET,
        BLOCK_T,
        BLOCK_N,
        BLOCK_K,
    )
    token = tl.arange(0, BLOCK_T)
    output = first + tl.arange(0, BLOCK_N)
    tl.store(
        outputs + (row + token)[:, None] * num_outputs + output[None, :],
        result.to(DTYPE),
        mask=(token < num_tokens)[:, None] & (output < num_outputs)[None, :],
    )


@triton.jit
def sum_pairs(
    outputs,
    rows,
    weights,
    result,
    num_columns,
    TOP_K: tl.constexpr,
    PRODUCT: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Weight and sum expert outputs (P, H) per token, rounded as in torch.

    `rows` (T, K) has the row of each of a token's outputs, by expert, -1 for no expert; `weights`
    (T, K) is in the same order.

    Grid: tokens, blocks of columns.
    """
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    total = tl.zeros([BLOCK_H], tl.float32)
    for position in range(0, TOP_K):
        row = tl.load(rows + token * TOP_K + position)
        if row >= 0:
            weight = tl.load(weights + token * TOP_K + position).to(tl.float32)
            mask = column < num_columns
            output = tl.load(outputs + row * num_columns + column, mask=mask, other=0)
            product = (output.to(tl.float32) * weight).to(PRODUCT).to(SUM).to(tl.float32)
            total = (total + product).to(SUM).to(tl.float32)
    kind = result.dtype.element_ty
    tl.store(result + token * num_columns + column, total.to(kind), mask=column < num_columns)
