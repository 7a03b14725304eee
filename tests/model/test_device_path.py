"""The parts of the device path are built together, hold the checkpoint, and go together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from fakes import make_engine
from foreload import engine as engine_module
from foreload.errors import CapacityError, ConfigError, TransferError
from foreload.memory import cuda
from foreload.memory.host_arena import HostArena
from foreload.model import device_path
from foreload.model.device_plan import device_layouts
from foreload.ops import present
from foreload.ops.device_layout import unpack_expert

if TYPE_CHECKING:
    from pathlib import Path

    from foreload import Engine

NUM_EXPERTS = 64


def open_device(directory: Path, **settings: Any) -> Engine:
    settings = {"expert_memory": "50%", "predictor": "lookahead", **settings}
    return make_engine(directory, device="cpu", orchestration="device", **settings)


def test_host_memory_holds_the_checkpoints_experts(tiny_checkpoint: Path, tiny_model: Any) -> None:
    with open_device(tiny_checkpoint) as engine:
        path = engine._device
        assert path is not None
        layouts = device_layouts(engine._loaded)
        for site in engine._loaded.sites:
            own = tiny_model.get_submodule(site.name)
            for expert in range(site.num_experts):
                block = path._host.blocks[site.layer, expert]
                parts = unpack_expert(layouts[site.layer], block)
                assert torch.equal(parts["gate_up_proj"], own.gate_up_proj[expert])
                assert torch.equal(parts["down_proj"], own.down_proj[expert])


@pytest.mark.parametrize("near", [{0}, None], ids=str)
def test_host_memory_is_filled_by_the_processors_near_the_device(
    tiny_checkpoint: Path, near: set[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[torch.device] = []
    given: list[Any] = []
    own_fill = HostArena.fill

    def cpus_near(device: torch.device) -> set[int] | None:
        asked.append(device)
        return near

    def fill(self: HostArena, *args: Any, cpus: Any = "not told", **kwargs: Any) -> None:
        given.append(cpus)
        own_fill(self, *args, **kwargs)

    monkeypatch.setattr(cuda, "cpus_near", cpus_near)
    monkeypatch.setattr(HostArena, "fill", fill)
    with open_device(tiny_checkpoint):
        assert asked == [torch.device("cpu")]
        assert given == [near]


def test_sizes_are_those_of_the_settings(tiny_checkpoint: Path) -> None:
    with open_device(tiny_checkpoint) as engine:
        assert engine.num_slots == NUM_EXPERTS // 2
        assert engine.expert_memory_bytes == engine.config.expert_memory
        assert engine.config.orchestration == "device"
        assert engine.config.host_memory == 2 * engine.expert_memory_bytes
        assert engine.config.eviction == "lru"


def test_a_request_gets_a_cache_no_larger_than_the_context(tiny_checkpoint: Path) -> None:
    with open_device(tiny_checkpoint, context=300) as engine:
        path = engine._device
        assert path is not None
        with path.lend_step(17) as short:
            assert short is not None
            assert short.num_positions == 256
        # As a power of two it would be 512.
        with path.lend_step(290) as long:
            assert long is not None
            assert long.num_positions == 300


def test_what_the_host_alone_can_do_is_refused_by_name(tiny_checkpoint: Path) -> None:
    with open_device(tiny_checkpoint) as engine:
        for name in ("tiers", "runtime"):
            with pytest.raises(ConfigError, match="needs the host"):
                getattr(engine, name)


@pytest.mark.parametrize(
    "settings",
    [
        {"eviction": "none"},
        {"device": "cuda"},
    ],
    ids=str,
)
def test_bad_combinations_are_refused_before_anything_is_allocated(
    tiny_checkpoint: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_load(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("nothing may be loaded")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(engine_module, "load_model", no_load)
    with pytest.raises(ConfigError):
        engine_module.Engine.from_pretrained(
            tiny_checkpoint, **{"device": "cpu", "orchestration": "device", **settings}
        )


@pytest.mark.parametrize(
    ("predictor", "verb"), [("default-vectors", "calibrate"), ("estimator", "train-estimator")]
)
def test_what_a_predictor_needs_and_nobody_made_is_named(
    tiny_checkpoint: Path, predictor: str, verb: str
) -> None:
    with pytest.raises(ConfigError, match=f"predictor='{predictor}' needs") as caught:
        open_device(tiny_checkpoint, predictor=predictor)
    assert f"foreload {verb}" in str(caught.value.hint)


def test_a_cuda_device_chooses_among_who_is_there_in_one_kernel() -> None:
    triton_present = pytest.importorskip("foreload.ops.triton_present")
    assert device_path._make_choice(torch.device("cuda:1")) is triton_present.choose_present
    assert device_path._make_choice(torch.device("cpu")) is present.choose_present


def test_without_a_predictor_speculate_when_still_knows_the_routers(tiny_checkpoint: Path) -> None:
    how = {"predictor": "none", "policy": "speculate-when", "confidence": 0.0}
    with open_device(tiny_checkpoint, expert_memory="50%", **how) as engine:
        result = engine.generate([5, 6, 7], max_new_tokens=12)
        fraction = result.stats.speculated_fraction
        assert fraction is not None
        assert 0 < fraction < 1
        path = engine._device
        assert path is not None
        assert all(rule is not None for rule in path.policy._score_rules)
        assert not path.policy._logits, "every layer has used its router's"
    assert not any(site.router._forward_hooks for site in engine._loaded.sites)


def test_host_memory_that_is_too_small_says_by_how_much(tiny_checkpoint: Path) -> None:
    with pytest.raises(CapacityError, match="do not all fit") as caught:
        open_device(tiny_checkpoint, host_memory="50%")
    assert caught.value.setting == "host_memory"
    assert caught.value.needed_bytes > caught.value.available_bytes > 0


def test_an_interrupted_opening_leaves_nothing_behind(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released: list[HostArena] = []
    own_release = HostArena.release

    def fail(self: HostArena, *args: Any, **kwargs: Any) -> None:
        raise TransferError("the disk is gone")

    def release(self: HostArena) -> None:
        released.append(self)
        own_release(self)

    monkeypatch.setattr(HostArena, "fill", fail)
    monkeypatch.setattr(HostArena, "release", release)
    with pytest.raises(TransferError):
        open_device(tiny_checkpoint)
    assert released


def test_host_memory_stays_until_the_device_has_nothing_left_to_copy(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    own_release = HostArena.release

    def release(self: HostArena) -> None:
        done.append("released")
        own_release(self)

    monkeypatch.setattr(HostArena, "release", release)
    monkeypatch.setattr(cuda, "wait_idle", lambda device: done.append(str(device)))
    engine = open_device(tiny_checkpoint)
    done.clear()
    engine.close()
    assert done[:2] == ["cpu", "released"]


def test_a_model_without_a_static_cache_runs_without_steps(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with open_device(tiny_checkpoint) as engine:
        wanted = engine.generate([5, 6, 7], max_new_tokens=8).token_ids
    monkeypatch.setattr(device_path, "can_be_static", lambda model: False)
    with open_device(tiny_checkpoint) as engine:
        assert engine.generate([5, 6, 7], max_new_tokens=8).token_ids == wanted
        engine.generate([5, 6, 7], max_new_tokens=2)
    assert len([r for r in caplog.records if "not captured" in r.message]) == 1


def test_progress_is_told_while_host_memory_is_filled(tiny_checkpoint: Path) -> None:
    told: list[tuple[int, int]] = []
    drafted: list[tuple[int, int]] = []
    engine = engine_module.Engine.from_pretrained(
        tiny_checkpoint,
        device="cpu",
        orchestration="device",
        expert_memory="150%",
        host_progress=lambda done, total: told.append((done, total)),
        draft="int8",
        draft_progress=lambda done, total: drafted.append((done, total)),
    )
    with engine:
        for seen in (told, drafted):
            assert seen[-1][0] == seen[-1][1] > 0
            assert len(seen) == NUM_EXPERTS
