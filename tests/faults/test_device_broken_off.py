"""Where the device decides, what breaks a forward off, or runs beside it, spoils nothing."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch

import zoo
from fakes import make_engine
from foreload.errors import CapacityError
from foreload.ops.device_experts import TwinKernels
from pretend_cuda import Graph, pretend_cuda

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PROMPT = [11, 16, 21, 3, 7]
LONG = [(7 * i * i + 3 * i + 1) % 29 + 1 for i in range(40)]
DEVICE = {"dtype": "float32", "orchestration": "device"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    zoo.save_small(tmp_path / "model")
    return tmp_path / "model"


def is_held(turns: Any) -> bool:
    """Tell whether another thread would have to wait."""
    found = []

    def ask() -> None:
        is_free = turns._lock.acquire(blocking=False)
        if is_free:
            turns._lock.release()
        found.append(not is_free)

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, torch.OutOfMemoryError])
@pytest.mark.parametrize(("name", "call"), [("fetch", 0), ("forward", 1), ("forward", 4)])
def test_experts_that_never_came_are_not_taken_for_there(
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException],
    name: str,
    call: int,
) -> None:
    settings = {**DEVICE, "device": "cpu", "expert_memory": "100%", "predictor": "lookahead"}
    with make_engine(model, **settings) as engine:
        wanted = engine.generate(PROMPT, max_new_tokens=6).token_ids
    own: Callable[..., Any] = getattr(TwinKernels, name)
    calls = []

    def break_off(*given: Any, **settings: Any) -> Any:
        calls.append(given)
        if len(calls) == call + 1:
            raise error("out of memory")
        return own(*given, **settings)

    with make_engine(model, **settings) as engine:
        monkeypatch.setattr(TwinKernels, name, break_off)
        with pytest.raises(BaseException, match="out of memory"):
            engine.generate(PROMPT, max_new_tokens=6)
        monkeypatch.undo()
        assert calls
        held = engine._device._experts.tables  # type: ignore[union-attr]
        assert (held.slot_of < 0).all(), "who has a slot may not be in it"
        held.check()
        assert not is_held(engine._device.runtime.turns)  # type: ignore[union-attr]
        for _ in range(2):
            assert engine.generate(PROMPT, max_new_tokens=6).token_ids == wanted


def test_an_error_outside_of_the_experts_leaves_them_where_they_are(model: Path) -> None:
    settings = {**DEVICE, "device": "cpu", "expert_memory": "100%"}
    with make_engine(model, **settings) as engine:
        engine.generate(PROMPT, max_new_tokens=2)
        with pytest.raises(Exception, match=r"dtype|type"):
            engine.model(input_ids=torch.zeros(1, 3))
        assert (engine._device._experts.tables.slot_of >= 0).any()  # type: ignore[union-attr]


def test_forwards_and_replays_take_turns(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay between two layers of a prompt would take the slots that it has counted on."""
    in_forward, in_replay, between = [], [], []
    with (
        pretend_cuda(monkeypatch),
        make_engine(model, device="cuda", expert_memory="50%", **DEVICE) as engine,
    ):
        path = engine._device
        assert path is not None
        turns = path.runtime.turns
        # Behind all layers, and no part of any.
        engine.model.lm_head.register_forward_pre_hook(
            lambda *given: in_forward.append(is_held(turns))
        )
        replay = Graph.replay

        def watched(graph: Graph) -> None:
            in_replay.append(is_held(turns))
            replay(graph)

        monkeypatch.setattr(Graph, "replay", watched)
        for _ in engine.stream(LONG, max_new_tokens=4):
            between.append(is_held(turns))
    assert in_forward
    assert in_replay
    assert all(in_forward)
    assert all(in_replay)
    assert not any(between), "another request may go on meanwhile"


def test_a_prefetch_that_nobody_joined_is_waited_for_by_the_next_turn(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken off between two layers: a replay has no joins but those it was captured with."""
    with (
        pretend_cuda(monkeypatch),
        make_engine(
            model, device="cuda", expert_memory="50%", predictor="lookahead", **DEVICE
        ) as engine,
    ):
        path = engine._device
        assert path is not None
        runtime = path.runtime
        second = engine.model.model.layers[1]

        def run_out(*given: Any) -> None:
            assert runtime._open, "the second layer's guess is on its way"
            raise torch.OutOfMemoryError("CUDA out of memory")

        hook = second.register_forward_pre_hook(run_out)
        joined: list[Any] = []
        join = runtime._side.join
        monkeypatch.setattr(
            runtime._side, "join", lambda mark: (joined.append(mark), join(mark))[1]
        )
        with pytest.raises(CapacityError):
            engine.forward(torch.tensor([[3]]), engine.make_cache())
        hook.remove()
        assert not runtime._open
        assert joined
        assert (path._experts.tables.slot_of >= 0).any(), "no layer was broken off in the middle"


def test_a_request_that_is_interrupted_while_it_waits_leaves_nothing_lent(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**DEVICE, "device": "cpu", "expert_memory": "100%"}
    with make_engine(model, **settings) as engine:
        path = engine._device
        assert path is not None
        steps = path._steps
        assert steps is not None

        def interrupt() -> Any:
            raise KeyboardInterrupt

        def request() -> None:
            with path.lend_step(20):
                assert len(steps._lent) == 1
                # As a wait for another thread's forward would be.
                monkeypatch.setattr(steps._turns, "taken", interrupt)

        with pytest.raises(KeyboardInterrupt):
            request()
        monkeypatch.undo()
        assert not steps._lent
        assert path._num_requests == 0
        engine.replan_slots("equal")
