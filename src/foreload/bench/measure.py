"""Runs one arm over one workload and takes its measures; every trial's logits are compared.

An exact arm whose logits differ from transformers' eager experts by a single bit has no time; of a
lossy arm that holds for the prompt, and what its other logits are worth stands beside its time.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from foreload.config import EngineConfig
from foreload.engine import Engine, resolve
from foreload.evaluate import compare_logits
from foreload.model.kv_cache import make_kv_cache
from foreload.predict.estimator import Estimator
from foreload.predict.oracle import Oracle
from foreload.trace.record import RoutingRecorder

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from foreload.bench.workload import Workload
    from foreload.metrics import Metrics, Timeline
    from foreload.model.hf import LoadedModel
    from foreload.trace.record import RoutingTrace

    Forward = Callable[[Tensor, Any], Tensor]

__all__ = [
    "Arm",
    "ForcedRun",
    "Sample",
    "measure_bandwidth",
    "run_engine_arm",
    "run_forced",
    "run_stock_arm",
]


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to run the model.

    Attributes:
        name: As tables and figures show it.
        settings: Engine settings beside the memory; None for transformers itself.
        implementation: For transformers itself: its experts implementation.
        is_resident: Whether it gets the memory of all experts, whatever the budget.
        is_oracle: Whether predictions are replayed from the workload's own trace.
        is_pure: Whether its estimator speaks for every layer, even where another predictor was
            measured to be better.
        is_layerwise: Whether a layer is computed when all its experts have arrived, instead of each
            expert as it arrives.
    """

    name: str
    settings: dict[str, Any] | None = None
    implementation: str | None = None
    is_resident: bool = False
    is_oracle: bool = False
    is_pure: bool = False
    is_layerwise: bool = False

    @property
    def is_lossy(self) -> bool:
        """Tell whether it may execute other experts than the true router's."""
        policy: str = (self.settings or {}).get("policy", "exact")
        return policy != "exact"


