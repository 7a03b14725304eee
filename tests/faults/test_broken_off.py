"""Whatever breaks off a generation, nothing hangs, and the next one gives the right tokens."""

from __future__ import annotations

import errno
import os
import random
import threading
from typing import TYPE_CHECKING, Any

import pytest

from fakes import assert_settled, finish
from foreload.errors import TransferError
from foreload.memory.disk import DiskBackend

if TYPE_CHECKING:
    from collections.abc import Callable

    from foreload import Engine
    from foreload.memory.arena import SlotArena

    Open = Callable[..., Engine]

PROMPT = list(range(40, 52))
OTHER = [7, 8, 9, 10]


class FailingReads:
    """`os.preadv` that fails where the test says so, by number of the read."""

    def __init__(self) -> None:
        self.num_reads = 0
        self.should_fail: Callable[[int], bool] = lambda number: False
        self._lock = threading.Lock()

    def __call__(self, descriptor: int, buffers: list[memoryview], offset: int) -> int:
        with self._lock:
            number = self.num_reads
            self.num_reads += 1
        if self.should_fail(number):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return os.preadv(descriptor, buffers, offset)

    def backend(self, arena: SlotArena) -> DiskBackend:
        return DiskBackend(arena, preadv=self)


@pytest.fixture
def wanted(open_engine: Open) -> dict[str, list[int]]:
    """What a fresh engine gives."""
    engine = open_engine(expert_memory="100%", predictor="none")
    return {
        "prompt": engine.generate(PROMPT, max_new_tokens=8).token_ids,
        "other": engine.generate(OTHER, max_new_tokens=8).token_ids,
    }


@pytest.mark.parametrize("predictor", ["none", "lookahead"])
@pytest.mark.parametrize("expert_memory", ["minimum", "50%"])
@pytest.mark.parametrize("after", [0, 7, 40])
def test_a_read_error_fails_one_request_only(
    open_engine: Open,
    wanted: dict[str, list[int]],
    predictor: str,
    expert_memory: str,
    after: int,
) -> None:
    reads = FailingReads()
    engine = open_engine(expert_memory=expert_memory, predictor=predictor, backend=reads.backend)
    reads.should_fail = lambda number: number >= after
    with pytest.raises(TransferError, match="Input/output error"):
        finish(lambda: engine.generate(PROMPT, max_new_tokens=8))
    assert_settled(engine.tiers)
    reads.should_fail = lambda number: False
    assert engine.generate(PROMPT, max_new_tokens=8).token_ids == wanted["prompt"]
    assert engine.generate(OTHER, max_new_tokens=8).token_ids == wanted["other"]


def test_errors_now_and_then_never_give_wrong_tokens(
    open_engine: Open, wanted: dict[str, list[int]]
) -> None:
    reads, chance = FailingReads(), random.Random(0)
    engine = open_engine(expert_memory="25%", predictor="lookahead", backend=reads.backend)
    reads.should_fail = lambda number: chance.random() < 0.01
    outcomes: list[Any] = []
    # One in three gets through; which, is up to the threads that read.
    while len(outcomes) < 12 or (len(outcomes) < 200 and len({o is None for o in outcomes}) < 2):
        try:
            outcomes.append(finish(lambda: engine.generate(PROMPT, max_new_tokens=8)).token_ids)
        except TransferError:
            outcomes.append(None)
        engine.tiers.cache.check()
    assert None in outcomes
    assert {tuple(tokens) for tokens in outcomes if tokens} == {tuple(wanted["prompt"])}


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, RuntimeError])
@pytest.mark.parametrize("expert_memory", ["minimum", "50%"])
def test_an_interrupt_between_two_experts_leaves_a_usable_engine(
    open_engine: Open,
    wanted: dict[str, list[int]],
    error: type[BaseException],
    expert_memory: str,
) -> None:
    engine = open_engine(expert_memory=expert_memory, predictor="lookahead")
    num_outputs = 0

    def interrupt(*output: Any) -> None:
        nonlocal num_outputs
        num_outputs += 1
        if num_outputs % 37 == 0:
            raise error

    engine.runtime.on_output = interrupt
    for _ in range(4):
        with pytest.raises(error):
            engine.generate(PROMPT, max_new_tokens=8)
        assert_settled(engine.tiers)
    engine.runtime.on_output = None
    assert engine.generate(PROMPT, max_new_tokens=8).token_ids == wanted["prompt"]


def test_an_interrupt_while_waiting_for_a_copy_leaves_a_usable_engine(
    open_engine: Open, wanted: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine(expert_memory="minimum", predictor="none")
    transfers = engine.tiers._transfers
    real_wait = transfers.wait
    calls = iter(range(10**6))

    def wait(timeout: float | None = None) -> Any:
        if next(calls) == 5:
            raise KeyboardInterrupt
        return real_wait(timeout)

    monkeypatch.setattr(transfers, "wait", wait)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(PROMPT, max_new_tokens=8)
    assert_settled(engine.tiers)
    assert engine.generate(PROMPT, max_new_tokens=8).token_ids == wanted["prompt"]


def test_a_stream_left_in_the_middle_leaves_a_usable_engine(
    open_engine: Open, wanted: dict[str, list[int]]
) -> None:
    engine = open_engine(expert_memory="minimum", predictor="lookahead")
    stream = engine.stream(OTHER, max_new_tokens=8)
    next(stream)
    del stream
    assert engine.generate(PROMPT, max_new_tokens=8).token_ids == wanted["prompt"]
    assert_settled(engine.tiers)
