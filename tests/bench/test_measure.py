"""An arm's trial gives the model's own logits bit for bit, and counts what the engine did."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fakes import make_engine, write_random_vectors
from foreload.bench.arm import Arm
from foreload.bench.measure import measure_bandwidth, run_engine_arm, run_stock_arm
from foreload.bench.suite import ENGINE_ARMS, RESIDENT, _load_stock
from foreload.bench.workload import Workload
from foreload.model.hf import load_model

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from foreload.bench.arm import Sample
    from foreload.bench.forced import ForcedRun
    from foreload.model.hf import LoadedModel
    from foreload.trace.record import RoutingTrace

ARMS = {arm.name: arm for arm in ENGINE_ARMS}
WORKLOAD = Workload(tuple(3 + (7 * i) % 300 for i in range(16)), 6)
DECODED = WORKLOAD.num_decode_tokens
BUDGET = 0.25


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint: Path) -> LoadedModel:
    return load_model(tiny_checkpoint)


@pytest.fixture(scope="module")
def stock(tiny_checkpoint: Path, loaded: LoadedModel) -> Any:
    return _load_stock(tiny_checkpoint, loaded)


@pytest.fixture(scope="module")
def reference(stock: Any) -> Tensor:
    """The logits of transformers' eager experts."""
    eager = Arm("transformers eager", implementation="eager")
    return run_stock_arm(stock, eager, WORKLOAD, trial=0, reference=None)[1].logits


