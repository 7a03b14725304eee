"""From samples to a Markdown table: medians, ranges, distances from both limits.

What the summaries of all suites share, and the engine suite's.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from foreload.bench.quality import pool_quality
from foreload.config import format_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from foreload.bench.arm import Sample

__all__ = [
    "BudgetLimits",
    "belady_limit_s",
    "by_place",
    "describe_run",
    "label_arm",
    "resident_table",
    "samples_at",
    "spread",
    "summarise",
    "title_place",
    "wire_limit_s",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetLimits:
    """What one trial's trace and machine allow at one budget.

    Attributes:
        budget: Share of all experts' bytes.
        trial: Number of the trial.
        context: Tokens of the prompt.
        num_slots: Slots of the cache.
        bandwidth_bytes_s: What the transfer layer delivered with its queue full.
        compute_s: Time per token with all experts resident.
        expert_bytes: Bytes of one expert on disk.
        hit_rates: Hit rate of each eviction policy on the trace, without prefetch.
        misses_per_token: Its misses per decoded token.
        compute_share: Share of its speed that computing keeps while copies run.
        copy_share: Share of their bandwidth that copies keep while the machine computes.
    """

    budget: float
    trial: int
    num_slots: int
    bandwidth_bytes_s: float
    compute_s: float
    expert_bytes: int
    hit_rates: dict[str, float]
    misses_per_token: dict[str, float]
    context: int = 0
    compute_share: float = 1.0
    copy_share: float = 1.0


def wire_limit_s(limits: BudgetLimits, policy: str) -> float:
    """Give max(compute, missed bytes / bandwidth) of a policy: what perfect overlap leaves."""
    moved = limits.misses_per_token[policy] * limits.expert_bytes / limits.bandwidth_bytes_s
    return max(limits.compute_s, moved)


def belady_limit_s(limits: BudgetLimits) -> float:
    """Give the wire limit of the best possible eviction on the same trace and slots."""
    return wire_limit_s(limits, "belady")


def by_place(limits: Sequence[BudgetLimits]) -> dict[tuple[int, float], list[BudgetLimits]]:
    """Sort limits by context and budget; each place gets a table."""
    places = sorted({(limit.context, limit.budget) for limit in limits})
    return {
        place: [limit for limit in limits if (limit.context, limit.budget) == place]
        for place in places
    }


def samples_at(
    samples: Sequence[Sample], limits: Sequence[BudgetLimits]
) -> dict[str, list[Sample]]:
    """Give, by arm, the samples taken at one context and budget, without resident ones.

    Arms come in the order they first ran anywhere, so that all tables have the same.
    """
    trials = {(limit.context, limit.budget, limit.trial) for limit in limits}
    found: dict[str, list[Sample]] = {sample.arm: [] for sample in samples}
    for sample in samples:
        if (sample.context, sample.budget, sample.trial) in trials and not sample.is_resident:
            found[sample.arm].append(sample)
    return {arm: own for arm, own in found.items() if own}


def title_place(limits: Sequence[BudgetLimits]) -> str:
    """Write what one context and budget came to."""
    slots = limits[0].num_slots
    bandwidth = spread([limit.bandwidth_bytes_s / 1e9 for limit in limits], digits=2)
    context = f"{limits[0].context} tokens of prompt, " * bool(limits[0].context)
    return (
        f"{limits[0].budget:.0%} of the experts' memory ({context}{slots} slots, "
        f"disk {bandwidth} GB/s)"
    )


def label_arm(arm: str, samples: Sequence[Sample]) -> str:
    """Name an arm; a lossy one with its quality, which no figure leaves out."""
    if not any(sample.is_lossy for sample in samples):
        return arm
    quality = pool_quality(samples)
    if quality is None:
        return f"{arm} (lossy; random weights, no quality)"
    ratio = quality.perplexity_ratio.value
    return f"{arm} (KL {quality.kl.value:.2g}, perplexity x{ratio:.3f})"


def summarise(
    machine: dict[str, Any], samples: Sequence[Sample], limits: Sequence[BudgetLimits]
) -> str:
    """Write the Markdown summary of the engine suite."""
    has_stock = any(sample.arm == "transformers eager" for sample in samples)
    reference = "transformers' eager experts" if has_stock else "those of the all-resident arm"
    compared = f"Every arm's logits were compared with {reference} at every step"
    parts = [describe_run(machine, compared), resident_table(samples)]
    for here in by_place(limits).values():
        parts.append(_budget_table(samples, here))
        parts.append(_policy_table(here))
    return "\n\n".join(parts) + "\n"


def describe_run(machine: dict[str, Any], compared: str) -> str:
    """Write the head of a summary: model, machine, and what logits were compared with."""
    random_note = " Random weights: times only, routing means nothing." * machine["is_random"]
    return (
        f"# {machine['model']}, {machine['date']}\n\n"
        f"{machine['architecture']}, {machine['num_moe_layers']} MoE layers x "
        f"{machine['num_experts']} experts of {format_bytes(machine['expert_bytes'])}, top-"
        f"{machine['top_k']}, {machine['dtype']}, {format_bytes(machine['total_expert_bytes'])} of "
        f"experts.{random_note} {machine['cores']} cores ({machine['cpu']}), "
        f"{format_bytes(machine['memory_bytes'])} RAM, {machine['threads']} threads, torch "
        f"{machine['torch']}, transformers {machine['transformers']}, foreload "
        f"{machine['foreload']}. {compared}; medians over trials, ranges in brackets."
    )


def resident_table(samples: Sequence[Sample]) -> str:
    """Write the times of the arms that have all experts in memory."""
    rows = ["| all experts in memory | TPOT ms | prefill s |", "|---|---|---|"]
    resident = [sample for sample in samples if sample.is_resident]
    contexts = {sample.context for sample in resident}
    for name, context in dict.fromkeys((s.arm, s.context) for s in resident):
        own = [s for s in resident if (s.arm, s.context) == (name, context)]
        shown = name if len(contexts) == 1 else f"{name}, {context} tokens"
        if not all(sample.is_equal for sample in own):
            rows.append(f"| {shown} | logits differ | |")
            continue
        tpot = spread([sample.tpot_s * 1e3 for sample in own])
        prefill = spread([sample.prefill_s for sample in own], digits=2)
        rows.append(f"| {shown} | {tpot} | {prefill} |")
    return "\n".join(rows)


def _budget_table(samples: Sequence[Sample], limits: Sequence[BudgetLimits]) -> str:
    by_trial = {limit.trial: limit for limit in limits}
    own = samples_at(samples, limits)
    rows = [
        f"## {title_place(limits)}\n",
        "| arm | TPOT ms | / wire limit | / Belady limit | on-demand / it | hits | late | "
        "MB per token | wasted MB | stall ms |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    on_demand = own.get("on-demand", [])
    is_valid = all(sample.is_equal for sample in on_demand)
    base = {sample.trial: sample.tpot_s for sample in on_demand if is_valid}
    for name, group in own.items():
        if not all(sample.is_equal for sample in group):
            rows.append(f"| {name} | logits differ | | | | | | | | |")
            continue
        wire = [s.tpot_s / wire_limit_s(by_trial[s.trial], s.eviction) for s in group]
        best = [s.tpot_s / belady_limit_s(by_trial[s.trial]) for s in group]
        gain = [base[s.trial] / s.tpot_s for s in group if s.trial in base]
        rows.append(
            f"| {name} | {spread([s.tpot_s * 1e3 for s in group])} | {spread(wire, digits=2)} | "
            f"{spread(best, digits=2)} | {spread(gain, digits=2) if gain else ''} | "
            f"{_median([s.hit_rate or 0 for s in group]):.3f} | "
            f"{_median([s.late_rate or 0 for s in group]):.3f} | "
            f"{_median([s.bytes_per_token / 1e6 for s in group]):.0f} | "
            f"{_median([s.wasted_bytes_per_token / 1e6 for s in group]):.0f} | "
            f"{_median([s.stall_s_per_token * 1e3 for s in group]):.1f} |"
        )
    for name, policy in (("wire limit, history", "history"), ("Belady limit", "belady")):
        times = [wire_limit_s(limit, policy) * 1e3 for limit in limits]
        moved = [limit.misses_per_token[policy] * limit.expert_bytes / 1e6 for limit in limits]
        hits = [limit.hit_rates[policy] for limit in limits]
        rows.append(
            f"| *{name}* | {spread(times)} | | | | {_median(hits):.3f} | | "
            f"{_median(moved):.0f} | | |"
        )
    return "\n".join(rows)


def _policy_table(limits: Sequence[BudgetLimits]) -> str:
    rows = [
        "Hit rates of eviction policies on the same traces, without prefetch:\n",
        "| policy | hit rate | share of the gap from LRU to Belady closed |",
        "|---|---|---|",
    ]
    for policy in limits[0].hit_rates:
        rates = [limit.hit_rates[policy] for limit in limits]
        closed = [
            (limit.hit_rates[policy] - limit.hit_rates["lru"])
            / max(limit.hit_rates["belady"] - limit.hit_rates["lru"], 1e-9)
            for limit in limits
        ]
        rows.append(f"| {policy} | {spread(rates, digits=3)} | {spread(closed, digits=2)} |")
    return "\n".join(rows)


def _median(values: Sequence[float]) -> float:
    return statistics.median(values)


def spread(values: Sequence[float], *, digits: int = 1) -> str:
    """Write a median with its range in brackets."""
    return f"{_median(values):.{digits}f} [{min(values):.{digits}f} to {max(values):.{digits}f}]"
