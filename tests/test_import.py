"""Importing foreload is quick and quiet: nothing heavy is loaded, printed or set."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import foreload

HEAVY = ("torch", "transformers", "safetensors", "huggingface_hub", "matplotlib", "rich", "psutil")

LOOK_AROUND = """
import json, os, sys, threading, warnings
before = dict(os.environ), list(warnings.filters), threading.active_count()
{code}
after = dict(os.environ), list(warnings.filters), threading.active_count()
heavy = [name for name in {heavy!r} if name in sys.modules]
print(json.dumps([heavy, before == after]))
"""


def look(code: str, heavy: tuple[str, ...] = HEAVY) -> tuple[list[str], bool, str]:
    """Run code in a fresh Python; give heavy modules, whether nothing was set, what was printed."""
    program = LOOK_AROUND.format(code=code, heavy=heavy)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *printed, last = done.stdout.splitlines()
    loaded, is_unchanged = json.loads(last)
    return loaded, is_unchanged, "\n".join(printed) + done.stderr


def test_import_loads_nothing_heavy_and_leaves_the_process_alone() -> None:
    code = "import foreload\nfrom foreload import EngineConfig, RequestStats, ForeloadError"
    assert look(code) == ([], True, "")


def test_the_bookkeeping_needs_no_torch() -> None:
    modules = ["memory.cache", "memory.eviction", "memory.checkpoint", "schedule.prefetch"]
    modules += [
        "trace.read",
        "trace.simulate",
        "predict.choice",
        "predict.oracle",
        "types",
        "metrics",
        "config",
        "errors",
    ]
    code = "\n".join(f"import foreload.{name}" for name in modules)
    loaded, _, printed = look(code, ("torch", "transformers"))
    assert (loaded, printed) == ([], "")


def test_help_loads_neither_torch_nor_transformers() -> None:
    code = """
import sys
sys.argv = ["foreload", "--help"]
from foreload.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
"""
    loaded, _, printed = look(code, ("torch", "transformers"))
    assert loaded == []
    assert "generate" in printed


def test_the_engine_is_there_when_asked_for() -> None:
    loaded, _, _ = look("from foreload import Engine\nassert Engine.__name__ == 'Engine'")
    assert {"torch", "transformers"} <= set(loaded)


def test_every_public_name_can_be_had() -> None:
    for name in foreload.__all__:
        assert getattr(foreload, name) is not None
    assert dir(foreload) == foreload.__all__
    with pytest.raises(AttributeError, match="no attribute 'Motor'"):
        foreload.Motor  # noqa: B018


def test_public_names_are_their_modules_own() -> None:
    from foreload.config import EngineConfig
    from foreload.decode.chunks import Chunk, GenerationResult
    from foreload.engine import Engine
    from foreload.metrics import RequestStats

    for cls in (EngineConfig, Chunk, Engine, GenerationResult, RequestStats):
        assert getattr(foreload, cls.__name__) is cls
