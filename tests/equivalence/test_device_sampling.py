"""Tokens are drawn as the logits say where the device decides, with a draft and without."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

import zoo
from distribution import compare_draws, exact_second
from fakes import make_engine

if TYPE_CHECKING:
    from pathlib import Path

PROMPT = [11, 16, 21, 5]
NUM_DRAWS = 200


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer: what is tested is behind it."""
    cls = zoo.model_class("qwen3_moe")
    settings = {**zoo.SEVEN_FAMILIES["qwen3_moe"], "num_hidden_layers": 1, "mlp_only_layers": []}
    path = tmp_path_factory.mktemp("model")
    zoo._save(zoo._build(cls, cls.config_class(**settings), torch.float32, seed=0), path)
    return path


@pytest.mark.parametrize(
    ("draft", "settings"),
    [
        ("none", {"temperature": 0.7, "top_k": 6, "top_p": 0.95}),
        ("int4", {"temperature": 0.7, "top_k": 6, "top_p": 0.95}),
    ],
)
def test_second_tokens_have_their_exact_distribution(
    checkpoint: Path, draft: str, settings: dict[str, Any]
) -> None:
    """Chi-square, a fixed seed for each draw."""
    given: dict[str, Any] = {} if draft == "none" else {"draft": draft, "num_draft_tokens": 1}
    with make_engine(
        checkpoint,
        device="cpu",
        orchestration="device",
        expert_memory="200%",
        predictor="none",
        **given,
    ) as engine:
        length = 2 if draft == "none" else 3
        seconds = [
            engine.generate(PROMPT, max_new_tokens=length, seed=seed, **settings).token_ids[1]
            for seed in range(NUM_DRAWS)
        ]
        if draft != "none":
            assert 0 < (engine.metrics.acceptance_rate or 0) < 1, "both ways to a token were taken"
        found = compare_draws(seconds, exact_second(engine, PROMPT, settings))
        assert found.is_fine, found
        # The test would see another temperature.
        other = exact_second(engine, PROMPT, {**settings, "temperature": 3.0, "top_p": 1.0})
        assert not compare_draws(seconds, other).is_fine
