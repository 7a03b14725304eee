"""Traces others have published as CSV: `# route_trace v1`, one row per chosen expert.

    turn,phase,step,layer,slot,expert,weight,residency,expert_bytes

Phase 0 is a turn's prompt, read in one forward whose `step` counts tokens; in phase 1 every step is
a forward of one token. Layers without experts are left out of the count.

Reference:
    github.com/Helldez/BigMoeOnEdge, docs/bench-data.
"""

from __future__ import annotations

import itertools
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, NamedTuple

from foreload.trace.record import LayerVisit, RoutingTrace, TraceInfo

if TYPE_CHECKING:
    from collections.abc import Iterator

    from foreload.trace.lines import TraceLines

__all__ = ["MARK", "read_route_csv"]

MARK = "# route_trace "

_VERSION = "v1"
_COLUMNS = "turn,phase,step,layer,slot,expert,weight,residency,expert_bytes"


class _Row(NamedTuple):
    turn: int
    phase: int
    step: int
    layer: int
    expert: int
    weight: float

    @property
    def visit(self) -> tuple[int, int, int, int]:
        """Name the layer visit: all tokens of a prompt are one."""
        return self.turn, self.phase, self.step if self.phase else 0, self.layer


def read_route_csv(lines: TraceLines, first: str) -> RoutingTrace:
    """Read a published trace.

    Args:
        lines: The file, of which the first line has been read.
        first: That line.

    Raises:
        TraceError: The first thing that is wrong, with its line.
    """
    if first != MARK + _VERSION:
        raise lines.error(
            f"{first!r} is another version of the format; foreload reads {_VERSION}",
            hint="give a trace of that version",
        )
    settings, sizes = _read_header(lines)
    try:
        num_experts, top_k = int(settings["n_expert"]), int(settings["n_expert_used"])
    except (KeyError, ValueError) as error:
        raise lines.error("the header lacks n_expert or n_expert_used") from error
    visits = itertools.groupby(_rows(lines, num_experts), key=lambda row: row.visit)
    found: list[list[tuple[int, LayerVisit]]] = []
    last: tuple[int, ...] = ()
    for (*forward, layer), rows in visits:
        # A prompt in several chunks comes back to a layer it has been through.
        if forward != list(last) or layer <= found[-1][-1][0]:
            found.append([])
        last = tuple(forward)
        found[-1].append((layer, _make_visit(list(rows), num_experts)))
    if not found:
        raise lines.error("the trace is empty")
    layers = [layer for layer, _ in found[0]]
    for step, visits_of_step in enumerate(found):
        if [layer for layer, _ in visits_of_step] != layers:
            raise lines.error(f"forward {step} does not visit the layers the first one visits")
    missing = [layer for layer in layers if layer not in sizes]
    if missing:
        raise lines.error(f"the header lacks the expert_bytes of layer {missing[0]}")
    info = TraceInfo(
        model=PurePosixPath(settings.get("model", "")).name,
        top_k=top_k,
        expert_bytes=tuple(sizes[layer] for layer in layers),
    )
    steps = [[visit for _, visit in visits_of_step] for visits_of_step in found]
    return RoutingTrace(len(layers), num_experts, steps, info)


def _read_header(lines: TraceLines) -> tuple[dict[str, str], dict[int, int]]:
    """Read up to the columns' names; give the settings, and the bytes of an expert by layer."""
    settings: dict[str, str] = {}
    sizes: dict[int, int] = {}
    for line in lines:
        if line == _COLUMNS:
            return settings, sizes
        if not line.startswith("# "):
            raise lines.error(f"neither a comment nor the columns {_COLUMNS}")
        values = dict(word.split("=", 1) for word in line[2:].split() if "=" in word)
        if "layer" not in values:
            settings |= values
            continue
        try:
            sizes[int(values["layer"])] = int(values["expert_bytes"])
        except (KeyError, ValueError) as error:
            raise lines.error("a layer without its expert_bytes") from error
    raise lines.error(f"the columns {_COLUMNS} never come")


def _rows(lines: TraceLines, num_experts: int) -> Iterator[_Row]:
    for line in lines:
        try:
            turn, phase, step, layer, _, expert, weight, _, _ = line.split(",")
            row = _Row(int(turn), int(phase), int(step), int(layer), int(expert), float(weight))
        except ValueError as error:
            raise lines.error(f"no row of the columns {_COLUMNS}") from error
        if row.phase not in (0, 1) or not 0 <= row.expert < num_experts:
            raise lines.error(f"phase {row.phase}, expert {row.expert} of {num_experts}")
        yield row


def _make_visit(rows: list[_Row], num_experts: int) -> LayerVisit:
    tokens = [list(token) for _, token in itertools.groupby(rows, key=lambda row: row.step)]
    return LayerVisit.from_routing(
        [[row.expert for row in token] for token in tokens],
        num_experts,
        weights=tuple(tuple(row.weight for row in token) for token in tokens),
        is_prefill=rows[0].phase == 0,
    )
