"""Experts from device-managed slots compute what the reference does, whatever is in the slots."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from foreload.errors import ForeloadError, ShapeError
from foreload.ops.device_experts import MAX_TOKENS, DeviceExperts
from foreload.ops.device_layout import (
    ExpertLayout,
    StoredFormat,
    expert_layout,
    pack_expert,
    unpack_expert,
)
from foreload.ops.device_tables import Counters
from foreload.ops.grouped import Chunk
from foreload.ops.reference import SumRule
from foreload.types import Routing
from plain_experts import KINDS, PlainExperts, random_weights, reference, shapes_of

TOP_K = 2


def make_host(
    experts: PlainExperts, layout: ExpertLayout, sizes: tuple[int, int], num_layers: int = 1
) -> Tensor:
    host = torch.zeros(num_layers, experts.num_experts, layout.num_bytes, dtype=torch.uint8)
    for layer in range(num_layers):
        for expert in range(experts.num_experts):
            weights = random_weights(experts, *sizes, seed=100 * layer + expert)
            pack_expert(layout, weights, host[layer, expert])
    return host


def lay_out(
    experts: PlainExperts, stored: StoredFormat, dtype: torch.dtype, sizes: tuple[int, int]
) -> ExpertLayout:
    return expert_layout(experts, shapes_of(experts, *sizes), stored, dtype=dtype)


def make(experts: PlainExperts, num_layers: int = 1, **settings: Any) -> DeviceExperts:
    layout = lay_out(experts, StoredFormat.FLOAT32, torch.float32, (16, 8))
    return DeviceExperts(
        [layout] * num_layers,
        make_host(experts, layout, (16, 8), num_layers),
        **{
            "num_slots": [4] * num_layers,
            "sum_rules": [SumRule.HIDDEN] * num_layers,
            "device": "cpu",
            **settings,
        },
    )


def route(index: list[list[int]], dtype: torch.dtype = torch.float32, seed: int = 0) -> Routing:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(len(index), len(index[0]), generator=generator)
    return Routing(torch.tensor(index), weights.to(dtype))


def rows(num_tokens: int, size: int = 16, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(num_tokens)
    return torch.randn(num_tokens, size, generator=generator).to(dtype)


# One token, several with experts in common, one expert twice, and placeholders for none.
STEPS = ([[0, 3]], [[3, 1], [0, 3]], [[2, 2]], [[9, 4]], [[0, 3]], [[5, 6], [6, 7]])


@pytest.mark.parametrize("stored", StoredFormat, ids=lambda stored: stored.value)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_slots", [1, 3, 6])
def test_every_layout_and_format_is_the_reference_bit_for_bit(
    kind: str, stored: StoredFormat, num_slots: int
) -> None:
    experts = KINDS[kind]
    sizes = (30, 17) if stored.is_plain else (64, 32)
    dtype = stored.code_dtype if stored.is_plain else torch.bfloat16
    layout = lay_out(experts, stored, dtype, sizes)
    host = make_host(experts, layout, sizes)
    device = DeviceExperts(
        [layout], host, num_slots=[num_slots], sum_rules=[SumRule.HIDDEN], device="cpu"
    )
    weights = [unpack_expert(layout, block) for block in host[0]]
    for index in STEPS:
        routing = route(index, dtype)
        hidden = rows(len(index), sizes[0], dtype)
        found = device.run(0, experts, hidden, routing)
        assert torch.equal(found, reference(experts, weights, hidden, routing, SumRule.HIDDEN))
        assert not found.isnan().any()
        device.tables.check()
    (counters,) = device.read_counters()
    # Six experts come for the first time; in three slots 0 and 3 have to come again, and one slot
    # has only expert 0 in the second step.
    assert counters.misses == {1: 9, 3: 8, 6: 6}[num_slots]
    assert counters.hits + counters.misses == 10


@pytest.mark.parametrize("rule", SumRule)
def test_sums_are_made_in_the_layers_own_element_type(rule: SumRule) -> None:
    experts = KINDS["gated"]
    layout = lay_out(experts, StoredFormat.BFLOAT16, torch.bfloat16, (16, 8))
    host = make_host(experts, layout, (16, 8), num_layers=2)
    device = DeviceExperts(
        [layout] * 2,
        host,
        num_slots=[6, 6],
        sum_rules=[SumRule.HIDDEN, rule],
        device="cpu",
    )
    weights = [unpack_expert(layout, block) for block in host[1]]
    hidden, routing = rows(3, dtype=torch.bfloat16), route([[0, 1], [2, 1], [4, 5]])
    found = device.run(1, experts, hidden, routing)
    assert torch.equal(found, reference(experts, weights, hidden, routing, rule))


def test_resident_experts_are_not_read_from_host_memory_again() -> None:
    experts = KINDS["gated"]
    device = make(experts)
    routing = route([[1, 2]])
    before = device.run(0, experts, rows(1), routing)
    device._memory[0].host.fill_(0xFF)
    assert torch.equal(device.run(0, experts, rows(1), routing), before)
    assert device.run(0, experts, rows(1), route([[1, 3]])).isnan().all(), "expert 3 was not there"
    assert device.read_counters() == [Counters(3, 3, 0, 0)]


def test_slots_are_poisoned_until_they_are_written() -> None:
    device = make(KINDS["gated"])
    assert device._slots.view(torch.float32).isnan().all()
    assert device.num_bytes == 4 * 4096


def test_prefetched_experts_are_hits() -> None:
    experts = KINDS["gated"]
    device = make(experts, num_layers=2, num_slots=[4, 5])
    wanted = make(experts, num_layers=2).run(1, experts, rows(1), route([[5, 2]]))
    device.prefetch(1, torch.tensor([[5, 2]]))
    assert torch.equal(device.run(1, experts, rows(1), route([[5, 2]])), wanted)
    assert device.read_counters() == [Counters(0, 0, 0, 0), Counters(2, 0, 2, 2)]
    device.tables.check()


def test_no_more_is_prefetched_than_allowed() -> None:
    device = make(KINDS["gated"], max_prefetches=2)
    device.prefetch(0, torch.tensor([[5, 2, 1]]), most=1)
    assert device.tables.slot_of[0].tolist() == [-1, -1, -1, -1, -1, 0]
    device.prefetch(0, torch.tensor([[5, 2, 1, 0]]))
    assert device.tables.slot_of[0].tolist() == [-1, 2, 1, -1, -1, 0]


def test_a_module_may_have_fewer_experts_than_the_layer_with_most() -> None:
    device = make(KINDS["gated"])
    smaller = PlainExperts(num_experts=3)
    device.run(0, smaller, rows(1), route([[1, 3]]))
    assert device.read_counters()[0].misses == 1, "expert 3 is a placeholder to this module"


def test_steps_too_long_are_refused() -> None:
    experts = KINDS["gated"]
    device = make(experts)
    with pytest.raises(ValueError, match="the most are 16"):
        device.run(0, experts, rows(MAX_TOKENS + 1), route([[0, 1]] * (MAX_TOKENS + 1)))
    assert device.read_counters() == [Counters(0, 0, 0, 0)]


def test_a_long_inputs_visit_serves_its_last_token_and_counts_the_others() -> None:
    experts = KINDS["gated"]
    device = make(experts)
    device.run(0, experts, rows(1), route([[0, 1]]))
    device.prefetch(0, torch.tensor([[2, 3]]))
    is_wanted = torch.tensor([True, False, True, False, True, True])
    device.visit(0, torch.tensor([[5, 2]]), is_wanted, num_experts=6)
    device.tables.check()
    # Expert 2 was there, 5 was not and took the place of one of the stalest; 0 is counted, 4 too.
    assert device.tables.slot_of[0].tolist() in ([-1, 1, 2, 3, -1, 0], [0, -1, 2, 3, -1, 1])
    slot = int(device.tables.slot_of[0, 5])
    assert torch.equal(device.memory(0).slots[slot], device.memory(0).host[5])
    counters = device.read_counters()[0]
    assert counters.hits + counters.misses == 6
    assert counters.misses == (4 if slot else 5)
    assert counters.used_prefetches == 1
    # A guess that somebody else than the last token wanted was right as well, and once.
    for _ in range(2):
        device.visit(0, torch.tensor([[9, 9]]), torch.arange(5) == 3, num_experts=5)
        assert device.read_counters()[0].used_prefetches == 2
        assert not device.tables.is_fresh.any()
    assert device.read_counters()[0].hits == counters.hits + 2
    assert int(device.tables.clock[0]) == 4, "each is a visit like any other"


def test_what_comes_by_is_held_in_empty_slots() -> None:
    experts = KINDS["gated"]
    device = make(experts)
    device.run(0, experts, rows(1), route([[0, 1]]))
    blocks = device.memory(0).host.clone()
    device.hold(0, Chunk([5, 2, 4], blocks, [5, 2, 4]), {5: 3, 4: 2})
    device.tables.check()
    assert device.tables.slot_of[0].tolist() == [0, 1, -1, -1, 2, 3]
    device.memory(0).host.fill_(0xFF)
    assert not device.run(0, experts, rows(1), route([[5, 4]])).isnan().any()
    assert device.read_counters()[0] == Counters(2, 2, 0, 0)


def test_slots_are_divided_anew_and_empty() -> None:
    experts = KINDS["gated"]
    device = make(experts, num_layers=2)
    routings = [route([[1, 2]]), route([[3, 0]], seed=1)]
    before = [device.run(layer, experts, rows(1), routings[layer]) for layer in range(2)]
    num_bytes = device.num_bytes
    for num_slots in ([2, 6], [6, 2], [2, 2], [4, 4]):
        device.divide(num_slots)
        assert device.tables.num_slots == tuple(num_slots)
        assert (device.tables.slot_of == -1).all()
        assert (device._slots == 0xFF).all(), "reading what was not written shows"
        assert [len(memory.slots) for memory in device._memory] == num_slots
        for layer in range(2):
            found = device.run(layer, experts, rows(1), routings[layer])
            assert torch.equal(found, before[layer])
        assert device.read_counters() == [Counters(0, 2, 0, 0)] * 2
        device.tables.check()
        assert device.num_bytes == num_bytes


def test_released_it_holds_neither_slots_nor_host_memory() -> None:
    experts = KINDS["gated"]
    device = make(experts)
    device.run(0, experts, rows(1), route([[0, 1]]))
    num_bytes, held = device.num_bytes, weakref.ref(device.memory(0).host._base)
    for _ in range(2):
        device.release()
        assert held() is None
        assert not device._slots.numel()
    assert device.num_bytes == num_bytes
    with pytest.raises(ForeloadError, match="closed"):
        device.run(0, experts, rows(1), route([[0, 1]]))


def test_slots_that_are_not_there_cannot_be_given() -> None:
    device = make(KINDS["gated"], num_layers=2)
    for num_slots in ([4, 5], [8]):
        with pytest.raises(ShapeError, match="of 8 slots"):
            device.divide(num_slots)
    with pytest.raises(ValueError, match="too few"):
        device.divide([8, 0])


def test_host_memory_that_does_not_fit_the_layouts_is_refused() -> None:
    layout = lay_out(KINDS["gated"], StoredFormat.FLOAT32, torch.float32, (16, 8))

    def build(*shape: int, dtype: torch.dtype = torch.uint8, layers: int = 1) -> None:
        DeviceExperts(
            [layout] * layers,
            torch.zeros(shape, dtype=dtype),
            num_slots=[4],
            sum_rules=[SumRule.HIDDEN],
            device="cpu",
        )

    build(1, 6, 4096)
    with pytest.raises(ShapeError, match="uint8"):
        build(1, 6, 1024, dtype=torch.float32)
    with pytest.raises(ShapeError, match="4096 bytes"):
        build(1, 6, 4095)
    with pytest.raises(ShapeError, match="2 layouts"):
        build(1, 6, 4096, layers=2)
