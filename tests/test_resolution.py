"""Memory and drafts: every "auto" becomes a number, and what cannot be is refused beforehand."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

import psutil
import pytest
import torch

import zoo
from foreload import resolution
from foreload.config import EngineConfig
from foreload.errors import (
    CapacityError,
    CheckpointError,
    ConfigError,
    MissingExtraError,
    UnsupportedModelError,
)
from foreload.memory import cuda
from foreload.model.device_plan import (
    block_bytes,
    device_layouts,
    draft_layouts,
    kv_bytes_per_token,
    workspace_bytes,
)
from foreload.model.draft_files import draft_folder, has_draft
from foreload.model.draft_layout import draft_bytes
from foreload.model.hf import load_model
from foreload.resolution import (
    device_slots,
    least_memory,
    prepare_draft,
    resolve,
    slot_size,
)
from foreload.trace.format import TraceWriter
from foreload.trace.record import LayerVisit, TraceInfo

if TYPE_CHECKING:
    from pathlib import Path

    from foreload.model.hf import LoadedModel


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint: Path) -> LoadedModel:
    return load_model(tiny_checkpoint)


def config(**settings: Any) -> EngineConfig:
    return EngineConfig(**{"expert_memory": "80%", **settings})


def working_bytes(loaded: LoadedModel, context: int = 512) -> int:
    """Give what a request of so many tokens takes of a device, beside weights and experts."""
    return context * kv_bytes_per_token(loaded) + workspace_bytes(loaded, context, context)


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


class TestNoEffect:
    """What comes to nothing is said; what nobody asked for is not."""

    HOST: ClassVar = {"device": "cpu", "orchestration": "host"}
    DEVICE: ClassVar = {"device": "cpu", "orchestration": "device"}

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"context": 513}, "context=513 is more than the 512 tokens the model was built for"),
            ({**HOST, "host_memory": "1GiB"}, "host_memory='1GiB' has no effect"),
            ({**DEVICE, "lookahead_layers": 3}, "lookahead_layers=3 has no effect"),
            ({"confidence": 0.5}, "confidence=0.5 has no effect with policy='exact'"),
            ({"confidence": 0.5, "policy": "speculate"}, "confidence=0.5 has no effect"),
        ],
        ids=str,
    )
    def test_a_setting_that_comes_to_nothing_is_named(
        self,
        loaded: LoadedModel,
        caplog: pytest.LogCaptureFixture,
        settings: dict[str, Any],
        message: str,
    ) -> None:
        resolve(config(**settings), loaded)
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert message in caplog.text

    @pytest.mark.parametrize(
        "settings",
        [
            {},
            HOST,
            DEVICE,
            {"context": 512},
            {**DEVICE, "host_memory": "1GiB"},
            {**DEVICE, "lookahead_layers": 1},
            {**HOST, "lookahead_layers": 3},
            {"confidence": 0.5, "policy": "speculate-when"},
            {"confidence": 0.9, "policy": "exact"},
        ],
        ids=str,
    )
    def test_defaults_and_what_has_an_effect_are_not(
        self, loaded: LoadedModel, caplog: pytest.LogCaptureFixture, settings: dict[str, Any]
    ) -> None:
        resolved = resolve(config(**settings), loaded)
        resolve(resolved, loaded)
        assert caplog.text == ""


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

    @pytest.mark.parametrize("damage", ["version", "witness"])
    def test_one_of_another_time_is_left_alone(
        self,
        loaded: LoadedModel,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        damage: str,
    ) -> None:
        monkeypatch.setattr(resolution, "draft_pays", lambda *figures, **slots: True)
        for kind in ("int4", "int8"):
            prepare_draft(config(draft=kind), loaded, cache_dir=tmp_path)
        told = draft_folder(tmp_path, loaded.spec.identity, "int4") / "config.json"
        told.write_text(json.dumps({**json.loads(told.read_text()), damage: [0.0]}))
        assert resolve(config(draft="auto"), loaded, cache_dir=tmp_path).draft == "int8"
        assert "the int4 draft is left alone" in caplog.text
        with pytest.raises(CheckpointError, match="delete that folder"):
            prepare_draft(config(draft="int4"), loaded, cache_dir=tmp_path)

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


class TestDevice:
    """What a device that decides for itself is given; the CUDA device is a stand-in."""

    FREE = 10 << 30

    @pytest.fixture
    def _has_cuda(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cuda, "has_device", lambda: True)
        monkeypatch.setattr(
            cuda, "find_device", lambda name: torch.device("cuda:0" if "cuda" in name else "cpu")
        )
        monkeypatch.setattr(cuda, "free_bytes", lambda device: self.FREE)
        monkeypatch.setattr(resolution, "find_spec", lambda name: object())

    def layer_slot(self, loaded: LoadedModel) -> int:
        return loaded.spec.num_moe_layers * block_bytes(device_layouts(loaded))

    def test_every_layer_has_as_many_slots(self, loaded: LoadedModel) -> None:
        resolved = resolve(config(device="cpu", orchestration="device"), loaded)
        slot = self.layer_slot(loaded)
        assert resolved.expert_memory == int(0.8 * 16) * slot
        assert resolved.host_memory == 16 * slot
        assert (resolved.device, resolved.orchestration) == ("cpu", "device")
        assert resolve(resolved, loaded) == resolved, "resolving again changes nothing"

    def test_one_expert_per_layer_is_the_least(self, loaded: LoadedModel) -> None:
        least = self.layer_slot(loaded)
        asked = {"device": "cpu", "orchestration": "device"}
        assert resolve(config(**asked, expert_memory=least), loaded).expert_memory == least
        with pytest.raises(CapacityError, match="one expert in each of 4 layers") as caught:
            resolve(config(**asked, expert_memory=least - 1), loaded)
        assert caught.value.needed_bytes == least

    @pytest.mark.parametrize("kind", ["int4", "int8"])
    def test_a_draft_is_a_part_of_the_memory(self, loaded: LoadedModel, kind: str) -> None:
        asked = {"device": "cpu", "orchestration": "device", "draft": kind}
        layouts = device_layouts(loaded)
        drafted = 4 * 16 * block_bytes(draft_layouts(loaded, layouts, kind))
        slot = self.layer_slot(loaded)
        resolved = resolve(config(**asked, expert_memory="90%", num_draft_tokens=5), loaded)
        assert (resolved.draft, resolved.num_draft_tokens) == (kind, 5)
        slots = (int(0.9 * 16 * slot) - drafted) // slot
        assert resolved.expert_memory == drafted + slots * slot
        assert device_slots(resolved, loaded) == (slots,) * loaded.spec.num_moe_layers
        assert resolve(resolved, loaded) == resolved, "resolving again changes nothing"
        # No more is taken than draft and experts need.
        most = resolve(config(**asked, expert_memory="500%"), loaded)
        assert most.expert_memory == drafted + 16 * slot
        least = drafted + slot
        assert resolve(config(**asked, expert_memory=least), loaded).expert_memory == least
        with pytest.raises(CapacityError, match=f"beside the {kind} draft") as caught:
            resolve(config(**asked, expert_memory=least - 1), loaded)
        assert caught.value.needed_bytes == least

    def test_a_draft_is_made_when_the_engine_is_opened(
        self, loaded: LoadedModel, tmp_path: Path
    ) -> None:
        asked = {"device": "cpu", "orchestration": "device", "expert_memory": "100%"}
        resolved = resolve(config(**asked, draft="int8"), loaded, cache_dir=tmp_path)
        assert prepare_draft(resolved, loaded, cache_dir=tmp_path) is None
        assert not list(tmp_path.iterdir())
        resolved = resolve(config(**asked, draft="auto"), loaded, cache_dir=tmp_path)
        assert (resolved.draft, resolved.num_draft_tokens) == ("none", "auto")

    def test_more_than_the_machine_has_is_refused(
        self, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = 16 * self.layer_slot(loaded)
        memory = SimpleNamespace(available=whole + (1 << 30) + 4096)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
        asked = config(device="cpu", orchestration="device", expert_memory="auto")
        with pytest.raises(CapacityError, match="one expert in each"):
            resolve(asked, loaded)
        memory.available = whole
        with pytest.raises(CapacityError, match="do not all fit") as caught:
            resolve(asked, loaded)
        assert caught.value.setting == "host_memory"
        memory.available = 2 * whole - 4096
        with pytest.raises(CapacityError, match="less free memory") as caught:
            resolve(asked.with_values(expert_memory="100%", host_memory="100%"), loaded)
        assert caught.value.setting == "expert_memory"

    def test_host_memory_is_a_ceiling(self, loaded: LoadedModel) -> None:
        asked = config(device="cpu", orchestration="device")
        resolve(asked.with_values(host_memory="100%"), loaded)
        with pytest.raises(CapacityError, match="do not all fit"):
            resolve(asked.with_values(host_memory="99%"), loaded)

    @pytest.mark.usefixtures("_has_cuda")
    def test_auto_takes_the_cuda_device_and_what_it_has_to_spare(
        self, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        slot = self.layer_slot(loaded)
        resolved = resolve(config(expert_memory="auto"), loaded)
        assert (resolved.device, resolved.orchestration) == ("cuda:0", "device")
        assert resolved.expert_memory == 16 * slot
        streamed = 2 * loaded.spec.num_experts * block_bytes(device_layouts(loaded))
        kept = loaded.spec.dense_bytes + streamed + (1 << 30) + working_bytes(loaded)
        monkeypatch.setattr(cuda, "free_bytes", lambda device: kept + 5 * slot + 1)
        assert resolve(config(expert_memory="auto"), loaded).expert_memory == 5 * slot

    @pytest.mark.usefixtures("_has_cuda")
    @pytest.mark.parametrize("orchestration", ["host", "device"])
    def test_memory_is_kept_for_the_context_whatever_the_experts_are_given(
        self, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, orchestration: str
    ) -> None:
        asked = config(device="cuda", orchestration=orchestration, expert_memory="100%")
        assert resolve(asked, loaded).context == 512, "the model's own"
        short = asked.with_values(context=64)
        assert resolve(short, loaded).context == 64
        assert resolve(asked.with_values(context=4096), loaded).context == 512
        whole = int(resolve(asked, loaded).expert_memory)
        streamed = 2 * loaded.spec.num_experts * block_bytes(device_layouts(loaded))
        kept = loaded.spec.dense_bytes + (1 << 30) + working_bytes(loaded, 64)
        kept += streamed if orchestration == "device" else 0
        monkeypatch.setattr(cuda, "free_bytes", lambda device: kept + whole)
        assert resolve(short, loaded).expert_memory == whole
        with pytest.raises(CapacityError, match="less free memory than expert_memory") as caught:
            resolve(asked, loaded)
        more = working_bytes(loaded, 512) - working_bytes(loaded, 64)
        assert caught.value.available_bytes == max(whole - more, 0)

    @pytest.mark.usefixtures("_has_cuda")
    @pytest.mark.parametrize(
        "setting",
        [{"policy": "speculate-when"}, {"policy": "speculate"}, {"predictor": "estimator"}],
        ids=str,
    )
    def test_it_decides_for_itself_under_every_policy_and_predictor(
        self, loaded: LoadedModel, setting: dict[str, Any]
    ) -> None:
        for device in ("auto", "cuda"):
            resolved = resolve(config(device=device, **setting), loaded)
            assert (resolved.device, resolved.orchestration) == ("cuda:0", "device")

    @pytest.mark.usefixtures("_has_cuda")
    @pytest.mark.parametrize(
        "setting",
        [
            {"eviction": "lfu"},
            {"orchestration": "host"},
            {"device": "cpu"},
            {"host_memory": 4095},
        ],
        ids=str,
    )
    def test_auto_leaves_it_alone_where_these_settings_do_not_run(
        self, loaded: LoadedModel, setting: dict[str, Any]
    ) -> None:
        resolved = resolve(config(**setting), loaded)
        assert (resolved.device, resolved.orchestration) == ("cpu", "host")

    @pytest.mark.usefixtures("_has_cuda")
    def test_a_cuda_device_that_was_asked_for_is_not_quietly_left_alone(
        self, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with pytest.raises(CapacityError, match="no room for one expert"):
            resolve(config(device="cuda", host_memory=4095), loaded)
        with pytest.raises(CapacityError, match="do not all fit"):
            resolve(config(device="cuda", orchestration="device", host_memory="50%"), loaded)
        monkeypatch.setattr(resolution, "find_spec", lambda name: None)
        with pytest.raises(MissingExtraError, match="triton"):
            resolve(config(device="cuda"), loaded)
        assert resolve(config(), loaded).device == "cpu"

    def test_without_a_cuda_device_auto_is_the_host(self, loaded: LoadedModel) -> None:
        resolved = resolve(config(), loaded)
        assert (resolved.device, resolved.orchestration) == ("cpu", "host")


class TestSlotPlan:
    def trace(self, loaded: LoadedModel, folder: Path, moving: tuple[int, ...] = (2,)) -> Path:
        """Write a trace in which some layers go round all experts, and the others stay."""
        spec = loaded.spec
        info = TraceInfo(
            model="tiny", top_k=4, expert_bytes=(spec.expert_bytes,) * 4, identity=spec.identity
        )
        path = folder / "trace.jsonl"
        with TraceWriter(path, info, num_layers=4, num_experts=16) as writer:
            for token in range(40):
                there = [(4 * token + place) % 16 for place in range(4)]
                rows = [there if layer in moving else [0, 1, 2, 3] for layer in range(4)]
                writer.write_step([LayerVisit.from_routing([row], 16) for row in rows])
            writer.finish()
        return path

    def test_a_trace_becomes_slots(self, loaded: LoadedModel, tmp_path: Path) -> None:
        path = self.trace(loaded, tmp_path)
        size = block_bytes(device_layouts(loaded))
        asked = config(
            device="cpu", orchestration="device", expert_memory=30 * size, slot_plan=str(path)
        )
        resolved = resolve(asked, loaded)
        assert resolved.slot_plan == (5, 5, 16, 4)
        assert resolved.expert_memory == 30 * size
        assert device_slots(resolved, loaded) == (5, 5, 16, 4)
        path.unlink()
        assert resolve(resolved, loaded) == resolved, "resolving again changes nothing"

    def test_a_plan_divides_what_a_draft_leaves(self, loaded: LoadedModel, tmp_path: Path) -> None:
        layouts = device_layouts(loaded)
        drafted = 4 * 16 * block_bytes(draft_layouts(loaded, layouts, "int4"))
        asked = config(
            device="cpu",
            orchestration="device",
            expert_memory=drafted + 13 * 4 * block_bytes(layouts),
            draft="int4",
            slot_plan=str(self.trace(loaded, tmp_path, (1, 2))),
        )
        slots = device_slots(resolve(asked, loaded), loaded)
        assert (min(slots), sum(slots)) == (10, 52)
        assert slots[1] == slots[2] > 13

    def test_the_hosts_slots_cannot_be_divided(self, loaded: LoadedModel) -> None:
        with pytest.raises(ConfigError, match="here the host decides"):
            resolve(config(device="cpu", slot_plan=(4, 4, 4, 4)), loaded)

    def test_a_trace_of_another_model_is_refused(self, loaded: LoadedModel, tmp_path: Path) -> None:
        path = self.trace(loaded, tmp_path)
        path.write_text(path.read_text().replace(loaded.spec.identity, "other"))
        with pytest.raises(ConfigError, match="another checkpoint"):
            resolve(config(device="cpu", orchestration="device", slot_plan=str(path)), loaded)


class TestStaged:
    """A CUDA device, a stand-in, whose experts come as the host's loop decides."""

    FREE = 10 << 30

    @pytest.fixture(autouse=True)
    def _has_cuda(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cuda, "has_device", lambda: True)
        monkeypatch.setattr(
            cuda, "find_device", lambda name: torch.device("cuda:0" if "cuda" in name else "cpu")
        )
        monkeypatch.setattr(cuda, "free_bytes", lambda device: self.FREE)
        monkeypatch.setattr(resolution, "find_spec", lambda name: object())

    def test_both_memories_are_whole_experts(self, loaded: LoadedModel) -> None:
        size = slot_size(loaded.plans)
        asked = config(device="cuda", orchestration="host", host_memory="30%")
        resolved = resolve(asked, loaded)
        assert (resolved.device, resolved.orchestration) == ("cuda:0", "host")
        assert resolved.expert_memory == int(0.8 * 64) * size
        assert resolved.host_memory == int(0.3 * 64) * size
        assert resolve(resolved, loaded) == resolved, "resolving again changes nothing"

    def test_slots_cannot_be_divided(self, loaded: LoadedModel) -> None:
        asked = config(device="cuda", host_memory="50%", slot_plan=(4, 4, 4, 4))
        with pytest.raises(ConfigError, match="here the host decides"):
            resolve(asked, loaded)

    def test_no_triton_is_needed(
        self, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(resolution, "find_spec", lambda name: None)
        assert resolve(config(device="cuda", orchestration="host"), loaded).device == "cuda:0"

    @pytest.mark.parametrize("device", ["auto", "cuda"])
    def test_auto_is_the_host_where_not_all_experts_fit(
        self, loaded: LoadedModel, device: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level("INFO", "foreload")
        resolved = resolve(config(device=device, host_memory="50%"), loaded)
        assert (resolved.device, resolved.orchestration) == ("cuda:0", "host")
        assert resolved.host_memory == 32 * slot_size(loaded.plans)
        assert "the host decides" in caplog.text
        assert "do not all fit" in caplog.text
        assert resolve(config(device=device), loaded).orchestration == "device"

    def test_auto_is_the_host_where_a_setting_wants_it(
        self, loaded: LoadedModel, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level("INFO", "foreload")
        resolved = resolve(config(device="cuda", eviction="lfu"), loaded)
        assert (resolved.device, resolved.orchestration) == ("cuda:0", "host")
        assert "wants it" in caplog.text

    def test_a_part_of_the_machine_is_left_unlocked(
        self, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        size = slot_size(loaded.plans)
        memory = SimpleNamespace(available=40 * size)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
        asked = config(device="cuda", orchestration="host")
        assert resolve(asked, loaded).host_memory == 30 * size
        assert resolve(asked.with_values(host_memory=40 * size), loaded).host_memory == 40 * size
        with pytest.raises(CapacityError, match="less free memory than host_memory") as caught:
            resolve(asked.with_values(host_memory=41 * size), loaded)
        assert caught.value.setting == "host_memory"
        with pytest.raises(CapacityError, match="no room for one expert") as caught:
            resolve(asked.with_values(host_memory=size - 1), loaded)
        assert (caught.value.needed_bytes, caught.value.available_bytes) == (size, size - 1)

    def test_one_layers_needs_are_the_least(
        self, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        least = least_memory(loaded)
        asked = config(device="cuda", orchestration="host", expert_memory=least)
        assert resolve(asked, loaded).expert_memory == least
        with pytest.raises(CapacityError, match="one layer's needs"):
            resolve(asked.with_values(expert_memory=least - 1), loaded)
        kept = loaded.spec.dense_bytes + (1 << 30) + working_bytes(loaded)
        size = slot_size(loaded.plans)
        monkeypatch.setattr(cuda, "free_bytes", lambda device: kept + 7 * size + 1)
        spare = asked.with_values(expert_memory="auto")
        assert resolve(spare, loaded).expert_memory == 7 * size
        monkeypatch.setattr(cuda, "free_bytes", lambda device: loaded.spec.dense_bytes)
        with pytest.raises(CapacityError, match="the device has less free memory"):
            resolve(asked, loaded)

    def test_a_draft_that_is_only_allowed_is_left_out(self, loaded: LoadedModel) -> None:
        asked = config(device="cuda", orchestration="host", draft="auto", num_draft_tokens=3)
        resolved = resolve(asked, loaded)
        assert (resolved.draft, resolved.num_draft_tokens) == ("none", "auto")

    @pytest.mark.parametrize("kind", ["int4", "int8"])
    def test_a_draft_is_a_part_of_the_memory(
        self, loaded: LoadedModel, kind: str, tmp_path: Path
    ) -> None:
        size = slot_size(loaded.plans)
        drafted = 4 * 16 * block_bytes(draft_layouts(loaded, device_layouts(loaded), kind))
        asked = config(device="cuda", orchestration="host", draft=kind, expert_memory="90%")
        resolved = resolve(asked.with_values(num_draft_tokens=5), loaded)
        assert (resolved.device, resolved.draft, resolved.num_draft_tokens) == ("cuda:0", kind, 5)
        asked_bytes = int(0.9 * 64 * size)
        assert resolved.expert_memory == (asked_bytes - drafted) // size * size + drafted
        assert resolve(resolved, loaded) == resolved, "resolving again changes nothing"
        assert prepare_draft(resolved, loaded, cache_dir=tmp_path) is None, "the engine makes it"
        assert not list(tmp_path.iterdir())
        most = resolve(asked.with_values(expert_memory="500%"), loaded)
        assert most.expert_memory == drafted + 64 * size
        least = drafted + least_memory(loaded)
        assert resolve(asked.with_values(expert_memory=least), loaded).expert_memory == least
        with pytest.raises(CapacityError, match=f"beside the {kind} draft") as caught:
            resolve(asked.with_values(expert_memory=least - 1), loaded)
        assert caught.value.needed_bytes == least

    def test_a_draft_needs_triton(
        self, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(resolution, "find_spec", lambda name: None)
        with pytest.raises(MissingExtraError, match="triton"):
            resolve(config(device="cuda", orchestration="host", draft="int4"), loaded)

    def test_a_draft_runs_here_where_host_memory_is_too_small_for_the_experts(
        self, loaded: LoadedModel
    ) -> None:
        asked = config(device="cuda", draft="int4", expert_memory="90%", host_memory="50%")
        resolved = resolve(asked, loaded)
        assert (resolved.orchestration, resolved.draft) == ("host", "int4")

    def test_a_model_that_cannot_go_back_has_none(self, tmp_path: Path) -> None:
        recurrent = load_model(zoo.save_tiny("qwen3_next", tmp_path / "model").path)
        asked = config(device="cuda:0", orchestration="host", draft="int4")
        with pytest.raises(UnsupportedModelError, match="cannot go back"):
            prepare_draft(asked, recurrent, cache_dir=tmp_path)