@dataclass(slots=True, kw_only=True)
class Sample:
    """One arm, one context, one budget, one trial. Times in seconds, bytes per decoded token.

    Attributes:
        context: Tokens of the prompt.
        is_equal: Whether the logits are the reference's bit for bit; of a lossy arm, those of the
            prompt, which no policy changes.
        is_lossy: Whether the arm may execute other experts than the true router's.
        is_layerwise: Whether it computes whole layers, see `Arm`.
        eviction: Eviction policy; empty for transformers itself.
        quality: Of a lossy arm, for each decoded token that another follows, what
            `evaluate.TokenQuality` has.
    """

    arm: str
    budget: float
    trial: int
    tpot_s: float
    prefill_s: float
    step_s: list[float]
    is_equal: bool
    context: int = 0
    is_resident: bool = False
    is_lossy: bool = False
    is_layerwise: bool = False
    eviction: str = ""
    hit_rate: float | None = None
    late_rate: float | None = None
    bytes_per_token: float = 0.0
    prefetch_bytes_per_token: float = 0.0
    wasted_bytes_per_token: float = 0.0
    stall_s_per_token: float = 0.0
    prefetch_precision: float | None = None
    num_slots: int = 0
    recall_at_n: dict[int, dict[int, float]] = field(default_factory=dict)
    speculated_fraction: float = 0.0
    quality: dict[str, list[float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Give the sample as JSON-ready values."""
        return asdict(self)


@dataclass(slots=True)
class ForcedRun:
    """Logits and times of one forced decode."""

    logits: Tensor
    prefill_s: float
    step_s: list[float]


def run_forced(forward: Forward, workload: Workload, kv_cache: Any) -> ForcedRun:
    """Prefill the prompt, then feed the rest one token at a time.

    Args:
        forward: From token ids (1, T) and a cache to the last position's logits (V,).
        workload: What to feed.
        kv_cache: Empty cache.
    """
    ids = torch.tensor([workload.token_ids])
    start = time.perf_counter()
    rows = [forward(ids[:, : workload.num_prompt_tokens], kv_cache)]
    prefill_s = time.perf_counter() - start
    step_s = []
    for place in range(workload.num_prompt_tokens, ids.shape[1]):
        start = time.perf_counter()
        rows.append(forward(ids[:, place : place + 1], kv_cache))
        step_s.append(time.perf_counter() - start)
    return ForcedRun(torch.stack(rows), prefill_s, step_s)


def run_engine_arm(
    loaded: LoadedModel,
    arm: Arm,
    workload: Workload,
    *,
    budget: float,
    trial: int,
    cache_dir: Path,
    trace: RoutingTrace | None = None,
    reference: Tensor | None = None,
    with_timeline: bool = False,
) -> tuple[Sample, ForcedRun, RoutingTrace, Timeline]:
    """Run one trial of a foreload arm in an engine of its own, from an empty cache.

    Args:
        loaded: The model; not attached to any engine.
        arm: What to run.
        workload: What to decode.
        budget: Share of all experts' bytes.
        trial: Number of the trial.
        cache_dir: Where calibrations and estimators lie.
        trace: The workload's routing, for oracle arms.
        reference: Logits an exact arm must reproduce bit for bit, and a lossy one is judged by,
            (1 + decoded, V).
        with_timeline: Whether to keep the decode's spans.

    Returns:
        The sample, the raw run, the routing of this run (empty for a lossy arm), and its timeline.
    """
    memory = "100%" if arm.is_resident else f"{budget * 100:g}%"
    settings = {"expert_memory": memory, **(arm.settings or {})}
    config = resolve(EngineConfig.from_dict(settings), loaded)
    if arm.is_oracle and trace is None:
        raise ValueError(f"{arm.name} needs the workload's trace")
    oracle = Oracle(trace.demands()) if arm.is_oracle and trace is not None else None
    engine = Engine(loaded, None, config, cache_dir=cache_dir, predictor=oracle)
    recorder = RoutingRecorder(engine.spec.num_moe_layers, engine.spec.num_experts)
    with engine:
        if arm.is_resident:
            _load_all(engine)
        engine.tiers.is_layerwise = arm.is_layerwise
        predictor = engine.runtime.predictor
        if arm.is_pure and isinstance(predictor, Estimator):
            engine.runtime.predictor = predictor.make_pure()
        if not arm.is_lossy:
            engine.runtime.on_routing = recorder
        marks: list[Metrics] = []

        def forward(ids: Tensor, kv_cache: Any) -> Tensor:
            marks.append(engine.metrics.snapshot())
            is_prompt = len(marks) == 1
            engine.timeline.is_on = with_timeline and not is_prompt
            with engine.runtime.prefilling() if is_prompt else nullcontext():
                return engine.forward(ids, kv_cache)

        run = run_forced(forward, workload, engine.make_cache())
        # The first forward is the prefill, however short the prompt.
        counted = engine.metrics.since(marks[1])
        tokens = workload.num_decode_tokens
        sample = Sample(
            arm=arm.name,
            budget=budget,
            trial=trial,
            tpot_s=sum(run.step_s) / tokens,
            prefill_s=run.prefill_s,
            step_s=run.step_s,
            is_equal=_is_equal(run, reference, arm),
            context=workload.num_prompt_tokens,
            is_resident=arm.is_resident,
            is_lossy=arm.is_lossy,
            is_layerwise=arm.is_layerwise,
            eviction=config.eviction,
            hit_rate=counted.hit_rate,
            late_rate=counted.late_rate,
            bytes_per_token=counted.bytes_moved / tokens,
            prefetch_bytes_per_token=counted.prefetch_bytes / tokens,
            wasted_bytes_per_token=counted.wasted_bytes / tokens,
            stall_s_per_token=counted.stall_s / tokens,
            prefetch_precision=counted.prefetch_precision,
            num_slots=engine.tiers.num_slots,
            recall_at_n=counted.recall_at_n,
            speculated_fraction=counted.speculated_fraction,
        )
        if arm.is_lossy and reference is not None:
            sample.quality = _judge(run, reference, workload)
        engine.timeline.is_on = False
        return sample, run, recorder.trace, engine.timeline


def run_stock_arm(
    model: Any, arm: Arm, workload: Workload, *, trial: int, reference: Tensor | None
) -> tuple[Sample, ForcedRun]:
    """Run one trial of transformers itself, all experts in memory.

    Other implementations than eager sum in another order: their logits are compared with a
    tolerance of 5 % of the logits' standard deviation.
    """
    if arm.implementation is None:
        raise ValueError(f"{arm.name} names no experts implementation")

    def forward(ids: Tensor, kv_cache: Any) -> Tensor:
        # batched_mm copies every token's experts: transformers itself keeps it for decoding.
        is_prompt = ids.shape[1] > 1 and arm.implementation == "batched_mm"
        model.set_experts_implementation("grouped_mm" if is_prompt else arm.implementation)
        with torch.inference_mode():
            output = model(
                input_ids=ids, past_key_values=kv_cache, use_cache=True, logits_to_keep=1
            )
            logits: Tensor = output.logits[0, -1]
            return logits

    run = run_forced(forward, workload, make_kv_cache(model))
    is_equal = reference is None or _is_close(run.logits, reference)
    tpot_s = sum(run.step_s) / workload.num_decode_tokens
    sample = Sample(
        arm=arm.name,
        budget=1.0,
        trial=trial,
        tpot_s=tpot_s,
        prefill_s=run.prefill_s,
        step_s=run.step_s,
        is_equal=is_equal,
        context=workload.num_prompt_tokens,
        is_resident=True,
    )
    return sample, run


def _is_equal(run: ForcedRun, reference: Tensor | None, arm: Arm) -> bool:
    if reference is None:
        return True
    compared = 1 if arm.is_lossy else len(reference)
    return torch.equal(run.logits[:compared], reference[:compared])


def _judge(run: ForcedRun, reference: Tensor, workload: Workload) -> dict[str, list[float]]:
    """Compare a lossy arm's logits with the exact ones, where the text says what follows."""
    following = workload.token_ids[workload.num_prompt_tokens + 1 :]
    next_ids = torch.tensor(following, dtype=torch.int64)
    quality = compare_logits(reference[1:-1], run.logits[1:-1], next_ids)
    return {name: values.tolist() for name, values in quality._asdict().items()}


def _is_close(logits: Tensor, reference: Tensor) -> bool:
    gap = (logits.float() - reference.float()).abs().mean()
    return bool(gap <= 0.05 * reference.float().std())


def _load_all(engine: Engine) -> None:
    for layer in range(engine.spec.num_moe_layers):
        for _ in engine.tiers.demand(layer, list(range(engine.spec.num_experts))):
            pass


def measure_bandwidth(engine: Engine, *, num_experts: int = 48) -> float:
    """Measure what the transfer layer delivers with its queue full, bytes per second.

    A first pass is thrown away: it also pays for memory that was never touched before.
    """
    _read_experts(engine, num_experts)
    before = engine.metrics.bytes_moved
    start = time.perf_counter()
    _read_experts(engine, num_experts)
    elapsed = time.perf_counter() - start
    return (engine.metrics.bytes_moved - before) / elapsed


def _read_experts(engine: Engine, num_experts: int) -> None:
    engine.tiers.flush()
    for layer in range(engine.spec.num_moe_layers):
        share = min(engine.spec.num_experts, num_experts)
        for _ in engine.tiers.demand(layer, list(range(share))):
            pass
        num_experts -= share
    engine.tiers.flush()
