"""Answers what fits, which settings to use and how long a token will take, before anything runs.

Reads a checkpoint's headers, takes the machine's figures as given or has them measured
(`bench.probe`), and asks the cost model (`foreload.cost`) or, with a trace, the simulator
(`trace.simulate`). Loads no weights and runs no engine on the model.
"""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foreload.bench.probe import ExpertProbe, LayerProbe, probe_experts, probe_layers
from foreload.config import EngineConfig, format_bytes, parse_size
from foreload.cost import (
    MachineRates,
    cached_s,
    dense_s,
    expert_s,
    prefetched_s,
    resident_s,
    wire_s,
)
from foreload.errors import ConfigError
from foreload.memory.available import available_bytes
from foreload.model.headers import read_headers
from foreload.model.source import DEMO_NAME, open_headers
from foreload.trace.layer_slots import SlotPlanGain, slot_plan_gain
from foreload.trace.read import read_trace
from foreload.trace.simulate import SimulationSettings, simulate

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from foreload.cost import DecodeWork
    from foreload.model.headers import ModelHeaders
    from foreload.trace.record import RoutingTrace

    Progress = Callable[[str, int, int], None]

__all__ = [
    "GivenFigures",
    "Machine",
    "PlannedArm",
    "Recommendation",
    "RunPlan",
    "make_run_plan",
    "predict_arms",
    "predict_range",
]

_MARGIN_BYTES = 1 << 30
"""Left to the rest of the machine, as expert_memory="auto" leaves it."""

_BUSY = 0.5
"""Cores in use from which on the figures of a machine suffer."""

