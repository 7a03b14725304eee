"""Steps at fixed addresses give what any forward gives, captured (by a stand-in) or not.

No test here needs a CUDA device. The stand-in records the calls a capture makes and undoes what a
real capture would not have executed.
"""

from __future__ import annotations

import functools
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from foreload.errors import ForeloadError
from foreload.model.graph import StepGraph, StepGraphs
from foreload.model.kv_cache import clear_static, make_static_cache, rewind_static

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor
    from transformers import PreTrainedModel

CPU = torch.device("cpu")
PROMPT = [5, 9, 33, 7, 101]
ROOM = 64


def forward(model: PreTrainedModel, token_ids: Tensor, cache: Any) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=token_ids, past_key_values=cache, use_cache=True).logits[0]


@pytest.fixture
def run(tiny_model: PreTrainedModel) -> Any:
    return functools.partial(forward, tiny_model)


def make_step(run: Any, model: PreTrainedModel, **settings: Any) -> StepGraph:
    cache = make_static_cache(model, ROOM)
    return StepGraph(run, cache, CPU, num_positions=ROOM, **settings)


def wanted_logits(run: Any, model: PreTrainedModel, tokens: list[int]) -> list[Tensor]:
    cache = make_static_cache(model, ROOM)
    run(torch.tensor([PROMPT]), cache)
    return [run(torch.tensor([[token]]), cache)[0] for token in tokens]


def test_steps_give_what_forwards_give(run: Any, tiny_model: PreTrainedModel) -> None:
    step = make_step(run, tiny_model)
    tokens = [11, 12, 13]
    for _ in range(2):
        run(torch.tensor([PROMPT]), step.cache)
        for token, wanted in zip(tokens, wanted_logits(run, tiny_model, tokens), strict=True):
            assert torch.equal(step(token), wanted)
        step.clear()
    assert not step.is_captured


def test_the_likeliest_token_is_the_largest_logit(run: Any, tiny_model: PreTrainedModel) -> None:
    step = make_step(run, tiny_model)
    run(torch.tensor([PROMPT]), step.cache)
    (wanted,) = wanted_logits(run, tiny_model, [11])
    assert step.likeliest(11) == int(wanted.argmax())


def test_a_step_of_several_tokens_can_go_back(run: Any, tiny_model: PreTrainedModel) -> None:
    step = make_step(run, tiny_model, num_tokens=3)
    run(torch.tensor([PROMPT]), step.cache)
    logits, best = (value.clone() for value in step.run([11, 12, 13]))
    assert torch.equal(best, logits.argmax(-1))
    with torch.inference_mode():
        rewind_static(step.cache, 2)
    again, _ = step.run([12, 13, 14])
    torch.testing.assert_close(again[:2], logits[1:])
    with torch.inference_mode():
        clear_static(step.cache)
    assert int(step.cache.layers[0].cumulative_length) == 0


def test_a_closed_step_runs_nothing(run: Any, tiny_model: PreTrainedModel) -> None:
    step = make_step(run, tiny_model)
    step.close()
    with pytest.raises(ForeloadError, match="closed"):
        step(3)


def test_steps_beside_share_the_sequence(run: Any, tiny_model: PreTrainedModel) -> None:
    step = make_step(run, tiny_model)
    run(torch.tensor([PROMPT]), step.cache)
    asked: list[int] = []

    def other(token_ids: Tensor, cache: Any) -> Tensor:
        asked.append(token_ids.shape[1])
        return run(token_ids, cache)

    wide, second = step.beside(3), step.beside(1, forward=other)
    assert wide.cache is second.cache is step.cache
    assert step.beside(3) is wide
    assert step.beside(1, forward=other) is second
    tokens = [11, 12, 13]
    wanted = wanted_logits(run, tiny_model, tokens)
    torch.testing.assert_close(wide.run(tokens)[0], torch.stack(wanted))
    step.rewind(2)
    torch.testing.assert_close(second(12), wanted[1])
    assert asked == [1]
    torch.testing.assert_close(step(13), wanted[2])
    step.rewind(0)
    assert int(step.cache.layers[0].cumulative_length) == len(PROMPT) + 3
    step.close()
    for gone in (wide, second):
        with pytest.raises(ForeloadError, match="closed"):
            gone.run(tokens)


class FakeCuda:
    """Stands in for torch.cuda: a graph replays the step it saw into the tensors it gave."""

    def __init__(self, step: StepGraph, *, fails: bool = False) -> None:
        self.step = step
        self.fails = fails
        self.log: list[str] = []
        self.outputs: tuple[Tensor, ...] = ()

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        stream = SimpleNamespace(wait_stream=lambda other: self.log.append("wait"))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
        monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
        monkeypatch.setattr(torch.cuda, "stream", self.on_stream)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=self.replay))
        monkeypatch.setattr(torch.cuda, "graph", self.graph)

    @contextmanager
    def on_stream(self, stream: Any) -> Iterator[None]:
        self.log.append("warm up")
        yield

    @contextmanager
    def graph(self, graph: Any, capture_error_mode: str) -> Iterator[None]:
        self.log.append("capture")
        inner = self.step._step

        def see() -> tuple[Tensor, Tensor]:
            if self.fails:
                raise RuntimeError("operation not permitted when stream is capturing")
            self.outputs = inner()
            rewind_static(self.step.cache, self.step._token_ids.shape[1])
            return self.outputs

        self.step._step = see  # type: ignore[method-assign]
        try:
            yield
        finally:
            self.step._step = inner  # type: ignore[method-assign]

    def replay(self) -> None:
        self.log.append("replay")
        for fixed, new in zip(self.outputs, self.step._step(), strict=True):
            fixed.copy_(new)


