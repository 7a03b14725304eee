"""Every kind of expert can be laid out quantised, in the memory that was announced."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from drafting import KINDS, MOST_ERROR, build, errors_of, make_inputs, read
from streaming import StreamedExperts, read_expert

import zoo
from foreload.memory.checkpoint import CheckpointIndex
from foreload.model.draft_layout import DRAFT_BITS, draft_bytes, pack_expert
from foreload.model.hf import load_model
from foreload.ops.cpu import draft_forward

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from foreload.model.hf import LoadedModel


@pytest.mark.parametrize("kind", KINDS)
def test_its_memory_is_what_was_announced(
    loaded: LoadedModel, folders: dict[str, Path], kind: str
) -> None:
    announced = draft_bytes(loaded.sites, loaded.plans, kind)
    draft = read(loaded, folders[kind], kind)
    assert draft.num_bytes == announced == CheckpointIndex.open(folders[kind]).total_bytes
    assert draft.kind == kind
    whole = loaded.spec.total_expert_bytes  # float32
    assert DRAFT_BITS[kind] / 32 < announced / whole < 1.35 * DRAFT_BITS[kind] / 32


FAMILIES: dict[str, Callable[[Path], tuple[zoo.TinyCheckpoint, torch.dtype]]] = {
    "biases, transposed, float32": lambda path: (
        zoo.save_family("gpt_oss", path, torch.float32),
        torch.float32,
    ),
    "biases, transposed, bfloat16": lambda path: (
        zoo.save_family("gpt_oss", path, torch.bfloat16),
        torch.bfloat16,
    ),
    "two bytes, read as four": lambda path: (
        zoo.save_family("mixtral", path, torch.bfloat16),
        torch.float32,
    ),
    "no gate": lambda path: (zoo.save_tiny("nemotron_h", path), torch.float32),
    "stored in MXFP4": lambda path: (
        zoo.save_quantised("mxfp4", "gpt_oss", path),
        torch.bfloat16,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_layout_has_a_draft(tmp_path: Path, family: str, kind: str) -> None:
    checkpoint, dtype = FAMILIES[family](tmp_path / "model")
    loaded = load_model(checkpoint.path, dtype=dtype)
    assert loaded.model.dtype == dtype
    build(loaded, tmp_path / "draft", kind)
    draft = read(loaded, tmp_path / "draft", kind)
    for num_tokens in (1, 9):
        assert max(errors_of(loaded, draft, num_tokens)) < MOST_ERROR[kind]
    bare = draft.without_kernels()
    assert max(errors_of(loaded, bare, 9)) < MOST_ERROR[kind]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arch", ["gpt_oss", "mixtral"])
def test_one_expert_is_packed_as_a_layer_of_one(tmp_path: Path, arch: str, kind: str) -> None:
    loaded = load_model(zoo.save_family(arch, tmp_path).path)
    site, plan = loaded.sites[1], loaded.plans[1][3]
    layer = pack_expert(site.experts, plan, read_expert(plan), DRAFT_BITS[kind])
    assert len(layer.first) == len(layer.down) == 1
    hidden, _, weights = make_inputs(loaded, 1, 5)
    index = torch.tensor([[3]] * 5)
    wanted = StreamedExperts(loaded.plans)(1, site.experts, hidden, index, weights[:, :1])
    found = draft_forward(layer, site.experts, hidden, torch.zeros_like(index), weights[:, :1])
    assert (found - wanted).norm() < MOST_ERROR[kind] * wanted.norm()
