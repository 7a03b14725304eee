"""Steps at fixed addresses give what any forward gives, captured (by a stand-in) or not.

No test here needs a CUDA device.
"""

from __future__ import annotations

import functools
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fake_cuda import FakeCuda
from foreload.errors import ForeloadError
from foreload.model import graph
from foreload.model.graph import FilledNumbers, StepGraph, StepGraphs
from foreload.model.kv_cache import clear_static, make_static_cache, pass_cache, rewind_static
from watch import Watch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor
    from transformers import PreTrainedModel

CPU = torch.device("cpu")
PROMPT = [5, 9, 33, 7, 101]
ROOM = 64


@pytest.mark.parametrize("number", [2.5, 3, True])
def test_a_number_becomes_a_tensor_without_a_copy_from_the_host(number: float) -> None:
    with Watch() as watch, FilledNumbers():
        made = torch.tensor(number, device="meta")
        half = torch.tensor(number, dtype=torch.float16, device="meta")
        here, row = torch.tensor(number), torch.tensor([number], device="cpu")
    assert (made.shape, made.dtype, made.device.type) == ((), here.dtype, "meta")
    assert (half.dtype, here.item(), row.tolist()) == (torch.float16, number, [number])
    assert watch.called.count("aten::full") == 2, "the host's own are made as ever"


def forward(model: PreTrainedModel, token_ids: Tensor, cache: Any) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=token_ids, **pass_cache(model, cache), use_cache=True).logits[0]


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


