"""Every token is fed once, in order, drafted or not."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, Self

import pytest
import torch
from torch import Tensor

from foreload.config import SamplingConfig
from foreload.decode import loop as loop_module
from foreload.decode.loop import decode
from foreload.decode.sampling import verify

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

VOCABULARY = 50


class Counting:
    """A model whose likeliest next token is the sum of all it has seen."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []

    def __call__(self, token_ids: Tensor, kv_cache: list[int]) -> Tensor:
        assert token_ids.dtype == torch.int64
        assert token_ids.shape[0] == 1
        self.calls.append(token_ids[0].tolist())
        kv_cache.extend(self.calls[-1])
        logits = torch.zeros(VOCABULARY)
        logits[sum(kv_cache) % VOCABULARY] = 9.0
        return logits


def greedy(prompt: list[int], num_tokens: int) -> list[int]:
    seen = list(prompt)
    for _ in range(num_tokens):
        seen.append(sum(seen) % VOCABULARY)
    return seen[len(prompt) :]


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 100])
def test_prefill_chunks_cover_the_prompt_and_then_tokens_come_one_by_one(chunk: int) -> None:
    prompt, model, cache = [3, 1, 4, 1, 5], Counting(), []
    config = SamplingConfig(max_new_tokens=4)
    tokens = list(decode(model, prompt, cache, config, prefill_chunk=chunk))
    assert tokens == greedy(prompt, 4)
    prefill = [prompt[start : start + chunk] for start in range(0, 5, chunk)]
    assert model.calls == prefill + [[token] for token in tokens[:-1]]
    assert cache == prompt + tokens[:-1]


def test_no_forward_is_run_for_a_token_nobody_asks_for() -> None:
    model = Counting()
    tokens = decode(model, [1], [], SamplingConfig(max_new_tokens=9), prefill_chunk=8)
    assert model.calls == [], "nothing runs before the first token is asked for"
    next(tokens)
    next(tokens)
    assert len(model.calls) == 2
    tokens.close()
    assert len(model.calls) == 2


def test_one_token_takes_one_forward() -> None:
    model = Counting()
    config = SamplingConfig(max_new_tokens=1)
    assert list(decode(model, [7, 8], [], config, prefill_chunk=8)) == [15]
    assert model.calls == [[7, 8]]


@pytest.mark.parametrize("chunk", [1, 2, 4])
def test_the_prompt_is_run_by_who_runs_prompts(chunk: int) -> None:
    prompt, reader, writer, cache = [3, 1, 4], Counting(), Counting(), []
    config = SamplingConfig(max_new_tokens=3)
    tokens = list(decode(writer, prompt, cache, config, prefill_chunk=chunk, prefill=reader))
    assert reader.calls == [prompt[start : start + chunk] for start in range(0, 3, chunk)]
    assert writer.calls == [[token] for token in tokens[:-1]]


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        next(decode(Counting(), [], [], SamplingConfig(), prefill_chunk=8))


def draw(seed: int | None) -> list[int]:
    config = SamplingConfig(max_new_tokens=30, temperature=3.0, seed=seed)
    return list(decode(Counting(), [1], [], config, prefill_chunk=8))


def test_the_seed_decides_the_samples_whatever_else_is_drawn() -> None:
    first = draw(5)
    torch.manual_seed(99)
    torch.rand(3)
    state = torch.get_rng_state()
    assert draw(5) == first != draw(6)
    assert torch.equal(torch.get_rng_state(), state), "the global generator was touched"


def test_without_a_seed_samples_differ() -> None:
    assert draw(None) != draw(None)


def peaked(seen: list[int], error: int = 0) -> Tensor:
    """Give the logits of `Counting` behind what was seen, or others."""
    logits = torch.zeros(VOCABULARY)
    logits[(sum(seen) + error) % VOCABULARY] = 9.0
    return logits


class Guessing:
    """A drafter whose draft knows the target, and errs at every so many-th token."""

    def __init__(self, number: int, wrong_every: int = 1000) -> None:
        self.number = number
        self.wrong_every = wrong_every
        self.num_drafted = 0
        self.mosts: list[int] = []
        self.rounds: list[GuessingRound] = []
        self.error: BaseException | None = None

    def begin(self, kv_cache: list[int], most: int) -> GuessingRound:
        self.mosts.append(most)
        assert all(not one.is_open for one in self.rounds), "one round at a time"
        self.rounds.append(GuessingRound(self, kv_cache, min(self.number, most)))
        return self.rounds[-1]


