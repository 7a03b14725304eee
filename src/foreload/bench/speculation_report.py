"""The summary of the suite about executing predictions: times with quality, and what they say.

Every table that shows a lossy arm's time, or a ratio of times, shows its KL and perplexity beside.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from foreload.bench.quality import pool_quality
from foreload.bench.report import (
    by_place,
    describe_run,
    resident_table,
    samples_at,
    spread,
    title_place,
    wire_limit_s,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from foreload.bench.arm import Sample
    from foreload.bench.report import BudgetLimits
    from foreload.evaluate import Interval

__all__ = [
    "is_valid",
    "own_limit_s",
    "recall_by_layer",
    "share_of_overlap",
    "summarise_speculation",
]

_LAYERWISE, _BASE = "layerwise-on-demand", "on-demand"
_OURS = "cache-prefetch"

_GAIN_NOTE = (
    "## What executing guesses gives without a cache\n\n"
    f"The cut of TPOT against both ways to load on demand in the same trial, and the time saved as "
    "a share of min(copy, compute), all that overlap can take from copying and computing in turn. "
    "`copy` is the bytes per token over the measured bandwidth, `compute` the TPOT of "
    f"all-resident. {_LAYERWISE} copies and computes in turn, as the paper's engine does; "
    f"{_BASE} computes each expert while the next one comes, and leaves less to save.\n"
)
_CACHE_NOTE = (
    "## Exact with cache and prefetch, and guesses executed without a cache, in the same memory\n"
)
_RECALL_NOTE = (
    "## Recall per layer, percent\n\n"
    "Share of the truly routed experts among as many predicted, one layer ahead, while the "
    "predictions were executed without a cache; medians over all runs.\n"
)

_GAIN_HEAD = (
    f"| arm | context | memory | cut against {_LAYERWISE} | share of min(copy, compute) | "
    f"cut against {_BASE} | share of min(copy, compute) | KL per token | perplexity x |",
    "|---|---|---|---|---|---|---|---|---|",
)
_CACHE_HEAD = (
    f"| executed without a cache | context | memory | its TPOT / that of {_OURS} | {_OURS} is | "
    "KL per token | perplexity x |",
    "|---|---|---|---|---|---|---|",
)


def summarise_speculation(
    machine: dict[str, Any], samples: Sequence[Sample], limits: Sequence[BudgetLimits]
) -> str:
    """Write the Markdown summary."""
    has_stock = any(sample.arm == "transformers eager" for sample in samples)
    reference = "transformers' eager experts" if has_stock else "those of the all-resident arm"
    compared = (
        f"Exact arms' logits were compared with {reference} at every step, bit for bit; so were "
        "lossy arms' at the end of the prompt, and their quality is counted in the timed runs"
    )
    places = by_place(limits)
    parts = [describe_run(machine, compared), resident_table(samples)]
    parts += [_place_table(samples, here) for here in places.values()]
    parts += _section(_GAIN_NOTE, _GAIN_HEAD, _gain_rows, samples, limits)
    parts += _section(_CACHE_NOTE, _CACHE_HEAD, _cache_rows, samples, limits)
    parts += _recall_table(samples)
    return "\n\n".join(parts) + "\n"


def is_valid(samples: Sequence[Sample]) -> bool:
    """Tell whether an arm's times may be shown: its logits are what they must be."""
    return bool(samples) and all(sample.is_equal for sample in samples)


def _is_bare(sample: Sample) -> bool:
    """Tell whether a sample's arm executes guesses and keeps no expert after its use."""
    return sample.is_lossy and sample.eviction == "none"


def own_limit_s(sample: Sample, limits: BudgetLimits) -> float:
    """Give max(compute, the bytes this arm moved / bandwidth): what perfect overlap leaves."""
    return max(limits.compute_s, sample.bytes_per_token / limits.bandwidth_bytes_s)


