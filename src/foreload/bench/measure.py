"""Runs one arm over one workload and takes its measures; every trial's logits are compared.

An exact arm whose logits differ from transformers' eager experts by a single bit has no time; of a
lossy arm that holds for the prompt, and what its other logits are worth stands beside its time.
"""

from __future__ import annotations

import functools
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from foreload.bench.arm import Arm, Sample
from foreload.bench.forced import ForcedRun, run_forced, run_rounds
from foreload.config import EngineConfig
from foreload.engine import Engine
from foreload.evaluate import compare_logits
from foreload.memory.throttle import ThrottledBackend
from foreload.model.kv_cache import make_kv_cache, pass_cache, rewind
from foreload.model.self_draft import SelfDraft
from foreload.predict.draft_routing import LookaheadBuffer
from foreload.predict.estimator import Estimator
from foreload.predict.oracle import Oracle
from foreload.resolution import least_memory, prepare_draft, resolve
from foreload.schedule.orchestrator import PrefetchRound
from foreload.trace.record import RoutingRecorder

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from foreload.bench.workload import Workload
    from foreload.memory.transfer import CopyBackend
    from foreload.metrics import Metrics, Timeline
    from foreload.model.draft_round import Verification
    from foreload.model.hf import LoadedModel
    from foreload.trace.record import RoutingTrace

    Forward = Callable[[Tensor, Any], Tensor]

__all__ = [
    "judge",
    "load_all",
    "make_link",
    "measure_bandwidth",
    "run_engine_arm",
    "run_stock_arm",
]


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
    link_bytes_s: float | None = None,
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
        link_bytes_s: Bandwidth that copies are throttled to; None takes what there is.

    Returns:
        The sample, the raw run, the routing of this run (empty for a lossy arm), and its timeline.
    """
    # A draft comes on top of all experts; what no expert needs is not taken.
    memory = "200%" if arm.is_resident else f"{budget * 100:g}%"
    # What is compared is watched, and that only the host's loop allows.
    settings = {"orchestration": "host", "expert_memory": memory, **(arm.settings or {})}
    if arm.is_draft_alone:
        settings["expert_memory"] = least_memory(loaded, settings["draft"])
    config = resolve(EngineConfig.from_dict(settings), loaded)
    if arm.is_oracle and trace is None:
        raise ValueError(f"{arm.name} needs the workload's trace")
    is_replayed = arm.is_oracle and not arm.has_draft
    oracle = Oracle(trace.demands()) if is_replayed and trace is not None else None
    draft = prepare_draft(config, loaded, cache_dir=cache_dir)
    if draft is not None and not arm.has_kernel:
        draft = draft.without_kernels()
    engine = Engine(
        loaded,
        None,
        config,
        cache_dir=cache_dir,
        predictor=oracle,
        draft=draft,
        link=make_link(link_bytes_s),
    )
    recorder = RoutingRecorder(engine.spec.num_moe_layers, engine.spec.num_experts)
    with engine:
        if arm.is_resident:
            load_all(engine)
        engine.tiers.is_layerwise = arm.is_layerwise
        predictor = engine.runtime.predictor
        if arm.is_pure and isinstance(predictor, Estimator):
            engine.runtime.predictor = predictor.make_pure()
        if not arm.is_lossy:
            engine.runtime.on_routing = recorder
        marks: list[Metrics] = []

        def forward(ids: Tensor, kv_cache: Any) -> Tensor:
            is_prompt = not marks
            engine.timeline.is_on = with_timeline and not is_prompt
            with engine.runtime.prefilling() if is_prompt else nullcontext():
                logits = engine.forward(ids, kv_cache)
            if is_prompt:
                marks.append(engine.metrics.snapshot())
                engine.timeline.is_on = with_timeline
            return logits

        # The arms run where the host decides.
        drafter = engine.drafter if isinstance(engine.drafter, SelfDraft) else None
        verifications: list[Verification] = []
        if drafter is not None:
            drafter.on_round = lambda this: verifications.append(this.verification)
            drafter.is_prefetching = arm.is_asynchronous
            if arm.is_oracle and trace is not None:
                drafter.foresight = functools.partial(_foresee, trace, workload)
        if drafter is None:
            run = run_forced(forward, workload, engine.make_cache())
        elif arm.is_draft_alone:
            run = run_forced(_alone(drafter, forward), workload, engine.make_cache())
        else:

            def prefill(ids: Tensor, kv_cache: Any) -> Tensor:
                logits = forward(ids, kv_cache)
                rewind(kv_cache, 0)
                return logits

            run = run_rounds(drafter, prefill, workload, engine.make_request_cache())
        # The first forward is the prefill, however short the prompt.
        counted = engine.metrics.since(marks[0])
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
        if drafter is not None and not arm.is_draft_alone:
            sample.acceptance_rate = counted.acceptance_rate
            sample.accept_length = counted.accept_length
            sample.draft_s_per_token = counted.draft_s / tokens
            sample.verifications = [list(seen) for seen in verifications]
            sample.rounds = dict(sorted(drafter.governor.rounds_by_draft.items()))
            sample.roofs = [point._asdict() for point in drafter.governor.roofs()]
            if reference is not None:
                sample.num_other, sample.widest_tie = _compare_choices(run.logits, reference)
        if arm.is_lossy and reference is not None:
            sample.quality = judge(run, reference, workload)
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
                input_ids=ids, use_cache=True, logits_to_keep=1, **pass_cache(model, kv_cache)
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


def make_link(link_bytes_s: float | None) -> Callable[[CopyBackend], CopyBackend] | None:
    """Give what an engine's copies go through: None as they are, or a link of so many bytes/s."""
    if link_bytes_s is None:
        return None
    return functools.partial(ThrottledBackend, link_bytes_s=link_bytes_s)


