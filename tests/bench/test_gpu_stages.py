"""Every stage of `benchmarks/gpu` runs to its end, on a device that is not there.

Kernels are launched and give zeros: what is tested is that no stage trips over itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.autograd.profiler_util import FunctionEventAvg

import zoo
from foreload import Engine
from foreload.bench.speculating_experts import SPECULATION_ARMS
from foreload.bench.workload import Workload
from foreload.model import source
from foreload.predict import estimator
from foreload.trace import read
from foreload.trace.record import LayerVisit, RoutingTrace
from foreload.types import RoutingEvent
from pretend_cuda import pretend_cuda

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[2]
STAGES = (
    "kernels",
    "equivalence",
    "tiers",
    "sampling",
    "predictors",
    "suites",
    "baselines",
    "speculation",
    "drafts",
    "slot_plan",
    "replay",
    "profile",
)
SIZES: dict[str, Any] = {
    "shares": (50,),
    "families": (),
    "num_warm": 2,
    "num_tokens": 4,
    "num_draws": 2,
    "staged": ((80, 30),),
    "num_staged_tokens": 4,
    "share_with_draft": 250,
    "host_shares": (30,),
    "num_staged_runs": 1,
    "num_timed": 2,
    "num_trials": 1,
    "num_prompt_tokens": 3,
    "num_decode_tokens": 4,
    "num_slow_tokens": 2,
    "num_recorded_tokens": 6,
    "num_training_tokens": 100,
    "speculation_shares": (80,),
    "draft_shares": (250,),
    "plan_share": 80,
    "link_bytes": 1 << 12,
}


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tokenizer: Any
) -> Callable[..., list[dict[str, Any]]]:
    """Run stages with a small model and few tokens; give the last one's rows."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from gpu.__main__ import main

    build = tmp_path / "build"
    for name in ("demo-x8", "qwen3-30b-a3b-2"):
        zoo.save_small(build / name)
    # Random weights have no tokenizer.
    tokenizer.save_pretrained(build / "demo-x8")
    for name in ("held_out", "calibration"):
        (build / "demo-x8" / f"{name}.txt").write_text("the cat sat on the mat " * 40)
    monkeypatch.setattr(source, "resolve_model", lambda name: build / "demo-x8")
    # Calibrations and estimators.
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    # torch has no gradients on a device that is not there.
    monkeypatch.setattr(
        estimator,
        "_directions",
        lambda router, rule, shape, dtype, device: torch.zeros(shape, device=device),
    )

    def run_stages(*words: str) -> list[dict[str, Any]]:
        # What is asked for comes before the sizes of tests.
        sizes = dict(SIZES)
        if "--trials" in words:
            del sizes["num_trials"]
        if "--shares" in words:
            for name in ("shares", "speculation_shares", "draft_shares"):
                del sizes[name]
        with pytest.raises(SystemExit):
            main([*words, "--output", str(tmp_path)], build=build, **sizes)
        stage = next(word for word in reversed(words) if word in STAGES)
        # A second call writes another file.
        newest = max(tmp_path.glob(f"{stage}*.json"), key=lambda path: path.stat().st_mtime_ns)
        rows: list[dict[str, Any]] = json.loads(newest.read_text())["rows"]
        return rows

    return run_stages


def test_every_stage_has_a_test(run: Any) -> None:
    from gpu.__main__ import STAGES as FOUND

    assert tuple(FOUND) == STAGES


class Profile:
    """Stands in for torch's profiler, which takes long to begin."""

    def __init__(self, *, activities: Any) -> None:
        assert len(activities) == 2

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def export_chrome_trace(self, path: str) -> None:
        assert path.endswith(".json.gz")

    def key_averages(self) -> Profile:
        return self

    def table(self, *, sort_by: str, row_limit: int) -> str:
        assert hasattr(FunctionEventAvg(), sort_by)
        return "one row"


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_runs_to_its_end(
    run: Callable[..., list[dict[str, Any]]], stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.profiler, "profile", Profile)
    more = []
    if stage == "replay":
        told = RoutingTrace(
            2,
            4,
            [
                [
                    LayerVisit.from_routing([((step + layer) % 4, (step + layer + 1) % 4)], 4)
                    for layer in range(2)
                ]
                for step in range(4)
            ],
        )
        monkeypatch.setattr(read, "read_trace", lambda path: told)
        more = ["--trace", "told.csv", "--layers", "2"]
    if stage == "kernels":
        # The kernels' own tests take minutes in the interpreter.
        from gpu import kernels

        monkeypatch.setattr(kernels, "FILES", ("test_scores",))
        monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    with pytest.MonkeyPatch.context() as patch, pretend_cuda(patch, is_quiet=True) as machine:
        rows = run(stage, *more)
        assert machine.num_launches > 0 or stage in ("kernels", "predictors")
    assert rows
    assert [row["error"] for row in rows if "error" in row] == []
    if stage == "replay":
        assert {"none", "recall-90", "oracle", "host-lru"} < {row.get("arm") for row in rows}
    if stage == "kernels":
        assert rows[0]["passed"] > 0
        assert rows[0]["is_fine"]
    if stage == "slot_plan":
        arms = [row for row in rows if row.get("arm") in ("equal", "planned")]
        slots = [counted["num_slots"] for row in arms for counted in row["counted"]]
        assert len(slots) == 2
        assert len(set(slots)) == 1, "the plan must not be given more of them"


