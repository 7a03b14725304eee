"""The Triton kernels that compute experts on a device; `ops.triton` says how they are launched.

A block of bytes is addressed by a plain 64-bit number, in a slot or in host memory: which of the
two is data, and only a kernel can follow it without asking the host.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "FP8",
    "INT4",
    "INT8",
    "MXFP4",
    "PLAIN",
    "expert_products",
    "sum_experts",
]

# How elements are stored; from INT4 on two share a byte.
PLAIN = tl.constexpr(0)
INT8 = tl.constexpr(1)
FP8 = tl.constexpr(2)
INT4 = tl.constexpr(3)
MXFP4 = tl.constexpr(4)


@triton.jit
def _pointer(block, OFFSET: tl.constexpr, ELEMENT: tl.constexpr):
    """Give where elements begin that lie `OFFSET` bytes into a block.

    The hint is on the block itself: Triton 3.8 loses one that is on a sum of numbers.
    """
    begin = tl.multiple_of(block.to(tl.pointer_type(ELEMENT)), 16)
    return begin + OFFSET // (ELEMENT.primitive_bitwidth // 8)


@triton.jit
def _load(source, place, mask, OFFSET: tl.constexpr, ELEMENT: tl.constexpr):
    """Load elements of a block, zeros where there are none."""
    read = _pointer(source, OFFSET, ELEMENT)
    return tl.load(read + place, mask=mask, other=0)


@triton.jit
def _store(target, is_kept, place, mask, values, OFFSET: tl.constexpr, ELEMENT: tl.constexpr):
    """Write what a miss loaded through to its slot, where it has one.

    Even where nothing is stored this waits for what was loaded, so it comes last.
    """
    write = _pointer(target, OFFSET, ELEMENT)
    tl.store(write + place, values, mask=mask & is_kept)


@triton.jit
def _read(source, target, is_kept, place, mask, OFFSET: tl.constexpr, ELEMENT: tl.constexpr):
    """Load elements of a block and, after a miss, write them through to its slot."""
    values = _load(source, place, mask, OFFSET, ELEMENT)
    _store(target, is_kept, place, mask, values, OFFSET, ELEMENT)
    return values


@triton.jit
def _fp8_value(codes):
    """Give what e4m3 bytes stand for, over 2 ** 8: as float16 their exponent is off by eight."""
    bits = codes.to(tl.int16)
    return (((bits & 128) << 8) | ((bits & 127) << 7)).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _fp4_value(codes):
    """Give what e2m1 nibbles stand for, over 2 ** 14: as float16 their exponent is off by 14."""
    bits = codes.to(tl.int16)
    return (((bits & 8) << 12) | ((bits & 7) << 9)).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _scales(
    source,
    target,
    is_kept,
    row,
    is_row,
    start,
    OFFSET: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,
    STORED: tl.constexpr,
    PART_ROWS: tl.constexpr,
    GRID_ROWS: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Give the scales (N, G) of some rows and the groups from column `start` on, float32."""
    grid_columns: tl.constexpr = (NUM_COLUMNS + GROUP - 1) // GROUP
    group = start // GROUP + tl.arange(0, BLOCK_G)
    grid_row = row // PART_ROWS * GRID_ROWS + row % PART_ROWS // SCALE_ROWS
    place = grid_row[:, None] * grid_columns + group[None, :]
    mask = is_row[:, None] & (group < grid_columns)[None, :]
    if STORED == FP8:
        return _read(source, target, is_kept, place, mask, OFFSET, tl.float32) * 256
    if STORED == MXFP4:
        exponents = _read(source, target, is_kept, place, mask, OFFSET, tl.uint8)
        return (exponents.to(tl.int32) << 23).to(tl.float32, bitcast=True) * 16384
    return _read(source, target, is_kept, place, mask, OFFSET, tl.bfloat16).to(tl.float32)


