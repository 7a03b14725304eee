"""A draft is built whole or not at all, is read only where it belongs, and resembles its model."""

from __future__ import annotations

import json
import shutil
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch
from streaming import StreamedExperts, read_expert

import zoo
from foreload.errors import CheckpointError, ForeloadError, TransferError
from foreload.memory.checkpoint import CheckpointIndex
from foreload.model.draft_files import build_draft, draft_folder, has_draft, read_draft
from foreload.model.draft_layout import DRAFT_BITS, draft_bytes, pack_expert
from foreload.model.hf import load_model
from foreload.ops.cpu import draft_forward

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from foreload.model.draft import DraftExperts
    from foreload.model.hf import LoadedModel

KINDS = tuple(DRAFT_BITS)
# Of random weights, the worst there are; relative to the true experts' output.
MOST_ERROR = {"int4": 0.25, "int8": 0.03}


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint: Path) -> LoadedModel:
    return load_model(tiny_checkpoint)


def build(loaded: LoadedModel, folder: Path, kind: str = "int4", **settings: Any) -> None:
    build_draft(loaded.sites, loaded.plans, loaded.spec.identity, folder, kind, **settings)


def read(loaded: LoadedModel, folder: Path, kind: str = "int4") -> DraftExperts:
    return read_draft(loaded.sites, loaded.plans, loaded.spec.identity, folder, kind)


