"""`foreload generate`: text to stdout, the rest to stderr, and how it ends."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch

from foreload import Engine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

PROMPT = "def add("
SHORT = ("--max-new-tokens", "8", "--expert-memory", "50%")

# A shell that starts tests in the background ignores Ctrl-C, and children inherit that.
SCRIPT = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from foreload.cli import main
main()
"""


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> str:
    with Engine.from_pretrained(checkpoint) as engine:
        return engine.generate(PROMPT, max_new_tokens=8).text


def test_text_goes_to_stdout_and_the_rest_to_stderr(
    call: Callable[..., Any], checkpoint: Path, expected: str
) -> None:
    result = call("generate", checkpoint, "-p", PROMPT, *SHORT)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == expected + "\n"
    settings, statistics = result.stderr.splitlines()
    assert "Qwen3MoeForCausalLM" in settings
    assert "(50.0 % of all experts)" in settings
    assert statistics.startswith("8 tokens (length), TTFT ")


@pytest.mark.parametrize("way", ["stdin", "file", "ids"])
def test_a_prompt_may_come_from_elsewhere(
    way: str, call: Callable[..., Any], checkpoint: Path, expected: str, tmp_path: Path
) -> None:
    if way == "stdin":
        result = call("generate", checkpoint, *SHORT, "--quiet", input=PROMPT + "\n")
    elif way == "file":
        path = tmp_path / "prompt.txt"
        path.write_text(PROMPT + "\n")
        result = call("generate", checkpoint, *SHORT, "--quiet", "--prompt-file", path)
    else:
        with Engine.from_pretrained(checkpoint) as engine:
            ids = ",".join(map(str, engine.tokenizer(PROMPT)["input_ids"]))
        result = call("generate", checkpoint, *SHORT, "--quiet", "--prompt-ids", ids)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == expected + "\n"
    assert result.stderr == ""


def test_json_is_one_object(call: Callable[..., Any], checkpoint: Path, expected: str) -> None:
    result = call("generate", checkpoint, "-p", PROMPT, *SHORT, "--json", "--stop", "\x00")
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["text"] == expected
    assert len(answer["token_ids"]) == 8
    assert answer["finish_reason"] == "length"
    assert answer["stats"]["num_output_tokens"] == 8
    assert answer["config"]["expert_memory"] > 0
    assert answer["config"]["device"] == "cpu"
    assert answer["config"]["sampling"]["stop"] == ["\x00"]


def test_the_text_is_the_same_where_the_device_decides(
    call: Callable[..., Any], checkpoint: Path, expected: str
) -> None:
    words = ("--device", "cpu", "--orchestration", "device", "--expert-memory", "50%")
    result = call("generate", checkpoint, "-p", PROMPT, *SHORT, "--json", *words)
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["text"] == expected
    assert answer["config"]["orchestration"] == "device"
    assert answer["config"]["host_memory"] == 2 * answer["config"]["expert_memory"]


def test_a_device_that_is_not_there_is_named(
    call: Callable[..., Any], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = call("generate", checkpoint, "-p", PROMPT, "--device", "cuda:3")
    assert result.exit_code == 1
    assert "no CUDA device" in result.stderr
    assert "Traceback" not in result.stderr
    assert call("generate", checkpoint, "--device", "gpu").exit_code == 2


def test_an_empty_prompt_is_an_error(call: Callable[..., Any], checkpoint: Path) -> None:
    result = call("generate", checkpoint, input="")
    assert result.exit_code == 1
    assert "error: the prompt is empty" in result.stderr


def test_too_little_memory_names_the_setting(call: Callable[..., Any], checkpoint: Path) -> None:
    result = call("generate", checkpoint, "-p", PROMPT, "--expert-memory", "1kb")
    assert result.exit_code == 1
    assert "hint: set expert_memory to at least" in result.stderr
    assert "Traceback" not in result.stderr


def test_compare_sets_two_runs_side_by_side(
    call: Callable[..., Any], checkpoint: Path, expected: str
) -> None:
    result = call("generate", checkpoint, "-p", PROMPT, *SHORT, "--compare", "--quiet")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == expected + "\n"
    for word in ("TTFT", "TPOT", "hit rate", "bytes read", "foreload", "on demand", "0.0 %"):
        assert word in result.stderr


def test_compare_runs_where_the_device_decides(call: Callable[..., Any], checkpoint: Path) -> None:
    words = ("--orchestration", "device", "--device", "cpu", "--expert-memory", "50%")
    result = call("generate", checkpoint, "-p", PROMPT, *SHORT, *words, "--compare", "--json")
    assert result.exit_code == 0, result.stderr
    compared = json.loads(result.stdout)["comparison"]
    assert compared["is_same_text"]


def test_compare_repeats_sampled_text(call: Callable[..., Any], checkpoint: Path) -> None:
    result = call(
        "generate", checkpoint, "-p", PROMPT, *SHORT, "--compare", "--json", "--temperature", "2"
    )
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout)
    comparison = answer["comparison"]
    assert comparison["is_same_text"]
    assert comparison["stats"]["hit_rate"] == 0
    assert comparison["config"]["predictor"] == "none"
    assert comparison["config"]["expert_memory"] == answer["config"]["expert_memory"]
    assert comparison["ratio"]["bytes_moved"] > 1
    assert isinstance(answer["config"]["sampling"]["seed"], int)


