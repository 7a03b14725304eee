"""The draft's experts are the host tier's, quantised; whom it named is kept where it was said."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from foreload.errors import ShapeError
from foreload.model.device_draft import DeviceDraft, quantise_experts
from foreload.ops.device_experts import ResidentExperts
from foreload.ops.device_layout import (
    ExpertLayout,
    StoredFormat,
    expert_layout,
    pack_expert,
    unpack_expert,
)
from foreload.ops.device_tables import ABSENT
from foreload.ops.reference import SumRule
from foreload.types import Routing
from plain_experts import KINDS, PlainExperts, random_weights, reference, shapes_of

SIZES = (64, 32)
CPU = torch.device("cpu")
LAYERS = 2


def lay_out(experts: PlainExperts, stored: StoredFormat) -> ExpertLayout:
    return expert_layout(experts, shapes_of(experts, *SIZES), stored, dtype=torch.float32)


def fill_host(experts: PlainExperts) -> tuple[ExpertLayout, Tensor]:
    layout = lay_out(experts, StoredFormat.FLOAT32)
    host = torch.zeros(LAYERS, experts.num_experts, layout.num_bytes, dtype=torch.uint8)
    for layer in range(LAYERS):
        for expert in range(experts.num_experts):
            weights = random_weights(experts, *SIZES, seed=100 * layer + expert)
            pack_expert(layout, weights, host[layer, expert])
    return layout, host


def make_draft(experts: PlainExperts, kind: str, most_tokens: int = 3) -> DeviceDraft:
    layout, host = fill_host(experts)
    quantised = lay_out(experts, StoredFormat(kind))
    numbers = [experts.num_experts] * LAYERS
    blocks = quantise_experts(host, [layout] * LAYERS, [quantised] * LAYERS, numbers, CPU)
    return DeviceDraft(
        kind,
        [quantised] * LAYERS,
        blocks,
        sum_rules=[SumRule.HIDDEN] * LAYERS,
        most_tokens=most_tokens,
        top_k=2,
    )


@pytest.mark.parametrize("kind", ["int4", "int8"])
@pytest.mark.parametrize("shape", KINDS)
def test_it_computes_with_the_quantised_experts(shape: str, kind: str) -> None:
    experts = KINDS[shape]
    draft = make_draft(experts, kind)
    layout = lay_out(experts, StoredFormat(kind))
    assert draft.num_bytes == LAYERS * experts.num_experts * layout.num_bytes
    hidden = torch.randn((1, SIZES[0]), generator=torch.Generator().manual_seed(1))
    routing = Routing(torch.tensor([[3, 1]]), torch.tensor([[0.75, 0.25]]))
    for layer in range(LAYERS):
        weights = []
        for expert in range(experts.num_experts):
            block = torch.zeros(layout.num_bytes, dtype=torch.uint8)
            full = random_weights(experts, *SIZES, seed=100 * layer + expert)
            pack_expert(layout, full, block, search=True)
            weights.append(unpack_expert(layout, block))
        wanted = reference(experts, weights, hidden, routing, SumRule.HIDDEN)
        assert torch.equal(draft.run(layer, experts, hidden, routing), wanted)


def test_searching_for_scales_comes_closer() -> None:
    experts = PlainExperts()
    layout = lay_out(experts, StoredFormat.INT4)
    full = random_weights(experts, *SIZES, seed=3)
    errors = []
    for search in (False, True):
        block = torch.zeros(layout.num_bytes, dtype=torch.uint8)
        pack_expert(layout, full, block, search=search)
        found = unpack_expert(layout, block)
        errors.append(float((found["down_proj"] - full["down_proj"]).square().sum()))
    assert errors[1] < 0.9 * errors[0]


def test_progress_is_told_and_absent_experts_are_left_out() -> None:
    experts = PlainExperts()
    layout, host = fill_host(experts)
    quantised = lay_out(experts, StoredFormat.INT8)
    told: list[tuple[int, int]] = []
    blocks = quantise_experts(
        host,
        [layout] * LAYERS,
        [quantised] * LAYERS,
        [2, 3],
        CPU,
        progress=lambda done, total: told.append((done, total)),
    )
    assert told == [(n * layout.num_bytes, 5 * layout.num_bytes) for n in range(1, 6)]
    assert (blocks[0, 2:] == 0xFF).all()
    assert (blocks[1, 3:] == 0xFF).all()


def test_a_rounds_routing_is_kept_token_by_token() -> None:
    draft = make_draft(PlainExperts(), "int8")
    draft.restart()
    none = [ABSENT, ABSENT]
    assert draft.note(0, torch.tensor([[4, 1]])).tolist() == [[4, 1], none, none]
    assert draft.note(1, torch.tensor([[0, 2]])).tolist() == [[0, 2], none, none]
    draft.end_token()
    assert draft.note(0, torch.tensor([[5, 4]])).tolist() == [[4, 1], [5, 4], none]
    assert draft.note(1, torch.tensor([[3]])).tolist() == [[0], [3], [ABSENT]], "fewer experts"
    for _ in range(5):
        draft.end_token()
    assert draft.note(0, torch.tensor([[6, 7]])).tolist()[-1] == [6, 7], "beyond the end"
    draft.restart()
    assert draft.note(0, torch.tensor([[1, 0]])).tolist() == [[1, 0], none, none]


def test_blocks_that_do_not_fit_are_refused() -> None:
    layout = lay_out(PlainExperts(), StoredFormat.INT8)
    for shape in ((1, 8, layout.num_bytes), (2, 8, layout.num_bytes - 1)):
        blocks = torch.zeros(shape, dtype=torch.uint8)
        with pytest.raises(ShapeError):
            ResidentExperts([layout] * 2, blocks, sum_rules=[SumRule.HIDDEN] * 2)