def test_all_arms_of_a_suite_run_at_each_context_and_some_say_why_they_cannot(
    run: Callable[..., list[dict[str, Any]]],
) -> None:
    with pytest.MonkeyPatch.context() as patch, pretend_cuda(patch, is_quiet=True):
        run("predictors")
        rows = run(
            "speculation", "--arms", "all", "--shares", "80", "--contexts", "3,5", "--trials", "2"
        )
    assert [row["error"] for row in rows if "error" in row] == []
    assert not any("left_out" in row for row in rows), "calibrated and trained is all they need"
    timed = [row for row in rows if "tpot_ms" in row]
    for arm in SPECULATION_ARMS:
        found = [row for row in timed if row["arm"] == arm.name]
        assert {row["context"] for row in found} == {3, 5}, arm.name
        assert all(row["kl"] is not None for row in found), "exact arms show what rounding makes"
        by = {counted["orchestration"] for row in found for counted in row["counted"]}
        assert by == {"host" if "eviction" in (arm.settings or {}) else "device"}, arm.name
    assert {"cut of layerwise-speculate", "cut of cache-oracle"} < {row.get("what") for row in rows}

    with pytest.MonkeyPatch.context() as patch, pretend_cuda(patch, is_quiet=True):
        rows = run("drafts", "--arms", "draft-1,int4-alone,draft-4-oracle", "--shares", "250")
    assert [row["arm"] for row in rows if "left_out" in row] == ["int4-alone", "draft-4-oracle"]
    (drafted,) = [row for row in rows if row.get("arm") == "draft-1" and "tpot_ms" in row]
    # The engine's "auto" depends on what has been calibrated.
    assert drafted["counted"][0]["predictor"] not in ("auto", None)

    with pytest.MonkeyPatch.context() as patch, pretend_cuda(patch, is_quiet=True):
        rows = run("drafts", "--arms", "draft-1", "--shares", "26")
    (drafted,) = [row for row in rows if row.get("arm") == "draft-1"]
    assert "memory" in drafted["left_out"]
    assert "error" not in drafted


def test_rounds_are_counted_behind_each_prompt(run: Callable[..., list[dict[str, Any]]]) -> None:
    with pytest.MonkeyPatch.context() as patch, pretend_cuda(patch, is_quiet=True):
        rows = run("drafts", "--arms", "draft-1", "--shares", "250", "--trials", "3")
    (drafted,) = [row for row in rows if row.get("arm") == "draft-1"]
    totals = [sum(counted["rounds_by_draft"].values()) for counted in drafted["counted"]]
    assert len(totals) == 3
    assert max(totals) <= SIZES["num_decode_tokens"]


def test_a_stage_whose_time_is_up_tells_what_it_has(
    run: Callable[..., list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpu import trials

    ran = []
    check = trials._check

    def count(*given: Any, **settings: Any) -> Any:
        ran.append(given)
        return check(*given, **settings)

    monkeypatch.setattr(trials, "_check", count)
    monkeypatch.setattr("gpu.settings.Settings.is_over", lambda self: len(ran) >= 4)
    with pytest.MonkeyPatch.context() as patch, pretend_cuda(patch, is_quiet=True):
        rows = run("suites", "--trials", "5", "--shares", "50,80")
    assert len(ran) == 4
    assert [row["share"] for row in rows if row.get("left_out")] == [50, 80]
    assert len([row for row in rows if "tpot_ms" in row]) == 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("profile", "replay"), "replay needs --trace"),
        (("suites", "--shares", "100"), "a share below 100"),
        (("suites", "--shares", "15,x"), "percent above 0"),
        (("slot_plan", "--shares", "30"), "--shares is for"),
        (("suites", "--arms", "cache"), "--arms and --contexts are for"),
        (("drafts", "--arms", "cache"), "unknown arm 'cache'"),
        (("suites", "--trials", "0"), "a number from 1 on"),
        (("drafts", "--contexts", "5,0"), "a number from 1 on"),
    ],
)
def test_what_no_stage_could_do_is_refused_before_anything_is_made(
    run: Callable[..., list[dict[str, Any]]],
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    said: str,
    tmp_path: Path,
) -> None:
    from gpu.__main__ import main

    with (
        pytest.MonkeyPatch.context() as patch,
        pretend_cuda(patch, is_quiet=True),
        pytest.raises(SystemExit) as ended,
    ):
        main([*words, "--output", str(tmp_path / "out")], **SIZES)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_contexts_beyond_the_models_own_are_refused(
    run: Callable[..., list[dict[str, Any]]],
) -> None:
    with pytest.MonkeyPatch.context() as patch, pretend_cuda(patch, is_quiet=True):
        rows = run("drafts", "--contexts", "5,100000")
    assert len(rows) == 1
    assert "more than the model's context" in rows[0]["error"]


