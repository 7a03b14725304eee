"""A draft on the device is the checkpoint's experts, quantised; it lets go of its memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

import zoo
from foreload.errors import ForeloadError
from foreload.memory.arena import SlotArena, slot_bytes
from foreload.memory.disk import DiskBackend
from foreload.model.device_plan import device_layouts, draft_layouts, resident_draft_bytes
from foreload.model.hf import load_model
from foreload.model.resident_draft import ResidentDraft, make_resident_draft
from foreload.model.selfcheck import find_sum_rules
from foreload.ops.device_layout import pack_expert, unpack_expert
from foreload.ops.reference import SumRule
from foreload.types import Routing
from plain_experts import reference

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from foreload.model.hf import LoadedModel

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["qwen3_moe", "gpt_oss"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp(request.param)
    return load_model(zoo.save_family(request.param, folder, torch.float32).path)


def make(
    loaded: LoadedModel, kind: str, progress: Callable[[int, int], None] | None = None
) -> ResidentDraft:
    rules = find_sum_rules(loaded.sites, loaded.model.dtype)
    return make_resident_draft(loaded, kind, CPU, sum_rules=rules, progress=progress)


def read(loaded: LoadedModel, layer: int, expert: int) -> dict[str, Tensor]:
    """Read one expert by itself."""
    plan = loaded.plans[layer][expert]
    arena = SlotArena(1, slot_bytes(plan))
    backend = DiskBackend(arena)
    for piece in range(backend.num_pieces(plan)):
        backend.copy_piece(plan, 0, piece)
    backend.close()
    return arena.tensors(0, plan)


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_it_computes_with_every_expert_of_the_checkpoint_quantised(
    loaded: LoadedModel, kind: str
) -> None:
    told: list[tuple[int, int]] = []
    draft = make(loaded, kind, lambda done, total: told.append((done, total)))
    spec = loaded.spec
    assert (draft.kind, draft.num_bytes) == (kind, resident_draft_bytes(loaded, kind))
    total = sum(plan.read_bytes for row in loaded.plans for plan in row)
    assert len(told) == spec.num_moe_layers * spec.num_experts
    assert told[-1] == (total, total)
    rules = find_sum_rules(loaded.sites, loaded.model.dtype)
    layouts = draft_layouts(loaded, device_layouts(loaded), kind)
    hidden = torch.randn((2, spec.hidden_size), generator=torch.Generator().manual_seed(1))
    index = torch.tensor([[spec.num_experts - 1, 0], [2, 1]])
    weights = torch.tensor([[0.75, 0.25], [0.5, 0.5]])
    for layer in (0, spec.num_moe_layers - 1):
        experts = loaded.sites[layer].experts
        held = []
        for expert in range(spec.num_experts):
            block = torch.zeros(layouts[layer].num_bytes, dtype=torch.uint8)
            pack_expert(layouts[layer], read(loaded, layer, expert), block, search=True)
            held.append(unpack_expert(layouts[layer], block))
        with torch.inference_mode():
            wanted = reference(experts, held, hidden, Routing(index, weights), rules[layer])
            found = draft.run_layer(layer, experts, hidden, index, weights)
        assert torch.equal(found, wanted)


def test_it_cannot_run_once_it_is_let_go_of(loaded: LoadedModel) -> None:
    draft = make(loaded, "int8")
    draft.release()
    draft.release()
    assert draft.num_bytes == 0
    one = torch.zeros((1, loaded.spec.hidden_size))
    with pytest.raises(ForeloadError, match="engine is closed"):
        draft.run_layer(0, loaded.sites[0].experts, one, torch.tensor([[0]]), torch.ones(1, 1))


def test_without_a_draft_it_takes_nothing(loaded: LoadedModel) -> None:
    assert resident_draft_bytes(loaded, "none") == 0
    assert 0 < resident_draft_bytes(loaded, "int4") <= resident_draft_bytes(loaded, "int8")
    assert set(find_sum_rules(loaded.sites, torch.float32)) <= set(SumRule)