@pytest.fixture(scope="module")
def folders(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A draft of each kind."""
    found = {kind: tmp_path_factory.mktemp("drafts") / kind for kind in KINDS}
    for kind, folder in found.items():
        build(loaded, folder, kind)
    return found


def make_inputs(loaded: LoadedModel, layer: int, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Give hidden states and a routing that takes every expert in turn."""
    site = loaded.sites[layer]
    down = next(t for t in loaded.plans[layer][0].tensors if t.name == "down_proj")
    width = down.shape[1] if site.experts.is_transposed else down.shape[0]
    generator = torch.Generator().manual_seed(layer)
    hidden = torch.randn(num_tokens, width, generator=generator).to(loaded.model.dtype)
    index = torch.arange(2 * num_tokens).view(num_tokens, 2) % site.num_experts
    weights = 0.2 + torch.rand(num_tokens, 2, generator=generator)
    return hidden, index, weights.to(loaded.model.dtype)


def errors_of(loaded: LoadedModel, draft: DraftExperts, num_tokens: int) -> list[float]:
    """Give, per layer, the draft's distance from the true experts, as a share of their output."""
    run_true = StreamedExperts(loaded.plans)
    errors = []
    for site in loaded.sites:
        inputs = make_inputs(loaded, site.layer, num_tokens)
        with torch.no_grad():
            wanted = run_true(site.layer, site.experts, *inputs).float()
            found = draft.run_layer(site.layer, site.experts, *inputs)
        assert found.dtype == loaded.model.dtype
        errors.append(float((found.float() - wanted).norm() / wanted.norm()))
    return errors


class TestBuilding:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("num_tokens", [1, 32])
    def test_a_draft_comes_close_to_the_true_experts(
        self, loaded: LoadedModel, folders: dict[str, Path], kind: str, num_tokens: int
    ) -> None:
        errors = errors_of(loaded, read(loaded, folders[kind], kind), num_tokens)
        assert 0 < min(errors) <= max(errors) < MOST_ERROR[kind]

    @pytest.mark.parametrize("kind", KINDS)
    def test_every_expert_is_itself(
        self, loaded: LoadedModel, folders: dict[str, Path], kind: str
    ) -> None:
        draft, run_true = read(loaded, folders[kind], kind), StreamedExperts(loaded.plans)
        site = loaded.sites[2]
        hidden = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
        for expert in range(site.num_experts):
            routing = torch.tensor([[expert]]), torch.ones(1, 1)
            wanted = run_true(2, site.experts, hidden, *routing)
            found = draft.run_layer(2, site.experts, hidden, *routing)
            assert (found - wanted).norm() < 0.5 * wanted.norm(), expert

    @pytest.mark.parametrize("kind", KINDS)
    def test_its_memory_is_what_was_announced(
        self, loaded: LoadedModel, folders: dict[str, Path], kind: str
    ) -> None:
        announced = draft_bytes(loaded.sites, loaded.plans, kind)
        draft = read(loaded, folders[kind], kind)
        assert draft.num_bytes == announced == CheckpointIndex.open(folders[kind]).total_bytes
        assert draft.kind == kind
        whole = loaded.spec.total_expert_bytes  # float32
        assert DRAFT_BITS[kind] / 32 < announced / whole < 1.35 * DRAFT_BITS[kind] / 32

    def test_progress_comes_to_all_bytes(self, loaded: LoadedModel, tmp_path: Path) -> None:
        seen: list[tuple[int, int]] = []
        build(
            loaded, tmp_path / "draft", search=False, progress=lambda *numbers: seen.append(numbers)
        )
        whole = sum(plan.read_bytes for layer in loaded.plans for plan in layer)
        assert [done for done, _ in seen] == sorted(done for done, _ in seen)
        assert {total for _, total in seen} == {whole}
        assert seen[-1][0] == whole
        assert len(seen) == 64

    def test_importance_is_asked_for_by_layer_and_matrix(
        self, loaded: LoadedModel, folders: dict[str, Path], tmp_path: Path
    ) -> None:
        asked: set[tuple[int, str]] = set()

        def importance(layer: int, name: str) -> Tensor | None:
            asked.add((layer, name))
            if (layer, name) != (0, "first"):
                return None
            return torch.linspace(0.0, 1.0, 64) ** 8

        build(loaded, tmp_path / "draft", importance=importance)
        assert asked == {(layer, name) for layer in range(4) for name in ("first", "down")}
        plain, weighted = (read(loaded, f) for f in (folders["int4"], tmp_path / "draft"))
        for layer in range(4):
            inputs = make_inputs(loaded, layer, 4)
            experts = loaded.sites[layer].experts
            one, other = (d.run_layer(layer, experts, *inputs) for d in (plain, weighted))
            assert torch.equal(one, other) is (layer > 0)

    def test_what_was_there_before_is_replaced(self, loaded: LoadedModel, tmp_path: Path) -> None:
        folder = tmp_path / "draft"
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "leftover").write_text("of another time")
        build(loaded, folder, "int8")
        assert not (folder / "leftover").exists()
        assert max(errors_of(loaded, read(loaded, folder, "int8"), 4)) < MOST_ERROR["int8"]

    @pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
    @pytest.mark.parametrize("had_one", [False, True])
    def test_an_interrupted_build_leaves_nothing_behind(
        self,
        loaded: LoadedModel,
        folders: dict[str, Path],
        tmp_path: Path,
        error: type[BaseException],
        had_one: bool,
    ) -> None:
        folder = tmp_path / "draft"
        if had_one:
            shutil.copytree(folders["int8"], folder)
        before = set(threading.enumerate())

        def progress(done: int, total: int) -> None:
            if done > total / 2:
                raise error

        with pytest.raises(error):
            build(loaded, folder, "int8", progress=progress)
        assert list(tmp_path.iterdir()) == []
        assert not has_draft(folder)
        assert set(threading.enumerate()) == before

    def test_an_expert_that_cannot_be_read_fails_the_build(
        self, checkpoint_copy: Path, tmp_path: Path
    ) -> None:
        loaded = load_model(checkpoint_copy)
        for file in checkpoint_copy.glob("*.safetensors"):
            with file.open("r+b") as stream:
                stream.truncate(4096)
        drafts = tmp_path / "drafts"
        with pytest.raises(TransferError, match="ended early"):
            build(loaded, drafts / "draft")
        assert list(drafts.iterdir()) == []


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