_BOUNDS = ("on-demand", "oracle")
"""Arms that are there to be compared with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenFigures:
    """What is said of a machine; None is measured on this one.

    Attributes:
        disk_bytes_s: Bytes per second that copies deliver.
        memory_bytes_s: Bytes per second that a product of a matrix and a vector reads.
        memory_bytes: Memory the model may take.
        layer_s: Seconds per MoE layer beside bytes and FLOP.
    """

    disk_bytes_s: float | None = None
    memory_bytes_s: float | None = None
    memory_bytes: int | None = None
    layer_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A machine's figures.

    Attributes:
        rates: What the cost model computes with.
        memory_bytes: Memory the model may take.
        origins: By figure, "measured", "given" or "assumed".
        num_busy: Cores that were in use before anything was measured.
    """

    rates: MachineRates
    memory_bytes: int
    origins: dict[str, str]
    num_busy: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedArm:
    """What to expect of one way to run the model, with one expert memory.

    Attributes:
        arm: The way, as `foreload bench` calls it; "cache" for any.
        budget: Share of the experts that have a slot.
        num_slots: Slots.
        tpot_s: Seconds per decoded token; of a range the larger end.
        best_tpot_s: The other end, perfect prefetch; `tpot_s` where it is no range.
        hit_rate: Share of the lookups that find their expert readable.
        wire_s: Seconds per token that the copies take.
    """

    arm: str
    budget: float
    num_slots: int
    tpot_s: float
    best_tpot_s: float
    hit_rate: float
    wire_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommendation:
    """Settings, what to expect of them, and what stands in the way of more.

    Attributes:
        expert_memory_bytes: For `expert_memory`.
        eviction: For `eviction`.
        predictor: For `predictor`.
        tpot_s: Seconds per decoded token; of a range the larger end; None where it cannot run.
        best_tpot_s: The other end of the range.
        limit: "capacity" (it cannot run), "wire" or "compute".
        reason: The limit in words.
    """

    expert_memory_bytes: int
    eviction: str
    predictor: str
    tpot_s: float | None
    best_tpot_s: float | None
    limit: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """What `make_run_plan` found.

    Attributes:
        model: As it was named.
        basis: "cost model" or "trace".
        machine: The machine's figures.
        work: What a decoded token of the model reads and computes.
        dense_bytes: Memory for everything but the experts.
        slot_bytes: Memory for one expert.
        num_slots: Slots for all experts.
        num_fitting: Slots the machine has memory for.
        resident_s: Seconds per token with all experts in memory.
        on_demand_s: Seconds per token with nothing kept.
        arms: What to expect, by expert memory.
        slot_plans: What slots of each layer's own would miss, equal and planned from the trace, by
            expert memory; none without a trace.
        recommendation: What to use.
        notes: What the figures do not say.
    """

    model: str
    basis: str
    machine: Machine
    work: DecodeWork
    dense_bytes: int
    slot_bytes: int
    num_slots: int
    num_fitting: int
    resident_s: float
    on_demand_s: float
    arms: list[PlannedArm]
    slot_plans: list[SlotPlanGain]
    recommendation: Recommendation
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Give the plan as JSON-ready values; what is unlimited is None."""
        values = asdict(self)
        rates: dict[str, float] = values["machine"]["rates"]
        values["machine"]["rates"] = {
            name: value if math.isfinite(value) else None for name, value in rates.items()
        }
        return values


def make_run_plan(
    model: str,
    *,
    dtype: str = "auto",
    given: GivenFigures | None = None,
    budgets: Sequence[float] = (0.1, 0.25, 0.5, 0.75, 1.0),
    trace: Path | None = None,
    progress: Progress | None = None,
) -> RunPlan:
    """Plan a model on a machine.

    Args:
        model: Local directory, Hub name, or "demo"; of a Hub model only headers are downloaded.
        dtype: Element type in memory.
        given: Figures of the machine that are not to be measured.
        budgets: Shares of all experts to look at, beside the largest that fits.
        trace: Recorded routing of this model, or of one that routes the same.
        progress: Called with (what, done, total).

    Raises:
        CheckpointError: The checkpoint is missing, damaged or incomplete.
        UnsupportedModelError: foreload cannot run the model.
        ConfigError: A figure makes no sense, or the trace does not fit the model.
        TraceError: The trace cannot be read.

    Cost:
        Up to ten seconds of measuring; with a trace, a few simulations of it per budget.
    """
    tell: Progress = progress or _ignore
    recorded = None if trace is None else read_trace(trace)
    with open_headers(model) as folder:
        headers = read_headers(folder, dtype=dtype)
        if recorded is not None:
            _check_trace(recorded, headers)
        is_local = model == DEMO_NAME or Path(model).expanduser().is_dir()
        disk = folder if is_local else _download_folder()
        machine = _measure_machine(headers, given or GivenFigures(), disk, tell)
    spec, work = headers.spec, headers.work
    room = machine.memory_bytes - spec.dense_bytes - _MARGIN_BYTES
    num_fitting = max(0, min(headers.num_experts, room // headers.slot_bytes))
    arms: list[PlannedArm] = []
    slot_plans: list[SlotPlanGain] = []
    counts = _slot_counts(headers, budgets, num_fitting)
    for done, num_slots in enumerate(counts):
        tell("Expert memories", done, len(counts))
        if recorded is None:
            arms.append(predict_range(work, machine.rates, num_slots))
        else:
            arms += predict_arms(work, machine.rates, recorded, num_slots)
            gain = slot_plan_gain(recorded, num_slots, least=spec.top_k)
            slot_plans += [] if gain is None else [gain]
    tell("Expert memories", len(counts), len(counts))
    on_demand = [arm.tpot_s for arm in arms if arm.arm == "on-demand"]
    return RunPlan(
        model=model,
        basis="cost model" if recorded is None else "trace",
        machine=machine,
        work=work,
        dense_bytes=spec.dense_bytes,
        slot_bytes=headers.slot_bytes,
        num_slots=headers.num_experts,
        num_fitting=num_fitting,
        resident_s=resident_s(work, machine.rates),
        on_demand_s=on_demand[-1] if on_demand else cached_s(work, machine.rates, 0.0),
        arms=arms,
        slot_plans=slot_plans,
        recommendation=_recommend(headers, machine, num_fitting, arms),
        notes=_notes(headers, machine, recorded),
    )


def predict_range(work: DecodeWork, rates: MachineRates, num_slots: int) -> PlannedArm:
    """Give what a cache comes to where nothing is known of the routing.

    It hits with the share of the experts that fits, as with uniform routing that knows no past.
    The range is from no prefetch to perfect prefetch.

    Args:
        work: The model's.
        rates: The machine's.
        num_slots: Slots of the cache.
    """
    share = work.share_that_fits(num_slots)
    cached = cached_s(work, rates, share)
    return PlannedArm(
        arm="cache" if share < 1 else "all-resident",
        budget=share,
        num_slots=num_slots,
        tpot_s=cached,
        # Guessing may cost more than it hides.
        best_tpot_s=cached if share == 1 else min(cached, prefetched_s(work, rates, share)),
        hit_rate=share,
        wire_s=wire_s(work, rates, share),
    )


def predict_arms(
    work: DecodeWork, rates: MachineRates, trace: RoutingTrace, num_slots: int
) -> list[PlannedArm]:
    """Give what each arm comes to on a recorded routing, by simulation.

    Args:
        work: The model's.
        rates: The machine's.
        trace: Its prefills fill the cache, its decoded tokens are counted.
        num_slots: Slots of the cache; where all experts fit, they count as there from the start.
    """
    share = work.share_that_fits(num_slots)
    if share == 1:
        return [predict_range(work, rates, num_slots)]
    arms = []
    for name, eviction, predictor in _arms_of(trace):
        guessing_s = rates.prediction_s if predictor == "trace" else 0.0
        result = simulate(
            trace,
            SimulationSettings(
                num_slots=num_slots,
                expert_bytes=work.stored_bytes,
                bandwidth_bytes_s=rates.disk_bytes_s,
                dense_s=dense_s(work, rates) + guessing_s,
                expert_s=expert_s(work, rates),
                compute_share=rates.compute_share,
                copy_share=rates.copy_share,
                call_s=rates.call_s,
                eviction=eviction,
                predictor=predictor,
            ),
        )
        arms.append(
            PlannedArm(
                arm=name,
                budget=share,
                num_slots=num_slots,
                tpot_s=result.tpot_s,
                best_tpot_s=result.tpot_s,
                hit_rate=result.hit_rate,
                wire_s=result.bytes_per_token / rates.disk_bytes_s,
            )
        )
    return arms


def _arms_of(trace: RoutingTrace) -> list[tuple[str, str, str]]:
    """Give name, eviction and the simulator's predictor of each arm a trace can answer for."""
    default = EngineConfig().eviction
    arms = [("on-demand", "none", "none"), ("lru", "lru", "none"), (default, default, "none")]
    recorded = "none" if trace.info is None else trace.info.predictor
    if recorded != "none":
        arms.append((recorded, default, "trace"))
    return [*arms, ("oracle", default, "oracle")]


