"""How much memory this process may still take: the machine's, or what its container leaves it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["available_bytes"]

_MEMBERSHIP = Path("/proc/self/cgroup")
_CGROUPS = Path("/sys/fs/cgroup")


def available_bytes(membership: Path = _MEMBERSHIP, cgroups: Path = _CGROUPS) -> int:
    """Give the bytes of memory that can be taken before something is swapped or killed.

    Pages of files that a control group has in memory count as available, as they do for the
    machine: the kernel takes them back first.

    Args:
        membership: The kernel's list of the control groups this process is in.
        cgroups: Where the control groups are mounted.
    """
    room: int = psutil.virtual_memory().available
    for folder, limit_name, used_name, prefix in _groups(membership, cgroups):
        limit, used = _number(folder / limit_name), _number(folder / used_name)
        if limit is not None and used is not None:
            room = min(room, limit - used + _file_bytes(folder / "memory.stat", prefix))
    return max(room, 0)


def _groups(membership: Path, cgroups: Path) -> Iterator[tuple[Path, str, str, str]]:
    """Give every group whose limit holds: folder, names of limit and use, prefix of totals."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = cgroups, ("memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            root = cgroups / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        else:
            continue
        # In a container the path may be the host's; the mounted root is the container's own then.
        folder = root / path.lstrip("/")
        for group in (folder, *folder.parents):
            if group == root or root in group.parents:
                yield group, *names


def _number(file: Path) -> int | None:
    """Read a number; None where there is none, as in "max"."""
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _file_bytes(file: Path, prefix: str) -> int:
    try:
        pairs = [line.split() for line in file.read_text().splitlines()]
    except OSError:
        return 0
    wanted = {f"{prefix}active_file", f"{prefix}inactive_file"}
    return sum(int(pair[1]) for pair in pairs if len(pair) == 2 and pair[0] in wanted)
