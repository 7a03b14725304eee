"""A round leaves the target's own past behind, whatever was drafted, kept or broken off in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from fakes import assert_settled

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from foreload import Engine
    from foreload.model.self_draft import DraftRound, SelfDraft
    from foreload.types import RoutingEvent

PROMPT = list(range(40, 52))
TOKEN = 77
DRAFTED = 3


@pytest.fixture(scope="module")
def drafts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache directory in which the draft is built once."""
    return tmp_path_factory.mktemp("drafts")


@pytest.fixture
def open_drafting(open_engine: Callable[..., Engine], drafts: Path) -> Callable[..., Engine]:
    """Open engines that draft three tokens per round."""

    def open_one(**settings: Any) -> Engine:
        given = {"draft": "int4", "num_draft_tokens": DRAFTED, "predictor": "none", **settings}
        return open_engine(cache_dir=drafts, **given)

    return open_one


def drafter_of(engine: Engine) -> SelfDraft:
    assert engine.drafter is not None
    return engine.drafter


def prefill(engine: Engine, *more: int) -> Any:
    """Give a cache that has seen the prompt."""
    cache = engine.make_request_cache()
    engine._prefill(torch.tensor([[*PROMPT, *more]]), cache)
    return cache


def states(cache: Any) -> list[Tensor]:
    return [state.clone() for layer in cache.layers for state in (layer.keys, layer.values)]


class Greedy:
    """Takes the likeliest tokens, at most so many, and keeps them."""

    def __init__(self, most: int = 99) -> None:
        self.most = most
        self.tokens: list[int] = []
        self.logits: list[Tensor] = []

    def __call__(self, logits: Tensor) -> int | None:
        assert logits.shape == (320,)
        self.logits.append(logits)
        self.tokens.append(int(logits.argmax()))
        return self.tokens[-1] if len(self.tokens) < self.most else None


def run_round(
    engine: Engine, cache: Any, num_accepted: int, most: int = 9
) -> tuple[DraftRound, list[int], Tensor]:
    """Draft, verify and settle; give the round, the drafted tokens and the target's logits."""
    choose = Greedy()
    with drafter_of(engine).begin(cache, most) as this_round:
        this_round.draft(TOKEN, choose)
        logits = this_round.verify([TOKEN, *choose.tokens])
        this_round.settle(num_accepted)
    return this_round, choose.tokens, logits


def foreseen(engine: Engine) -> set[tuple[int, int]]:
    """Give the experts that the cache knows to be coming."""
    flat = np.flatnonzero(np.isfinite(engine.tiers.cache._foreseen))
    return {divmod(int(place), engine.spec.num_experts) for place in flat}


class TestPast:
    def test_drafting_leaves_no_trace_in_the_past(
        self, open_drafting: Callable[..., Engine]
    ) -> None:
        engine = open_drafting()
        cache = prefill(engine)
        before = states(cache)
        choose = Greedy()
        with drafter_of(engine).begin(cache, 9) as this_round:
            this_round.draft(TOKEN, choose)
        assert len(choose.tokens) == DRAFTED
        assert cache.get_seq_length() == len(PROMPT)
        assert all(torch.equal(*pair) for pair in zip(states(cache), before, strict=True))

    @pytest.mark.parametrize("num_accepted", range(DRAFTED + 1))
    def test_the_past_is_the_targets_own_as_far_as_was_accepted(
        self, open_drafting: Callable[..., Engine], num_accepted: int
    ) -> None:
        engine = open_drafting()
        cache = prefill(engine)
        _, drafted, _ = run_round(engine, cache, num_accepted)
        assert cache.get_seq_length() == len(PROMPT) + 1 + num_accepted

        plain = open_drafting(draft="none", num_draft_tokens="auto")
        wanted = prefill(plain)
        for token in (TOKEN, *drafted[:num_accepted]):
            plain.forward(torch.tensor([[token]]), wanted)
        for found, true in zip(states(cache), states(wanted), strict=True):
            assert torch.allclose(found, true, atol=1e-4)
        following = torch.tensor([[5]])
        logits = engine.forward(following, cache)
        assert torch.allclose(logits, plain.forward(following, wanted), atol=1e-3)

    def test_the_targets_logits_are_those_of_single_steps(
        self, open_drafting: Callable[..., Engine]
    ) -> None:
        engine = open_drafting()
        _, drafted, logits = run_round(engine, prefill(engine), 0)
        assert logits.shape == (1 + DRAFTED, 320)
        cache = prefill(engine)
        steps = [engine.forward(torch.tensor([[token]]), cache) for token in (TOKEN, *drafted)]
        assert torch.allclose(logits, torch.stack(steps), atol=1e-3)

    def test_rounds_follow_each_other(self, open_drafting: Callable[..., Engine]) -> None:
        engine = open_drafting()
        cache = prefill(engine)
        for num_accepted in (3, 0, 1, 2):
            before = cache.get_seq_length()
            run_round(engine, cache, num_accepted)
            assert cache.get_seq_length() == before + 1 + num_accepted

    def test_rounds_and_steps_generate_the_same_text(
        self, open_drafting: Callable[..., Engine]
    ) -> None:
        engines = open_drafting(), open_drafting(draft="none", num_draft_tokens="auto")
        one, other = (engine.generate(PROMPT, max_new_tokens=24) for engine in engines)
        assert one.token_ids == other.token_ids