def _measure_machine(
    headers: ModelHeaders, given: GivenFigures, disk: Path, tell: Progress
) -> Machine:
    """Measure what is not given; `disk` is a folder on the disk that is meant."""
    num_busy = os.getloadavg()[0]
    rates: dict[str, float] = {}
    origins: dict[str, str] = {}

    def take(name: str, value: float, origin: str) -> None:
        rates[name] = value
        origins[name] = origin

    tell("Measuring", 0, 2)
    probe = ExpertProbe(expert_s=math.nan, flop_s=math.inf)
    if given.disk_bytes_s is None or given.memory_bytes_s is None:
        probe = probe_experts(headers, folder=disk if given.disk_bytes_s is None else None)
    if given.disk_bytes_s is not None:
        take("disk_bytes_s", given.disk_bytes_s, "given")
    elif probe.disk_bytes_s is not None:
        take("disk_bytes_s", probe.disk_bytes_s, "measured")
    if given.memory_bytes_s is not None:
        # The arithmetic measured here says nothing of a machine with another memory.
        take("memory_bytes_s", given.memory_bytes_s, "given")
        take("flop_s", math.inf, "assumed")
    else:
        take("memory_bytes_s", headers.work.expert_bytes / probe.expert_s, "measured")
        take("flop_s", probe.flop_s, "measured")
    is_here = set(origins.values()) == {"measured"}
    for name in ("compute_share", "copy_share"):
        take(name, getattr(probe, name) if is_here else 1.0, "measured" if is_here else "assumed")
    tell("Measuring", 1, 2)
    if given.layer_s is not None:
        take("layer_s", given.layer_s, "given")
        take("prediction_s", 0.0, "assumed")
        take("call_s", 0.0, "assumed")
    else:
        layers: LayerProbe = probe_layers(rates["memory_bytes_s"])
        take("layer_s", layers.layer_s, "measured")
        take("prediction_s", layers.prediction_s, "measured")
        take("call_s", layers.call_s, "measured")
    tell("Measuring", 2, 2)
    origins["memory_bytes"] = "measured" if given.memory_bytes is None else "given"
    memory_bytes = given.memory_bytes or available_bytes()
    return Machine(
        rates=MachineRates(**rates), memory_bytes=memory_bytes, origins=origins, num_busy=num_busy
    )