def test_a_captured_step_is_replayed(
    run: Any, tiny_model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = make_step(run, tiny_model, is_captured=True)
    cuda = FakeCuda(step)
    cuda.install(monkeypatch)
    tokens = [11, 12, 13, 14]
    for turn in range(2):
        run(torch.tensor([PROMPT]), step.cache)
        for token, wanted in zip(tokens, wanted_logits(run, tiny_model, tokens), strict=True):
            assert torch.equal(step(token), wanted), f"turn {turn}"
        step.clear()
    assert step.is_captured
    assert cuda.log == ["wait", "warm up", "wait", "capture", *["replay"] * 8]


def test_a_step_can_be_captured_before_it_runs(
    run: Any, tiny_model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make_step(run, tiny_model, is_captured=True)
    step = first.beside(2)
    assert not first.beside(3, can_capture=False)._wants_capture
    cuda = FakeCuda(step)
    cuda.install(monkeypatch)
    run(torch.tensor([PROMPT]), step.cache)
    for _ in range(2):
        step.prepare()
    assert step.is_captured
    assert cuda.log == ["wait", "warm up", "wait", "capture"], "captured once, and not run"
    assert int(step.cache.layers[0].cumulative_length) == len(PROMPT)
    wanted = torch.stack(wanted_logits(run, tiny_model, [11, 12]))
    torch.testing.assert_close(step.run([11, 12])[0], wanted)
    assert cuda.log[-1] == "replay"


def test_a_step_that_cannot_be_captured_runs_as_it_is(
    run: Any,
    tiny_model: PreTrainedModel,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    broken: list[bool] = []
    step = make_step(run, tiny_model, is_captured=True, on_broken=lambda: broken.append(True))
    FakeCuda(step, fails=True).install(monkeypatch)
    run(torch.tensor([PROMPT]), step.cache)
    tokens = [11, 12, 13]
    for token, wanted in zip(tokens, wanted_logits(run, tiny_model, tokens), strict=True):
        assert torch.equal(step(token), wanted)
    assert not step.is_captured
    assert broken == [True]
    assert len(caplog.records) == 1, "said once"


class TestLending:
    def make(self, run: Any, model: PreTrainedModel, most: int | None = None) -> StepGraphs:
        self.made: list[int] = []

        def make_cache(num_positions: int) -> Any:
            self.made.append(num_positions)
            return make_static_cache(model, num_positions)

        return StepGraphs(run, make_cache, CPU, most_positions=most)

    def test_one_step_serves_requests_one_after_the_other(
        self, run: Any, tiny_model: PreTrainedModel
    ) -> None:
        steps = self.make(run, tiny_model)
        with steps.lend(20) as first:
            run(torch.tensor([PROMPT]), first.cache)
            first(3)
        with steps.lend(200) as second:
            assert second is first
            assert int(second.cache.layers[0].cumulative_length) == 0
        assert self.made == [256]

    def test_two_requests_at_once_have_a_step_each(
        self, run: Any, tiny_model: PreTrainedModel
    ) -> None:
        steps = self.make(run, tiny_model)
        with steps.lend(20) as first, steps.lend(20) as second:
            assert first is not second
        assert self.made == [256, 256]

    def test_a_lent_step_is_found_by_its_cache(self, run: Any, tiny_model: PreTrainedModel) -> None:
        steps = self.make(run, tiny_model)
        with steps.lend(20) as first, steps.lend(20) as second:
            assert steps.step_of(first.cache) is first
            assert steps.step_of(second.cache) is second
        with pytest.raises(ForeloadError, match="closed"):
            steps.step_of(first.cache)

    def test_a_longer_request_gets_more_room(self, run: Any, tiny_model: PreTrainedModel) -> None:
        steps = self.make(run, tiny_model, most=1000)
        for num_positions, room in ((10, 256), (257, 512), (600, 1000), (1000, 1000)):
            with steps.lend(num_positions) as step:
                assert step.num_positions == room
        assert self.made == [256, 512, 1000]

    def test_released_steps_are_closed_wherever_they_are(
        self, run: Any, tiny_model: PreTrainedModel
    ) -> None:
        steps = self.make(run, tiny_model)
        with steps.lend(20) as lent:
            steps.release()
            with pytest.raises(ForeloadError, match="closed"):
                lent(3)
        with steps.lend(20) as fresh:
            assert fresh is not lent