def test_a_captured_step_is_replayed(
    run: Any, tiny_model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = make_step(run, tiny_model, is_captured=True)
    cuda = FakeCuda()
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
    assert not first.beside(3, can_capture=False).wants_capture
    cuda = FakeCuda()
    cuda.install(monkeypatch)
    run(torch.tensor([PROMPT]), step.cache)
    assert [step.prepare() for _ in range(2)] == [True, False]
    assert step.is_captured
    assert cuda.log == ["wait", "warm up", "wait", "capture"], "captured once, and not run"
    assert int(step.cache.layers[0].cumulative_length) == len(PROMPT)
    wanted = torch.stack(wanted_logits(run, tiny_model, [11, 12]))
    torch.testing.assert_close(step.run([11, 12])[0], wanted)
    assert cuda.log[-1] == "replay"


def test_steps_used_in_turn_share_memory_and_keep_their_outputs(
    run: Any, tiny_model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = make_step(run, tiny_model, is_captured=True)
    three = one.beside(3)
    cuda = FakeCuda()
    cuda.install(monkeypatch)
    wanted = wanted_logits(run, tiny_model, [11, 12, 13, 14])
    run(torch.tensor([PROMPT]), one.cache)
    for _ in range(2):
        wide, best = three.run([11, 12, 13])
        narrow, token = one.run([14])
        three.rewind(4)
        torch.testing.assert_close(wide, torch.stack(wanted[:3]))
        assert torch.equal(best, wide.argmax(-1))
        three.run([11, 12, 13])
        three.rewind(3)
        torch.testing.assert_close(narrow[0], wanted[3])
        assert torch.equal(token, narrow.argmax(-1))
    assert cuda.log.count("replay") == 6
    first, second = cuda.graphs
    assert first.handle is second.handle


def test_a_pool_that_has_ended_is_not_named_again(
    run: Any, tiny_model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = FakeCuda()
    cuda.install(monkeypatch)
    steps = StepGraphs(run, lambda room: make_static_cache(tiny_model, room), CPU, is_captured=True)
    with steps.lend(20) as first, steps.lend(20) as second:
        for step in (first, second):
            run(torch.tensor([PROMPT]), step.cache)
            step(3)
    steps.release()
    with steps.lend(20) as third:
        run(torch.tensor([PROMPT]), third.cache)
        third(3)
    handles = [graph.handle for graph in cuda.graphs]
    assert handles[0] is handles[1]
    assert handles[2] is not handles[0]


def test_a_step_that_breaks_while_it_is_warmed_up_says_why(
    run: Any, tiny_model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_off(token_ids: Tensor, cache: Any) -> Tensor:
        raise RuntimeError("out of memory")

    step = make_step(break_off, tiny_model, is_captured=True)
    FakeCuda().install(monkeypatch)
    with pytest.raises(RuntimeError, match="out of memory"):
        step(3)


def test_the_host_waits_once_for_a_token(tiny_model: PreTrainedModel) -> None:
    rows = torch.eye(32)
    step = make_step(lambda token_ids, cache: rows[token_ids[0]], tiny_model)
    with Watch() as watch:
        step.run([11])
        assert not watch.asked
        assert step.likeliest(12) == 12
    assert watch.asked == ["aten::item"]


def test_a_step_that_cannot_be_captured_runs_as_it_is(
    run: Any,
    tiny_model: PreTrainedModel,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    broken: list[bool] = []
    step = make_step(run, tiny_model, is_captured=True, on_broken=lambda: broken.append(True))
    FakeCuda(fails=True).install(monkeypatch)
    run(torch.tensor([PROMPT]), step.cache)
    tokens = [11, 12, 13]
    for token, wanted in zip(tokens, wanted_logits(run, tiny_model, tokens), strict=True):
        assert torch.equal(step(token), wanted)
    assert not step.is_captured
    assert broken == [True]
    assert len(caplog.records) == 1, "said once"


def test_one_step_that_cannot_be_captured_speaks_for_all(
    run: Any,
    tiny_model: PreTrainedModel,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def draft(token_ids: Tensor, cache: Any) -> Tensor:
        return run(token_ids, cache)

    cuda = FakeCuda(fails=True)
    cuda.install(monkeypatch)
    steps = StepGraphs(run, lambda room: make_static_cache(tiny_model, room), CPU, is_captured=True)
    wanted = wanted_logits(run, tiny_model, [11, 12, 13])
    for num_positions in (20, 300):
        with steps.lend(num_positions) as step:
            run(torch.tensor([PROMPT]), step.cache)
            assert torch.equal(step(11), wanted[0])
            torch.testing.assert_close(step.beside(1, forward=draft)(12), wanted[1])
            step.rewind(1)
            wide = step.beside(2)
            assert not wide.prepare()
            torch.testing.assert_close(wide.run([12, 13])[0], torch.stack(wanted[1:]))
        steps.release()
    assert cuda.log == ["wait", "warm up", "wait", "capture"]
    assert cuda.current is cuda.home, "work goes on where it was"
    assert len(caplog.records) == 1
    assert "not permitted" in caplog.text


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, None])
def test_a_capture_that_breaks_off_is_left(
    run: Any,
    tiny_model: PreTrainedModel,
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException] | None,
) -> None:
    left: list[tuple[Any, Any]] = []
    monkeypatch.setattr(graph, "leave_capture", lambda device, pool: left.append((device, pool)))
    cuda = FakeCuda()
    cuda.install(monkeypatch)

    def breaking(token_ids: Tensor, cache: Any) -> Tensor:
        if cuda.phase == "capture" and error is not None:
            raise error("stop")
        return run(token_ids, cache)

    step = make_step(breaking, tiny_model, is_captured=True)
    if error is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            step.prepare()
        assert step.wants_capture
    else:
        step.prepare()
    assert left == ([] if error is None else [(CPU, cuda.graphs[0].handle)])


@pytest.mark.parametrize("is_hidden", [False, True])
def test_memory_that_runs_out_in_a_capture_says_nothing_about_the_model(
    run: Any,
    tiny_model: PreTrainedModel,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    is_hidden: bool,
) -> None:
    cuda = FakeCuda()
    cuda.install(monkeypatch)
    num_free = 0

    def lacking(token_ids: Tensor, cache: Any) -> Tensor:
        if cuda.phase == "capture" and not num_free:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(token_ids, cache)

    @contextmanager
    def capture(graph: Any, **settings: Any) -> Iterator[None]:
        with cuda.graph(graph, **settings):
            try:
                yield
            except RuntimeError:
                if is_hidden:
                    raise RuntimeError("failed due to a previous error during capture")  # noqa: B904
                raise

    monkeypatch.setattr(torch.cuda, "graph", capture)
    broken: list[bool] = []
    step = make_step(lacking, tiny_model, is_captured=True, on_broken=lambda: broken.append(True))
    run(torch.tensor([PROMPT]), step.cache)
    with pytest.raises(torch.OutOfMemoryError):
        step(11)
    assert broken == [True]
    assert not caplog.records
    num_free = 1
    step.clear()
    run(torch.tensor([PROMPT]), step.cache)
    assert torch.equal(step(11), wanted_logits(run, tiny_model, [11])[0])
    assert step.is_captured


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

    def test_a_step_that_a_request_broke_in_is_not_lent_again(
        self, run: Any, tiny_model: PreTrainedModel
    ) -> None:
        steps = self.make(run, tiny_model)
        with steps.lend(20), steps.lend(20):
            pass
        lent: list[StepGraph] = []

        def break_off(error: BaseException) -> None:
            with steps.lend(20) as step:
                lent.append(step)
                raise error

        with pytest.raises(KeyboardInterrupt):
            break_off(KeyboardInterrupt())
        assert len(steps._idle) == 2, "an interruption is no lack of memory"
        with pytest.raises(RuntimeError):
            break_off(torch.OutOfMemoryError("no more"))
        assert not steps._idle, "what nobody uses is given back too"
        assert not steps._lent
        with pytest.raises(ForeloadError, match="closed"):
            lent[-1](3)
        with steps.lend(20) as fresh:
            assert fresh not in lent

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