def _download_folder() -> Path:
    """Give the nearest folder there is of where Hub models are downloaded to."""
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE)
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def _check_trace(trace: RoutingTrace, headers: ModelHeaders) -> None:
    spec = headers.spec
    if (trace.num_layers, trace.num_experts) != (spec.num_moe_layers, spec.num_experts):
        raise ConfigError(
            f"the trace has {trace.num_layers} MoE layers of {trace.num_experts} experts, the "
            f"model {spec.num_moe_layers} of {spec.num_experts}",
            hint="give a trace of this model: `foreload trace` records one",
        )


def _least_slots(headers: ModelHeaders) -> int:
    """Give the fewest slots an engine accepts."""
    return min(headers.num_experts, headers.spec.top_k + 1)


def _slot_counts(headers: ModelHeaders, budgets: Sequence[float], num_fitting: int) -> list[int]:
    """Give the slot counts to look at: the budgets', and the largest that fits."""
    whole = headers.num_experts * headers.slot_bytes
    sizes = [
        parse_size(f"{budget * 100:g}%", whole_bytes=whole, setting="budgets") for budget in budgets
    ]
    counts = {min(headers.num_experts, size // headers.slot_bytes) for size in sizes}
    return sorted(n for n in counts | {num_fitting} if n >= _least_slots(headers))


def _recommend(
    headers: ModelHeaders, machine: Machine, num_fitting: int, arms: Sequence[PlannedArm]
) -> Recommendation:
    """Choose the fastest arm with the largest memory that fits."""
    defaults = EngineConfig()
    fitting = [arm for arm in arms if arm.num_slots == num_fitting and arm.arm not in _BOUNDS]
    if not fitting:
        least = _least_slots(headers) * headers.slot_bytes
        needed = headers.spec.dense_bytes + least + _MARGIN_BYTES
        return Recommendation(
            expert_memory_bytes=least,
            eviction=defaults.eviction,
            predictor=defaults.predictor,
            tpot_s=None,
            best_tpot_s=None,
            limit="capacity",
            reason=f"it needs {format_bytes(needed)} of memory and has "
            f"{format_bytes(machine.memory_bytes)}",
        )
    best = min(fitting, key=lambda arm: arm.tpot_s)
    compute_s = resident_s(headers.work, machine.rates)
    is_wire = best.wire_s > compute_s
    plain = ("all-resident", "lru", defaults.eviction)
    # Where no guessing arm was compared, the default stays: it switches itself off if it loses.
    is_compared = best.arm == "all-resident" or any(
        arm.arm not in (*plain, "cache") for arm in fitting
    )
    predictor = defaults.predictor
    if is_compared:
        predictor = "none" if best.arm in plain else best.arm
    return Recommendation(
        expert_memory_bytes=num_fitting * headers.slot_bytes,
        eviction="lru" if best.arm == "lru" else defaults.eviction,
        predictor=predictor,
        tpot_s=best.tpot_s,
        best_tpot_s=best.best_tpot_s,
        limit="wire" if is_wire else "compute",
        reason=f"per token, copies take {best.wire_s * 1000:.1f} ms and computing "
        f"{compute_s * 1000:.1f} ms",
    )


def _notes(headers: ModelHeaders, machine: Machine, trace: RoutingTrace | None) -> list[str]:
    """Say what the figures leave out."""
    notes = ["prompts and long contexts are left out: a token's attention counts as if short"]
    if "measured" in machine.origins.values() and machine.num_busy > _BUSY:
        notes.append(
            f"{machine.num_busy:.1f} cores were busy while this machine was measured: on a quiet "
            "one it may be faster"
        )
    if trace is None:
        notes.append(
            "without a trace the hit rate is not known: taken is the share of the experts that "
            "fits, as if routing knew no past; `foreload trace` records what it does know"
        )
        return notes
    info = trace.info
    if info is not None and info.identity != headers.spec.identity:
        notes.append("the trace is from another checkpoint: its routing is taken for this one's")
    if info is not None and info.top_k != headers.spec.top_k:
        notes.append(
            f"the trace has {info.top_k} experts per token, the model {headers.spec.top_k}"
        )
    if info is None or info.predictor == "none":
        notes.append(
            "the trace has no predictions: prefetching is shown at its bound, the oracle, only"
        )
    return notes


def _ignore(what: str, done: int, total: int) -> None:
    """Report progress to nobody."""
