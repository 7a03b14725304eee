"""Plans: what fits, what is recommended and why, and where every figure is from."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from huggingface_hub import constants

from foreload import resolution
from foreload.bench import planner
from foreload.bench.planner import GivenFigures, make_run_plan, predict_arms, predict_range
from foreload.bench.probe import ExpertProbe, LayerProbe
from foreload.config import EngineConfig
from foreload.cost import DecodeWork, MachineRates, cached_s, prefetched_s, resident_s
from foreload.errors import ConfigError
from foreload.model.headers import read_headers
from foreload.trace.format import TraceWriter
from foreload.trace.record import LayerVisit, RoutingTrace, TraceInfo
from foreload.types import Prediction

if TYPE_CHECKING:
    from pathlib import Path

WORK = DecodeWork(
    num_layers=4,
    num_experts=16,
    top_k=2,
    expert_bytes=10**6,
    stored_bytes=10**6,
    expert_flop=10**6,
    dense_bytes=4 * 10**6,
    dense_flop=4 * 10**6,
)
RATES = MachineRates(disk_bytes_s=1e9, memory_bytes_s=4e9)
GIVEN = GivenFigures(disk_bytes_s=1e9, memory_bytes_s=1e10, memory_bytes=1 << 40, layer_s=1e-4)


def make_trace(num_experts: int = 16, *, predictor: str = "none") -> RoutingTrace:
    """Four layers, two experts per token of which one stays the same; guesses are right."""

    def chosen(step: int, layer: int) -> tuple[int, int]:
        return layer % num_experts, (1 + step * 3 + layer) % num_experts

    def visit(step: int, layer: int) -> LayerVisit:
        guesses = ()
        if predictor != "none" and layer < 3:
            guess = Prediction(layer + 1, 1, chosen(step, layer + 1), (2.0, 2.0), 2)
            guesses = (guess,)
        return LayerVisit.from_routing([chosen(step, layer)], num_experts, predictions=guesses)

    info = TraceInfo(model="m", top_k=2, expert_bytes=(10**6,) * 4, predictor=predictor)
    steps = [[visit(step, layer) for layer in range(4)] for step in range(24)]
    return RoutingTrace(4, num_experts, steps, info)


def write_trace(trace: RoutingTrace, path: Path) -> Path:
    info = trace.info
    assert info is not None
    sizes = {"num_layers": trace.num_layers, "num_experts": trace.num_experts}
    with TraceWriter(path, info, **sizes) as writer:
        for visits in trace.steps:
            writer.write_step(visits)
        writer.finish()
    return path


class TestPredictions:
    def test_without_a_trace_a_cache_hits_what_fits(self) -> None:
        arm = predict_range(WORK, RATES, 32)
        assert arm.arm == "cache"
        assert arm.hit_rate == arm.budget == 0.5
        assert arm.tpot_s == cached_s(WORK, RATES, 0.5)
        assert arm.best_tpot_s == prefetched_s(WORK, RATES, 0.5)
        assert arm.best_tpot_s < arm.tpot_s
        assert arm.wire_s == pytest.approx(4 * 2 * 0.5 * 1e-3)

    def test_guesses_that_cost_more_than_they_hide_are_no_best(self) -> None:
        slow = replace(RATES, prediction_s=1.0)
        arm = predict_range(WORK, slow, 32)
        assert prefetched_s(WORK, slow, 0.5) > arm.tpot_s
        assert arm.best_tpot_s == arm.tpot_s

    def test_where_all_fits_nothing_is_left_to_guess(self) -> None:
        for arm in (predict_range(WORK, RATES, 64), *predict_arms(WORK, RATES, make_trace(), 64)):
            assert arm.arm == "all-resident"
            assert arm.tpot_s == arm.best_tpot_s == resident_s(WORK, RATES)
            assert (arm.hit_rate, arm.wire_s) == (1.0, 0.0)

    def test_a_trace_gives_each_arm_its_time(self) -> None:
        arms = {
            arm.arm: arm for arm in predict_arms(WORK, RATES, make_trace(predictor="lookahead"), 24)
        }
        assert list(arms) == ["on-demand", "lru", "history", "lookahead", "oracle"]
        assert arms["on-demand"].hit_rate == 0
        assert arms["on-demand"].tpot_s == pytest.approx(cached_s(WORK, RATES, 0.0), rel=0.1)
        assert arms["lru"].hit_rate >= 0.4
        assert arms["oracle"].tpot_s <= arms["lookahead"].tpot_s < arms["history"].tpot_s
        assert arms["history"].tpot_s < arms["on-demand"].tpot_s

    def test_a_trace_without_guesses_says_nothing_of_a_predictor(self) -> None:
        names = [arm.arm for arm in predict_arms(WORK, RATES, make_trace(), 24)]
        assert names == ["on-demand", "lru", "history", "oracle"]

    def test_only_who_guesses_pays_for_guessing(self) -> None:
        trace = make_trace(predictor="lookahead")
        costly = replace(RATES, prediction_s=0.01)
        free, paid = (predict_arms(WORK, rates, trace, 24) for rates in (RATES, costly))
        dearer = [b.arm for a, b in zip(free, paid, strict=True) if b.tpot_s > a.tpot_s]
        assert dearer == ["lookahead"]
        assert paid[3].tpot_s == pytest.approx(free[3].tpot_s + 4 * 0.01, rel=0.1)

    def test_every_copy_is_paid_for(self) -> None:
        before, after = (
            predict_arms(WORK, rates, make_trace(), 24)[0]
            for rates in (RATES, replace(RATES, call_s=0.01))
        )
        assert after.tpot_s > before.tpot_s + 4 * 0.01

    def test_copies_in_the_way_of_computing_cost_time(self) -> None:
        slowed = replace(RATES, compute_share=0.5, copy_share=0.5)
        trace = make_trace(predictor="lookahead")
        before, after = (predict_arms(WORK, rates, trace, 24) for rates in (RATES, slowed))
        slower = [b.arm for a, b in zip(before, after, strict=True) if b.tpot_s > a.tpot_s]
        assert {"lookahead", "oracle"} <= set(slower)


class TestPlan:
    def test_given_figures_are_not_measured(
        self, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(planner, "probe_experts", pytest.fail)
        monkeypatch.setattr(planner, "probe_layers", pytest.fail)
        plan = make_run_plan(str(tiny_checkpoint), given=GIVEN)
        assert plan.machine.rates.disk_bytes_s == 1e9
        assert plan.machine.memory_bytes == 1 << 40
        origins = plan.machine.origins
        for name in ("disk_bytes_s", "memory_bytes_s", "memory_bytes", "layer_s"):
            assert origins[name] == "given"
        for name in ("flop_s", "compute_share", "copy_share", "prediction_s", "call_s"):
            assert origins[name] == "assumed"

    def test_the_rest_is_measured_and_says_so(
        self, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[Any] = []

        def probe_experts(headers: Any, *, folder: Path | None) -> ExpertProbe:
            asked.append(folder)
            disk = None if folder is None else 2e9
            return ExpertProbe(
                expert_s=1e-4, flop_s=1e12, disk_bytes_s=disk, compute_share=0.8, copy_share=0.9
            )

        monkeypatch.setattr(planner, "probe_experts", probe_experts)
        layers = LayerProbe(layer_s=3e-4, prediction_s=1e-4, call_s=2e-4)
        monkeypatch.setattr(planner, "probe_layers", lambda bandwidth: layers)
        plan = make_run_plan(str(tiny_checkpoint))
        assert asked == [tiny_checkpoint]
        assert set(plan.machine.origins.values()) == {"measured"}
        rates = plan.machine.rates
        assert (rates.disk_bytes_s, rates.flop_s) == (2e9, 1e12)
        assert (rates.layer_s, rates.prediction_s, rates.call_s) == (3e-4, 1e-4, 2e-4)
        assert (rates.compute_share, rates.copy_share) == (0.8, 0.9)
        assert rates.memory_bytes_s == pytest.approx(plan.work.expert_bytes / 1e-4)
        half = make_run_plan(str(tiny_checkpoint), given=GivenFigures(disk_bytes_s=5e9))
        assert asked[1] is None, "a disk that is given is not read"
        assert half.machine.rates.disk_bytes_s == 5e9
        assert half.machine.rates.compute_share == 1.0, "measured beside another disk's copies"

    def test_a_hub_models_disk_is_the_one_it_would_be_downloaded_to(
        self, hollow_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[Any] = []

        def probe_experts(headers: Any, *, folder: Path | None) -> ExpertProbe:
            asked.append(folder)
            return ExpertProbe(expert_s=1e-4, flop_s=1e12, disk_bytes_s=2e9)

        monkeypatch.setattr(planner, "probe_experts", probe_experts)
        monkeypatch.setattr(planner, "open_headers", lambda name: nullcontext(hollow_checkpoint))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "not" / "yet" / "there"))
        make_run_plan("owner/model", given=GivenFigures(layer_s=0.0))
        assert asked == [tmp_path]

    def test_every_budget_and_the_largest_that_fits_is_there(self, tiny_checkpoint: Path) -> None:
        headers = read_headers(tiny_checkpoint)
        room = headers.spec.dense_bytes + planner._MARGIN_BYTES + 20 * headers.slot_bytes
        plan = make_run_plan(
            str(tiny_checkpoint), given=replace(GIVEN, memory_bytes=room), budgets=(0.25, 1.0)
        )
        assert [arm.num_slots for arm in plan.arms] == [16, 20, 64]
        assert plan.num_fitting == 20
        assert plan.recommendation.expert_memory_bytes == 20 * headers.slot_bytes
        assert plan.recommendation.tpot_s == plan.arms[1].tpot_s

    def test_budgets_are_counted_as_the_engine_counts_them(
        self, tiny_checkpoint: Path, open_engine: Any
    ) -> None:
        opened = open_engine(tiny_checkpoint, expert_memory="30%", predictor="none")
        plan = make_run_plan(str(tiny_checkpoint), given=GIVEN, budgets=(0.3,))
        assert plan.arms[0].num_slots == opened.tiers.num_slots
        assert planner._MARGIN_BYTES == resolution._MARGIN_BYTES

    def test_a_machine_too_small_is_told_what_it_lacks(self, tiny_checkpoint: Path) -> None:
        plan = make_run_plan(str(tiny_checkpoint), given=replace(GIVEN, memory_bytes=1 << 20))
        assert plan.recommendation.limit == "capacity"
        assert plan.recommendation.tpot_s is None
        assert "1.0 MiB" in plan.recommendation.reason

    def test_what_limits_is_named(self, tiny_checkpoint: Path) -> None:
        plan = make_run_plan(str(tiny_checkpoint), given=GIVEN)
        assert plan.recommendation.limit == "compute"
        assert plan.recommendation.predictor == "none"
        headers = read_headers(tiny_checkpoint)
        room = headers.spec.dense_bytes + planner._MARGIN_BYTES + 32 * headers.slot_bytes
        slow = replace(GIVEN, memory_bytes=room, disk_bytes_s=1e6)
        plan = make_run_plan(str(tiny_checkpoint), given=slow)
        assert plan.recommendation.limit == "wire"
        assert plan.recommendation.predictor == EngineConfig().predictor

    @pytest.mark.parametrize(("guesses", "advice"), [("lookahead", "lookahead"), ("none", "auto")])
    def test_a_trace_decides_what_is_recommended(
        self, tiny_checkpoint: Path, tmp_path: Path, guesses: str, advice: str
    ) -> None:
        path = write_trace(make_trace(predictor=guesses), tmp_path / "trace.jsonl")
        headers = read_headers(tiny_checkpoint)
        room = headers.spec.dense_bytes + planner._MARGIN_BYTES + 24 * headers.slot_bytes
        given = replace(GIVEN, memory_bytes=room, disk_bytes_s=1e8)
        plan = make_run_plan(str(tiny_checkpoint), given=given, trace=path, budgets=(1.0,))
        assert plan.basis == "trace"
        assert plan.recommendation.predictor == advice
        fitting = [a for a in plan.arms if a.num_slots == 24 and a.arm not in planner._BOUNDS]
        assert plan.recommendation.tpot_s == min(arm.tpot_s for arm in fitting)
        on_demand = next(arm for arm in plan.arms if arm.arm == "on-demand")
        assert plan.on_demand_s == on_demand.tpot_s
        notes = " ".join(plan.notes)
        assert "another checkpoint" in notes
        assert ("no predictions" in notes) == (guesses == "none")

    def test_another_models_trace_is_refused(self, tiny_checkpoint: Path, tmp_path: Path) -> None:
        path = write_trace(make_trace(12), tmp_path / "trace.jsonl")
        with pytest.raises(ConfigError, match="4 MoE layers of 12 experts"):
            make_run_plan(str(tiny_checkpoint), given=GIVEN, trace=path)

    def test_a_plan_is_json(self, tiny_checkpoint: Path) -> None:
        values = make_run_plan(str(tiny_checkpoint), given=GIVEN).to_dict()
        assert json.loads(json.dumps(values, allow_nan=False)) == values
        assert values["machine"]["rates"]["flop_s"] is None
        assert math.isfinite(values["resident_s"])

    def test_progress_is_told(self, tiny_checkpoint: Path) -> None:
        told: list[tuple[str, int, int]] = []
        make_run_plan(
            str(tiny_checkpoint),
            given=GIVEN,
            budgets=(0.5, 1.0),
            progress=lambda *words: told.append(words),
        )
        assert told[0] == ("Measuring", 0, 2)
        assert told[-1] == ("Expert memories", 2, 2)