@triton.jit
def _inputs(
    inputs,
    input_stride,
    num_tokens,
    unit,
    start,
    NUM_COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    """Load the inputs that meet a tile of weights, whose columns are `unit * STEP + SHIFT`.

    Called before the weights are: the wait for these is short, and within that for those.
    """
    if BLOCK_T == 1:
        column = unit * STEP + SHIFT
        values = tl.load(inputs + column, mask=column < NUM_COLUMNS, other=0)
    else:
        token = tl.arange(0, BLOCK_T)
        column = (start + tl.arange(0, BLOCK_U)) * STEP + SHIFT
        values = tl.load(
            inputs + token[:, None] * input_stride + column[None, :],
            mask=(token < num_tokens)[:, None] & (column < NUM_COLUMNS)[None, :],
            other=0,
        )
    return values


@triton.jit
def _add(
    total,
    weight,
    values,
    DTYPE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    """Add what a tile of weights (N, ...) contributes.

    One token is multiplied elementwise: a matrix product of 16 rows would be mostly empty. Each
    tile is summed at once, which leaves registers for more programs, and so for more loads, at a
    time: 96 of them instead of 160 for 16 rows of 512 columns.
    """
    weight = weight.to(DTYPE)
    if BLOCK_T == 1:
        product = weight.to(tl.float32) * tl.expand_dims(values.to(tl.float32), 0)
        if len(product.shape) == 3:
            product = tl.sum(product, 2)
        total += tl.sum(product, 1)
    else:
        flat = tl.reshape(weight, (BLOCK_N, BLOCK_U))
        total = tl.dot(values, tl.trans(flat), total, input_precision="ieee")
    return total


@triton.jit
def _products(
    inputs,
    input_stride,
    num_tokens,
    row,
    is_row,
    source,
    target,
    is_kept,
    OFFSET: tl.constexpr,
    SCALE_OFFSET: tl.constexpr,
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
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Give inputs (T, K) times rows of a matrix, (T, N) float32, reading each weight once."""
    if BLOCK_T == 1:
        total = tl.zeros([BLOCK_N], tl.float32)
    else:
        total = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    if STORED == PLAIN:
        for start in range(0, NUM_COLUMNS, BLOCK_K):
            unit = start + tl.arange(0, BLOCK_K)
            if IS_TRANSPOSED:
                place = unit[None, :] * NUM_ROWS + row[:, None]
            else:
                place = row[:, None] * NUM_COLUMNS + unit[None, :]
            mask = is_row[:, None] & (unit < NUM_COLUMNS)[None, :]
            values = _inputs(
                inputs, input_stride, num_tokens, unit, start, NUM_COLUMNS, 1, 0, BLOCK_T, BLOCK_K
            )
            weight = _load(source, place, mask, OFFSET, CODE)
            total = _add(total, weight, values, DTYPE, BLOCK_T, BLOCK_N, BLOCK_K)
            _store(target, is_kept, place, mask, weight, OFFSET, CODE)
    else:
        # Three dimensions: rows, groups, and what shares a scale.
        step: tl.constexpr = 2 if STORED >= INT4 else 1
        block_g: tl.constexpr = BLOCK_K // GROUP
        block_u: tl.constexpr = BLOCK_K // step
        width: tl.constexpr = GROUP // step
        num_units: tl.constexpr = NUM_COLUMNS // step
        for start in range(0, NUM_COLUMNS, BLOCK_K):
            first = start // step
            group = tl.arange(0, block_g)[:, None] * width
            unit = first + group + tl.arange(0, width)[None, :]
            place = row[:, None, None] * num_units + unit[None, :, :]
            mask = is_row[:, None, None] & (unit < num_units)[None, :, :]
            values = _inputs(
                inputs,
                input_stride,
                num_tokens,
                unit,
                first,
                NUM_COLUMNS,
                step,
                0,
                BLOCK_T,
                block_u,
            )
            if step == 2:
                odd_values = _inputs(
                    inputs,
                    input_stride,
                    num_tokens,
                    unit,
                    first,
                    NUM_COLUMNS,
                    step,
                    1,
                    BLOCK_T,
                    block_u,
                )
            codes = _load(source, place, mask, OFFSET, CODE)
            scale = _scales(
                source,
                target,
                is_kept,
                row,
                is_row,
                start,
                SCALE_OFFSET,
                NUM_COLUMNS,
                STORED,
                PART_ROWS,
                GRID_ROWS,
                SCALE_ROWS,
                GROUP,
                block_g,
            )[:, :, None]
            if STORED == INT8:
                weight = codes.to(tl.float32) * scale
            elif STORED == FP8:
                weight = _fp8_value(codes) * scale
            elif STORED == INT4:
                weight = ((codes & 15).to(tl.float32) - 8) * scale
            else:
                weight = _fp4_value(codes & 15) * scale
            total = _add(total, weight, values, DTYPE, BLOCK_T, BLOCK_N, block_u)
            if step == 2:
                if STORED == INT4:
                    odd = ((codes >> 4).to(tl.float32) - 8) * scale
                else:
                    odd = _fp4_value(codes >> 4) * scale
                total = _add(total, odd, odd_values, DTYPE, BLOCK_T, BLOCK_N, block_u)
            _store(target, is_kept, place, mask, codes, OFFSET, CODE)
    if BLOCK_T == 1:
        total = total[None, :]
    return total


@triton.jit
def _round(values, DTYPE: tl.constexpr):
    return values.to(DTYPE).to(tl.float32)


@triton.jit
def _curve(values, CURVE: tl.constexpr, ALPHA: tl.constexpr, DTYPE: tl.constexpr):
    """Apply an activation, rounded where torch rounds; the numbers are those of `ops.gating`."""
    if CURVE == 0:
        if ALPHA == 1:
            values = values * tl.sigmoid(values)
        else:
            steep = _round(tl.sigmoid(_round(values * ALPHA, DTYPE)), DTYPE)
            values = values * steep
    elif CURVE == 1:
        values = 0.5 * values * (1 + tl.erf(values * 0.7071067811865476))
    elif CURVE == 2:
        inner = 0.7978845608028654 * (values + 0.044715 * values * values * values)
        values = values * tl.sigmoid(2 * inner)
    elif CURVE == 3:
        values = tl.maximum(values, 0)
    else:
        values = tl.maximum(values, 0)
        values = values * values
    return _round(values, DTYPE)


@triton.jit
def activated_products(
    inputs,
    input_stride,
    num_tokens,
    first,
    source,
    target,
    is_kept,
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
    """Give inputs (T, K) times `BLOCK_N` outputs of a matrix from `first` on, (T, N) float32.

    Rounded, with the bias added, and activated unless `CURVE` is negative.
    """
    is_pair: tl.constexpr = HAS_GATE and CURVE >= 0
    num_outputs: tl.constexpr = NUM_ROWS // 2 if is_pair else NUM_ROWS
    block_r: tl.constexpr = 2 * BLOCK_N if is_pair else BLOCK_N
    each = tl.arange(0, block_r)
    if is_pair and IS_INTERLEAVED:
        row = 2 * first + each
        is_row = row < NUM_ROWS
    else:
        output = first + each % BLOCK_N
        row = output + each // BLOCK_N * num_outputs
        is_row = output < num_outputs
    products = _products(
        inputs,
        input_stride,
        num_tokens,
        row,
        is_row,
        source,
        target,
        is_kept,
        OFFSET,
        SCALE_OFFSET,
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
        BLOCK_T,
        block_r,
        BLOCK_K,
    )
    products = _round(products, DTYPE)
    if BIAS_OFFSET >= 0:
        bias = _read(source, target, is_kept, row, is_row, BIAS_OFFSET, DTYPE)
        products = _round(products + bias.to(tl.float32)[None, :], DTYPE)

    if is_pair:
        if IS_INTERLEAVED:
            gate, up = tl.split(tl.reshape(products, (BLOCK_T, BLOCK_N, 2)))
        else:
            pairs = tl.permute(tl.reshape(products, (BLOCK_T, 2, BLOCK_N)), (0, 2, 1))
            gate, up = tl.split(pairs)
        gate = _curve(tl.minimum(gate, GATE_MAX), CURVE, ALPHA, DTYPE)
        up = tl.minimum(tl.maximum(up, -UP_MAX), UP_MAX)
        if UP_OFFSET != 0:
            up = _round(up + UP_OFFSET, DTYPE)
        result = gate * up
    elif CURVE >= 0:
        result = _curve(products, CURVE, ALPHA, DTYPE)
    else:
        result = products
    return result


@triton.jit
def expert_products(
    inputs,
    input_stride,
    expert_stride,
    outputs,
    work_expert,
    work_slot,
    work_is_hit,
    work_order,
    slots_address,
    host_address,
    block_bytes,
    num_tokens,
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
    IS_COPIED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Multiply every token by some rows of one matrix of one expert of the work list.

    Writes (W, T, outputs) in the experts' element type, activated unless `CURVE` is negative.
    Tokens that the expert does not serve are computed too: the weights are what costs. With
    `IS_COPIED` what has a slot is there already.

    Grid: blocks of `BLOCK_N` outputs, places of the work list.
    """
    place = tl.load(work_order + tl.program_id(1))
    expert = tl.load(work_expert + place)
    if expert < 0:
        return
    slot = tl.load(work_slot + place)
    is_miss = slot < 0 if IS_COPIED else tl.load(work_is_hit + place) == 0
    # Without a slot the target is none, and nothing is written to it.
    is_kept = is_miss & (slot >= 0)
    target = slots_address + slot.to(tl.int64) * block_bytes
    source = target
    if is_miss:
        source = host_address + expert.to(tl.int64) * block_bytes

    is_pair: tl.constexpr = HAS_GATE and CURVE >= 0
    num_outputs: tl.constexpr = NUM_ROWS // 2 if is_pair else NUM_ROWS
    first = tl.program_id(0) * BLOCK_N
    result = activated_products(
        inputs + place.to(tl.int64) * expert_stride,
        input_stride,
        num_tokens,
        first,
        source,
        target,
        is_kept,
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
    at = (place * num_tokens + token)[:, None].to(tl.int64) * num_outputs + output[None, :]
    tl.store(
        outputs + at,
        result.to(DTYPE),
        mask=(token < num_tokens)[:, None] & (output < num_outputs)[None, :],
    )


@triton.jit
def sum_experts(
    outputs,
    ids,
    weights,
    work_expert,
    result,
    num_tokens,
    top_k,
    num_columns,
    LENGTH: tl.constexpr,
    PRODUCT: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Weight and sum expert outputs (W, T, H) per token, ascending and rounded as in torch.

    Grid: tokens, blocks of columns.
    """
    token = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    position = tl.arange(0, BLOCK_K)
    chosen = tl.load(ids + token * top_k + position, mask=position < top_k, other=-1).to(tl.int32)
    weight = tl.load(weights + token * top_k + position, mask=position < top_k, other=0)
    total = tl.zeros([BLOCK_H], tl.float32)
    for place in range(0, LENGTH):
        expert = tl.load(work_expert + place)
        is_chosen = (chosen == expert) & (expert >= 0)
        # What an unrouted token got may be anything, NaN too: it is not read.
        if tl.max(is_chosen.to(tl.int32), 0) > 0:
            own = tl.sum(tl.where(is_chosen, weight.to(tl.float32), 0), 0)
            at = (place * num_tokens + token).to(tl.int64) * num_columns + column
            output = tl.load(outputs + at, mask=column < num_columns, other=0).to(tl.float32)
            total = _round(total + _round(_round(output * own, PRODUCT), SUM), SUM)
    kind = result.dtype.element_ty
    at = token.to(tl.int64) * num_columns + column
    tl.store(result + at, total.to(kind), mask=column < num_columns)