def _alone(drafter: SelfDraft, forward: Forward) -> Forward:
    """Give the forward of the draft itself, nothing of which is verified or prefetched."""
    draft = drafter.draft
    if draft is None:
        raise ValueError("the draft was let go of")
    nothing = PrefetchRound(
        drafter.tiers,
        LookaheadBuffer(drafter.num_layers),
        num_layers=drafter.num_layers,
        chances=(1.0,),
        num_workers=1,
        link_experts=0.0,
        is_prefetching=False,
    )

    def forward_draft(ids: Tensor, kv_cache: Any) -> Tensor:
        with drafter.runtime.drafting(draft.run_layer, nothing):
            return forward(ids, kv_cache)

    return forward_draft


def _foresee(trace: RoutingTrace, workload: Workload, position: int, layer: int) -> tuple[int, ...]:
    """Give where the target sent the token at a position of the text."""
    return trace.steps[1 + position - workload.num_prompt_tokens][layer].experts


def _compare_choices(logits: Tensor, reference: Tensor) -> tuple[int, float]:
    """Count steps with another likeliest token, and give the widest gap between both there."""
    own, true = logits.argmax(-1), reference.argmax(-1)
    places = (own != true).nonzero().flatten()
    if not len(places):
        return 0, 0.0
    gaps = reference[places, true[places]] - reference[places, own[places]]
    return len(places), float(gaps.max())


def _is_equal(run: ForcedRun, reference: Tensor | None, arm: Arm) -> bool:
    if reference is None or arm.is_draft_alone:
        return True
    if arm.has_draft:
        # Forwards of several tokens round differently than those of one.
        return torch.equal(run.logits[:1], reference[:1]) and _is_close(run.logits, reference)
    compared = 1 if arm.is_lossy else len(reference)
    return torch.equal(run.logits[:compared], reference[:compared])


def judge(run: ForcedRun, reference: Tensor, workload: Workload) -> dict[str, list[float]]:
    """Compare a lossy arm's logits with the exact ones, where the text says what follows.

    Returns:
        What `evaluate.TokenQuality` has, of each decoded token that another follows.
    """
    following = workload.token_ids[workload.num_prompt_tokens + 1 :]
    next_ids = torch.tensor(following, dtype=torch.int64)
    quality = compare_logits(reference[1:-1], run.logits[1:-1], next_ids)
    return {name: values.tolist() for name, values in quality._asdict().items()}


def _is_close(logits: Tensor, reference: Tensor) -> bool:
    gap = (logits.float() - reference.float()).abs().mean()
    return bool(gap <= 0.05 * reference.float().std())


def load_all(engine: Engine) -> None:
    """Bring every expert once, to whatever tiers have room for it."""
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
