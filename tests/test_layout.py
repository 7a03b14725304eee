"""The house is in order: each module has its test, its exports are true, its tools allowed."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "foreload"
MODULES = sorted(path.relative_to(SOURCE) for path in SOURCE.rglob("*.py"))

# Modules without a test file of their own: the file that tests them, or why none does.
TESTED_ELSEWHERE = {
    "__init__.py": "tests/test_import.py",
    "calibrate.py": "tests/cli/test_calibrate.py",
    "cli/__init__.py": "tests/cli/test_command.py",
    "cli/options.py": "tests/cli/test_command.py",
    "cli/simulate.py": "tests/cli/test_simulate_verb.py",
    "cli/slot_table.py": "tests/cli/test_simulate_verb.py",
    "cli/statistics.py": "tests/cli/test_generate.py",
    "cli/streaming.py": "tests/cli/test_generate.py",
    "cli/terminal.py": "tests/cli/test_command.py",
    "cli/verb.py": "tests/cli/test_command.py",
    "evaluate.py": "tests/cli/test_evaluate.py",
    "feature_collection.py": "tests/cli/test_train_estimator.py",
    "ops/triton_grouped_kernels.py": "tests/ops/test_triton_grouped.py",
    "ops/triton_kernels.py": "tests/ops/test_triton.py",
    "ops/triton_slots.py": "tests/ops/test_triton.py",
    "train_estimator.py": "tests/cli/test_train_estimator.py",
}

# Modules that stand on an optional dependency as a whole: the package they import.
NEEDS_EXTRA = {
    "lm_eval.py": "lm_eval",
    "ops/triton.py": "triton",
    "ops/triton_grouped.py": "triton",
    "ops/triton_grouped_kernels.py": "triton",
    "ops/triton_kernels.py": "triton",
    "ops/triton_present.py": "triton",
    "ops/triton_slots.py": "triton",
}

# Modules that may ask torch.cuda: everything else is the same on any device.
KNOWS_CUDA = {"memory/cuda.py", "model/graph.py"}


def has_code(path: Path) -> bool:
    """Tell whether a module is more than a docstring."""
    return len(ast.parse((SOURCE / path).read_text()).body) > 1


def own_test(path: Path) -> Path:
    return ROOT / "tests" / path.parent / f"test_{path.name}"


@pytest.mark.parametrize("path", [path for path in MODULES if has_code(path)], ids=str)
def test_every_module_has_its_test(path: Path) -> None:
    listed = TESTED_ELSEWHERE.get(path.as_posix())
    if listed is None:
        assert own_test(path).is_file(), f"write {own_test(path).relative_to(ROOT)}"
    else:
        assert (ROOT / listed).is_file(), f"{listed} is gone"
        assert not own_test(path).is_file(), "it has a test of its own: take it off the list"


def test_the_list_names_only_modules_that_exist() -> None:
    assert set(TESTED_ELSEWHERE) <= {path.as_posix() for path in MODULES}


def exported(path: Path) -> list[str] | None:
    for node in ast.parse((SOURCE / path).read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    return None


def export_order(name: str) -> tuple[int, str]:
    """Sort constants first, then classes, then functions."""
    kind = 0 if name.isupper() else 1 if name[0].isupper() else 2
    return kind, name


@pytest.mark.parametrize("path", [path for path in MODULES if has_code(path)], ids=str)
def test_exports_are_sorted_and_true(path: Path) -> None:
    names = exported(path)
    assert names is not None, "a module says what it is for others to use"
    assert names == sorted(set(names), key=export_order)
    if path.as_posix() in NEEDS_EXTRA:
        pytest.importorskip(NEEDS_EXTRA[path.as_posix()], reason="an extra is not installed")
    dotted = ".".join(["foreload", *path.with_suffix("").parts]).removesuffix(".__init__")
    module = importlib.import_module(dotted)
    for name in names:
        assert hasattr(module, name), f"{dotted} exports {name}, which it does not have"


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_every_module_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse((SOURCE / path).read_text()))


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_no_module_reaches_for_a_gpu_or_asserts(path: Path) -> None:
    tree = ast.parse((SOURCE / path).read_text())
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Assert), f"line {node.lineno}: assert is for tests"
    is_allowed = path.as_posix() in KNOWS_CUDA
    assert is_allowed or not lines_with_cuda(tree), "memory/cuda.py knows the devices"


def lines_with_cuda(tree: ast.AST) -> list[int]:
    """Give the lines that reach for torch.cuda, or for a tensor's own `cuda`."""
    lines = []
    for node in ast.walk(tree):
        names: list[str] = []
        match node:
            case ast.Attribute(attr="cuda"):
                names = ["torch.cuda"]
            case ast.Import():
                names = [alias.name for alias in node.names]
            case ast.ImportFrom(level=0):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
        if any(f"{name}.".startswith("torch.cuda.") for name in names):
            lines.append(node.lineno)
    return lines


@pytest.mark.parametrize(
    ("source", "is_found"),
    [
        ("torch.cuda.is_available()", True),
        ("tensor.cuda()", True),
        ("import torch.cuda", True),
        ("import os, torch.cuda.graphs as graphs", True),
        ("from torch import nn, cuda", True),
        ("from torch import cuda as device", True),
        ("def run():\n    from torch.cuda import Stream", True),
        ("from torch.cuda.graphs import *", True),
        ("import torch", False),
        ("from torch import nn", False),
        ("from foreload.memory import cuda\ncuda.find_device('cpu')", False),
        ("from foreload.memory.cuda import find_device", False),
        ("from .torch import cuda", False),
        ("import torch.cudagraphs", False),
    ],
)
def test_whoever_reaches_for_a_gpu_is_found(source: str, is_found: bool) -> None:
    assert bool(lines_with_cuda(ast.parse(source))) == is_found


@pytest.mark.parametrize("path", sorted(KNOWS_CUDA))
def test_those_who_may_reach_for_a_gpu_do(path: str) -> None:
    assert lines_with_cuda(ast.parse((SOURCE / path).read_text()))


def test_names_that_say_nothing_are_not_used() -> None:
    nothing = {"utils.py", "util.py", "helpers.py", "common.py", "misc.py", "manager.py"}
    found = {path.name for path in MODULES}
    assert "tiers.py" in found
    assert not found & nothing


def test_test_files_have_different_names() -> None:
    """Without packages, pytest cannot tell two test files of one name apart."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