def test_a_trace_of_another_model_is_refused(
    run: Callable[..., list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told = RoutingTrace(3, 600, [[LayerVisit.from_routing([(1, 500)], 600)] * 3] * 4)
    monkeypatch.setattr(read, "read_trace", lambda path: told)
    with pytest.MonkeyPatch.context() as patch, pretend_cuda(patch, is_quiet=True):
        rows = run("replay", "--trace", "told.csv", "--layers", "3")
    assert "up to number 500" in rows[0]["error"]
    assert not (tmp_path / "build" / "qwen3-30b-a3b-3").exists()


def test_an_oracle_guesses_what_the_text_at_hand_was_sent_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from gpu.arms import Told

    def make_trace(shift: int) -> RoutingTrace:
        visits = [
            [LayerVisit.from_routing([(step + shift, layer)], 9) for layer in range(2)]
            for step in range(3)
        ]
        return RoutingTrace(2, 9, visits)

    texts = [Workload((1, 2, 3, 4), 2), Workload((5, 6, 3, 4), 2)]
    with pretend_cuda(monkeypatch, is_quiet=True):
        told = Told([(texts[0], make_trace(2)), (texts[1], make_trace(5))], 2)
        event = RoutingEvent(0, 0, None, torch.zeros(1, 2), torch.zeros(1, 2))
        for text, shift in zip(texts, (2, 5), strict=True):
            told.start(text)
            for number in range(2):
                told.begin(number)
                guess = told.guesses.route_next(event)
                assert guess is not None
                # The prompt is the trace's first step.
                assert sorted(guess.top_k_index[0].tolist()) == [1, number + 1 + shift]


def test_guesses_that_are_told_have_the_recall_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from gpu.arms import Forcing

    demands = [[[step, step + 1] for _ in range(3)] for step in range(100)]
    with pretend_cuda(monkeypatch, is_quiet=True):
        forcing = Forcing(demands, 2, 10_000)
        some, all_right = forcing.guess(0.9), forcing.guess(1.0)
        num_right = 0
        for step, wanted in enumerate(demands):
            forcing.begin(step)
            for layer in range(2):
                event = RoutingEvent(0, layer, None, torch.zeros(1, 2), torch.zeros(1, 2))
                told = all_right.route_next(event)
                assert told is not None
                assert told.top_k_index.tolist() == [wanted[layer + 1]]
                guess = some.route_next(event)
                assert guess is not None
                found = guess.top_k_index.tolist()[0]
                num_right += sum(a == b for a, b in zip(found, wanted[layer + 1], strict=True))
        assert 0.85 < num_right / 400 < 0.95
        last = RoutingEvent(0, 2, None, torch.zeros(1, 2), torch.zeros(1, 2))
        assert some.route_next(last) is None


def test_a_trace_that_is_not_there_ends_before_a_checkpoint_is_made(
    run: Callable[..., list[dict[str, Any]]], tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch, pretend_cuda(patch, is_quiet=True):
        rows = run("replay", "--trace", str(tmp_path / "nowhere.csv"), "--layers", "3")
    assert "nowhere.csv" in rows[0]["error"]
    assert not (tmp_path / "build" / "qwen3-30b-a3b-3").exists()


def test_what_breaks_is_kept_and_told(
    run: Callable[..., list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("no such thing")

    monkeypatch.setattr(Engine, "from_pretrained", fail)
    with pytest.MonkeyPatch.context() as patch, pretend_cuda(patch, is_quiet=True):
        run("suites", "profile")
    for stage in ("suites", "profile"):
        rows = json.loads((tmp_path / f"{stage}.json").read_text())["rows"]
        assert all("no such thing" in row["error"] for row in rows)
