"""Memory and drafts: every "auto" becomes a number, and what cannot be is refused beforehand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

import zoo
from foreload import resolution
from foreload.config import EngineConfig
from foreload.errors import CapacityError, UnsupportedModelError
from foreload.model.draft import draft_bytes, draft_folder, has_draft
from foreload.model.hf import load_model
from foreload.resolution import least_memory, prepare_draft, resolve, slot_size

if TYPE_CHECKING:
    from pathlib import Path

    from foreload.model.hf import LoadedModel


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint: Path) -> LoadedModel:
    return load_model(tiny_checkpoint)


def config(**settings: Any) -> EngineConfig:
    return EngineConfig(**{"expert_memory": "80%", **settings})


def test_the_draft_is_a_part_of_the_memory(loaded: LoadedModel) -> None:
    size, drafted = slot_size(loaded.plans), draft_bytes(loaded.sites, loaded.plans, "int4")
    resolved = resolve(config(draft="int4"), loaded)
    assert resolved.draft == "int4"
    asked = int(0.8 * 64 * size)
    assert asked - size < int(resolved.expert_memory) <= asked
    assert (int(resolved.expert_memory) - drafted) % size == 0


def test_no_more_is_taken_than_draft_and_experts_need(loaded: LoadedModel) -> None:
    drafted = draft_bytes(loaded.sites, loaded.plans, "int8")
    resolved = resolve(config(draft="int8", expert_memory="400%"), loaded)
    assert resolved.expert_memory == 64 * slot_size(loaded.plans) + drafted


def test_too_little_for_draft_and_a_layer_is_refused(loaded: LoadedModel) -> None:
    least = least_memory(loaded, "int4")
    assert resolve(config(draft="int4", expert_memory=least), loaded).expert_memory == least
    with pytest.raises(CapacityError, match="beside the int4 draft") as caught:
        resolve(config(draft="int4", expert_memory=least - 1), loaded)
    assert caught.value.needed_bytes == least


class TestAuto:
    def test_nothing_is_built_for_it(self, loaded: LoadedModel, tmp_path: Path) -> None:
        assert resolve(config(draft="auto"), loaded, cache_dir=tmp_path).draft == "none"
        assert resolve(config(draft="auto"), loaded).draft == "none"
        asked = config(draft="auto", num_draft_tokens=4)
        assert resolve(asked, loaded).num_draft_tokens == "auto"
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("pays", [True, False])
    def test_a_draft_that_is_there_is_used_where_it_pays(
        self, loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pays: bool
    ) -> None:
        assert prepare_draft(config(draft="int8"), loaded, cache_dir=tmp_path) is not None
        monkeypatch.setattr(resolution, "draft_pays", lambda *figures, **slots: pays)
        resolved = resolve(config(draft="auto"), loaded, cache_dir=tmp_path)
        assert resolved.draft == ("int8" if pays else "none")
        assert int(resolved.expert_memory) <= 0.8 * 64 * slot_size(loaded.plans)

    def test_one_that_does_not_fit_is_left_out(self, loaded: LoadedModel, tmp_path: Path) -> None:
        prepare_draft(config(draft="int4"), loaded, cache_dir=tmp_path)
        least = least_memory(loaded)
        resolved = resolve(config(draft="auto", expert_memory=least), loaded, cache_dir=tmp_path)
        assert (resolved.draft, resolved.expert_memory) == ("none", least)


def test_a_draft_is_built_once_and_then_read(loaded: LoadedModel, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    asked = config(draft="int4")
    first = prepare_draft(
        asked, loaded, cache_dir=tmp_path, progress=lambda *done: seen.append(done)
    )
    assert first is not None
    assert seen[-1][0] == seen[-1][1] > 0
    assert has_draft(draft_folder(tmp_path, loaded.spec.identity, "int4"))
    count = len(seen)
    again = prepare_draft(
        asked, loaded, cache_dir=tmp_path, progress=lambda *done: seen.append(done)
    )
    assert again is not None
    assert again.num_bytes == first.num_bytes
    assert len(seen) == count


def test_a_model_that_cannot_go_back_has_no_draft(tmp_path: Path) -> None:
    recurrent = load_model(zoo.save_tiny("qwen3_next", tmp_path / "model").path)
    with pytest.raises(UnsupportedModelError, match="cannot go back"):
        prepare_draft(config(draft="int4"), recurrent, cache_dir=tmp_path)
    assert not (tmp_path / "draft").exists()
