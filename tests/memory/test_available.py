"""A container's limit counts like the machine's, and files in memory count as available."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

import psutil
import pytest

from foreload.memory.available import available_bytes

if TYPE_CHECKING:
    from pathlib import Path

MACHINE = 10_000


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=MACHINE))


def group(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f"memory.{name}").write_text(f"{content}\n")


def ask(tmp_path: Path, membership: str) -> int:
    (tmp_path / "membership").write_text(membership)
    return available_bytes(tmp_path / "membership", tmp_path / "cgroup")


def test_without_a_group_it_is_the_machines(tmp_path: Path) -> None:
    assert available_bytes(tmp_path / "none", tmp_path) == MACHINE
    assert ask(tmp_path, "0::/\n") == MACHINE


def test_a_groups_limit_holds_where_it_is_nearer(tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    group(root / "app", max=5000, current=3000, stat="anon 2000\nactive_file 300\ninactive_file 50")
    assert ask(tmp_path, "0::/app\n") == 2350
    group(root / "app", max=50_000)
    assert ask(tmp_path, "0::/app\n") == MACHINE
    group(root / "app", max="max")
    assert ask(tmp_path, "0::/app\n") == MACHINE


def test_limits_of_the_groups_above_hold_too(tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    group(root / "slice", max=4000, current=1000)
    group(root / "slice" / "app", max="max", current=500)
    assert ask(tmp_path, "0::/slice/app\n") == 3000


def test_in_a_container_the_mounted_root_is_its_own_group(tmp_path: Path) -> None:
    group(tmp_path / "cgroup", max=4000, current=1000)
    assert ask(tmp_path, "0::/../docker/of/the/host\n") == 3000
    assert ask(tmp_path, "0::/\n") == 3000


def test_the_older_version_has_other_names(tmp_path: Path) -> None:
    folder = tmp_path / "cgroup" / "memory" / "app"
    group(
        folder,
        limit_in_bytes=4000,
        usage_in_bytes=3000,
        stat="active_file 7\ntotal_active_file 500\ntotal_inactive_file 0",
    )
    membership = "12:cpu,cpuacct:/app\n4:memory:/app\n"
    assert ask(tmp_path, membership) == 1500


def test_more_used_than_allowed_leaves_nothing(tmp_path: Path) -> None:
    group(tmp_path / "cgroup", max=4000, current=5000)
    assert ask(tmp_path, "0::/\n") == 0
