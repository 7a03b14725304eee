"""The command as a whole: what it loads, its options, its exit statuses."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import pytest

from foreload import __version__
from foreload.cli.options import ENGINE, HELP, SAMPLING
from foreload.config import EngineConfig, SamplingConfig

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

VERBS = [
    "generate",
    "chat",
    "inspect",
    "calibrate",
    "evaluate",
    "trace",
    "simulate",
    "bench",
    "make-model",
]
HEAVY = ("torch", "transformers", "numpy", "safetensors", "huggingface_hub", "tokenizers")

HELP_SCRIPT = f"""
import sys
from foreload.cli import main
for words in ([], *([verb] for verb in {VERBS!r}), ["make-model", "random"]):
    sys.argv = ["foreload", *words, "--help"]
    try:
        main()
    except SystemExit as end:
        assert end.code == 0
loaded = [name for name in {HEAVY!r} if name in sys.modules]
assert not loaded, loaded
import os
assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
"""


def test_help_loads_nothing_heavy() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HELP_SCRIPT], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for verb in VERBS:
        assert verb in done.stdout


def test_version(call: Callable[..., Any]) -> None:
    assert call("--version").stdout == f"foreload {__version__}\n"


@pytest.mark.parametrize("verb", ["generate", "chat"])
def test_every_setting_is_an_option_with_its_default(verb: str, call: Callable[..., Any]) -> None:
    text = re.sub(r"[\s│]+", " ", call(verb, "--help").stdout)
    for config in (EngineConfig(), SamplingConfig()):
        for field in fields(config):
            if field.name != "model":
                assert f"--{field.name.replace('_', '-')} " in text
                assert HELP[field.name] in text
    assert f"[default: {EngineConfig().eviction}]" in text
    assert f"[default: {SamplingConfig().max_new_tokens}]" in text


def test_groups_make_the_default_settings() -> None:
    for group, default in ((ENGINE, EngineConfig()), (SAMPLING, SamplingConfig())):
        values = {parameter.name: parameter.default for parameter in group.parameters}
        assert group.collect(values) == default
        assert values == {}


@pytest.mark.parametrize(
    "words",
    [
        ["no-such-verb"],
        ["generate", "--no-such-option"],
        ["generate", "-p", "x", "--predictor", "crystal-ball"],
        ["generate", "-p", "x", "--expert-memory", "some"],
        ["generate", "-p", "x", "--temperature", "-1"],
        ["generate", "-p", "x", "--num-workers", "0"],
        ["generate", "-p", "x", "--prompt-ids", "1"],
        ["generate", "--prompt-ids", "one"],
        ["generate", "--prompt-file", "/does/not/exist"],
        ["calibrate", "--text", "/does/not/exist"],
        ["evaluate", "--text", "/does/not/exist"],
        ["evaluate", "--num-prompt-tokens", "0"],
        ["trace"],
        ["trace", "--output", "trace", "--text", "/does/not/exist"],
        ["simulate", "/does/not/exist"],
        ["bench", "--budgets", "0"],
        ["bench", "--budgets", "half"],
        ["bench", "--suite", "nothing"],
        ["make-model", "widen", "demo"],
    ],
    ids=" ".join,
)
def test_bad_usage_ends_with_2(words: list[str], call: Callable[..., Any]) -> None:
    result = call(*words)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Error" in result.stderr


def test_an_error_is_one_line_and_a_hint(call: Callable[..., Any]) -> None:
    result = call("generate", "/no/such/folder", "-p", "x", "--json")
    assert result.exit_code == 1
    assert result.stdout == ""
    error, hint = result.stderr.splitlines()
    assert error.startswith("error: no folder '/no/such/folder'")
    assert hint.startswith("hint: ")


def test_debug_shows_the_traceback(call: Callable[..., Any]) -> None:
    result = call("inspect", "/no/such/folder", "--debug")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert "CheckpointError" in result.stderr


def test_what_was_not_expected_says_so(
    call: Callable[..., Any], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **settings: object) -> None:
        raise ZeroDivisionError("once [in] a while")

    monkeypatch.setattr("foreload.model.describe.describe", fail)
    result = call("inspect", checkpoint)
    assert result.exit_code == 1
    assert "error: ZeroDivisionError: once [in] a while" in result.stderr
    assert "--debug" in result.stderr
    assert "Traceback" not in result.stderr


def test_log_level_comes_from_the_environment(call: Callable[..., Any], checkpoint: Path) -> None:
    words = ("generate", checkpoint, "-p", "def", "--max-new-tokens", "1")
    assert "INFO foreload." in call(*words, env={"FORELOAD_LOG": "info"}).stderr
    assert "INFO" not in call(*words).stderr
    result = call(*words, env={"FORELOAD_LOG": "loud"})
    assert result.exit_code == 1
    assert "FORELOAD_LOG='loud'" in result.stderr


def run_command(words: list[str], **settings: Any) -> subprocess.CompletedProcess[str]:
    script = "from foreload.cli import main; main()"
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0"}
    return subprocess.run(
        [sys.executable, "-c", script, *words],
        text=True,
        check=False,
        env=environment,
        **settings,
    )


def test_an_answer_outlives_notes_that_cannot_be_written(checkpoint: Path) -> None:
    words = ["generate", str(checkpoint), "-p", "the", "--max-new-tokens", "2", "--device", "cpu"]
    with open("/dev/full", "w") as full:
        done = run_command(words, stdout=subprocess.PIPE, stderr=full)
    assert done.returncode == 0
    assert done.stdout.strip()


def test_help_that_cannot_be_written_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = run_command(["--help"], stdout=full, stderr=subprocess.PIPE)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert "No space left" in done.stderr


def test_bytes_that_are_no_text_are_told_in_any_locale(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with (tmp_path / "bytes").open() as given:
        done = run_command(
            ["generate", str(checkpoint)],
            stdin=given,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
    assert done.returncode in (1, 2)
    assert "not UTF-8 text" in done.stderr