class TestDrafting:
    def test_tokens_are_drafted_by_the_quantised_experts(
        self, open_drafting: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engine = open_drafting()
        draft = drafter_of(engine).draft
        assert draft is not None
        visits: list[tuple[int, int]] = []
        run_layer = draft.run_layer

        def watch(layer: int, experts: Any, hidden: Tensor, *routing: Tensor) -> Tensor:
            visits.append((layer, len(hidden)))
            return run_layer(layer, experts, hidden, *routing)

        monkeypatch.setattr(draft, "run_layer", watch)
        cache = prefill(engine)
        exact: list[int] = []
        engine.runtime.on_routing = lambda event, wanted: exact.append(event.layer)
        run_round(engine, cache, 1)
        assert visits == [(layer, 1) for _ in range(DRAFTED) for layer in range(4)]
        assert exact == [0, 1, 2, 3], "the target runs once, over all of them"

    def test_the_draft_says_nearly_what_the_target_says(
        self, open_drafting: Callable[..., Engine]
    ) -> None:
        engine = open_drafting(draft="int8")
        choose = Greedy()
        with drafter_of(engine).begin(prefill(engine), 9) as this_round:
            this_round.draft(TOKEN, choose)
            logits = this_round.verify([TOKEN, *choose.tokens])
        for drafted, true in zip(choose.logits, logits, strict=False):
            assert 0 < (drafted - true).norm() < 0.1 * true.norm()

    def test_a_choice_of_none_ends_the_draft(self, open_drafting: Callable[..., Engine]) -> None:
        engine = open_drafting()
        cache, choose = prefill(engine), Greedy(most=2)
        with drafter_of(engine).begin(cache, 9) as this_round:
            this_round.draft(TOKEN, choose)
            assert cache.get_seq_length() == len(PROMPT)
            this_round.verify([TOKEN, *choose.tokens])
            this_round.settle(2)
        assert cache.get_seq_length() == len(PROMPT) + 3
        assert engine.metrics.num_draft_tokens == 2

    @pytest.mark.parametrize(("most", "number"), [(9, DRAFTED), (2, 2), (0, 0)])
    def test_no_more_is_drafted_than_there_is_room_for(
        self, open_drafting: Callable[..., Engine], most: int, number: int
    ) -> None:
        engine = open_drafting()
        this_round, drafted, logits = run_round(engine, prefill(engine), 0, most)
        assert this_round.number == len(drafted) == number
        assert len(logits) == 1 + number

    def test_a_round_without_a_draft_is_a_plain_step(
        self, open_drafting: Callable[..., Engine]
    ) -> None:
        engine = open_drafting()
        cache = prefill(engine)
        _, _, logits = run_round(engine, cache, 0, most=0)
        assert torch.equal(logits[0], engine.forward(torch.tensor([[TOKEN]]), prefill(engine)))
        assert engine.metrics.num_prefetched == 0
        assert (engine.metrics.num_rounds, engine.metrics.num_draft_tokens) == (1, 0)
        assert engine.metrics.acceptance_rate is None


class TestCopies:
    def test_what_was_drafted_is_foreseen_until_it_is_verified(
        self, open_drafting: Callable[..., Engine]
    ) -> None:
        engine = open_drafting()
        choose = Greedy()
        with drafter_of(engine).begin(prefill(engine), 9) as this_round:
            this_round.draft(TOKEN, choose)
            buffer = this_round.prefetches.buffer
            assert buffer.num_tokens == DRAFTED
            used = {(layer, e) for layer in range(4) for e in buffer.uses(layer)}
            assert foreseen(engine) == used
            assert engine.tiers.cache._delay.all(), "nothing else is expected"
            this_round.verify([TOKEN, *choose.tokens])
            assert foreseen(engine) == set()
            this_round.settle(0)
        assert_settled(engine.tiers)

    @pytest.mark.parametrize("is_prefetching", [True, False])
    def test_what_is_missing_is_copied_while_drafting_unless_told_otherwise(
        self, open_drafting: Callable[..., Engine], is_prefetching: bool
    ) -> None:
        engine = open_drafting(expert_memory="30%")
        drafter_of(engine).is_prefetching = is_prefetching
        run_round(engine, prefill(engine), 0)
        assert (engine.metrics.num_prefetched > 0) is is_prefetching

    def test_foresight_takes_the_place_of_the_drafts_own_routing(
        self, open_drafting: Callable[..., Engine]
    ) -> None:
        engine = open_drafting()
        asked: list[tuple[int, int]] = []

        def foresee(position: int, layer: int) -> tuple[int, ...]:
            asked.append((position, layer))
            return (position % 16, layer)

        drafter_of(engine).foresight = foresee
        start = len(PROMPT)
        with drafter_of(engine).begin(prefill(engine), 9) as this_round:
            this_round.draft(TOKEN, Greedy())
            buffer = this_round.prefetches.buffer
            for layer in range(4):
                wanted = {position % 16 for position in range(start, start + DRAFTED)} | {layer}
                assert set(buffer.uses(layer)) == wanted
        assert asked == [(start + token, layer) for token in range(DRAFTED) for layer in range(4)]

    def test_true_foresight_brings_all_that_is_missing_and_nothing_else(
        self, open_drafting: Callable[..., Engine]
    ) -> None:
        engine = open_drafting(expert_memory="60%")
        routed: dict[int, list[int]] = {}
        engine.runtime.on_routing = lambda event, wanted: routed.update({event.layer: wanted})
        _, drafted, _ = run_round(engine, prefill(engine), 0)
        known = dict(routed)
        drafter_of(engine).foresight = lambda position, layer: known[layer]
        cache = prefill(engine)
        before = engine.metrics.snapshot()
        this_round, again, _ = run_round(engine, cache, 0)
        counted = engine.metrics.since(before)
        assert (again, routed) == (drafted, known)
        assert counted.num_misses == 0
        assert counted.num_prefetched_used == counted.num_prefetched > 0
        assert this_round.verification.num_lookups == sum(len(w) for w in known.values())


class TestCounting:
    def test_a_round_is_counted_when_it_is_settled(
        self, open_drafting: Callable[..., Engine]
    ) -> None:
        engine = open_drafting()
        cache = prefill(engine)
        before = engine.metrics.snapshot()
        run_round(engine, cache, 2)
        counted = engine.metrics.since(before)
        assert counted.num_rounds == 1
        assert counted.num_draft_tokens == DRAFTED
        assert counted.num_accepted_tokens == 2
        assert counted.draft_s > 0
        assert counted.num_steps == 1
        assert counted.acceptance_rate == pytest.approx(2 / 3)
        assert counted.accept_length == 3

    def test_the_governor_learns_what_the_round_took(
        self, open_drafting: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engine = open_drafting(expert_memory="30%")
        governor = drafter_of(engine).governor
        reports: list[Any] = []
        learn = governor.learn
        monkeypatch.setattr(
            governor, "learn", lambda report: (reports.append(report), learn(report))
        )
        cache = prefill(engine)
        before = engine.metrics.snapshot()
        this_round, _, _ = run_round(engine, cache, 1)
        counted = engine.metrics.since(before)
        (report,) = reports
        assert (report.num_draft_tokens, report.num_accepted_tokens) == (DRAFTED, 1)
        assert report.num_lookups == counted.num_lookups
        assert report.stall_s == pytest.approx(counted.stall_s)
        # Copies that were called off may have ended in between.
        assert 0 < report.copied_bytes <= counted.bytes_moved
        assert 0 < report.link_s <= counted.link_s
        assert report.draft_s == pytest.approx(counted.draft_s)
        assert report.verify_s == pytest.approx(this_round.verification.time_s)
        assert 0 <= report.stall_s < report.verify_s
        assert governor.rounds_by_draft == {DRAFTED: 1}
        assert governor.draft_token_s == pytest.approx(report.draft_s / DRAFTED)

    def test_a_verification_tells_what_it_demanded(
        self, open_drafting: Callable[..., Engine]
    ) -> None:
        engine = open_drafting(expert_memory="30%")
        drafter_of(engine).is_prefetching = False
        rounds: list[DraftRound] = []
        drafter_of(engine).on_round = rounds.append
        cache = prefill(engine)
        before = engine.metrics.snapshot()
        this_round, drafted, _ = run_round(engine, cache, 1)
        counted = engine.metrics.since(before)
        assert rounds == [this_round]
        assert (this_round.token_ids, this_round.num_accepted) == ([TOKEN, *drafted], 1)
        verification = this_round.verification
        assert verification.num_tokens == 1 + DRAFTED
        assert verification.time_s > 0
        assert verification.num_lookups == counted.num_lookups
        assert verification.num_absent == counted.num_misses + counted.num_late > 0

    def test_a_round_that_is_left_counts_nothing(
        self, open_drafting: Callable[..., Engine]
    ) -> None:
        engine = open_drafting()
        cache, choose = prefill(engine), Greedy()
        with drafter_of(engine).begin(cache, 9) as this_round:
            this_round.draft(TOKEN, choose)
            this_round.verify([TOKEN, *choose.tokens])
        assert engine.metrics.num_rounds == engine.metrics.num_draft_tokens == 0
        assert drafter_of(engine).governor.rounds_by_draft == {}


class TestErrors:
    def break_off(self, engine: Engine, place: str) -> None:
        """Run a round that an error ends."""
        cache, choose = prefill(engine), Greedy()

        def fail(*anything: object) -> int | None:
            raise KeyboardInterrupt

        def fail_in_the_middle(event: RoutingEvent, wanted: list[int]) -> None:
            if event.layer == 2:
                raise KeyboardInterrupt

        with drafter_of(engine).begin(cache, 9) as this_round:
            this_round.draft(TOKEN, fail if place == "draft" else choose)
            if place == "between":
                fail()
            engine.runtime.on_routing = fail_in_the_middle
            this_round.verify([TOKEN, *choose.tokens])

    @pytest.mark.parametrize("place", ["draft", "between", "verification"])
    def test_an_error_in_a_round_leaves_everything_settled(
        self, open_drafting: Callable[..., Engine], place: str
    ) -> None:
        engine = open_drafting(expert_memory="30%")
        wanted = engine.generate(PROMPT, max_new_tokens=8).token_ids
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                self.break_off(engine, place)
            engine.runtime.on_routing = None
            assert_settled(engine.tiers)
            assert foreseen(engine) == set()
            assert not engine.tiers.cache._delay.any()
            assert not engine.runtime._drafting
            assert not engine.runtime._verifying
        assert engine.generate(PROMPT, max_new_tokens=8).token_ids == wanted


class TestRelease:
    def test_without_its_draft_nothing_is_drafted(
        self, open_drafting: Callable[..., Engine]
    ) -> None:
        engine = open_drafting()
        wanted = engine.generate(PROMPT, max_new_tokens=8).token_ids
        draft = drafter_of(engine).draft
        assert draft is not None
        drafter_of(engine).release()
        drafter_of(engine).release()
        assert drafter_of(engine).draft is None
        assert draft.num_bytes == 0
        before = engine.metrics.snapshot()
        assert engine.generate(PROMPT, max_new_tokens=8).token_ids == wanted
        counted = engine.metrics.since(before)
        assert counted.num_draft_tokens == 0
        assert counted.num_rounds == 7