class GuessingRound:
    def __init__(self, owner: Guessing, kv_cache: list[int], number: int) -> None:
        self.owner, self.kv_cache, self.number = owner, kv_cache, number
        self.is_open = False
        self.fed: list[int] = []
        self.shown: list[Tensor] = []
        self.verified: list[int] | None = None
        self.num_accepted: int | None = None

    def __enter__(self) -> Self:
        self.is_open = True
        return self

    def __exit__(self, *error: object) -> None:
        self.is_open = False

    def draft(self, token: int, choose: Callable[[Tensor], int | None]) -> None:
        assert self.is_open
        seen, following = list(self.kv_cache), token
        while following is not None and len(self.fed) < self.number:
            self.fed.append(following)
            self.owner.num_drafted += 1
            is_wrong = self.owner.num_drafted % self.owner.wrong_every == 0
            self.shown.append(peaked([*seen, *self.fed], error=int(is_wrong)))
            following = choose(self.shown[-1])

    def verify(self, token_ids: Sequence[int]) -> Tensor:
        assert self.is_open
        if self.owner.error is not None:
            raise self.owner.error
        self.verified = list(token_ids)
        rows = []
        for token in token_ids:
            self.kv_cache.append(token)
            rows.append(peaked(self.kv_cache))
        return torch.stack(rows)

    def settle(self, num_accepted: int) -> None:
        assert self.is_open
        assert self.verified is not None
        self.num_accepted = num_accepted
        rejected = len(self.verified) - 1 - num_accepted
        del self.kv_cache[len(self.kv_cache) - rejected :]


def forbid(token_ids: Tensor, kv_cache: list[int]) -> Tensor:
    raise AssertionError("with a drafter every token comes from a round")


class TestRounds:
    @pytest.mark.parametrize("number", [0, 1, 3, 8])
    @pytest.mark.parametrize("wrong_every", [1, 2, 3, 5, 1000])
    @pytest.mark.parametrize("max_new_tokens", [1, 2, 7, 30])
    def test_tokens_are_the_same_as_without_a_draft(
        self, number: int, wrong_every: int, max_new_tokens: int
    ) -> None:
        config, cache = SamplingConfig(max_new_tokens=max_new_tokens), []
        drafter = Guessing(number, wrong_every)
        tokens = list(
            decode(
                forbid, [3, 1, 4], cache, config,
                prefill_chunk=8, prefill=Counting(), drafter=drafter,
            )
        )  # fmt: skip
        assert tokens == greedy([3, 1, 4], max_new_tokens)
        assert cache == [3, 1, 4, *tokens[:-1]], "all but the last token was run by the target"
        assert not any(one.is_open for one in drafter.rounds)

    def test_a_round_brings_the_accepted_tokens_and_one_more(self) -> None:
        config = SamplingConfig(max_new_tokens=12)
        drafter = Guessing(3)
        list(decode(Counting(), [1], [], config, prefill_chunk=8, drafter=drafter))
        assert [one.num_accepted for one in drafter.rounds] == [3, 3, 2]
        assert [len(one.fed) for one in drafter.rounds] == [3, 3, 2]

    def test_no_more_is_drafted_than_can_be_shown(self) -> None:
        config = SamplingConfig(max_new_tokens=9)
        drafter = Guessing(5, wrong_every=2)
        list(decode(Counting(), [1], [], config, prefill_chunk=8, drafter=drafter))
        # The first token came from the prompt, and every round brings one of its own.
        left = 8
        for most, one in zip(drafter.mosts, drafter.rounds, strict=True):
            assert most == left - 1
            assert one.num_accepted is not None
            left -= 1 + one.num_accepted
        assert left == 0

    def test_the_last_token_before_a_round_is_the_first_it_verifies(self) -> None:
        config = SamplingConfig(max_new_tokens=10)
        drafter = Guessing(2, wrong_every=4)
        tokens = list(decode(Counting(), [5, 6], [], config, prefill_chunk=8, drafter=drafter))
        place = 0
        for one in drafter.rounds:
            assert one.verified is not None
            assert one.verified[0] == tokens[place]
            assert one.num_accepted is not None
            place += 1 + one.num_accepted

    def test_nothing_is_drafted_behind_an_end(self) -> None:
        wanted = greedy([3, 1, 4], 10)
        end = wanted[3]
        assert end not in wanted[:3]
        drafter = Guessing(8)
        config = SamplingConfig(max_new_tokens=10)
        tokens = decode(
            Counting(), [3, 1, 4], [], config, prefill_chunk=8, drafter=drafter, ends={end, 99}
        )
        assert [next(tokens) for _ in range(4)] == wanted[:4]
        assert drafter.rounds[0].fed == wanted[:3]
        assert drafter.rounds[0].verified == wanted[:4], "the end itself is verified"

    def test_an_end_that_the_target_denies_ends_nothing(self) -> None:
        wanted = greedy([3, 1, 4], 10)
        drafter = Guessing(4, wrong_every=2)
        denied = wanted[2] + 1
        assert denied not in wanted
        tokens = decode(
            Counting(), [3, 1, 4], [], SamplingConfig(max_new_tokens=10),
            prefill_chunk=8, drafter=drafter, ends={denied},
        )  # fmt: skip
        assert list(tokens) == wanted
        assert drafter.rounds[0].verified == [*wanted[:2], denied]

    @pytest.mark.parametrize("after", [1, 2, 3])
    def test_a_draft_that_is_cancelled_is_not_verified(self, after: int) -> None:
        drafter = Guessing(4)
        tokens = decode(
            Counting(), [3, 1, 4], [], SamplingConfig(max_new_tokens=20),
            prefill_chunk=8, drafter=drafter,
            is_cancelled=lambda: drafter.num_drafted >= after,
        )  # fmt: skip
        assert list(tokens) == greedy([3, 1, 4], 1), "nothing but the prompt's own token"
        assert drafter.num_drafted == after
        (only,) = drafter.rounds
        assert only.verified is None
        assert not only.is_open

    def test_what_was_verified_before_is_shown_though_the_next_round_is_cancelled(self) -> None:
        drafter = Guessing(4)
        tokens = decode(
            Counting(), [3, 1, 4], [], SamplingConfig(max_new_tokens=20),
            prefill_chunk=8, drafter=drafter,
            is_cancelled=lambda: drafter.num_drafted > 6,
        )  # fmt: skip
        assert list(tokens) == greedy([3, 1, 4], 6)

    def test_no_round_is_open_while_tokens_are_shown(self) -> None:
        drafter = Guessing(3)
        tokens = decode(
            Counting(), [1], [], SamplingConfig(max_new_tokens=20),
            prefill_chunk=8, drafter=drafter,
        )  # fmt: skip
        for _ in itertools.islice(tokens, 7):
            assert not any(one.is_open for one in drafter.rounds)
        assert len(drafter.rounds) == 2, "the next one begins when its tokens are asked for"
        tokens.close()
        assert len(drafter.rounds) == 2

    def test_an_error_ends_its_round(self) -> None:
        drafter = Guessing(3)
        drafter.error = RuntimeError("flaw")
        tokens = decode(
            Counting(), [1], [], SamplingConfig(max_new_tokens=20),
            prefill_chunk=8, drafter=drafter,
        )  # fmt: skip
        with pytest.raises(RuntimeError, match="flaw"):
            list(tokens)
        assert [one.is_open for one in drafter.rounds] == [False]

    @pytest.mark.parametrize("temperature", [0.0, 3.0])
    def test_every_drafted_token_is_judged_beside_the_logits_it_came_from(
        self, monkeypatch: pytest.MonkeyPatch, temperature: float
    ) -> None:
        drafter, num_judged = Guessing(3, wrong_every=4), 0

        def judge(
            draft_ids: list[int], draft_logits: list[Tensor], target_logits: Tensor, *rest: Any
        ) -> Any:
            nonlocal num_judged
            shown = drafter.rounds[-1].shown
            assert len(draft_ids) == len(draft_logits) == len(shown)
            assert all(one is other for one, other in zip(draft_logits, shown, strict=True))
            assert len(target_logits) == 1 + len(draft_ids)
            num_judged += len(shown)
            return verify(draft_ids, draft_logits, target_logits, *rest)

        monkeypatch.setattr(loop_module, "verify", judge)
        config = SamplingConfig(max_new_tokens=20, temperature=temperature, seed=0)
        list(decode(Counting(), [1], [], config, prefill_chunk=8, drafter=drafter))
        assert num_judged == drafter.num_drafted > 0

    def test_the_seed_decides_drafted_samples_too(self) -> None:
        def draw(seed: int) -> list[int]:
            config = SamplingConfig(max_new_tokens=30, temperature=3.0, seed=seed)
            drafter = Guessing(3, wrong_every=3)
            return list(decode(Counting(), [1], [], config, prefill_chunk=8, drafter=drafter))

        first = draw(5)
        state = torch.get_rng_state()
        assert draw(5) == first != draw(6)
        assert len(first) == 30
        assert torch.equal(torch.get_rng_state(), state), "the global generator was touched"


