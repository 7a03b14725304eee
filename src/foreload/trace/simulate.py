"""Replays a trace on a virtual clock: what a cache, a predictor and a link would make of it.

Runs the engine's own tiers, cache, eviction and prefetcher; only the clock, the link and the slots
are simulated (`trace.virtual`), and the routing is the trace's. No model, no bytes, no threads,
and nothing is random beyond a seed. Torch-free.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from foreload.errors import ConfigError
from foreload.memory.eviction import make_eviction
from foreload.memory.tiers import ExpertTiers
from foreload.metrics import Metrics, Timeline
from foreload.schedule.prefetch import Prefetcher, most_prefetches
from foreload.trace.forecast import make_forecast
from foreload.trace.replay import replay
from foreload.trace.virtual import VirtualClock, VirtualSlots, VirtualTransfers
from foreload.types import ExpertPlan, Span

if TYPE_CHECKING:
    from foreload.trace.record import LayerVisit, RoutingTrace
    from foreload.trace.replay import ReplayCounts

__all__ = [
    "SimulationLimits",
    "SimulationResult",
    "SimulationSettings",
    "simulate",
    "simulation_limits",
    "wire_limit_s",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationSettings:
    """The machine and the settings a trace is replayed under.

    Attributes:
        num_slots: Experts that fit into the expert memory.
        expert_bytes: Bytes of one expert on disk, one number or one per MoE layer.
        bandwidth_bytes_s: What the link carries; infinite is allowed.
        dense_s: Seconds per MoE layer for everything but its experts and waiting.
        expert_s: Seconds to compute one executed expert.
        latency_s: Seconds before the first byte of each copy.
        num_workers: Pieces in flight at once.
        compute_share: Share of its speed that computing keeps while copies run.
        copy_share: Share of its bandwidth that the link keeps while something is computed.
        call_s: Seconds that each copy costs who computes: asking for it, waking up, booking it.
        eviction: As in `EngineConfig`.
        predictor: "none"; "trace", what was predicted when the trace was recorded; "oracle", who
            reads the trace; or the recall of a made-up predictor, from 0 to 1.
        lookahead_layers: How many MoE layers ahead is predicted, at most.
        max_prefetches: Most guessed experts queued or on their way; None takes the engine's.
        count_from: First step that is counted. Prefills are never counted; they fill the cache.
        seed: Draws which guesses of a given recall are wrong.
    """

    num_slots: int
    expert_bytes: int | tuple[int, ...]
    bandwidth_bytes_s: float
    dense_s: float
    expert_s: float
    latency_s: float = 0.0
    num_workers: int = 2
    compute_share: float = 1.0
    copy_share: float = 1.0
    call_s: float = 0.0
    eviction: str = "history"
    predictor: str | float = "none"
    lookahead_layers: int = 2
    max_prefetches: int | None = None
    count_from: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = self.expert_bytes
        least = min(sizes) if isinstance(sizes, tuple) else sizes
        checks = [
            ("num_slots", self.num_slots >= 1, "at least 1"),
            ("expert_bytes", least >= 1, "at least 1"),
            ("bandwidth_bytes_s", self.bandwidth_bytes_s > 0, "above 0"),
            ("dense_s", self.dense_s >= 0, "0 or more"),
            ("expert_s", self.expert_s >= 0, "0 or more"),
            ("latency_s", 0 <= self.latency_s < math.inf, "0 or more"),
            ("num_workers", self.num_workers >= 1, "at least 1"),
            ("compute_share", 0 < self.compute_share <= 1, "above 0 and at most 1"),
            ("copy_share", 0 < self.copy_share <= 1, "above 0 and at most 1"),
            ("call_s", 0 <= self.call_s < math.inf, "0 or more"),
            ("lookahead_layers", self.lookahead_layers >= 1, "at least 1"),
        ]
        for name, is_fine, wanted in checks:
            if not is_fine:
                raise ConfigError(f"{name}={getattr(self, name)!r} must be {wanted}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationResult:
    """What a simulated decode took, per counted step; rates from 0 to 1.

    Attributes:
        num_steps: Steps counted.
        tpot_s: Mean duration of a step, seconds.
        step_s: Duration of each.
        compute_s: Of a mean step, seconds that were computed.
        stall_s_per_token: Of a mean step, seconds that were waited.
        hit_rate: num_hits / num_lookups.
        late_rate: Lookups answered by a copy on its way / num_lookups.
        miss_rate: Lookups answered by nothing / num_lookups.
        bytes_per_token: Bytes copied.
        prefetch_bytes_per_token: Of these, on a guess.
        wasted_bytes_per_token: Of those, never demanded before eviction or cancellation.
        prefetch_precision: Prefetched experts demanded before eviction / prefetched.
        recall_at_n: By layer and distance, see `Metrics.recall_at_n`.
        num_hits: Lookups answered by a readable slot.
        num_late: Lookups answered by a copy on its way.
        num_misses: Lookups answered by nothing.
    """

    num_steps: int
    tpot_s: float
    step_s: tuple[float, ...]
    compute_s: float
    stall_s_per_token: float
    hit_rate: float
    late_rate: float
    miss_rate: float
    bytes_per_token: float
    prefetch_bytes_per_token: float
    wasted_bytes_per_token: float
    prefetch_precision: float | None
    recall_at_n: dict[int, dict[int, float]]
    num_hits: int
    num_late: int
    num_misses: int

    def to_dict(self) -> dict[str, Any]:
        """Give the result as JSON-ready values."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationLimits:
    """What a trace, slots and a machine allow, whatever the policy and the predictor.

    Attributes:
        lru_hit_rate: Hit rate of LRU without prefetch.
        belady_hit_rate: Hit rate of the best possible eviction without prefetch.
        compute_s: Seconds per token with every expert in memory.
        belady_limit_s: max(compute_s, missed bytes / bandwidth) of the best possible eviction.
    """

    lru_hit_rate: float
    belady_hit_rate: float
    compute_s: float
    belady_limit_s: float

    def to_dict(self) -> dict[str, float]:
        """Give the limits as JSON-ready values."""
        return asdict(self)


