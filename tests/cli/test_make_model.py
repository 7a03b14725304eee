"""`foreload make-model`: what it makes can be inspected and run."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from foreload.bench.random_models import RANDOM_MODELS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import pytest


def test_widen(call: Callable[..., Any], checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "wide"
    result = call("make-model", "widen", checkpoint, "--factor", "2", folder, "--json")
    assert result.exit_code == 0, result.stderr
    made = json.loads(result.stdout)
    assert made["directory"] == str(folder)
    assert made["factor"] == 2
    experts = [
        json.loads(call("inspect", each, "--json").stdout)["expert_bytes"]
        for each in (checkpoint, folder)
    ]
    assert experts[1] == 4 * experts[0]


def test_random(call: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = RANDOM_MODELS["qwen3-30b-a3b"] | {
        "vocab_size": 50,
        "hidden_size": 32,
        "moe_intermediate_size": 16,
        "num_attention_heads": 4,
        "head_dim": 8,
    }
    monkeypatch.setitem(RANDOM_MODELS, "small", small)
    folder = tmp_path / "random"
    result = call("make-model", "random", "small", "--layers", "2", folder)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{folder}\n"
    words = ("generate", folder, "--max-new-tokens", "3", "--quiet")
    generated = call(*words, "--prompt-ids", "1,2,3")
    assert generated.exit_code == 0, generated.stderr
    assert len(generated.stdout.split()) == 3


def test_what_a_killed_run_left_is_named(
    call: Callable[..., Any], checkpoint: Path, tmp_path: Path
) -> None:
    left = tmp_path / ".wide.1234abcd.partial"
    left.mkdir()
    words = ("make-model", "widen", checkpoint, "--factor", "2")
    assert f"{left} is of a run that was killed" in call(*words, tmp_path / "wide").stderr
    assert left.is_dir(), "another one may still be writing"
    assert ".partial" not in call(*words, tmp_path / "other").stderr


def test_errors_leave_nothing(call: Callable[..., Any], checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    for words in (["random", "gpt-9"], ["widen", checkpoint, "--factor", "3"]):
        result = call("make-model", *words, folder)
        assert result.exit_code == 1
        assert "hint: " in result.stderr
    assert not folder.exists()
    assert "qwen3-30b-a3b" in call("make-model", "random", "gpt-9", folder).stderr