class CountingStep:
    """A step on the same cache as the model, that remembers how it was asked."""

    def __init__(self, model: Counting, cache: list[int]) -> None:
        self.model, self.cache = model, cache
        self.asked: list[str] = []

    def __call__(self, token: int) -> Tensor:
        self.asked.append("logits")
        return self.model(torch.tensor([[token]]), self.cache)

    def likeliest(self, token: int) -> int:
        self.asked.append("likeliest")
        return int(self.model(torch.tensor([[token]]), self.cache).argmax())


@pytest.mark.parametrize(("temperature", "asked"), [(0.0, "likeliest"), (0.1, "logits")])
def test_a_step_decodes_what_comes_behind_the_prompt(temperature: float, asked: str) -> None:
    prompt, model, cache = [3, 1, 4], Counting(), []
    step = CountingStep(model, cache)
    config = SamplingConfig(max_new_tokens=5, temperature=temperature, seed=0)

    def only_prompt(token_ids: Tensor, kv_cache: list[int]) -> Tensor:
        assert token_ids.tolist() == [prompt]
        return model(token_ids, kv_cache)

    tokens = list(decode(only_prompt, prompt, cache, config, prefill_chunk=8, step=step))
    assert tokens == greedy(prompt, 5)
    assert step.asked == [asked] * 4
