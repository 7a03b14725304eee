"""Many tokens: sorted by expert, and computed as the reference does, in whichever chunks."""

from __future__ import annotations

import random

import pytest
import torch

from foreload.ops.device_experts import LayerMemory
from foreload.ops.device_layout import StoredFormat, expert_layout, pack_expert, unpack_expert
from foreload.ops.grouped import Chunk, SortedPairs, TwinGrouped, send_numbers, sort_pairs
from foreload.ops.reference import SumRule
from foreload.types import Routing
from plain_experts import KINDS, random_weights, reference, shapes_of


@pytest.mark.parametrize("num_tokens", [1, 17, 40])
def test_pairs_are_sorted_by_expert_and_placeholders_are_last(num_tokens: int) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    index = torch.randint(0, 9, (num_tokens, 3), generator=generator)
    order, starts = sort_pairs(index, 6)
    assert sorted(order.tolist()) == list(range(3 * num_tokens))
    flat = index.flatten()
    for expert in range(6):
        mine = order[starts[expert] : starts[expert + 1]]
        assert mine.tolist() == (flat == expert).nonzero().flatten().tolist()
    assert (flat[order[starts[6] :]] >= 6).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stored", [StoredFormat.BFLOAT16, StoredFormat.INT4])
@pytest.mark.parametrize("rule", [SumRule.HIDDEN, SumRule.FLOAT32])
def test_the_twin_is_the_reference_bit_for_bit_in_any_chunks(
    kind: str, stored: StoredFormat, rule: SumRule
) -> None:
    experts, sizes, dtype = KINDS[kind], (64, 32), torch.bfloat16
    layout = expert_layout(experts, shapes_of(experts, *sizes), stored, dtype=dtype)
    host = torch.zeros(experts.num_experts, layout.num_bytes, dtype=torch.uint8)
    for expert, block in enumerate(host):
        pack_expert(layout, random_weights(experts, *sizes, seed=expert), block)
    memory = LayerMemory(layout, host, host, host.data_ptr(), rule)
    generator = torch.Generator().manual_seed(0)
    # One expert has no token, and placeholders have some.
    index = torch.randint(0, 7, (29, 2), generator=generator)
    index[index == 3] = 1
    hidden = torch.randn(29, 64, generator=generator).to(dtype)
    routing = Routing(index, torch.rand(29, 2, generator=generator).to(dtype))
    wanted = sorted(set(index.flatten().tolist()) - {6})
    assert 3 not in wanted
    order, starts = sort_pairs(index, experts.num_experts)
    draw = random.Random(0)
    draw.shuffle(wanted)
    chunks = [
        Chunk(wanted[:2], host, wanted[:2]),
        Chunk([], host, []),
        Chunk(wanted[2:], host[wanted[2:]], range(len(wanted) - 2)),
    ]
    found = TwinGrouped().forward(
        memory, SortedPairs(order, starts.tolist()), iter(chunks), experts, hidden, routing
    )
    weights = [unpack_expert(layout, block) for block in host]
    assert torch.equal(found, reference(experts, weights, hidden, routing, rule))


def test_numbers_are_sent_as_they_are() -> None:
    sent = send_numbers([[1, 2**40], [-3, 0]], torch.device("cpu"))
    assert sent.dtype == torch.int64
    assert sent.tolist() == [[1, 2**40], [-3, 0]]
