"""The summary of the suite about drafts: what rounds took, and what holds them back.

The quantised model served alone is the one lossy arm: its time stands beside its quality.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any, NamedTuple

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
from foreload.bench.speculation_report import is_valid
from foreload.cost import overlap_s

if TYPE_CHECKING:
    from collections.abc import Sequence

    from foreload.bench.arm import Sample
    from foreload.bench.report import BudgetLimits

__all__ = [
    "VerificationRatio",
    "busy_s",
    "round_limit_s",
    "summarise_moe_speq",
    "verification_ratios",
]

_LRU, _GOVERNOR = "lru", "governor"
_WIDE, _RESIDENT = "draft-7", "draft-7-resident"

_VERIFY_NOTE = (
    "## Verification of eight positions\n\n"
    "Seconds of one forward of the target over eight tokens, beside its limit: the larger of the "
    f"same forward with every expert in memory ({_RESIDENT}, median of the trial) and the bytes of "
    "the experts that were absent when their layer was reached, over the bandwidth of the trial. "
    "Side by side, both keep only the shares of their speed that were measured in the trial; what "
    "perfect overlap takes then is the second limit."
)


class VerificationRatio(NamedTuple):
    """One verification: seconds, and those over each of its limits."""

    taken_s: float
    to_limit: float
    to_shared_limit: float


def summarise_moe_speq(
    machine: dict[str, Any], samples: Sequence[Sample], limits: Sequence[BudgetLimits]
) -> str:
    """Write the Markdown summary."""
    compared = (
        "Logits were compared with transformers' eager experts at every step: bit for bit in arms "
        "without a draft; with a tolerance of 5 % of their standard deviation in mean where drafts "
        "are verified, since forwards of several tokens round differently"
    )
    parts = [describe_run(machine, compared)]
    if machine.get("link_bytes_s"):
        parts.append(f"Copies were throttled to {machine['link_bytes_s'] / 1e9:g} GB/s.")
    parts.append(resident_table(samples))
    places = by_place(limits)
    for here in places.values():
        parts.append(_place_table(samples, here))
        parts += _governor_lines(samples, here)
    parts += _verification_table(samples, places)
    return "\n\n".join(parts) + "\n"


def busy_s(sample: Sample) -> float:
    """Give the seconds per token that were not spent waiting for copies."""
    return sample.tpot_s - sample.stall_s_per_token


def round_limit_s(sample: Sample, limits: BudgetLimits) -> float:
    """Give max(busy, bytes the arm moved / bandwidth): what perfect overlap leaves of an arm."""
    return max(busy_s(sample), sample.bytes_per_token / limits.bandwidth_bytes_s)


def verification_ratios(
    samples: Sequence[Sample], limits: Sequence[BudgetLimits]
) -> list[VerificationRatio]:
    """Put every verification of eight positions at one place beside its limits."""
    by_trial = {limit.trial: limit for limit in limits}
    compute = {
        sample.trial: _wide_seconds(sample)
        for sample in samples
        if sample.arm == _RESIDENT and sample.is_equal
    }
    found = []
    for sample in samples_at(samples, limits).get(_WIDE, []):
        if not sample.is_equal or not compute.get(sample.trial):
            continue
        limit = by_trial[sample.trial]
        resident_s = statistics.median(compute[sample.trial])
        for width, taken_s, _, absent in sample.verifications:
            if width == 8:
                copies_s = absent * limit.expert_bytes / limit.bandwidth_bytes_s
                shared_s = overlap_s(
                    resident_s,
                    copies_s,
                    compute_share=limit.compute_share,
                    copy_share=limit.copy_share,
                )
                found.append(
                    VerificationRatio(
                        taken_s, taken_s / max(resident_s, copies_s), taken_s / shared_s
                    )
                )
    return found


def _wide_seconds(sample: Sample) -> list[float]:
    return [taken_s for width, taken_s, _, _ in sample.verifications if width == 8]


def _place_table(samples: Sequence[Sample], limits: Sequence[BudgetLimits]) -> str:
    by_trial = {limit.trial: limit for limit in limits}
    groups = samples_at(samples, limits)
    base = {sample.trial: sample.tpot_s for sample in groups.get(_LRU, []) if sample.is_equal}
    rows = [
        f"## {title_place(limits)}\n",
        "| arm | TPOT ms | lru / it | / own limit | tokens per round | accepted | draft ms per "
        "token | hits | late | MB per token | wasted MB | stall ms | other choices | "
        "KL per token | perplexity x |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, group in groups.items():
        if not is_valid(group):
            rows.append(f"| {name} | logits differ |" + " |" * 13)
            continue
        gains = [base[s.trial] / s.tpot_s for s in group if s.trial in base]
        own = [s.tpot_s / round_limit_s(s, by_trial[s.trial]) for s in group]
        cells = [
            name,
            spread([s.tpot_s * 1e3 for s in group]),
            spread(gains, digits=2) if gains else "",
            spread(own, digits=2),
            _number([s.accept_length for s in group], 2),
            _number([s.acceptance_rate for s in group], 3),
            _number([s.draft_s_per_token * 1e3 or None for s in group], 1),
            _number([s.hit_rate for s in group], 3),
            _number([s.late_rate for s in group], 3),
            _number([s.bytes_per_token / 1e6 for s in group], 0),
            _number([s.wasted_bytes_per_token / 1e6 for s in group], 0),
            _number([s.stall_s_per_token * 1e3 for s in group], 1),
            _ties(group),
            *_quality(group),
        ]
        rows.append("| " + " | ".join(cells) + " |")
    for name, policy in (("wire limit, LRU", "lru"), ("Belady limit", "belady")):
        times = [wire_limit_s(limit, policy) * 1e3 for limit in limits]
        rows.append(f"| *{name}, one token at a time* | {spread(times)} |" + " |" * 13)
    return "\n".join(rows)


def _ties(group: Sequence[Sample]) -> str:
    """Tell how often the likeliest token was another one, and by how much at most."""
    if group[0].accept_length is None:
        return ""
    other = sum(sample.num_other for sample in group)
    widest = max(sample.widest_tie for sample in group)
    return f"{other} (gap {widest:.3f})" if other else "0"


def _quality(group: Sequence[Sample]) -> tuple[str, str]:
    if not group[0].is_lossy:
        return "0", "1"
    quality = pool_quality(group)
    if quality is None:
        return "unknown", "unknown"
    return f"{quality.kl.value:.4f}", f"{quality.perplexity_ratio.value:.3f}"


def _governor_lines(samples: Sequence[Sample], limits: Sequence[BudgetLimits]) -> list[str]:
    """Compare the governor with the best fixed number of draft tokens, 0 included."""
    groups = {name: g for name, g in samples_at(samples, limits).items() if is_valid(g)}
    fixed = {
        name: group
        for name, group in groups.items()
        if name.removeprefix("draft-").isdecimal() and group
    }
    if _GOVERNOR not in groups or not fixed:
        return []
    best = min(fixed, key=lambda name: statistics.median(s.tpot_s for s in fixed[name]))
    times = {sample.trial: sample.tpot_s for sample in fixed[best]}
    ratios = [s.tpot_s / times[s.trial] for s in groups[_GOVERNOR] if s.trial in times]
    chosen: dict[int, int] = {}
    for sample in groups[_GOVERNOR]:
        for number, rounds in sample.rounds.items():
            chosen[number] = chosen.get(number, 0) + rounds
    shares = ", ".join(f"{rounds} x {number}" for number, rounds in sorted(chosen.items()))
    return [
        f"Best fixed number: {best}. Governor / {best}: {spread(ratios, digits=2)}. "
        f"Rounds by draft tokens over all trials: {shares}."
    ]


def _verification_table(
    samples: Sequence[Sample], places: dict[tuple[int, float], list[BudgetLimits]]
) -> list[str]:
    rows = []
    for here in places.values():
        found = verification_ratios(samples, here)
        if found:
            times = spread([one.taken_s * 1e3 for one in found])
            ratios = spread([one.to_limit for one in found], digits=2)
            shared = spread([one.to_shared_limit for one in found], digits=2)
            shares = " and ".join(
                spread([getattr(limits, name) for limits in here], digits=2)
                for name in ("compute_share", "copy_share")
            )
            cells = (f"{here[0].budget:.0%}", str(len(found)), times, ratios, shares, shared)
            rows.append(f"| {' | '.join(cells)} |")
    if not rows:
        return []
    head = [
        "| memory | verifications | ms | / limit | computing and copying keep "
        "| / limit side by side |",
        "|---|---|---|---|---|---|",
    ]
    return [_VERIFY_NOTE, "\n".join([*head, *rows])]


def _number(values: Sequence[float | None], digits: int) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.median(known):.{digits}f}" if known else ""