def simulate(trace: RoutingTrace, settings: SimulationSettings) -> SimulationResult:
    """Replay a trace from an empty cache, and measure its decoded steps.

    Args:
        trace: Recorded routing; `trace.decode_part()` leaves the prompts out.
        settings: Machine and settings.

    Raises:
        ConfigError: An unknown policy or predictor, predictions the trace does not have, no step
            to count, or fewer slots than an engine needs.
    """
    least = _top_k(trace) + 1
    if settings.num_slots < least:
        raise ConfigError(
            f"num_slots={settings.num_slots} must be at least {least}: {least - 1} experts at work "
            "and one on its way",
            hint="give more slots, or a trace of a model with fewer experts per token",
        )
    return _Simulation(trace, settings).run()


def simulation_limits(trace: RoutingTrace, settings: SimulationSettings) -> SimulationLimits:
    """Give what the trace, slots and machine of a simulation allow at best.

    Args:
        trace: Recorded routing.
        settings: Machine and slots; eviction and predictor are not used.

    Raises:
        ConfigError: No step to count.
    """
    return SimulationLimits(
        lru_hit_rate=_replay(trace, settings, "lru").hit_rate,
        belady_hit_rate=_replay(trace, settings, "belady").hit_rate,
        compute_s=_compute_s(trace, settings),
        belady_limit_s=_limit_s(trace, settings, "belady"),
    )


def wire_limit_s(trace: RoutingTrace, settings: SimulationSettings) -> float:
    """Give max(compute, missed bytes / bandwidth) of a policy: what perfect overlap leaves.

    Args:
        trace: Recorded routing.
        settings: Machine, slots and eviction policy; the predictor is not used.

    Raises:
        ConfigError: An unknown policy, or no step to count.
    """
    return _limit_s(trace, settings, settings.eviction)


class _Simulation:
    """An engine whose model is a trace."""

    def __init__(self, trace: RoutingTrace, settings: SimulationSettings) -> None:
        self._trace = trace
        self._settings = settings
        self._counted = set(_counted_steps(trace, settings.count_from))
        sizes = _expert_sizes(trace, settings)
        plans = [[ExpertPlan((Span("", 0, size),), ())] * trace.num_experts for size in sizes]
        self._clock = VirtualClock()
        self._metrics = Metrics()
        self._transfers = VirtualTransfers(
            self._clock,
            bandwidth_bytes_s=settings.bandwidth_bytes_s,
            latency_s=settings.latency_s,
            num_workers=settings.num_workers,
            compute_share=settings.compute_share,
            copy_share=settings.copy_share,
            call_s=settings.call_s,
        )
        self._tiers = ExpertTiers(
            VirtualSlots(settings.num_slots, max(sizes)),
            plans,
            self._transfers,
            make_eviction(settings.eviction, trace.num_layers, trace.num_experts),
            self._metrics,
            Timeline(),
            keep=settings.eviction != "none",
            clock=self._clock,
        )
        self._prefetcher = Prefetcher(
            self._tiers,
            self._metrics,
            num_layers=trace.num_layers,
            max_prefetches=settings.max_prefetches
            or most_prefetches(settings.num_slots, _top_k(trace)),
        )
        self._forecast = make_forecast(
            settings.predictor, trace, max_distance=settings.lookahead_layers, seed=settings.seed
        )

    def run(self) -> SimulationResult:
        """Run every step; sum up the counted ones."""
        total = Metrics()
        step_s = []
        for step, visits in enumerate(self._trace.steps):
            before, start_s = self._metrics.snapshot(), self._clock()
            self._metrics.num_steps += 1
            self._prefetcher.begin_step(0)
            for layer, visit in enumerate(visits):
                self._run_layer(step, layer, visit)
            if step in self._counted:
                step_s.append(self._clock() - start_s)
                total.add(self._metrics.since(before))
        self._tiers.close()
        return _sum_up(total, step_s)

    def _run_layer(self, step: int, layer: int, visit: LayerVisit) -> None:
        """Do what `model.runtime.ExpertRuntime.run_layer` does, in the same order."""
        settings = self._settings
        self._transfers.compute(settings.dense_s)
        self._prefetcher.score(layer, visit.experts)
        counts = dict(zip(visit.experts, visit.counts, strict=True))
        routing = visit.routing if visit.num_tokens > 1 else None
        self._tiers.observe(layer, counts, visit.num_tokens, routing)
        demand = self._tiers.demand(layer, visit.experts)
        guesses = self._forecast(step, layer)
        if guesses:
            self._prefetcher.prefetch(guesses, is_single=visit.num_tokens == 1)
        for _ in demand:
            self._transfers.compute(settings.expert_s)