@pytest.fixture(scope="module")
def trace(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> RoutingTrace:
    """The workload's true routing."""
    return run_engine_arm(
        loaded, RESIDENT, WORKLOAD, budget=1.0, trial=0, cache_dir=tmp_path_factory.mktemp("none")
    )[2]


@pytest.fixture
def run(loaded: LoadedModel, trace: RoutingTrace, reference: Tensor, tmp_path: Path) -> Any:
    def run_one(arm: Arm, **settings: Any) -> tuple[Sample, ForcedRun, RoutingTrace, Any]:
        given = {"budget": BUDGET, "trial": 3, "trace": trace, "reference": reference, **settings}
        workload = given.pop("workload", WORKLOAD)
        return run_engine_arm(loaded, arm, workload, cache_dir=tmp_path, **given)

    return run_one


@pytest.mark.parametrize("arm", [*ENGINE_ARMS, RESIDENT], ids=lambda arm: arm.name)
def test_every_arm_gives_the_stock_logits_bit_for_bit(
    run: Any, arm: Arm, reference: Tensor, trace: RoutingTrace, loaded: LoadedModel, tmp_path: Path
) -> None:
    write_random_vectors(tmp_path, loaded.spec)
    sample, forced, routed, timeline = run(arm)
    assert torch.equal(forced.logits, reference)
    assert sample.is_equal
    assert routed == trace
    assert (sample.arm, sample.budget, sample.trial) == (arm.name, BUDGET, 3)
    assert sample.num_slots == (64 if arm.is_resident else 16)
    assert sample.tpot_s == pytest.approx(sum(forced.step_s) / DECODED)
    assert len(sample.step_s) == DECODED
    assert timeline.spans == []
    json.dumps(sample.to_dict())


def assert_read(sample: Sample, loaded: LoadedModel, num_experts: int) -> None:
    """Check that the bytes are those of so many experts, rounded to whole blocks of the disk."""
    plan = loaded.plans[0][0]
    moved = sample.bytes_per_token * len(sample.step_s)
    rounding = 2 * 4096 * len(plan.spans)
    least = num_experts * plan.read_bytes
    assert least <= moved <= least + num_experts * rounding


def test_on_demand_moves_every_demanded_expert_and_never_hits(
    run: Any, trace: RoutingTrace, loaded: LoadedModel
) -> None:
    sample = run(ARMS["on-demand"])[0]
    demanded = sum(len(visit.experts) for step in trace.steps[1:] for visit in step)
    assert sample.hit_rate == 0.0
    assert sample.late_rate == 0.0
    assert_read(sample, loaded, demanded)
    assert sample.prefetch_bytes_per_token == 0
    assert sample.prefetch_precision is None
    assert sample.recall_at_n == {}


def test_with_all_experts_resident_nothing_moves(run: Any) -> None:
    sample = run(RESIDENT)[0]
    assert sample.is_resident
    assert sample.hit_rate == 1.0
    assert sample.bytes_per_token == 0
    assert sample.stall_s_per_token == 0


def test_bytes_are_those_of_the_misses(run: Any, trace: RoutingTrace, loaded: LoadedModel) -> None:
    sample = run(ARMS["history"], budget=0.5)[0]
    demanded = sum(len(visit.experts) for step in trace.steps[1:] for visit in step)
    misses = round((1 - sample.hit_rate) * demanded)
    assert 0 < misses < demanded
    assert_read(sample, loaded, misses)


def test_the_oracle_is_always_right(run: Any) -> None:
    sample = run(ARMS["oracle"], budget=0.5)[0]
    recalls = [recall for by_distance in sample.recall_at_n.values() for recall in by_distance]
    assert len(recalls) >= 4
    assert {r for distances in sample.recall_at_n.values() for r in distances.values()} == {1.0}
    assert sample.prefetch_bytes_per_token > 0


def test_an_oracle_without_a_trace_is_refused(run: Any) -> None:
    with pytest.raises(ValueError, match="oracle needs the workload's trace"):
        run(ARMS["oracle"], trace=None)


def test_one_different_bit_makes_the_sample_unequal(run: Any, reference: Tensor) -> None:
    wrong = reference.clone()
    wrong[-1, 7] = torch.nextafter(wrong[-1, 7], torch.tensor(torch.inf))
    assert not run(ARMS["lru"], reference=wrong)[0].is_equal


def test_a_lossy_arm_is_held_to_the_prompts_logits_and_judged_by_the_others(
    run: Any, reference: Tensor, loaded: LoadedModel, tmp_path: Path
) -> None:
    write_random_vectors(tmp_path, loaded.spec)
    settings = {"policy": "speculate", "predictor": "default-vectors", "lookahead_layers": 1}
    lossy = Arm("speculate", settings)
    sample, forced, routed, _ = run(lossy)
    assert sample.is_lossy
    assert sample.is_equal, "the prompt follows the true router"
    assert not torch.equal(forced.logits, reference)
    assert sample.speculated_fraction > 0
    assert routed.steps == []

    scored = slice(1, DECODED)
    text = torch.tensor(WORKLOAD.token_ids[WORKLOAD.num_prompt_tokens + 1 :])
    exact = torch.nn.functional.cross_entropy(reference[scored], text, reduction="none")
    ours = torch.nn.functional.cross_entropy(forced.logits[scored], text, reduction="none")
    assert sample.quality["nll_exact"] == pytest.approx(exact.tolist(), rel=1e-4)
    assert sample.quality["nll"] == pytest.approx(ours.tolist(), rel=1e-4)
    assert min(sample.quality["kl"]) >= 0
    assert set(map(len, sample.quality.values())) == {DECODED - 1}

    later, prompt = reference.clone(), reference.clone()
    later[1:] += 1
    prompt[0] += 1
    assert run(lossy, reference=later)[0].is_equal
    assert not run(lossy, reference=prompt)[0].is_equal


def test_a_prompt_of_one_token_is_exact_too(run: Any) -> None:
    settings = {"policy": "speculate-when", "confidence": 0.0, "predictor": "none"}
    workload = Workload(WORKLOAD.token_ids[:6], 1)
    exact = run(RESIDENT, workload=workload, reference=None)[1].logits
    sample, forced, _, _ = run(Arm("when", settings), workload=workload, reference=exact)
    assert sample.is_equal
    assert not torch.equal(forced.logits, exact)


def test_a_layerwise_arm_computes_the_same_in_the_same_bytes(run: Any) -> None:
    layerwise = Arm("layerwise", {"predictor": "none", "eviction": "none"}, is_layerwise=True)
    sample, _, _, timeline = run(layerwise, with_timeline=True)
    assert sample.is_equal
    assert sample.bytes_per_token == run(ARMS["on-demand"])[0].bytes_per_token
    for layer in range(4):
        lanes = [
            [span for span in timeline.spans if span.lane == lane and span.name[0] == str(layer)]
            for lane in ("disk", "compute")
        ]
        disk, compute = ([lane[i : i + 4] for i in range(0, len(lane), 4)] for lane in lanes)
        for copies, computed in zip(disk, compute, strict=True):
            assert max(span.end_s for span in copies) <= min(span.start_s for span in computed)


def test_an_exact_arm_is_not_judged(run: Any) -> None:
    sample = run(ARMS["lru"])[0]
    assert not sample.is_lossy
    assert (sample.quality, sample.speculated_fraction) == ({}, 0.0)
    assert (sample.context, sample.eviction) == (WORKLOAD.num_prompt_tokens, "lru")


def test_the_prefill_is_not_counted_even_of_one_token(run: Any, loaded: LoadedModel) -> None:
    workload = Workload(WORKLOAD.token_ids[:3], 1)
    sample, _, routed, timeline = run(
        ARMS["on-demand"], workload=workload, reference=None, with_timeline=True
    )
    visits = [visit for step in routed.steps[1:] for visit in step]
    demanded = sum(len(visit.experts) for visit in visits)
    assert len(routed.steps) == 3
    assert sum(span.lane == "compute" for span in timeline.spans) == demanded
    assert sample.hit_rate == 0.0
    assert_read(sample, loaded, demanded)


@pytest.mark.parametrize("name", ["grouped_mm", "batched_mm"])
def test_other_implementations_are_compared_with_a_tolerance(
    stock: Any, reference: Tensor, name: str
) -> None:
    arm = Arm(name, implementation=name)
    near, far = (
        run_stock_arm(stock, arm, WORKLOAD, trial=0, reference=wanted)[0]
        for wanted in (reference, reference + 0.1 * reference.std())
    )
    assert near.is_resident
    assert near.is_equal
    assert not far.is_equal


def test_a_stock_arm_names_its_implementation(stock: Any) -> None:
    with pytest.raises(ValueError, match="lru names no experts implementation"):
        run_stock_arm(stock, ARMS["lru"], WORKLOAD, trial=0, reference=None)


def test_bandwidth_is_positive_and_leaves_the_cache_empty(tiny_checkpoint: Path) -> None:
    with make_engine(tiny_checkpoint, expert_memory="25%", predictor="none") as engine:
        assert measure_bandwidth(engine, num_experts=20) > 0
        assert engine.metrics.num_misses == 2 * 20, "once to warm up"
        assert engine.tiers.cache.keys() == []
