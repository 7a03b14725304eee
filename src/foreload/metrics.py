"""What is counted, and every derived number with its formula.

Counters are plain fields that add up; a request's statistics are the difference of two snapshots.
`Timeline` keeps named spans for the profile figure. Torch-free; nothing here decides anything.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Metrics", "RequestStats", "TimeSpan", "Timeline"]


@dataclass(slots=True)
class Metrics:
    """Counters of an engine since it was made.

    Attributes:
        num_steps: Forwards that reached the first MoE layer.
        num_hits: Demand lookups answered by a readable slot; one lookup per (forward, layer,
            distinct expert).
        num_late: Demand lookups answered by a copy on its way: predicted right, arrived late.
        num_misses: Demand lookups answered by nothing.
        demand_bytes: Bytes copied for demands (a prefetch promoted in flight stays a prefetch).
        prefetch_bytes: Bytes copied on a guess.
        host_bytes: Of all bytes copied, those found in the host tier; the others came from disk.
        wasted_bytes: Bytes copied on a guess and never demanded before eviction or cancellation.
        num_prefetched: Copies begun on a guess.
        num_prefetched_used: Of these, demanded before they were evicted or cancelled.
        stall_s: Seconds the compute thread waited for copies.
        link_s: Seconds in which at least one piece of a copy was on its way.
        num_rounds: Rounds of drafting and verifying, those of no draft token included.
        num_draft_tokens: Tokens drafted.
        num_accepted_tokens: Drafted tokens the target agreed with.
        draft_s: Seconds of drafting.
        num_executed: Pairs of token and expert that were executed, or that a policy dropped.
        num_speculated: Of these, pairs the true router chose and a policy replaced or dropped.
        num_predicted: Predicted experts by (layer, distance), counted at the n a layer demands.
        num_predicted_right: Of the experts a layer demanded, those inside the predicted n.
    """

    num_steps: int = 0
    num_hits: int = 0
    num_late: int = 0
    num_misses: int = 0
    demand_bytes: int = 0
    prefetch_bytes: int = 0
    host_bytes: int = 0
    wasted_bytes: int = 0
    num_prefetched: int = 0
    num_prefetched_used: int = 0
    stall_s: float = 0.0
    link_s: float = 0.0
    num_rounds: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    draft_s: float = 0.0
    num_executed: int = 0
    num_speculated: int = 0
    num_predicted: dict[tuple[int, int], int] = field(default_factory=dict)
    num_predicted_right: dict[tuple[int, int], int] = field(default_factory=dict)

    def snapshot(self) -> Metrics:
        """Copy the counters as they are now."""
        copy = Metrics(**{f.name: getattr(self, f.name) for f in fields(self)})
        copy.num_predicted = dict(self.num_predicted)
        copy.num_predicted_right = dict(self.num_predicted_right)
        return copy

    def since(self, earlier: Metrics) -> Metrics:
        """Give what has been counted since an earlier snapshot."""
        difference = Metrics()
        for f in fields(self):
            now, before = getattr(self, f.name), getattr(earlier, f.name)
            if isinstance(now, dict):
                value: Any = {key: count - before.get(key, 0) for key, count in now.items()}
            else:
                value = now - before
            setattr(difference, f.name, value)
        return difference

    def add(self, other: Metrics) -> None:
        """Count what another has counted as well."""
        for f in fields(self):
            mine, more = getattr(self, f.name), getattr(other, f.name)
            if isinstance(more, dict):
                mine.update({key: mine.get(key, 0) + count for key, count in more.items()})
            else:
                setattr(self, f.name, mine + more)

    @property
    def num_lookups(self) -> int:
        """Give hits + late + misses."""
        return self.num_hits + self.num_late + self.num_misses

    @property
    def hit_rate(self) -> float | None:
        """Give num_hits / num_lookups; None without lookups."""
        return self.num_hits / self.num_lookups if self.num_lookups else None

    @property
    def late_rate(self) -> float | None:
        """Give num_late / num_lookups; None without lookups."""
        return self.num_late / self.num_lookups if self.num_lookups else None

    @property
    def bytes_moved(self) -> int:
        """Give demand_bytes + prefetch_bytes."""
        return self.demand_bytes + self.prefetch_bytes

    @property
    def prefetch_precision(self) -> float | None:
        """Give num_prefetched_used / num_prefetched; None without prefetches."""
        return self.num_prefetched_used / self.num_prefetched if self.num_prefetched else None

    @property
    def acceptance_rate(self) -> float | None:
        """Give num_accepted_tokens / num_draft_tokens; None where nothing was drafted."""
        drafted = self.num_draft_tokens
        return self.num_accepted_tokens / drafted if drafted else None

    @property
    def accept_length(self) -> float | None:
        """Give 1 + num_accepted_tokens / num_rounds: tokens per round; None without rounds."""
        return 1 + self.num_accepted_tokens / self.num_rounds if self.num_rounds else None

    @property
    def speculated_fraction(self) -> float:
        """Give num_speculated / num_executed; 0 where nothing was executed."""
        return self.num_speculated / self.num_executed if self.num_executed else 0.0

    @property
    def recall_at_n(self) -> dict[int, dict[int, float]]:
        """Give, by layer and distance, the demanded experts' share inside as many predicted."""
        recall: dict[int, dict[int, float]] = {}
        for (layer, distance), demanded in sorted(self.num_predicted.items()):
            if demanded:
                right = self.num_predicted_right.get((layer, distance), 0)
                recall.setdefault(layer, {})[distance] = right / demanded
        return recall


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestStats:
    """Statistics of one request, under the names of the glossary.

    What is counted is counted for the engine as a whole: of requests that overlap, the figures of
    each include what the others did in the meantime.

    Attributes:
        ttft_s: Request submitted to first token available, seconds.
        tpot_s: (e2e_s - ttft_s) / (num_output_tokens - 1); None for fewer than two tokens.
        e2e_s: Request submitted to last token available, seconds.
        num_prompt_tokens: Tokens of the prompt.
        num_output_tokens: Tokens generated.
        hit_rate: num_hits / num_lookups.
        late_rate: num_late / num_lookups.
        recall_at_n: By layer and distance, see `Metrics.recall_at_n`.
        prefetch_precision: Prefetched experts demanded before eviction / prefetched.
        bytes_moved: Bytes copied into the device tier.
        bytes_per_token: bytes_moved of the decode phase / (num_output_tokens - 1).
        wasted_bytes: Bytes of prefetches that were never demanded.
        stall_s: Seconds compute waited on copies.
        stall_fraction: stall_s / e2e_s.
        expert_memory_bytes: Size of the device tier.
        speculated_fraction: num_speculated / num_executed while decoding; 0 under the exact policy.
        round_s: Mean seconds of a round; None without a draft.
        acceptance_rate: num_accepted_tokens / num_draft_tokens; None where nothing was drafted.
        accept_length: 1 + num_accepted_tokens / num_rounds; None without a draft.
        rounds_by_draft: How many rounds drafted how many tokens; empty without a draft.
    """

    ttft_s: float
    tpot_s: float | None
    e2e_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    hit_rate: float | None
    late_rate: float | None
    recall_at_n: dict[int, dict[int, float]]
    prefetch_precision: float | None
    bytes_moved: int
    bytes_per_token: float | None
    wasted_bytes: int
    stall_s: float
    stall_fraction: float
    expert_memory_bytes: int
    speculated_fraction: float
    round_s: float | None = None
    acceptance_rate: float | None = None
    accept_length: float | None = None
    rounds_by_draft: dict[int, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Give the statistics as JSON-ready values."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class TimeSpan:
    """One named interval on one lane: compute, disk or stall. Seconds on the engine's clock."""

    lane: str
    name: str
    start_s: float
    end_s: float


class Timeline:
    """Collects spans while switched on; off, it costs one comparison per span."""

    def __init__(self) -> None:
        self.is_on = False
        self.spans: list[TimeSpan] = []

    def add(self, lane: str, name: str, start_s: float, end_s: float) -> None:
        """Keep a span, if switched on."""
        if self.is_on:
            self.spans.append(TimeSpan(lane, name, start_s, end_s))

    def clear(self) -> None:
        """Forget all spans."""
        self.spans = []

    def write_chrome_trace(self, path: Path) -> None:
        """Write the spans as Chrome trace JSON (chrome://tracing, Perfetto)."""
        lanes = {lane: index for index, lane in enumerate(sorted({s.lane for s in self.spans}))}
        events: list[dict[str, Any]] = [
            {"ph": "M", "pid": 0, "tid": index, "name": "thread_name", "args": {"name": lane}}
            for lane, index in lanes.items()
        ]
        events += [
            {
                "ph": "X",
                "pid": 0,
                "tid": lanes[span.lane],
                "name": span.name,
                "ts": span.start_s * 1e6,
                "dur": (span.end_s - span.start_s) * 1e6,
            }
            for span in self.spans
        ]
        path.write_text(json.dumps({"traceEvents": events}))
