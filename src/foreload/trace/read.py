"""Reads a trace, whichever of the known formats it is in."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from foreload.trace.format import read_own_format
from foreload.trace.lines import TraceLines
from foreload.trace.route_csv import MARK, read_route_csv

if TYPE_CHECKING:
    from foreload.trace.record import RoutingTrace

__all__ = ["read_trace"]


def read_trace(path: str | Path) -> RoutingTrace:
    """Read a trace made by `foreload trace`, or a published one in route_trace's CSV.

    Args:
        path: The file, plain or gzip.

    Returns:
        The trace, with its `info`.

    Raises:
        TraceError: The file is damaged, cut off, or no trace; the message names the line.
    """
    with TraceLines(Path(path)) as lines:
        first = next(lines, "")
        if first.startswith(MARK):
            return read_route_csv(lines, first)
        return read_own_format(lines, first)