def share_of_overlap(sample: Sample, base: Sample, limits: BudgetLimits) -> float:
    """Give the time an arm saves against on-demand, as a share of min(copy, compute).

    Args:
        sample: The arm.
        base: An on-demand arm in the same trial.
        limits: Of the same trial.
    """
    copy_s = base.bytes_per_token / limits.bandwidth_bytes_s
    return (base.tpot_s - sample.tpot_s) / min(copy_s, limits.compute_s)


def recall_by_layer(samples: Sequence[Sample]) -> dict[str, dict[int, float]]:
    """Give, for each predictor whose guesses were executed without a cache, recall per layer."""
    found: dict[str, dict[int, list[float]]] = {}
    for sample in samples:
        # A layerwise arm predicts what its counterpart does.
        if sample.is_equal and _is_bare(sample) and not sample.is_layerwise:
            layers = found.setdefault(sample.arm, {})
            for layer, recall in sample.recall_at_n.items():
                layers.setdefault(layer, []).append(recall[1])
    return {
        arm: {layer: statistics.median(values) for layer, values in sorted(layers.items())}
        for arm, layers in found.items()
    }


def _place_table(samples: Sequence[Sample], limits: Sequence[BudgetLimits]) -> str:
    by_trial = {limit.trial: limit for limit in limits}
    groups = samples_at(samples, limits)
    base = _by_trial(groups.get(_BASE, []))
    rows = [
        f"## {title_place(limits)}\n",
        "| arm | TPOT ms | on-demand / it | / own limit | KL per token | perplexity x | top-1 | "
        "speculated | hits | late | MB per token | wasted MB | stall ms |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, group in groups.items():
        if not is_valid(group):
            rows.append(f"| {name} | {_fault(group)} |" + " |" * 11)
            continue
        gain = [base[s.trial].tpot_s / s.tpot_s for s in group if s.trial in base]
        limit = [s.tpot_s / own_limit_s(s, by_trial[s.trial]) for s in group]
        cells = [
            spread([s.tpot_s * 1e3 for s in group]),
            spread(gain, digits=2) if gain else "",
            spread(limit, digits=2),
            *_quality_cells(group),
            f"{_middle(group, lambda s: s.hit_rate or 0):.3f}",
            f"{_middle(group, lambda s: s.late_rate or 0):.3f}",
            f"{_middle(group, lambda s: s.bytes_per_token / 1e6):.0f}",
            f"{_middle(group, lambda s: s.wasted_bytes_per_token / 1e6):.0f}",
            f"{_middle(group, lambda s: s.stall_s_per_token * 1e3):.1f}",
        ]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    for name, policy in (
        ("wire limit, no cache", "none"),
        ("wire limit, history", "history"),
        ("Belady limit", "belady"),
    ):
        times = [wire_limit_s(limit, policy) * 1e3 for limit in limits]
        hits = statistics.median(limit.hit_rates[policy] for limit in limits)
        moved = [limit.misses_per_token[policy] * limit.expert_bytes / 1e6 for limit in limits]
        rows.append(
            f"| *{name}* | {spread(times)} |" + " |" * 6 + f" {hits:.3f} | | "
            f"{statistics.median(moved):.0f} | | |"
        )
    return "\n".join(rows)


def _section(
    note: str,
    head: tuple[str, str],
    make_rows: Callable[[dict[str, list[Sample]], Sequence[BudgetLimits]], list[str]],
    samples: Sequence[Sample],
    limits: Sequence[BudgetLimits],
) -> list[str]:
    """Write one table over all contexts and budgets; nothing where it would be empty."""
    rows = [
        row
        for here in by_place(limits).values()
        for row in make_rows(samples_at(samples, here), here)
    ]
    return ["\n".join([note, *head, *rows])] if rows else []


def _gain_rows(groups: dict[str, list[Sample]], limits: Sequence[BudgetLimits]) -> list[str]:
    by_trial = {limit.trial: limit for limit in limits}
    bases = [_by_trial(groups.get(name, [])) for name in (_LAYERWISE, _BASE)]
    rows = []
    for name, group in _executing(groups).items():
        cells = []
        for base in bases:
            paired = [(s, base[s.trial], by_trial[s.trial]) for s in group if s.trial in base]
            cut = [100 * (1 - sample.tpot_s / other.tpot_s) for sample, other, _ in paired]
            share = [100 * share_of_overlap(*three) for three in paired]
            cells += [f"{spread(cut)} %", f"{spread(share, digits=0)} %"] if paired else ["", ""]
        if any(cells):
            cells = [*_place_cells(limits), *cells, *_quality_cells(group)[:2]]
            rows.append(f"| {name} | {' | '.join(cells)} |")
    return rows


def _cache_rows(groups: dict[str, list[Sample]], limits: Sequence[BudgetLimits]) -> list[str]:
    ours = _by_trial(groups.get(_OURS, []))
    rows = []
    for name, group in _executing(groups).items():
        ratios = [s.tpot_s / ours[s.trial].tpot_s for s in group if s.trial in ours]
        if not ratios:
            continue
        middle = statistics.median(ratios)
        verdict = "faster" if middle > 1 else "slower"
        always = (min(ratios) > 1) if middle > 1 else (max(ratios) <= 1)
        cells = [
            *_place_cells(limits),
            spread(ratios, digits=2),
            f"{verdict} in {'every trial' if always else 'the median'}",
            *_quality_cells(group)[:2],
        ]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return rows


def _recall_table(samples: Sequence[Sample]) -> list[str]:
    recall = recall_by_layer(samples)
    layers = sorted({layer for values in recall.values() for layer in values})
    if not layers:
        return []
    rows = [_RECALL_NOTE, f"| layer | {' | '.join(recall)} |", "|---|" + "---|" * len(recall)]
    for layer in layers:
        cells = [f"{100 * v[layer]:.1f}" if layer in v else "" for v in recall.values()]
        rows.append(f"| {layer} | {' | '.join(cells)} |")
    means = [f"{100 * statistics.mean(values.values()):.1f}" for values in recall.values()]
    rows.append(f"| mean | {' | '.join(means)} |")
    return ["\n".join(rows)]


def _executing(groups: dict[str, list[Sample]]) -> dict[str, list[Sample]]:
    """Give the arms that execute guesses without a cache."""
    return {name: group for name, group in groups.items() if is_valid(group) and _is_bare(group[0])}


def _by_trial(group: Sequence[Sample]) -> dict[int, Sample]:
    return {sample.trial: sample for sample in group} if is_valid(group) else {}


def _place_cells(limits: Sequence[BudgetLimits]) -> tuple[str, str]:
    return str(limits[0].context), f"{limits[0].budget:.0%}"


def _quality_cells(group: Sequence[Sample]) -> list[str]:
    """Write KL, perplexity ratio, top-1 agreement and speculated fraction."""
    if not group[0].is_lossy:
        return ["0", "1", "1", "0"]
    quality = pool_quality(group)
    if quality is None:
        speculated = _middle(group, lambda s: s.speculated_fraction)
        return ["random weights"] * 3 + [f"{speculated:.3f}"]
    return [
        _interval(quality.kl, 4),
        _interval(quality.perplexity_ratio, 4),
        _interval(quality.top1_agreement, 3),
        f"{quality.speculated_fraction:.3f}",
    ]


def _interval(interval: Interval, digits: int) -> str:
    low, high = f"{interval.low:.{digits}f}", f"{interval.high:.{digits}f}"
    return f"{interval.value:.{digits}f} [{low} to {high}]"


def _middle(group: Sequence[Sample], value: Callable[[Sample], float]) -> float:
    return statistics.median(value(sample) for sample in group)


def _fault(group: Sequence[Sample]) -> str:
    return "the prompt's logits differ" if group[0].is_lossy else "logits differ"
