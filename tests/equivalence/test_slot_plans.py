"""However slots are divided over layers, and whenever they are divided anew: the same text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

import zoo
from fake_cuda import FakeCuda
from fakes import make_engine
from foreload.errors import ConfigError, ForeloadError
from foreload.recording import record_trace
from foreload.trace.layer_slots import plan_from_trace
from foreload.trace.read import read_trace

if TYPE_CHECKING:
    from pathlib import Path

    from foreload import Engine

PROMPT = list(range(40, 60))
UNEQUAL = (4, 8, 16, 5)
NUM_NEW = 16


def open_device(directory: Path, **settings: Any) -> Engine:
    given = {"expert_memory": "60%", "predictor": "lookahead", "dtype": "float32", **settings}
    return make_engine(directory, device="cpu", orchestration="device", **given)


def text_of(engine: Engine, **sampling: Any) -> list[int]:
    tokens = engine.generate(PROMPT, max_new_tokens=NUM_NEW, **sampling).token_ids
    assert len(tokens) == NUM_NEW
    return tokens


def check(engine: Engine) -> None:
    path = engine._device
    assert path is not None
    path._experts.tables.check()
    assert not path.runtime._open


@pytest.fixture(scope="module")
def trace_path(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Routing of the tiny checkpoint, recorded."""
    path = tmp_path_factory.mktemp("trace") / "trace.jsonl.gz"
    with make_engine(tiny_checkpoint, expert_memory="100%") as engine:
        tokens = torch.randint(3, 300, (90,), generator=torch.Generator().manual_seed(1)).tolist()
        record_trace(engine, tokens, path, num_prompt_tokens=10, max_tokens=90)
    return path


@pytest.mark.parametrize(("family", "predictor"), [("qwen3_moe", "none"), ("gpt_oss", "lookahead")])
def test_texts_are_those_of_equal_slots(family: str, predictor: str, tmp_path: Path) -> None:
    directory = zoo.save_family(family, tmp_path, torch.float32).path
    with make_engine(directory, dtype="float32", expert_memory="50%") as host:
        experts, top_k = host.spec.num_experts, host.spec.top_k
        slots = [top_k + layer % (experts - top_k + 1) for layer in range(host.spec.num_moe_layers)]
        wanted = [text_of(host, **how) for how in ({}, {"temperature": 0.8, "seed": 3})]
    settings = {"slot_plan": slots, "expert_memory": "100%", "predictor": predictor}
    with open_device(directory, **settings) as device:
        assert device.slots_per_layer == tuple(slots)
        assert device.expert_memory_bytes == device.config.expert_memory
        assert device.num_slots == sum(slots)
        found = [text_of(device, **how) for how in ({}, {"temperature": 0.8, "seed": 3})]
        check(device)
    assert found == wanted


@pytest.mark.parametrize("plan", [[8.0] * 4, [True] * 4, ["8"] * 4, 5, None, [8] * 3])
def test_a_plan_that_is_none_changes_nothing(tiny_checkpoint: Path, plan: Any) -> None:
    with open_device(tiny_checkpoint) as engine:
        before = engine.slots_per_layer, engine.num_slots, engine.config
        wanted = text_of(engine)
        with pytest.raises(ConfigError, match="slot_plan"):
            engine.replan_slots(plan)
        assert (engine.slots_per_layer, engine.num_slots, engine.config) == before
        assert text_of(engine) == wanted


def test_a_plan_may_be_an_array(tiny_checkpoint: Path) -> None:
    with open_device(tiny_checkpoint) as engine:
        wanted = text_of(engine)
        number = engine.slots_per_layer[0]
        engine.replan_slots(torch.tensor([number] * len(engine.slots_per_layer)))
        assert engine.slots_per_layer == engine.config.slot_plan
        assert {type(each) for each in engine.slots_per_layer} == {int}
        assert text_of(engine) == wanted


def test_a_trace_plans_the_slots(tiny_checkpoint: Path, trace_path: Path) -> None:
    trace = read_trace(trace_path)
    with open_device(tiny_checkpoint, slot_plan=str(trace_path)) as engine:
        total = int(0.6 * 64)
        assert engine.slots_per_layer == plan_from_trace(trace, total, least=engine.spec.top_k)
        assert engine.num_slots == total
        assert engine.config.slot_plan == engine.slots_per_layer
        found = text_of(engine)
        check(engine)
    with open_device(tiny_checkpoint) as engine:
        assert text_of(engine) == found


