"""Figures of a suite's results: TPOT by arm against the limits, and where one token's time goes."""

from __future__ import annotations

import itertools
import statistics
from typing import TYPE_CHECKING, Any

from foreload.bench.report import belady_limit_s, by_place, wire_limit_s
from foreload.errors import MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from foreload.bench.arm import Sample
    from foreload.bench.report import BudgetLimits
    from foreload.metrics import Timeline

__all__ = ["make_figure", "plot_timeline", "plot_tpot", "save_figure"]

_LANES = {"disk": "#4878a8", "draft": "#b8862c", "compute": "#6a9f58", "stall": "#c44e52"}


def plot_tpot(samples: Sequence[Sample], limits: Sequence[BudgetLimits], output: Path) -> None:
    """Draw one figure per budget and context: every arm's TPOT, its range, and both limits."""
    places = by_place(limits)
    contexts = {context for context, _ in places}
    for (context, budget), here in places.items():
        at = [s for s in samples if s.context == context]
        own = [s for s in at if s.is_resident or s.budget == budget]
        wrong = {sample.arm for sample in own if not sample.is_equal}
        names = [name for name in dict.fromkeys(s.arm for s in own) if name not in wrong]
        times = [[s.tpot_s * 1e3 for s in own if s.arm == name] for name in names]
        middle = [statistics.median(values) for values in times]
        figure, axes = make_figure(8, 0.5 + 0.4 * len(names))
        low = [m - min(v) for m, v in zip(middle, times, strict=True)]
        high = [max(v) - m for m, v in zip(middle, times, strict=True)]
        axes.barh(names, middle, xerr=[low, high], color="#8fb0d0", ecolor="#444444", capsize=3)
        for label, values, style in (
            ("wire limit (history)", [wire_limit_s(x, "history") * 1e3 for x in here], "-"),
            ("Belady limit", [belady_limit_s(x) * 1e3 for x in here], "--"),
        ):
            axes.axvline(statistics.median(values), linestyle=style, color="#333333", label=label)
        axes.invert_yaxis()
        axes.set_xlabel("ms per token (median, range over trials)")
        axes.set_title(f"{budget:.0%} of the experts' memory")
        axes.legend(loc="lower right", fontsize=8)
        name = f"tpot-{budget * 100:.0f}" + f"-{context}" * (len(contexts) > 1)
        save_figure(figure, output / f"{name}.png")


def plot_timeline(timeline: Timeline, step_s: Sequence[float], path: Path, *, title: str) -> None:
    """Draw one typical token, or round: what disk, draft, computation and waiting did.

    Args:
        timeline: Spans of a whole decode.
        step_s: Its step or round times, in order; the one nearest the median is drawn.
        path: Where the PNG goes.
        title: Name of the arm.
    """
    spans = timeline.spans
    if not any(span.lane == "compute" for span in spans):
        return
    begin, end = _typical_step(timeline, step_s)
    lanes = {lane: colour for lane, colour in _LANES.items() if any(s.lane == lane for s in spans)}
    figure, axes = make_figure(9, 2.2)
    for row, (lane, colour) in enumerate(lanes.items()):
        bars = [
            (
                (max(s.start_s, begin) - begin) * 1e3,
                (min(s.end_s, end) - max(s.start_s, begin)) * 1e3,
            )
            for s in spans
            if s.lane == lane and s.end_s > begin and s.start_s < end
        ]
        axes.broken_barh(bars, (row - 0.35, 0.7), facecolors=colour, alpha=0.75)
    axes.set_yticks(range(len(lanes)), list(lanes))
    axes.set_xlim(0, (end - begin) * 1e3)
    axes.set_xlabel("ms")
    what = "round" if "draft" in lanes else "token"
    axes.set_title(f"one {what}: {title}")
    save_figure(figure, path)


def _typical_step(timeline: Timeline, step_s: Sequence[float]) -> tuple[float, float]:
    """Give begin and end of the step nearest the median duration."""
    compute = [span for span in timeline.spans if span.lane == "compute"]
    starts = []
    last_layer = 1 << 30
    for span in compute:
        layer = int(span.name.split(".")[0])
        if layer < last_layer:
            starts.append(span.start_s)
        last_layer = layer
    starts.append(max(span.end_s for span in timeline.spans))
    lengths = [b - a for a, b in itertools.pairwise(starts)]
    wanted = statistics.median(step_s)
    best = min(range(len(lengths)), key=lambda i: abs(lengths[i] - wanted))
    return starts[best], starts[best + 1]


def make_figure(width: float, height: float) -> tuple[Any, Any]:
    """Make a figure with axes, inches wide and high.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "plots") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure as PNG, the same bytes for the same figure."""
    figure.savefig(path, dpi=110, metadata={"Software": None})
