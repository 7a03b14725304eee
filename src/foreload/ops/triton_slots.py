"""The Triton kernels that give out slots and fill them; `ops.triton` says how they are launched.

They keep the tables of `ops.device_tables`, and compute nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["assign_slots", "copy_blocks"]

_NEVER = tl.constexpr(2**62)


@triton.jit
def assign_slots(
    ids,
    num_tokens,
    top_k,
    slot_of,
    expert_of,
    stamp,
    is_fresh,
    clock,
    counters,
    scratch,
    scratch_stride,
    work_expert,
    work_slot,
    work_is_hit,
    work_order,
    num_slots,
    num_table_experts,
    num_experts,
    length,
    IS_PREFETCH: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_W: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program: `ops.device_tables.assign_slots`, or `assign_prefetch`, of one layer.

    Ids are numbered column by column, likeliest first. Barriers stand wherever another thread's
    store is read: all of them see the same global memory after one.
    """
    keys, by_rank, turns = scratch, scratch + scratch_stride, scratch + 2 * scratch_stride
    now = tl.load(clock)
    expert = tl.arange(0, BLOCK_E)
    slot = tl.arange(0, BLOCK_S)
    held = tl.load(expert_of + slot, mask=slot < num_slots, other=-1)
    age = tl.load(stamp + slot, mask=slot < num_slots, other=-1)

    first = tl.full([BLOCK_E], _NEVER, tl.int64)
    times = tl.zeros([BLOCK_E], tl.int64)
    is_taken = tl.zeros([BLOCK_S], tl.int32)
    for start in range(0, BLOCK_I, CHUNK):
        number = start + tl.arange(0, CHUNK)
        place = number % num_tokens * top_k + number // num_tokens
        some = tl.load(ids + place, mask=number < num_tokens * top_k, other=-1).to(tl.int32)
        some = tl.where(some < num_experts, some, -1)
        is_named = expert[:, None] == some[None, :]
        named = tl.where(is_named, number[None, :].to(tl.int64), _NEVER)
        first = tl.minimum(first, tl.min(named, 1))
        times += tl.sum(is_named.to(tl.int64), 1)
        is_same = (held[:, None] == some[None, :]) & (held[:, None] >= 0)
        is_taken = tl.maximum(is_taken, tl.max(is_same.to(tl.int32), 1))
    is_wanted = first < _NEVER
    own = tl.load(slot_of + expert, mask=expert < num_table_experts, other=-1)
    is_hit = is_wanted & (own >= 0)
    is_miss = is_wanted & (own < 0)

    # Rank the slots that may be emptied: empty ones, then the stalest.
    is_free = (slot < num_slots) & (is_taken == 0)
    key = tl.where(is_free, age, _NEVER)
    tl.store(keys + slot, key, mask=slot < num_slots)
    # And what is missing: what most tokens want, of that the likeliest; guesses are not counted.
    turn = first if IS_PREFETCH else first - times * BLOCK_I
    turn = tl.where(is_miss, turn, _NEVER)
    tl.store(turns + expert, turn, mask=expert < num_table_experts)
    tl.debug_barrier()
    rank = tl.zeros([BLOCK_S], tl.int32)
    for start in range(0, BLOCK_S, CHUNK):
        other = start + tl.arange(0, CHUNK)
        other_key = tl.load(keys + other, mask=other < num_slots, other=_NEVER)
        is_before = (other_key[None, :] < key[:, None]) | (
            (other_key[None, :] == key[:, None]) & (other[None, :] < slot[:, None])
        )
        rank += tl.sum(is_before.to(tl.int32), 1)
    tl.store(by_rank + rank, slot.to(tl.int64), mask=is_free)
    num_free = tl.sum(is_free.to(tl.int32), 0)
    num_misses = tl.sum(is_miss.to(tl.int32), 0)
    miss_rank = tl.zeros([BLOCK_E], tl.int32)
    for start in range(0, BLOCK_E, CHUNK):
        other = start + tl.arange(0, CHUNK)
        other_turn = tl.load(turns + other, mask=other < num_table_experts, other=_NEVER)
        miss_rank += tl.sum((other_turn[None, :] < turn[:, None]).to(tl.int32), 1)
    num_placed = tl.minimum(num_misses, num_free)
    if IS_PREFETCH:
        num_placed = tl.minimum(num_placed, length)
    is_placed = is_miss & (miss_rank < num_placed)
    tl.debug_barrier()
    given = tl.load(by_rank + miss_rank, mask=is_placed, other=0).to(tl.int32)
    evicted = tl.load(expert_of + given, mask=is_placed, other=-1)
    num_used = 0
    if not IS_PREFETCH:
        num_used = tl.sum(tl.load(is_fresh + own, mask=is_hit, other=0), 0)
    tl.debug_barrier()

    tl.store(slot_of + evicted, -1, mask=is_placed & (evicted >= 0))
    tl.store(slot_of + expert, given, mask=is_placed)
    tl.store(expert_of + given, expert, mask=is_placed)
    padding = tl.arange(0, BLOCK_W)
    if IS_PREFETCH:
        tl.store(stamp + given, now + tl.zeros_like(given).to(tl.int64), mask=is_placed)
        tl.store(is_fresh + given, 1, mask=is_placed)
        tl.store(counters + 2, tl.load(counters + 2) + num_placed)
        tl.store(work_expert + miss_rank, expert, mask=is_placed)
        tl.store(work_slot + miss_rank, given, mask=is_placed)
        tl.store(work_is_hit + miss_rank, 0, mask=is_placed)
        tl.store(work_order + miss_rank, miss_rank, mask=is_placed)
        count = num_placed
    else:
        # What is missing and has no slot keeps its -1.
        used = tl.where(is_placed, given, own)
        is_in = is_hit | is_placed
        tl.store(stamp + used, now + 1 + tl.zeros_like(used).to(tl.int64), mask=is_in)
        tl.store(is_fresh + used, 0, mask=is_in)
        tl.store(clock, now + 1)
        count = tl.sum(is_wanted.to(tl.int32), 0)
        tl.store(counters, tl.load(counters) + count - num_misses)
        tl.store(counters + 1, tl.load(counters + 1) + num_misses)
        tl.store(counters + 3, tl.load(counters + 3) + num_used)
        at = tl.cumsum(is_wanted.to(tl.int32), 0) - 1
        hit_rank = tl.cumsum(is_hit.to(tl.int32), 0) - 1
        tl.store(work_expert + at, expert, mask=is_wanted)
        tl.store(work_slot + at, used, mask=is_wanted)
        tl.store(work_is_hit + at, is_hit.to(tl.int32), mask=is_wanted)
        rank_in_order = tl.where(is_hit, num_misses + hit_rank, miss_rank)
        tl.store(work_order + rank_in_order, at, mask=is_wanted)
    is_padding = (padding >= count) & (padding < length)
    tl.store(work_expert + padding, -1, mask=is_padding)
    tl.store(work_slot + padding, -1, mask=is_padding)
    tl.store(work_is_hit + padding, 0, mask=is_padding)
    tl.store(work_order + padding, padding, mask=is_padding)


@triton.jit
def copy_blocks(
    work_expert,
    work_slot,
    work_is_hit,
    slots_address,
    host_address,
    BLOCK_BYTES: tl.constexpr,
    LENGTH: tl.constexpr,
    NUM_PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy the blocks of a work list's misses to their slots, in pieces of `BLOCK` words.

    A miss without a slot is left out.

    Grid: as few programs as keep the bus busy; each takes every n-th piece of every block.
    """
    num_words: tl.constexpr = BLOCK_BYTES // 4
    for place in range(0, LENGTH):
        expert = tl.load(work_expert + place)
        slot = tl.load(work_slot + place)
        if (slot >= 0) & (tl.load(work_is_hit + place) == 0):
            source = host_address + expert.to(tl.int64) * BLOCK_BYTES
            target = slots_address + slot.to(tl.int64) * BLOCK_BYTES
            read = tl.multiple_of(source.to(tl.pointer_type(tl.int32)), 16)
            write = tl.multiple_of(target.to(tl.pointer_type(tl.int32)), 16)
            for start in range(0, num_words, NUM_PROGRAMS * BLOCK):
                word = start + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
                values = tl.load(read + word, mask=word < num_words, other=0)
                tl.store(write + word, values, mask=word < num_words)
