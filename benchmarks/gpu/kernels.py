"""The compiled kernels beside their twins: the very tests that the interpreter runs elsewhere."""

from __future__ import annotations

from collections import Counter, defaultdict
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from gpu.rows import show
from gpu.settings import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gpu.rows import Row
    from gpu.settings import Settings

FILES = ("test_triton", "test_triton_grouped", "test_triton_present")
NUM_WORKERS = 12


def kernels(settings: Settings) -> Iterator[Row]:
    """Runs the kernels' tests, and tells for each file how many passed."""
    # What other stages do without.
    import pytest

    outcomes = _Outcomes()
    # Another torch warns of other things than that of CI.
    words = ["-q", "-W", "default", "--rootdir", str(ROOT)]
    if find_spec("xdist") is not None:
        words += ["-n", str(NUM_WORKERS)]
    files = [str(ROOT / "tests" / "ops" / f"{name}.py") for name in FILES]
    code = pytest.main([*words, *files], plugins=[outcomes])
    for name in FILES:
        counts = outcomes.by_file[f"tests/ops/{name}.py"]
        yield show({"file": name, **counts, "is_fine": not code and counts["passed"] > 0})
    for failure in outcomes.failures:
        yield show({**failure, "is_fine": False})


class _Outcomes:
    """Counts what became of each test, as pytest's plugin."""

    def __init__(self) -> None:
        self.by_file: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.failures: list[Row] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Takes a test's call, or what was skipped or broke before it."""
        if report.when != "call" and report.passed:
            return
        self.by_file[report.nodeid.split("::")[0]][report.outcome] += 1
        if report.failed:
            self.failures.append({"test": report.nodeid, "error": report.longreprtext[-2000:]})