def _replay(trace: RoutingTrace, settings: SimulationSettings, eviction: str) -> ReplayCounts:
    return replay(trace, settings.num_slots, eviction, count_from=settings.count_from)


def _compute_s(trace: RoutingTrace, settings: SimulationSettings) -> float:
    """Give the seconds per token that are computed."""
    counted = _counted_steps(trace, settings.count_from)
    num_experts = sum(len(visit.experts) for step in counted for visit in trace.steps[step])
    return settings.dense_s * trace.num_layers + settings.expert_s * num_experts / len(counted)


def _limit_s(trace: RoutingTrace, settings: SimulationSettings, eviction: str) -> float:
    num_tokens = len(_counted_steps(trace, settings.count_from))
    num_missed = _replay(trace, settings, eviction).num_misses / num_tokens
    moved_bytes = num_missed * statistics.mean(_expert_sizes(trace, settings))
    return max(_compute_s(trace, settings), moved_bytes / settings.bandwidth_bytes_s)


def _sum_up(total: Metrics, step_s: list[float]) -> SimulationResult:
    num_steps = len(step_s)
    tpot_s = statistics.fmean(step_s)
    lookups = max(total.num_lookups, 1)
    stall_s = total.stall_s / num_steps
    return SimulationResult(
        num_steps=num_steps,
        tpot_s=tpot_s,
        step_s=tuple(step_s),
        compute_s=tpot_s - stall_s,
        stall_s_per_token=stall_s,
        hit_rate=total.num_hits / lookups,
        late_rate=total.num_late / lookups,
        miss_rate=total.num_misses / lookups,
        bytes_per_token=total.bytes_moved / num_steps,
        prefetch_bytes_per_token=total.prefetch_bytes / num_steps,
        wasted_bytes_per_token=total.wasted_bytes / num_steps,
        prefetch_precision=total.prefetch_precision,
        recall_at_n=total.recall_at_n,
        num_hits=total.num_hits,
        num_late=total.num_late,
        num_misses=total.num_misses,
    )


def _top_k(trace: RoutingTrace) -> int:
    """Give the experts per token and layer."""
    if trace.info is not None:
        return trace.info.top_k
    single = [v for visits in trace.steps for v in visits if v.num_tokens == 1]
    return max((len(visit.experts) for visit in single), default=1)


def _counted_steps(trace: RoutingTrace, count_from: int) -> list[int]:
    """Name the steps that are counted.

    Raises:
        ConfigError: There are none.
    """
    counted = [step for step in range(count_from, len(trace.steps)) if not trace.is_prefill(step)]
    if not counted:
        raise ConfigError(
            f"the trace has no decoded step from step {count_from} on",
            hint="record a longer text, or count from an earlier step",
        )
    return counted


def _expert_sizes(trace: RoutingTrace, settings: SimulationSettings) -> tuple[int, ...]:
    """Give the bytes of an expert per layer.

    Raises:
        ConfigError: There is another number of sizes than of layers.
    """
    sizes = settings.expert_bytes
    if not isinstance(sizes, tuple):
        return (sizes,) * trace.num_layers
    if len(sizes) != trace.num_layers:
        raise ConfigError(
            f"expert_bytes has {len(sizes)} sizes for {trace.num_layers} layers",
            hint="give one number, or one per MoE layer",
        )
    return sizes
