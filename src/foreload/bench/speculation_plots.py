"""Figures of the suite about executing predictions, drawn from its samples alone.

A lossy arm carries its KL and perplexity in its name, wherever its time is drawn.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from foreload.bench.plots import make_figure, save_figure
from foreload.bench.quality import pool_quality
from foreload.bench.report import by_place, label_arm, samples_at, wire_limit_s
from foreload.bench.speculation_report import is_valid, recall_by_layer

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from foreload.bench.arm import Sample
    from foreload.bench.report import BudgetLimits

__all__ = ["plot_speculation"]

_CONTEXT_COLOURS = ("#c6d9ec", "#8fb0d0", "#4878a8", "#2b4a6b", "#14263a")
_MARKERS = "os^vDPX*<>hp"
_LEAST_KL = 1e-4
"""Below it the axis is linear: exact arms are at 0."""


def plot_speculation(
    samples: Sequence[Sample], limits: Sequence[BudgetLimits], output: Path
) -> None:
    """Draw TPOT by arm and context, recall per layer, and quality against TPOT."""
    places = by_place(limits)
    for budget in sorted({budget for _, budget in places}):
        here = {context: own for (context, at), own in places.items() if at == budget}
        _plot_contexts(samples, here, output / f"tpot-by-context-{budget * 100:.0f}.png")
    for (context, budget), own in places.items():
        name = f"quality-{budget * 100:.0f}-{context}.png"
        _plot_quality(samples_at(samples, own), own, output / name)
    _plot_recall(samples, output / "recall.png")


def _plot_contexts(
    samples: Sequence[Sample], by_context: dict[int, list[BudgetLimits]], path: Path
) -> None:
    """Draw one row per arm with one bar per context."""
    groups = {context: samples_at(samples, own) for context, own in by_context.items()}
    rows: dict[str, dict[int, list[float]]] = {}
    for arm in dict.fromkeys(name for found in groups.values() for name in found):
        own = [sample for found in groups.values() for sample in found.get(arm, [])]
        if is_valid(own):
            rows[label_arm(arm, own)] = {
                context: [s.tpot_s * 1e3 for s in found[arm]]
                for context, found in groups.items()
                if arm in found
            }
    rows["all resident"] = {
        context: [limit.compute_s * 1e3 for limit in own] for context, own in by_context.items()
    }
    for label, policy in (("no cache", "none"), ("history", "history")):
        rows[f"wire limit, {label}"] = {
            context: [wire_limit_s(limit, policy) * 1e3 for limit in own]
            for context, own in by_context.items()
        }
    figure, axes = make_figure(9, 1 + len(rows) * (0.15 + 0.15 * len(by_context)))
    height = 0.8 / len(by_context)
    for number, context in enumerate(by_context):
        shown = [
            (row, times[context]) for row, times in enumerate(rows.values()) if context in times
        ]
        middle = [statistics.median(times) for _, times in shown]
        low = [m - min(times) for m, (_, times) in zip(middle, shown, strict=True)]
        high = [max(times) - m for m, (_, times) in zip(middle, shown, strict=True)]
        axes.barh(
            [row - 0.4 + (number + 0.5) * height for row, _ in shown],
            middle,
            height=height,
            xerr=[low, high],
            color=_CONTEXT_COLOURS[number % len(_CONTEXT_COLOURS)],
            ecolor="#444444",
            label=f"{context} tokens of prompt",
        )
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.set_xlabel("ms per token (median, range over trials)")
    budget = next(iter(by_context.values()))[0].budget
    axes.set_title(f"{budget:.0%} of the experts' memory")
    axes.legend(loc="lower right", fontsize=8)
    save_figure(figure, path)


def _plot_quality(
    groups: dict[str, list[Sample]], limits: Sequence[BudgetLimits], path: Path
) -> None:
    """Draw every arm's TPOT over its KL; nothing where no arm has a quality."""
    valid = {name: group for name, group in groups.items() if is_valid(group)}
    if not any(sample.quality for group in valid.values() for sample in group):
        return
    figure, axes = make_figure(9, 5)
    for number, (name, group) in enumerate(valid.items()):
        quality = pool_quality(group)
        if quality is None and group[0].is_lossy:
            continue
        kl = 0.0 if quality is None else quality.kl.value
        spread = None if quality is None else [[kl - quality.kl.low], [quality.kl.high - kl]]
        times = [sample.tpot_s * 1e3 for sample in group]
        middle = statistics.median(times)
        axes.errorbar(
            [kl],
            [middle],
            xerr=spread,
            yerr=[[middle - min(times)], [max(times) - middle]],
            marker=_MARKERS[number % len(_MARKERS)],
            markerfacecolor=None if group[0].is_lossy else "none",
            linestyle="none",
            capsize=2,
            label=label_arm(name, group),
        )
    axes.set_xscale("symlog", linthresh=_LEAST_KL)
    axes.set_xlim(left=-_LEAST_KL / 2)
    axes.axvline(0, color="#333333", linewidth=1)
    axes.set_xlabel("KL(exact || arm) per token, nats (95 % interval); exact arms at 0")
    axes.set_ylabel("ms per token (median, range over trials)")
    axes.set_title(f"{limits[0].budget:.0%} of the experts' memory, {limits[0].context} tokens")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=7)
    save_figure(figure, path)


def _plot_recall(samples: Sequence[Sample], path: Path) -> None:
    """Draw the recall of every executed predictor over the layers."""
    recall = recall_by_layer(samples)
    if not any(recall.values()):
        return
    figure, axes = make_figure(7, 4)
    for number, (arm, layers) in enumerate(recall.items()):
        percent = [100 * value for value in layers.values()]
        axes.plot(list(layers), percent, marker=_MARKERS[number % len(_MARKERS)], label=arm)
    axes.set_xlabel("MoE layer")
    axes.set_ylabel("recall at top-k, percent (median over runs)")
    axes.legend(fontsize=8)
    save_figure(figure, path)