@pytest.mark.parametrize("policy", ["speculate", "speculate-when"])
def test_a_policy_is_shown_with_what_it_speculated(
    policy: str, call: Callable[..., Any], checkpoint: Path
) -> None:
    result = call(
        *("generate", checkpoint, "-p", PROMPT, "--max-new-tokens", "8"),
        *("--expert-memory", "25%", "--policy", policy),
        *(("--confidence", "0.25") if "when" in policy else ()),
    )
    assert result.exit_code == 0, result.stderr
    settings, statistics = result.stderr.splitlines()
    shown = "policy speculate-when (confidence 0.25)" if "when" in policy else "policy speculate"
    assert settings.endswith(shown)
    assert re.search(r", speculated [\d.]+ %$", statistics)


def test_json_has_the_policy(call: Callable[..., Any], checkpoint: Path) -> None:
    result = call(
        *("generate", checkpoint, "-p", PROMPT, "--max-new-tokens", "8", "--json"),
        *("--expert-memory", "25%", "--policy", "speculate-when", "--confidence", "0"),
    )
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["config"]["policy"] == "speculate-when"
    assert answer["config"]["confidence"] == 0
    assert answer["stats"]["speculated_fraction"] > 0


def test_the_exact_policy_says_nothing_of_speculation(
    call: Callable[..., Any], checkpoint: Path
) -> None:
    result = call("generate", checkpoint, "-p", PROMPT, *SHORT)
    assert "policy exact" in result.stderr
    assert "speculated" not in result.stderr


def test_compare_forgives_a_policy_that_is_not_exact(
    call: Callable[..., Any], checkpoint: Path
) -> None:
    result = call(
        *("generate", checkpoint, "-p", PROMPT, "--max-new-tokens", "16", "--compare", "--json"),
        *("--expert-memory", "25%", "--policy", "speculate-when", "--confidence", "0"),
        *("--predictor", "none"),
    )
    assert result.exit_code == 0, result.stderr
    comparison = json.loads(result.stdout)["comparison"]
    assert comparison["config"]["policy"] == "exact"
    assert comparison["stats"]["speculated_fraction"] == 0
    assert "speculated" in result.stderr
    assert comparison["is_same_text"] is not ("is not exact" in result.stderr)
    assert "this is a bug" not in result.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--policy", "speculate", "--predictor", "none"), "predictor='none' makes none"),
        (("--confidence", "2"), "confidence=2.0 must be a number from 0 to 1"),
        (("--policy", "guess"), "'guess' is not one of"),
    ],
)
def test_settings_of_a_policy_that_make_no_sense_are_wrong_usage(
    call: Callable[..., Any], checkpoint: Path, words: tuple[str, ...], message: str
) -> None:
    result = call("generate", checkpoint, "-p", PROMPT, *words)
    assert result.exit_code == 2
    assert message in result.stderr


@contextmanager
def running(checkpoint: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    """Start a generation that would take minutes, and wait for its first character."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-c", SCRIPT, "generate", str(checkpoint)),
            *("-p", PROMPT, "--max-new-tokens", "40000", *words),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            assert process.stdout is not None
            assert process.stdout.read(1)
            yield process
        finally:
            process.kill()


def test_ctrl_c_ends_the_text_and_prints_the_statistics(checkpoint: Path) -> None:
    with running(checkpoint) as process:
        process.send_signal(signal.SIGINT)
        text, notes = process.communicate(timeout=60)
    assert process.returncode == 130
    assert text.endswith("\n")
    assert "tokens (cancelled), TTFT" in notes
    assert "Traceback" not in notes


def test_a_reader_that_leaves_ends_it_quietly(checkpoint: Path) -> None:
    with running(checkpoint, "--quiet") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.wait(timeout=60) == 141
        assert process.stderr.read() == ""


@pytest.mark.usefixtures("interruptible")
def test_a_second_ctrl_c_aborts(
    call: Callable[..., Any], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cancelled = []
    # Nobody sees the first one: the forward takes for ever.
    monkeypatch.setattr(Engine, "cancel", lambda engine: cancelled.append(engine))

    def interrupt(*arguments: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        assert len(cancelled) == 1
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Engine, "forward", interrupt)
    result = call("generate", checkpoint, "-p", PROMPT, *SHORT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert len(cancelled) == 1
    assert result.exit_code == 130
    assert "interrupted" in result.stderr
