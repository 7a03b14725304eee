"""`foreload trace` writes what `foreload simulate` reads."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from foreload.trace.read import read_trace

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def test_it_records_a_text(
    call: Callable[..., Any], checkpoint: Path, text_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "trace.jsonl.gz"
    result = call(
        *("trace", checkpoint, "--text", text_file, "--output", output, "--json"),
        *("--num-prompt-tokens", "4", "--max-tokens", "24", "--expert-memory", "50%"),
        *("--predictor", "lookahead", "--lookahead-layers", "1"),
    )
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["num_prompt_tokens"], report["num_decode_tokens"]) == (4, 20)
    assert report["config"]["predictor"] == "lookahead"
    trace = read_trace(output)
    assert len(trace.steps) == 21
    assert [len(visit.predictions) for visit in trace.steps[1]] == [1, 1, 1, 0]


def test_it_says_what_it_did_and_simulate_takes_it(
    call: Callable[..., Any], checkpoint: Path, text_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "trace.jsonl"
    words = ("--num-prompt-tokens", "4", "--max-tokens", "24")
    recorded = call("trace", checkpoint, "--text", text_file, "--output", output, *words)
    assert recorded.exit_code == 0, recorded.stderr
    assert "20 decoded tokens at" in recorded.stdout
    assert "saved to" in recorded.stdout
    simulated = call("simulate", output, "--predictor", "trace", "--bandwidth", "1GB")
    assert simulated.exit_code == 0, simulated.stderr
    assert "TPOT" in simulated.stdout


def test_a_text_shorter_than_the_prompt_is_one_line_of_error(
    call: Callable[..., Any], checkpoint: Path, text_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "trace.jsonl"
    words = ("--num-prompt-tokens", "30", "--max-tokens", "20")
    result = call("trace", checkpoint, "--text", text_file, "--output", output, *words)
    assert result.exit_code == 1
    assert "the text has 20 tokens, and the prompt takes 30" in result.stderr
    assert not output.exists()
