"""Figures of the suite about drafts, drawn from its samples alone: TPOT by arm, and both roofs."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING

from foreload.bench.plots import make_figure, plot_tpot, save_figure
from foreload.bench.report import by_place, samples_at
from foreload.bench.speculation_report import is_valid

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from foreload.bench.arm import Sample
    from foreload.bench.report import BudgetLimits

__all__ = ["plot_moe_speq"]

_GOVERNOR = "governor"


def plot_moe_speq(samples: Sequence[Sample], limits: Sequence[BudgetLimits], output: Path) -> None:
    """Draw TPOT by arm, and the governor's choices under the roofs of link and computing."""
    plot_tpot(samples, limits, output)
    for (context, budget), here in by_place(limits).items():
        group = samples_at(samples, here).get(_GOVERNOR, [])
        if group and is_valid(group):
            name = f"roofs-{budget * 100:.0f}-{context}.png"
            _plot_roofs(group, output / name, title=f"{budget:.0%} of the experts' memory")


def _plot_roofs(group: Sequence[Sample], path: Path, *, title: str) -> None:
    """Draw, over tokens per byte copied, what link and computing allow and what is expected.

    Medians over trials; the size of a point tells in how many rounds it was chosen.

    Reference:
        arXiv:2511.14102, the Amortization Roofline Model.
    """
    rows = []
    for number in range(min(len(sample.roofs) for sample in group)):
        points = [sample.roofs[number] for sample in group]
        row = {
            name: statistics.median(point[name] for point in points)
            for name in ("intensity", "io_roof", "compute_roof", "predicted")
        }
        row["num_rounds"] = sum(point["num_rounds"] for point in points)
        if all(math.isfinite(value) and value > 0 for value in list(row.values())[:4]):
            rows.append((number, row))
    if not rows:
        return
    figure, axes = make_figure(7, 4.5)
    by_intensity = sorted((row for _, row in rows), key=lambda row: row["intensity"])
    x = [row["intensity"] * 1e9 for row in by_intensity]
    axes.plot(x, [row["io_roof"] for row in by_intensity], color="#4878a8", label="link")
    computing = [row["compute_roof"] for row in by_intensity]
    axes.plot(x, computing, color="#6a9f58", label="drafting and verifying")
    for number, row in rows:
        axes.scatter(
            [row["intensity"] * 1e9],
            [row["predicted"]],
            s=15 + 4 * row["num_rounds"],
            color="#c44e52" if row["num_rounds"] else "#bbbbbb",
            zorder=3,
        )
        axes.annotate(
            f"{number}",
            (row["intensity"] * 1e9, row["predicted"]),
            textcoords="offset points",
            xytext=(5, -10),
            fontsize=8,
        )
    axes.set_xlabel("tokens per GB copied")
    axes.set_ylabel("tokens per second")
    axes.set_ylim(bottom=0)
    axes.set_title(f"{title}: draft tokens under both roofs")
    axes.legend(fontsize=8)
    save_figure(figure, path)