@pytest.mark.parametrize("policy", ["exact", "speculate"])
def test_slots_are_divided_anew_between_requests(
    tiny_checkpoint: Path, trace_path: Path, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = FakeCuda()
    with open_device(tiny_checkpoint, expert_memory="75%", policy=policy) as engine:
        path = engine._device
        assert path is not None
        assert path._steps is not None
        path._steps._is_captured = True
        cuda.install(monkeypatch)
        wanted = text_of(engine)
        moved = engine.stats["bytes_moved"]
        host = path._host.blocks.data_ptr()
        for plan in (UNEQUAL, read_trace(trace_path), trace_path, "equal"):
            engine.replan_slots(plan)
            path._experts.tables.check()
            assert (path._experts.tables.slot_of == -1).all()
            assert text_of(engine) == wanted
            check(engine)
            assert path._host.blocks.data_ptr() == host
            now = engine.stats
            assert now["bytes_moved"] > moved
            assert 0 <= now["hit_rate"] <= 1
            assert now["wasted_bytes"] >= 0
            moved = now["bytes_moved"]
        assert engine.slots_per_layer == (12, 12, 12, 12)
        assert engine.config.slot_plan == "equal"
        assert len(cuda.graphs) == 5, "captured again after each"


def test_an_engine_plans_from_what_it_has_recorded_itself(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with open_device(tiny_checkpoint) as engine:
        wanted = text_of(engine)
        record_trace(engine, wanted * 3, tmp_path / "own", num_prompt_tokens=8)
        engine.replan_slots(tmp_path / "own")
        trace = read_trace(tmp_path / "own")
        assert engine.slots_per_layer == plan_from_trace(trace, 36, least=engine.spec.top_k)
        assert text_of(engine) == wanted


def test_all_memory_is_there_again_after_a_narrow_plan(tiny_checkpoint: Path) -> None:
    with open_device(tiny_checkpoint) as engine:
        engine.replan_slots((4, 4, 4, 4))
        assert engine.num_slots == 16
        engine.replan_slots("equal")
        assert engine.slots_per_layer == (9, 9, 9, 9)


def test_guesses_that_a_new_plan_drops_are_wasted(tiny_checkpoint: Path) -> None:
    with open_device(tiny_checkpoint) as engine:
        text_of(engine)
        before = engine.stats
        path = engine._device
        assert path is not None
        unseen = int(path._experts.tables.is_fresh.sum())
        engine.replan_slots(UNEQUAL)
        size = path._experts._slots.shape[1]
        assert engine.stats["wasted_bytes"] == before["wasted_bytes"] + unseen * size
        assert engine.stats["bytes_moved"] == before["bytes_moved"]


def test_a_running_request_is_not_disturbed(tiny_checkpoint: Path) -> None:
    with open_device(tiny_checkpoint) as engine:
        wanted = text_of(engine)
        stream = engine.stream(PROMPT, max_new_tokens=NUM_NEW)
        found = [*next(stream).token_ids]
        with pytest.raises(ForeloadError, match="while a request is running"):
            engine.replan_slots(UNEQUAL)
        for chunk in stream:
            found += chunk.token_ids
        assert found == wanted
        engine.replan_slots(UNEQUAL)
        stream = engine.stream(PROMPT, max_new_tokens=NUM_NEW)
        next(stream)
        stream.close()
        engine.replan_slots("equal")


def test_a_bad_plan_changes_nothing(tiny_checkpoint: Path) -> None:
    with open_device(tiny_checkpoint) as engine:
        for plan in ((0, 8, 16, 5), (16, 16, 16, 16), (4, 4)):
            with pytest.raises(ConfigError):
                engine.replan_slots(plan)
        assert engine.slots_per_layer == (9, 9, 9, 9)
        assert engine.config.slot_plan == "equal"
    with pytest.raises(ForeloadError, match="closed"):
        engine.replan_slots("equal")
    with (
        make_engine(tiny_checkpoint, expert_memory="50%") as host,
        pytest.raises(ConfigError, match="needs the device"),
    ):
        host.replan_slots("equal")


def test_rounds_go_as_far_after_a_new_plan(tiny_checkpoint: Path, trace_path: Path) -> None:
    settings = {"expert_memory": "90%", "draft": "int4", "num_draft_tokens": 3}
    with open_device(tiny_checkpoint, **settings) as engine:
        wanted = text_of(engine)
        for plan in (trace_path, (1, 2, 1, 1)):
            engine.replan_slots(plan)
            before = engine.metrics.num_rounds
            assert text_of(engine) == wanted
            assert engine.metrics.num_rounds > before
