"""A round on the device leaves the target's own past behind, and its experts in the slots."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fake_cuda import FakeCuda
from fakes import make_engine
from foreload.errors import ForeloadError
from foreload.model import draft_round
from foreload.model.device_self_draft import DeviceRound, DeviceSelfDraft
from foreload.ops.device_experts import MAX_TOKENS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor

    from foreload import Engine
    from foreload.model.graph import StepGraph

PROMPT = list(range(40, 60))  # longer than a step: its experts pass the slots by
TOKEN = 77
DRAFTED = 3


@pytest.fixture
def engine(tiny_checkpoint: Path) -> Iterator[Engine]:
    """All experts have a slot, so that verifications of any width are steps."""
    with open_drafting(tiny_checkpoint) as engine:
        yield engine


def open_drafting(directory: Path, **settings: Any) -> Engine:
    given = {
        "expert_memory": "200%",
        "draft": "int4",
        "num_draft_tokens": DRAFTED,
        "predictor": "none",
        **settings,
    }
    return make_engine(directory, device="cpu", orchestration="device", **given)


def drafter_of(engine: Engine) -> DeviceSelfDraft:
    assert isinstance(engine.drafter, DeviceSelfDraft)
    return engine.drafter


@contextmanager
def prefilled(engine: Engine) -> Iterator[StepGraph]:
    """Lend a step that has seen the prompt."""
    assert engine._device is not None
    with engine._device.lend_step(64) as step:
        assert step is not None
        engine._prefill(torch.tensor([PROMPT]), step.cache)
        yield step


class Greedy:
    """Takes the likeliest tokens, at most so many, and keeps them."""

    def __init__(self, most: int = 99) -> None:
        self.most = most
        self.tokens: list[int] = []
        self.logits: list[Tensor] = []

    def __call__(self, logits: Tensor) -> int | None:
        self.logits.append(logits)
        self.tokens.append(int(logits.argmax()))
        return self.tokens[-1] if len(self.tokens) < self.most else None


def run_round(
    engine: Engine, step: StepGraph, num_accepted: int, *, most_drafted: int = 99
) -> tuple[DeviceRound, list[int], Tensor]:
    choose = Greedy(most_drafted)
    with drafter_of(engine).begin(step.cache, 9) as this_round:
        this_round.draft(TOKEN, choose)
        logits = this_round.verify([TOKEN, *choose.tokens]).clone()
        this_round.settle(num_accepted)
    return this_round, choose.tokens, logits


def length(step: StepGraph) -> int:
    (found,) = {int(layer.cumulative_length) for layer in step.cache.layers}
    return found


def past(step: StepGraph) -> list[Tensor]:
    kept = length(step)
    return [
        states[..., :kept, :].clone()
        for layer in step.cache.layers
        for states in (layer.keys, layer.values)
    ]


@pytest.mark.parametrize("num_accepted", range(DRAFTED + 1))
def test_the_past_is_the_targets_own_as_far_as_was_accepted(
    engine: Engine, num_accepted: int
) -> None:
    with prefilled(engine) as step:
        _, drafted, logits = run_round(engine, step, num_accepted)
        assert length(step) == len(PROMPT) + 1 + num_accepted
        found = past(step)
    with prefilled(engine) as step:
        alone = [step(token) for token in (TOKEN, *drafted[:num_accepted])]
        for mine, its in zip(found, past(step), strict=True):
            torch.testing.assert_close(mine, its, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits[: len(alone)], torch.stack(alone), atol=1e-3, rtol=1e-3)


def test_drafting_leaves_no_trace_in_the_past(engine: Engine) -> None:
    with prefilled(engine) as step:
        before = past(step)
        choose = Greedy()
        with drafter_of(engine).begin(step.cache, 9) as this_round:
            this_round.draft(TOKEN, choose)
        assert len(choose.tokens) == DRAFTED
        assert all(torch.equal(*pair) for pair in zip(past(step), before, strict=True))
        assert len({logits.data_ptr() for logits in choose.logits}) == DRAFTED, "kept, each of them"


def test_the_draft_brings_the_targets_experts(engine: Engine) -> None:
    path = engine._device
    assert path is not None
    with prefilled(engine) as step:
        engine._count()
        before = engine.metrics.snapshot()
        choose = Greedy()
        with drafter_of(engine).begin(step.cache, 9) as this_round:
            this_round.draft(TOKEN, choose)
            draft = drafter_of(engine).draft
            assert draft is not None
            slot_of = path._experts.tables.slot_of
            for layer, rows in enumerate(draft._index[:, :DRAFTED]):
                assert (slot_of[layer, rows.flatten()] >= 0).all(), "named, and not brought"
            path._experts.tables.check()
            this_round.verify([TOKEN, *choose.tokens])
            this_round.settle(0)
        counted = engine.metrics.since(before)
    assert counted.num_prefetched > 0
    assert counted.num_prefetched_used > 0.9 * counted.num_prefetched
    assert counted.num_hits > 0.8 * counted.num_lookups, "only the last token was not foreseen"


def test_a_round_is_counted(engine: Engine) -> None:
    seen: list[DeviceRound] = []
    drafter_of(engine).on_round = seen.append
    with prefilled(engine) as step:
        engine._count()
        before = engine.metrics.snapshot()
        this_round, _, _ = run_round(engine, step, 2)
    assert seen == [this_round]
    counted = engine.metrics.since(before)
    assert (counted.num_rounds, counted.num_draft_tokens, counted.num_accepted_tokens) == (1, 3, 2)
    assert counted.num_steps == 1, "steps of the draft are none of the target's"
    assert this_round.verification.num_lookups == counted.num_lookups
    governor = drafter_of(engine).governor
    assert governor.rounds_by_draft == {DRAFTED: 1}
    assert governor.draft_token_s > 0


def test_a_draft_may_end_early(engine: Engine) -> None:
    with prefilled(engine) as step:
        this_round, drafted, logits = run_round(engine, step, 1, most_drafted=1)
        assert len(drafted) == 1
        assert logits.shape[0] == len(this_round.token_ids) == 2
        assert length(step) == len(PROMPT) + 2


def test_without_a_draft_rounds_are_steps(engine: Engine) -> None:
    drafter_of(engine).release()
    with prefilled(engine) as step:
        this_round, drafted, logits = run_round(engine, step, 0)
        assert (this_round.number, drafted) == (0, [])
        assert logits.shape[0] == 1
        assert not step._beside
        with pytest.raises(ValueError, match="let go"):
            drafter_of(engine)._forward_draft(torch.tensor([[3]]), step.cache)


def test_steps_serve_round_after_round(engine: Engine) -> None:
    with prefilled(engine) as step:
        for num_accepted in (3, 0, 1):
            run_round(engine, step, num_accepted)
        widths = sorted(num_tokens for num_tokens, _ in step._beside)
        assert widths == [1, 1 + DRAFTED]


@pytest.mark.parametrize("number", [MAX_TOKENS - 1, MAX_TOKENS])
def test_what_is_longer_than_a_step_is_not_captured(
    tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    # However few slots there are.
    with open_drafting(tiny_checkpoint, expert_memory="30%", num_draft_tokens=number) as engine:
        assert engine.num_slots == engine.spec.num_moe_layers
        drafter = drafter_of(engine)
        assert ("verified as a prompt is" in caplog.text) == (number == MAX_TOKENS)
        with prefilled(engine) as step:
            step._is_capturing = True
            for num_tokens in range(2, MAX_TOKENS + 2):
                wants = drafter.verifying_step(step, num_tokens).wants_capture
                assert wants == (num_tokens <= MAX_TOKENS)
            step._is_capturing = False
            step._beside.clear()
            with drafter.begin(step.cache, number) as this_round:
                assert this_round.number == number
            run_round(engine, step, 6)


@pytest.mark.parametrize("most_drafted", [DRAFTED, 1])
def test_captures_are_no_part_of_what_rounds_take(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, most_drafted: int
) -> None:
    """Also in the middle of a text, and where a draft ends before what was prepared for."""
    drafter = drafter_of(engine)
    settled: list[DeviceRound] = []
    drafter.on_round = settled.append
    with prefilled(engine) as step:
        run_round(engine, step, 0, most_drafted=most_drafted)
        past_the_first = length(step)
        step._beside.clear()
        step._is_capturing = True
        clock = SlowCaptures(monkeypatch)
        run_round(engine, step, 0, most_drafted=most_drafted)
        step.rewind(length(step) - past_the_first)
        run_round(engine, step, 0, most_drafted=most_drafted)
    assert len(clock.cuda.graphs) == (2 if most_drafted == DRAFTED else 3)
    _, capturing, replaying = settled
    assert capturing.verification == replaying.verification
    for started in (capturing, replaying):
        assert started._verify_end.time_s - started._start.time_s == 0
    lookups = [r._verify_end.num_lookups - r._start.num_lookups for r in (capturing, replaying)]
    assert lookups[0] == lookups[1] > 0


class SlowCaptures:
    """A clock that only captures, and what they warm up, move on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cuda = FakeCuda()
        self.cuda.install(monkeypatch)
        monkeypatch.setattr(draft_round.time, "perf_counter", lambda: float(self.num_captures))

    @property
    def num_captures(self) -> int:
        return self.cuda.log.count("warm up") + self.cuda.log.count("capture")


def test_a_closed_engine_makes_no_rounds(tiny_checkpoint: Path) -> None:
    engine = open_drafting(tiny_checkpoint)
    with prefilled(engine) as step:
        with drafter_of(engine).begin(step.cache, 9) as this_round:
            engine.close()
            with pytest.raises(ForeloadError, match="closed"):
                this_round.verify([TOKEN])
        with pytest.raises(ForeloadError, match="closed"):
            drafter_of(engine).begin(step.cache, 9)
        with pytest.raises(ForeloadError, match="closed"):
            step.beside(2)
