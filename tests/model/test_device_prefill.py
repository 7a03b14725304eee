"""Long inputs: residents from their slots, others once over the bus, and the right ones stay."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from foreload.memory.expert_stream import ExpertStream
from foreload.metrics import Metrics
from foreload.model.device_prefill import DevicePrefill
from foreload.ops.device_experts import DeviceExperts
from foreload.ops.device_layout import StoredFormat, expert_layout, pack_expert, unpack_expert
from foreload.ops.grouped import TwinGrouped
from foreload.ops.reference import SumRule
from foreload.types import Routing
from plain_experts import KINDS, PlainExperts, random_weights, reference, shapes_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from foreload.ops.grouped import Chunk

LAYERS, EXPERTS, SIZES = 2, 6, (16, 8)
CPU = torch.device("cpu")


class WatchedKernels(TwinGrouped):
    """Remembers who came in which chunk, and may fail on the way."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []
        self.fails_at: int | None = None

    def forward(self, memory: Any, pairs: Any, chunks: Iterable[Chunk], *rest: Any) -> Tensor:
        self.seen = []

        def watched() -> Iterable[Chunk]:
            for chunk in chunks:
                if len(self.seen) == self.fails_at:
                    raise RuntimeError("broken off")
                self.seen.append(list(chunk.experts))
                yield chunk

        return super().forward(memory, pairs, watched(), *rest)


class Setup:
    def __init__(self, num_slots: int = 3, *, kind: str = "gated", chunk_blocks: int = 2) -> None:
        self.experts: PlainExperts = KINDS[kind]
        shapes = shapes_of(self.experts, *SIZES)
        layout = expert_layout(self.experts, shapes, StoredFormat.FLOAT32, dtype=torch.float32)
        self.host = torch.zeros(LAYERS, EXPERTS, layout.num_bytes, dtype=torch.uint8)
        for layer in range(LAYERS):
            for expert in range(EXPERTS):
                weights = random_weights(self.experts, *SIZES, seed=100 * layer + expert)
                pack_expert(layout, weights, self.host[layer, expert])
        self.true = self.host.clone()
        self.layout, self.size, self.metrics = layout, layout.num_bytes, Metrics()
        self.slots = DeviceExperts(
            [layout] * LAYERS,
            self.host,
            num_slots=[num_slots] * LAYERS,
            sum_rules=[SumRule.HIDDEN] * LAYERS,
            device=CPU,
        )
        self.stream = ExpertStream(self.host, CPU, chunk_blocks=chunk_blocks)
        self.kernels = WatchedKernels()
        self.prefill = DevicePrefill(
            self.slots, self.stream, self.kernels, block_bytes=self.size, metrics=self.metrics
        )

    def routing(self, index: Tensor) -> Routing:
        generator = torch.Generator().manual_seed(int(index.sum()))
        return Routing(index, torch.rand(index.shape, generator=generator))

    def run(self, layer: int, index: Tensor) -> None:
        """Run a layer, and compare with the reference."""
        routing = self.routing(index)
        hidden = torch.randn(len(index), SIZES[0], generator=torch.Generator().manual_seed(1))
        found = self.prefill.run(layer, self.experts, hidden, routing)
        weights = [unpack_expert(self.layout, block) for block in self.true[layer]]
        assert torch.equal(found, reference(self.experts, weights, hidden, routing, SumRule.HIDDEN))
        self.check()

    def check(self) -> None:
        """Whoever is said to be in a slot is there, whole."""
        self.slots.tables.check()
        for layer in range(LAYERS):
            for expert, slot in enumerate(self.slots.tables.slot_of[layer].tolist()):
                if slot >= 0:
                    block = self.slots.memory(layer).slots[slot]
                    assert torch.equal(block, self.true[layer, expert]), (layer, expert)

    def residents(self, layer: int) -> set[int]:
        return {e for e, s in enumerate(self.slots.tables.slot_of[layer].tolist()) if s >= 0}

    def counts(self, layer: int) -> tuple[int, int]:
        counters = self.slots.read_counters()[layer]
        return counters.hits, counters.misses


def tokens(*rows: tuple[int, int], num: int = 20) -> Tensor:
    """Give `num` tokens whose last ones are these, before them the first one again and again."""
    return torch.tensor([rows[0]] * (num - len(rows)) + list(rows))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_slots", "chunk_blocks"), [(2, 1), (3, 2), (4, 6), (6, 2)])
