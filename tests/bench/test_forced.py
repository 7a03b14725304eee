"""What is fed is the given text, step by step or in rounds, and the logits are the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import pytest
import torch

from foreload.bench.forced import run_forced, run_rounds
from foreload.bench.workload import Workload

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import Tensor

    from foreload import Engine

WORKLOAD = Workload(tuple(3 + (7 * i) % 300 for i in range(20)), 6)


def test_forced_decoding_feeds_the_prompt_then_each_token() -> None:
    fed: list[list[int]] = []

    def forward(ids: Tensor, kv_cache: Any) -> Tensor:
        assert kv_cache == "cache"
        fed.append(ids[0].tolist())
        return torch.tensor([float(len(fed))])

    forced = run_forced(forward, Workload((5, 6, 7, 8, 9), 3), "cache")
    assert fed == [[5, 6, 7], [8], [9]]
    assert forced.logits.tolist() == [[1.0], [2.0], [3.0]]
    assert len(forced.step_s) == 2


class Script:
    """A drafter whose target names the number of its forward, and whose draft errs on request."""

    def __init__(self, number: int, wrong: Sequence[int] = ()) -> None:
        self.number = number
        self.wrong = wrong
        self.mosts: list[int] = []
        self.drafted: list[list[int]] = []
        self.verified: list[list[int]] = []
        self.settled: list[int] = []
        self.num_choices = 0

    def begin(self, kv_cache: Any, most: int) -> Self:
        self.mosts.append(most)
        self.drafted.append([])
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def draft(self, token: int, choose: Callable[[Tensor], int | None]) -> None:
        following: int | None = token
        while following is not None and len(self.drafted[-1]) < min(self.number, self.mosts[-1]):
            self.drafted[-1].append(following)
            following = choose(logits_of(2 if self.num_choices in self.wrong else 1))
            self.num_choices += 1

    def verify(self, token_ids: Sequence[int]) -> Tensor:
        self.verified.append(list(token_ids))
        return torch.stack([logits_of(1, mark=float(token)) for token in token_ids])

    def settle(self, num_accepted: int) -> None:
        self.settled.append(num_accepted)


def logits_of(best: int, mark: float = 0.0) -> Tensor:
    """Give logits with a likeliest token, that of others being the mark."""
    logits = torch.full((4,), mark)
    logits[best] = 1e6
    return logits


def run_script(script: Script, text: tuple[int, ...], num_prompt: int) -> list[float]:
    """Run rounds; give the mark of every step."""
    forced = run_rounds(
        script,  # type: ignore[arg-type]
        lambda ids, cache: logits_of(1, mark=float(ids[0, -1])),
        Workload(text, num_prompt),
        "cache",
    )
    assert len(forced.step_s) == len(script.settled)
    assert forced.prefill_s >= 0
    return forced.logits[:, 0].tolist()


class TestScripts:
    def test_the_draft_is_fed_the_text_and_every_step_has_its_row(self) -> None:
        script = Script(3)
        text = (10, 11, 12, 13, 14, 15, 16, 17)
        assert run_script(script, text, 2) == [11, 12, 13, 14, 15, 16, 17]
        assert script.drafted == [[12, 13, 14], [16]]
        assert script.verified == [[12, 13, 14, 15], [16, 17]]
        assert script.settled == [3, 1]
        assert script.mosts == [5, 1]

    def test_a_round_ends_where_draft_and_target_differ(self) -> None:
        script = Script(3, wrong=(1, 3))
        text = (10, 11, 12, 13, 14, 15, 16, 17)
        assert run_script(script, text, 2) == [11, 12, 13, 14, 15, 16, 17]
        assert script.verified[0] == [12, 13, 14, 15]
        assert script.settled[:2] == [1, 0]
        assert script.verified[1] == [14, 15, 16, 17]
        assert script.verified[2][0] == 15

    def test_rounds_without_a_draft_go_step_by_step(self) -> None:
        script = Script(0)
        assert run_script(script, (10, 11, 12, 13), 1) == [10, 11, 12, 13]
        assert script.verified == [[11], [12], [13]]

    def test_a_text_that_is_all_prompt_has_no_rounds(self) -> None:
        script = Script(3)
        assert run_script(script, (10, 11), 2) == [11]
        assert script.mosts == []


@pytest.fixture(scope="module")
def drafts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache directory in which the draft is built once."""
    return tmp_path_factory.mktemp("drafts")


class TestEngines:
    @pytest.mark.parametrize("num_draft_tokens", [0, 1, 4, "auto"])
    def test_rounds_give_the_logits_of_steps(
        self, open_engine: Callable[..., Engine], drafts: Path, num_draft_tokens: int | str
    ) -> None:
        engine = open_engine(draft="int4", num_draft_tokens=num_draft_tokens, cache_dir=drafts)
        steps = run_forced(engine.forward, WORKLOAD, engine.make_cache())
        assert engine.drafter is not None
        cache = engine.make_request_cache()
        rounds = run_rounds(engine.drafter, engine._prefill, WORKLOAD, cache)
        assert rounds.logits.shape == steps.logits.shape == (1 + 14, 320)
        assert torch.equal(rounds.logits[0], steps.logits[0])
        assert torch.allclose(rounds.logits, steps.logits, atol=1e-3)
        assert cache.get_seq_length() == len(WORKLOAD.token_ids)
        metrics = engine.metrics
        assert len(rounds.step_s) == metrics.num_rounds
        assert metrics.num_rounds + metrics.num_accepted_tokens == WORKLOAD.num_decode_tokens
        if num_draft_tokens == 0:
            assert torch.equal(rounds.logits, steps.logits)
            assert metrics.num_rounds == 14

    def test_a_good_draft_is_accepted_mostly(
        self, open_engine: Callable[..., Engine], drafts: Path
    ) -> None:
        engine = open_engine(draft="int8", num_draft_tokens=4, cache_dir=drafts)
        assert engine.drafter is not None
        run_rounds(engine.drafter, engine._prefill, WORKLOAD, engine.make_request_cache())
        assert engine.metrics.acceptance_rate is not None
        assert engine.metrics.acceptance_rate > 0.5
