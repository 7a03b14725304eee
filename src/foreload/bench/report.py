"""From samples to a Markdown table: medians, ranges, distances from both limits."""

from __future__ import annotations

import statistics
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from foreload.config import format_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from foreload.bench.measure import Sample

__all__ = ["BudgetLimits", "belady_limit_s", "summarise", "wire_limit_s"]

_ENGINE_POLICY = {"on-demand": "none", "lru": "lru"}
"""Eviction policy of the arms that do not use the default one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetLimits:
    """What one trial's trace and machine allow at one budget.

    Attributes:
        budget: Share of all experts' bytes.
        trial: Number of the trial.
        num_slots: Slots of the cache.
        bandwidth_bytes_s: What the transfer layer delivered with its queue full.
        compute_s: Time per token with all experts resident.
        expert_bytes: Bytes of one expert on disk.
        hit_rates: Hit rate of each eviction policy on the trace, without prefetch.
        misses_per_token: Its misses per decoded token.
    """

    budget: float
    trial: int
    num_slots: int
    bandwidth_bytes_s: float
    compute_s: float
    expert_bytes: int
    hit_rates: dict[str, float]
    misses_per_token: dict[str, float]


def wire_limit_s(limits: BudgetLimits, policy: str) -> float:
    """Give max(compute, missed bytes / bandwidth) of a policy: what perfect overlap leaves."""
    moved = limits.misses_per_token[policy] * limits.expert_bytes / limits.bandwidth_bytes_s
    return max(limits.compute_s, moved)


def belady_limit_s(limits: BudgetLimits) -> float:
    """Give the wire limit of the best possible eviction on the same trace and slots."""
    return wire_limit_s(limits, "belady")


def summarise(
    machine: dict[str, Any], samples: Sequence[Sample], limits: Sequence[BudgetLimits]
) -> str:
    """Write the Markdown summary of a run."""
    parts = [_header(machine, samples), _resident_table(samples)]
    for budget in sorted({limit.budget for limit in limits}):
        here = [limit for limit in limits if limit.budget == budget]
        parts.append(_budget_table(budget, samples, here))
        parts.append(_policy_table(here))
    return "\n\n".join(parts) + "\n"


def _header(machine: dict[str, Any], samples: Sequence[Sample]) -> str:
    has_stock = any(sample.arm == "transformers eager" for sample in samples)
    reference = "transformers' eager experts" if has_stock else "those of the all-resident arm"
    random_note = " Random weights: times only, routing means nothing." * machine["is_random"]
    return (
        f"# {machine['model']}, {machine['date']}\n\n"
        f"{machine['architecture']}, {machine['num_moe_layers']} MoE layers x "
        f"{machine['num_experts']} experts of {format_bytes(machine['expert_bytes'])}, top-"
        f"{machine['top_k']}, {machine['dtype']}, {format_bytes(machine['total_expert_bytes'])} of "
        f"experts.{random_note} {machine['cores']} cores ({machine['cpu']}), "
        f"{format_bytes(machine['memory_bytes'])} RAM, {machine['threads']} threads, torch "
        f"{machine['torch']}, transformers {machine['transformers']}, foreload "
        f"{machine['foreload']}. Every arm's logits were compared with {reference} "
        "at every step; medians over trials, ranges in brackets."
    )


def _resident_table(samples: Sequence[Sample]) -> str:
    rows = ["| all experts in memory | TPOT ms | prefill s |", "|---|---|---|"]
    names = dict.fromkeys(s.arm for s in samples if s.is_resident)
    for name in names:
        own = [s for s in samples if s.arm == name and s.is_resident]
        if not all(sample.is_equal for sample in own):
            rows.append(f"| {name} | logits differ | |")
            continue
        tpot = _spread([sample.tpot_s * 1e3 for sample in own])
        prefill = _spread([sample.prefill_s for sample in own], digits=2)
        rows.append(f"| {name} | {tpot} | {prefill} |")
    return "\n".join(rows)


def _budget_table(budget: float, samples: Sequence[Sample], limits: Sequence[BudgetLimits]) -> str:
    by_trial = {limit.trial: limit for limit in limits}
    own: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        if sample.budget == budget and sample.trial in by_trial and not sample.is_resident:
            own[sample.arm].append(sample)
    slots = limits[0].num_slots
    bandwidth = _spread([limit.bandwidth_bytes_s / 1e9 for limit in limits], digits=2)
    rows = [
        f"## {budget:.0%} of the experts' memory ({slots} slots, disk {bandwidth} GB/s)\n",
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
        policy = _ENGINE_POLICY.get(name, "history")
        wire = [s.tpot_s / wire_limit_s(by_trial[s.trial], policy) for s in group]
        best = [s.tpot_s / belady_limit_s(by_trial[s.trial]) for s in group]
        gain = [base[s.trial] / s.tpot_s for s in group if s.trial in base]
        rows.append(
            f"| {name} | {_spread([s.tpot_s * 1e3 for s in group])} | {_spread(wire, digits=2)} | "
            f"{_spread(best, digits=2)} | {_spread(gain, digits=2) if gain else ''} | "
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
            f"| *{name}* | {_spread(times)} | | | | {_median(hits):.3f} | | "
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
        rows.append(f"| {policy} | {_spread(rates, digits=3)} | {_spread(closed, digits=2)} |")
    return "\n".join(rows)


def _median(values: Sequence[float]) -> float:
    return statistics.median(values)


def _spread(values: Sequence[float], *, digits: int = 1) -> str:
    return f"{_median(values):.{digits}f} [{min(values):.{digits}f} to {max(values):.{digits}f}]"