def test_any_kind_any_number_of_slots_any_chunks(
    kind: str, num_slots: int, chunk_blocks: int
) -> None:
    setup = Setup(num_slots, kind=kind, chunk_blocks=chunk_blocks)
    generator = torch.Generator().manual_seed(num_slots)
    for num_tokens in (17, 40, 3):
        for layer in range(LAYERS):
            # Placeholders too.
            setup.run(layer, torch.randint(0, EXPERTS + 2, (num_tokens, 2), generator=generator))


def test_residents_are_read_from_their_slots_and_nobody_travels_twice() -> None:
    setup = Setup(num_slots=2, chunk_blocks=2)
    setup.run(0, tokens((0, 1)))
    assert setup.residents(0) == {0, 1}
    assert setup.counts(0) == (0, 2)
    setup.host[0, :2] = 0xFF
    setup.run(0, tokens((2, 4), (3, 4), (0, 1)))
    assert setup.kernels.seen == [[0, 1], [2, 3], [4]]
    assert setup.counts(0) == (2, 5)


def test_the_last_token_takes_slots_and_empty_ones_are_filled_with_whom_the_last_tokens_want() -> (
    None
):
    setup = Setup(num_slots=4)
    # Long ago everybody wanted 1; lately more tokens wanted 4 than 5, and the last one 2 and 0.
    setup.run(0, tokens((1, 3), *[(4, 5)] * 20, *[(4, 3)] * 11, (2, 0), num=150))
    assert setup.residents(0) == {0, 2, 4, 5}
    stamp, slot_of = setup.slots.tables.stamp[0], setup.slots.tables.slot_of[0]
    assert [int(stamp[slot_of[expert]]) for expert in (0, 2, 4, 5)] == [1, 1, 0, 0]
    # The least wanted is the first to leave.
    setup.run(0, tokens((1, 1)))
    assert setup.residents(0) == {0, 1, 2, 4}
    # No slot is empty any more: only the last token's come.
    setup.run(0, tokens((5, 3), (0, 2)))
    assert setup.residents(0) == {0, 1, 2, 4}


def test_the_next_layer_is_begun_where_it_will_want_everybody() -> None:
    setup = Setup(num_slots=2, chunk_blocks=2)
    everybody = tokens((0, 1), (2, 3), (4, 5), (0, 1))
    setup.run(1, tokens((0, 1)))
    setup.run(0, everybody)
    # Layer 1 has 0 and 1; what the others are is on its way, and not read again.
    setup.host[1, 2:4] = 0xFF
    setup.run(1, everybody)
    assert setup.kernels.seen == [[0, 1], [2, 3], [4, 5]]
    assert setup.stream._ahead is None, "behind the last layer there is none"
    metrics = setup.metrics
    assert (metrics.num_prefetched, metrics.prefetch_bytes, metrics.wasted_bytes) == (0, 0, 0)
    setup.host[1, 2:4] = setup.true[1, 2:4]
    setup.run(0, everybody)
    # The last token's expert is brought to a slot before anybody asks what was sent ahead.
    setup.run(1, tokens((4, 5), (0, 2)))
    assert (metrics.num_prefetched, metrics.wasted_bytes) == (2, 2 * setup.size)
    assert metrics.prefetch_bytes == 2 * setup.size
    setup.run(0, tokens((0, 1), (2, 3)))
    assert setup.stream._ahead is None, "a few experts say nothing of the next layer"


@pytest.mark.parametrize("fails_at", [0, 1, 2])
def test_broken_off_in_the_middle_it_is_as_if_it_had_not_begun(fails_at: int) -> None:
    setup = Setup(num_slots=5, chunk_blocks=1)
    everybody = tokens((0, 1), (2, 3), (4, 5), (0, 1))
    setup.run(1, everybody)
    setup.kernels.fails_at = fails_at
    with pytest.raises(RuntimeError, match="broken off"):
        setup.run(0, everybody)
    setup.check()
    assert {0, 1} <= setup.residents(0)
    assert setup.stream._ahead is None
    setup.kernels.fails_at = None
    for layer in (0, 1, 1, 0):
        setup.run(layer, everybody)
    assert setup.metrics.wasted_bytes % setup.size == 0
