"""`foreload inspect`: a table for people, an object for programs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def test_table_and_json_say_the_same(call: Callable[..., Any], checkpoint: Path) -> None:
    result = call("inspect", checkpoint, "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["supported"] is True
    assert (report["num_experts"], report["top_k"]) == (8, 2)
    table = call("inspect", checkpoint).stdout
    for value in (report["architecture"], f"{report['expert_bytes']:,} bytes", "yes"):
        assert value in table


def test_dtype_changes_the_bytes_in_memory(call: Callable[..., Any], checkpoint: Path) -> None:
    reports = [
        json.loads(call("inspect", checkpoint, "--json", "--dtype", dtype).stdout)
        for dtype in ("float32", "bfloat16")
    ]
    assert reports[0]["expert_bytes"] == 2 * reports[1]["expert_bytes"]


def test_a_model_that_cannot_run_is_an_answer(
    call: Callable[..., Any], checkpoint: Path, tmp_path: Path
) -> None:
    for path in checkpoint.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((checkpoint / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "dbrx"}))
    result = call("inspect", tmp_path, "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["supported"] is False
    assert "dbrx" in report["reason"]
