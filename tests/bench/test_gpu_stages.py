"""Every stage of `benchmarks/gpu.py` runs to its end, on a device that is not there.

Kernels are launched and give zeros: what is tested is that no stage trips over itself.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.autograd.profiler_util import FunctionEventAvg

import zoo
from foreload.model import source
from foreload.trace import read
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


class Profile:
    """Stands in for torch's profiler, which takes long to begin."""

    def __init__(self, *, activities: Any) -> None:
        assert len(activities) == 2

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def export_chrome_trace(self, path: str) -> None:
        assert path.endswith(".json.gz")

    def key_averages(self) -> Profile:
        return self

    def table(self, *, sort_by: str, row_limit: int) -> str:
        assert hasattr(FunctionEventAvg(), sort_by)
        return "one row"


@pytest.mark.parametrize(
    "stage", ["equivalence", "tiers", "sampling", "suites", "replay", "profile"]
)
def test_a_stage_runs_to_its_end(
    gpu: ModuleType, stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.profiler, "profile", Profile)
    more = []
    if stage == "replay":
        # The model to replay on is there already, as small as the others.
        monkeypatch.setattr(gpu, "ROOT", tmp_path)
        zoo.save_small(tmp_path / "build" / "qwen3-30b-a3b-2")
        told = SimpleNamespace(demands=lambda: [[(0, 1), (2, 3)]] * 4)
        part = SimpleNamespace(decode_part=lambda: told)
        monkeypatch.setattr(read, "read_trace", lambda path: part)
        more = ["--trace", "told.csv", "--layers", "2"]
    with pytest.MonkeyPatch.context() as patch, pretend_cuda(patch, is_quiet=True) as machine:
        with pytest.raises(SystemExit):
            gpu.main([stage, "--output", str(tmp_path), *more])
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
