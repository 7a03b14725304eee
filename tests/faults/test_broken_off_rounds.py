"""Whatever breaks off a round of drafting and verifying, later output is a fresh engine's."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any

import pytest

from fakes import assert_settled, finish
from foreload import Engine, resolution
from foreload.errors import ForeloadError, TransferError
from foreload.memory.disk import DiskBackend
from foreload.schedule.governor import Governor

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Open = Callable[..., Engine]

PROMPT = list(range(40, 52))
OTHER = [7, 8, 9, 10]
NUM_TOKENS = 16


def open_with_draft(open_engine: Open, **settings: Any) -> Engine:
    return open_engine(
        **{"expert_memory": "80%", "draft": "int4", "num_draft_tokens": 4, **settings}
    )


def draft_of(engine: Engine) -> Any:
    assert engine.drafter is not None
    assert engine.drafter.draft is not None
    return engine.drafter.draft


@pytest.fixture
def wanted(open_engine: Open) -> dict[str, list[int]]:
    """What a fresh engine gives."""
    engine = open_engine(expert_memory="100%", predictor="none")
    return {
        "prompt": engine.generate(PROMPT, max_new_tokens=NUM_TOKENS).token_ids,
        "other": engine.generate(OTHER, max_new_tokens=NUM_TOKENS).token_ids,
    }


def assert_as_fresh(engine: Engine, wanted: dict[str, list[int]]) -> None:
    assert_settled(engine.tiers)
    cache = engine.tiers.cache
    assert not cache._delay.any(), "a round's foresight stayed"
    assert (cache._foreseen == float("inf")).all(), "a round's foresight stayed"
    assert engine.generate(PROMPT, max_new_tokens=NUM_TOKENS).token_ids == wanted["prompt"]
    assert engine.generate(OTHER, max_new_tokens=NUM_TOKENS).token_ids == wanted["other"]
    assert_settled(engine.tiers)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, RuntimeError])
@pytest.mark.parametrize("at", [0, 3, 9])
def test_an_error_while_drafting(
    open_engine: Open, wanted: dict[str, list[int]], error: type[BaseException], at: int
) -> None:
    engine = open_with_draft(open_engine)
    draft = draft_of(engine)
    real, calls = draft.run_layer, iter(range(10**6))

    def run(*args: Any) -> Any:
        if next(calls) == at:
            raise error
        return real(*args)

    draft.run_layer = run
    with pytest.raises(error):
        engine.generate(PROMPT, max_new_tokens=NUM_TOKENS)
    draft.run_layer = real
    assert_as_fresh(engine, wanted)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_error_while_verifying(
    open_engine: Open, wanted: dict[str, list[int]], error: type[BaseException]
) -> None:
    engine = open_with_draft(open_engine)
    num_wide = 0

    def interrupt(layer: int, expert: int, output: Any) -> None:
        nonlocal num_wide
        num_wide += engine.metrics.num_rounds > 0
        if num_wide == 20:
            raise error

    engine.runtime.on_output = interrupt
    with pytest.raises(error):
        engine.generate(PROMPT, max_new_tokens=NUM_TOKENS)
    engine.runtime.on_output = None
    assert_as_fresh(engine, wanted)


@pytest.mark.parametrize("after", [60, 75, 90])
def test_a_read_error_in_a_round_fails_one_request_only(
    open_engine: Open, wanted: dict[str, list[int]], after: int
) -> None:
    reads = 0
    is_broken = True

    def preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        nonlocal reads
        reads += 1
        if is_broken and reads > after:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return os.preadv(descriptor, buffers, offset)

    engine = open_with_draft(
        open_engine,
        expert_memory="60%",
        backend=lambda arena: DiskBackend(arena, preadv=preadv),
    )
    with pytest.raises(TransferError, match="Input/output error"):
        finish(lambda: engine.generate(PROMPT, max_new_tokens=NUM_TOKENS))
    is_broken = False
    assert_as_fresh(engine, wanted)


@pytest.mark.parametrize("at", [1, 2, 5])
def test_cancelling_inside_a_round_ends_behind_the_last_token_shown(
    open_engine: Open, wanted: dict[str, list[int]], at: int
) -> None:
    engine = open_with_draft(open_engine)
    draft = draft_of(engine)
    real, calls = draft.run_layer, iter(range(10**6))

    def run(layer: int, *args: Any) -> Any:
        if layer == 0 and next(calls) == at:
            engine.cancel()
        return real(layer, *args)

    draft.run_layer = run
    result = engine.generate(PROMPT, max_new_tokens=NUM_TOKENS)
    draft.run_layer = real
    assert result.finish_reason == "cancelled"
    assert result.token_ids == wanted["prompt"][: len(result.token_ids)]
    assert len(result.token_ids) < NUM_TOKENS
    assert_as_fresh(engine, wanted)


def test_requests_that_take_turns_do_not_see_each_other(
    open_engine: Open, wanted: dict[str, list[int]]
) -> None:
    engine = open_with_draft(open_engine)
    streams = [engine.stream(prompt, max_new_tokens=NUM_TOKENS) for prompt in (PROMPT, OTHER)]
    found: list[list[int]] = [[], []]
    running = [0, 1]
    while running:
        for number in list(running):
            chunk = next(streams[number])
            found[number] += chunk.token_ids
            if chunk.finish_reason is not None:
                running.remove(number)
    assert found == [wanted["prompt"], wanted["other"]]
    assert_as_fresh(engine, wanted)


def test_a_stream_left_in_the_middle_of_a_round(
    open_engine: Open, wanted: dict[str, list[int]]
) -> None:
    engine = open_with_draft(open_engine)
    stream = engine.stream(PROMPT, max_new_tokens=NUM_TOKENS)
    for _ in range(3):
        next(stream)
    stream.close()
    assert_as_fresh(engine, wanted)


def test_a_stop_text_inside_a_round_ends_as_without_a_draft(open_engine: Open) -> None:
    plain = open_engine(expert_memory="100%")
    whole = plain.generate(PROMPT, max_new_tokens=NUM_TOKENS).text
    stop = whole[len(whole) // 2 :][:3]
    wanted = plain.generate(PROMPT, max_new_tokens=NUM_TOKENS, stop=(stop,))
    found = open_with_draft(open_engine).generate(PROMPT, max_new_tokens=NUM_TOKENS, stop=(stop,))
    assert (found.text, found.token_ids) == (wanted.text, wanted.token_ids)
    assert found.finish_reason == wanted.finish_reason == "stop"


def test_a_draft_that_is_let_go_of_leaves_its_memory_to_the_experts(
    open_engine: Open, wanted: dict[str, list[int]]
) -> None:
    engine = open_with_draft(open_engine)
    before = engine.tiers.num_slots
    engine.generate(PROMPT, max_new_tokens=NUM_TOKENS)
    engine.drop_draft()
    assert engine.tiers.num_slots > before
    assert engine.expert_memory_bytes <= int(engine.config.expert_memory)
    num_drafted = engine.metrics.num_draft_tokens
    assert_as_fresh(engine, wanted)
    assert engine.metrics.num_draft_tokens == num_drafted
    assert len(engine.tiers.cache.keys()) > before


def test_a_draft_that_is_at_work_is_not_let_go_of(
    open_engine: Open, wanted: dict[str, list[int]]
) -> None:
    engine = open_with_draft(open_engine)
    draft = draft_of(engine)
    real = draft.run_layer
    answers: list[bool] = []

    def run(*args: Any) -> Any:
        answers.append(finish(engine.drop_draft))
        return real(*args)

    draft.run_layer = run
    assert engine.generate(PROMPT, max_new_tokens=NUM_TOKENS).token_ids == wanted["prompt"]
    assert set(answers) == {False}
    assert engine.drop_draft()
    assert_as_fresh(engine, wanted)


def test_an_optional_draft_that_long_has_not_paid_is_let_go_of(
    tiny_checkpoint: Path,
    tmp_path: Path,
    wanted: dict[str, list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resolution, "draft_pays", lambda *figures, **slots: True)

    def open_engine(draft: str) -> Engine:
        given = {"expert_memory": "80%", "device": "cpu", "cache_dir": tmp_path}
        return Engine.from_pretrained(tiny_checkpoint, draft=draft, **given)

    open_engine("int4").close()
    with open_engine("auto") as engine:
        assert engine.drafter is not None
        # A probe falls on the sixtieth round: it is heard before anything is given up.
        for num_idle, is_kept in ((60, True), (61, False)):
            monkeypatch.setattr(Governor, "num_idle_rounds", num_idle)
            found = engine.generate(PROMPT, max_new_tokens=NUM_TOKENS).token_ids
            assert found == wanted["prompt"]
            assert (engine.drafter.draft is not None) is is_kept
        assert_as_fresh(engine, wanted)


def test_closing_while_a_token_is_drafted_says_that_the_engine_is_closed(
    open_engine: Open,
) -> None:
    engine = open_with_draft(open_engine)
    draft = draft_of(engine)
    real = draft.run_layer

    def run(*args: Any) -> Any:
        engine.close()
        return real(*args)

    draft.run_layer = run
    with pytest.raises(ForeloadError, match="engine is closed"):
        engine.generate(PROMPT, max_new_tokens=NUM_TOKENS)
