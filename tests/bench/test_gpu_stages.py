"""Every stage of `benchmarks/gpu.py` runs to its end, on a device that is not there.

Kernels are launched and give zeros: what is tested is that no stage trips over itself.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import zoo
from foreload.model import source
from pretend_cuda import pretend_cuda

if TYPE_CHECKING:
    from types import ModuleType

ROOT = Path(__file__).parents[2]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tokenizer: Any) -> ModuleType:
    """The script, with a small model and few tokens."""
    small = tmp_path / "small"
    zoo.save_small(small)
    tokenizer.save_pretrained(small)
    found = importlib.util.spec_from_file_location("gpu_stages", ROOT / "benchmarks" / "gpu.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    for name, value in {
        "SHARES": (50,),
        "FAMILIES": (),
        "NUM_TOKENS": 4,
        "NUM_STAGED_TOKENS": 4,
        "STAGED": ((80, 30),),
        "SHARE_WITH_DRAFT": 250,
        "HOST_SHARES": (30,),
        "NUM_DRAWS": 2,
        "NUM_RUNS": 1,
        "NUM_TIMED": 8,
        "NUM_WARM": 2,
        "PROMPT": "cat",
    }.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(module, "widened_demo", lambda: small)
    monkeypatch.setattr(source, "resolve_model", lambda name: small)
    return module


def test_every_stage_has_a_test(gpu: ModuleType) -> None:
    assert set(gpu.STAGES) == {"equivalence", "tiers", "sampling", "suites", "profile", "replay"}


@pytest.mark.parametrize("stage", ["equivalence", "tiers", "sampling", "suites", "profile"])
def test_a_stage_runs_to_its_end(gpu: ModuleType, stage: str, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, pretend_cuda(patch, is_quiet=True) as machine:
        with pytest.raises(SystemExit):
            gpu.main([stage, "--output", str(tmp_path)])
        assert machine.num_launches > 0
    rows = json.loads((tmp_path / f"{stage}.json").read_text())["rows"]
    assert rows
    assert [row["error"] for row in rows if "error" in row] == []


def test_what_breaks_is_kept_and_told(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("no such thing")

    monkeypatch.setattr(gpu, "open_engine", fail)
    with pytest.MonkeyPatch.context() as patch, pretend_cuda(patch, is_quiet=True):
        with pytest.raises(SystemExit) as caught:
            gpu.main(["suites", "profile", "--output", str(tmp_path)])
        assert caught.value.code == 1
    for stage in ("suites", "profile"):
        rows = json.loads((tmp_path / f"{stage}.json").read_text())["rows"]
        assert all("no such thing" in row["error"] for row in rows)
