"""With a draft the tokens are those without one: greedy ones the same, drawn ones as likely.

In float32, where the target's forward over several tokens rounds so little differently that no
choice of these models turns over. `benchmarks/draft_greedy.py` runs more text, and bfloat16.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

import zoo
from distribution import compare_draws, exact_second
from fakes import assert_settled, make_engine
from foreload.model.source import resolve_model

if TYPE_CHECKING:
    from collections.abc import Callable

    from foreload import Engine

FAMILIES = list(zoo.SEVEN_FAMILIES)
PROMPTS = [[11, 16, 21, 5, 9], [3, 3, 3], list(range(20, 60))]
NUM_TOKENS = 24
NUMBERS: list[int | str] = [0, 1, 2, 3, 5, 8, "auto"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = zoo.save_family(family, tmp_path_factory.mktemp(family)).path
        return made[family]

    return get


def generate(engine: Engine, prompt: list[int], num_tokens: int = NUM_TOKENS) -> list[int]:
    return engine.generate(prompt, max_new_tokens=num_tokens).token_ids


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_without_a_draft(
    checkpoints: Callable[[str], Path], family: str
) -> None:
    path = checkpoints(family)
    with make_engine(path, expert_memory="100%") as plain:
        wanted = [generate(plain, prompt) for prompt in PROMPTS]
    for place, number in enumerate(NUMBERS):
        kind = ("int4", "int8")[place % 2]
        memory = ("200%", "120%")[place % 2]
        with make_engine(path, expert_memory=memory, draft=kind, num_draft_tokens=number) as engine:
            assert [generate(engine, prompt) for prompt in PROMPTS] == wanted
            assert_settled(engine.tiers)
            drafted = engine.metrics.num_draft_tokens
            assert (drafted > 0) == (number != 0)


@pytest.mark.parametrize("number", [1, 4, 8, "auto"])
def test_the_demo_says_the_same_with_a_draft(
    number: int | str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    demo = resolve_model("demo")
    text = (demo / "held_out.txt").read_text(encoding="utf-8")
    prompts = [text[start : start + 200] for start in (1000, 60_000)]
    settings: dict[str, Any] = {"dtype": "float32", "predictor": "lookahead"}
    with make_engine(demo, expert_memory="60%", cache_dir=Path("unused"), **settings) as plain:
        wanted = [plain.generate(prompt, max_new_tokens=40).token_ids for prompt in prompts]
    with make_engine(
        demo,
        expert_memory="60%",
        cache_dir=tmp_path_factory.getbasetemp() / "demo-draft",
        draft="int4",
        num_draft_tokens=number,
        **settings,
    ) as engine:
        found = [engine.generate(prompt, max_new_tokens=40) for prompt in prompts]
    assert [result.token_ids for result in found] == wanted
    if number == 8:
        # A trained model's quantised self is a good draft; noise would be accepted now and then.
        assert all((result.stats.acceptance_rate or 0) > 0.7 for result in found)


def test_a_draft_that_is_always_wrong_changes_no_token(
    checkpoints: Callable[[str], Path],
) -> None:
    path = checkpoints("olmoe")
    with make_engine(path, expert_memory="100%") as plain:
        wanted = [generate(plain, prompt) for prompt in PROMPTS]
    with make_engine(path, expert_memory="200%", draft="int4", num_draft_tokens=4) as engine:
        assert engine.drafter is not None
        assert engine.drafter.draft is not None
        noise = torch.Generator().manual_seed(0)

        def run(layer: int, experts: Any, hidden: Any, index: Any, weights: Any) -> Any:
            return 10 * torch.randn(hidden.shape, generator=noise).to(hidden)

        engine.drafter.draft.run_layer = run  # type: ignore[method-assign]
        assert [generate(engine, prompt) for prompt in PROMPTS] == wanted
        assert (engine.metrics.acceptance_rate or 0) < 0.5


def test_drawn_tokens_are_distributed_as_without_a_draft(
    checkpoints: Callable[[str], Path],
) -> None:
    """The second token's distribution, against the exact one: a fixed seed for each draw."""
    path, prompt, draws = checkpoints("qwen3_moe"), [11, 16, 21, 5], 500
    settings: dict[str, Any] = {"temperature": 0.7, "top_k": 6, "top_p": 0.95}
    with make_engine(path, expert_memory="200%", draft="int4", num_draft_tokens=2) as engine:
        seconds = [
            engine.generate(prompt, max_new_tokens=3, seed=seed, **settings).token_ids[1]
            for seed in range(draws)
        ]
        assert 0 < (engine.metrics.acceptance_rate or 0) < 1, "both ways to a token were taken"
        found = compare_draws(seconds, exact_second(engine, prompt, settings))
    assert found.is_fine, found