def edit_config(**values: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return edit


def cut_weights(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as stream:
        stream.truncate(100_000)


def flip_the_first_codes(folder: Path) -> None:
    path = folder / "model.safetensors"
    entry = CheckpointIndex.open(folder)["layers.0.experts.0.draft"]
    raw = bytearray(path.read_bytes())
    for place in range(entry.offset, entry.offset + 64):
        raw[place] ^= 0xFF
    path.write_bytes(raw)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "no folder": shutil.rmtree,
    "no description": lambda folder: (folder / "config.json").unlink(),
    "a description that is none": lambda folder: (folder / "config.json").write_text("[1"),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "weights cut off": cut_weights,
    "other codes": flip_the_first_codes,
    "another version": edit_config(version=0),
    "another witness": edit_config(witness=[0.0] * 64),
    "no witness": edit_config(witness=None),
    "other formats": edit_config(formats=[]),
}


class TestReading:
    @pytest.mark.parametrize("damage", DAMAGES)
    @pytest.mark.parametrize("kind", KINDS)
    def test_a_damaged_draft_is_refused_with_what_to_do(
        self,
        loaded: LoadedModel,
        folders: dict[str, Path],
        tmp_path: Path,
        kind: str,
        damage: str,
    ) -> None:
        folder = shutil.copytree(folders[kind], tmp_path / "draft")
        read(loaded, folder, kind)
        DAMAGES[damage](folder)
        with pytest.raises(CheckpointError) as caught:
            read(loaded, folder, kind)
        assert "built again" in str(caught.value.hint)

    def test_another_kind_is_refused(self, loaded: LoadedModel, folders: dict[str, Path]) -> None:
        with pytest.raises(CheckpointError, match="another checkpoint"):
            read(loaded, folders["int4"], "int8")

    def test_another_checkpoints_draft_is_refused(
        self, loaded: LoadedModel, folders: dict[str, Path]
    ) -> None:
        with pytest.raises(CheckpointError, match="another checkpoint"):
            read_draft(loaded.sites, loaded.plans, "0" * 64, folders["int4"], "int4")

    def test_reading_changes_nothing_on_disk(
        self, loaded: LoadedModel, folders: dict[str, Path]
    ) -> None:
        files = {path: path.read_bytes() for path in folders["int4"].iterdir()}
        draft = read(loaded, folders["int4"])
        draft._layers[0].first[0].weight.fill_(0)  # type: ignore[union-attr]
        assert {path: path.read_bytes() for path in folders["int4"].iterdir()} == files


class TestFolders:
    def test_checkpoints_kinds_and_processors_have_folders_of_their_own(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one = draft_folder(tmp_path, "a" * 64, "int4")
        assert draft_folder(tmp_path, "a" * 64, "int4") == one
        others = {
            draft_folder(tmp_path, "b" * 64, "int4"),
            draft_folder(tmp_path, "a" * 64, "int8"),
        }
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "Other CPU")
        others.add(draft_folder(tmp_path, "a" * 64, "int4"))
        assert len(others | {one}) == 4
        assert all(folder.is_relative_to(tmp_path) for folder in others)

    def test_a_draft_is_there_once_it_is_built(
        self, folders: dict[str, Path], tmp_path: Path
    ) -> None:
        assert has_draft(folders["int4"])
        assert not has_draft(tmp_path)
        assert not has_draft(tmp_path / "nowhere")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_tokens", [1, 16])
def test_without_kernels_it_gives_the_same_but_for_rounding(
    loaded: LoadedModel, folders: dict[str, Path], kind: str, num_tokens: int
) -> None:
    draft = read(loaded, folders[kind], kind)
    bare = draft.without_kernels()
    assert (bare.kind, bare.num_bytes) == (draft.kind, draft.num_bytes)
    for site in loaded.sites:
        inputs = make_inputs(loaded, site.layer, num_tokens)
        one, other = (d.run_layer(site.layer, site.experts, *inputs) for d in (draft, bare))
        assert (one - other).norm() < 0.01 * one.norm()


def test_a_draft_that_was_let_go_of_says_so(loaded: LoadedModel, folders: dict[str, Path]) -> None:
    draft = read(loaded, folders["int4"])
    draft.release()
    assert draft.num_bytes == 0
    with pytest.raises(ForeloadError, match="engine is closed"):
        draft.run_layer(0, loaded.sites[0].experts, *make_inputs(loaded, 0, 1))
    draft.release()


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
