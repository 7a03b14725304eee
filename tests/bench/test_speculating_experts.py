"""The suite runs the paper's arms and ours side by side, with the quality of the lossy ones."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from fakes import write_random_vectors
from foreload.bench.speculating_experts import SPECULATING_EXPERTS, SPECULATION_ARMS
from foreload.bench.suite import SuiteOptions, SuiteResult, run_suite
from foreload.config import EngineConfig
from foreload.errors import ConfigError
from foreload.model.hf import load_model
from foreload.predict.estimator import LayerNetwork, TrainedEstimator, estimator_path
from foreload.resolution import default_cache_dir

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from foreload.bench.arm import Sample

    Run = Callable[..., SuiteResult]

NUM_DECODE_TOKENS = 5
ESTIMATED = ["speculate-estimator", "speculate-hybrid"]
LOSSY = [arm.name for arm in SPECULATION_ARMS if arm.is_lossy]


@pytest.fixture
def run(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the suite on the tiny checkpoint, in a home with a calibration that means nothing."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    write_random_vectors(default_cache_dir(), load_model(tiny_checkpoint).spec)
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat, then the rat ate the hat. " * 20)

    def run_one(**values: Any) -> SuiteResult:
        given = {"model": str(tiny_checkpoint), "text": text, "num_trials": 1, "contexts": (8,)}
        given |= {"num_decode_tokens": NUM_DECODE_TOKENS, "with_stock": False}
        return run_suite(SuiteOptions(**{**given, **values}), suite=SPECULATING_EXPERTS)

    return run_one


def by_arm(result: SuiteResult) -> dict[str, Sample]:
    return {sample.arm: sample for sample in result.samples}


def test_all_arms_run_at_every_context_and_everything_is_written(run: Run, tmp_path: Path) -> None:
    output = tmp_path / "results"
    result = run(contexts=(4, 12), with_stock=True, output=output)

    assert list(result.left_out) == ESTIMATED
    names = [arm.name for arm in SPECULATION_ARMS if arm.name not in ESTIMATED]
    expected = {(name, context) for name in names for context in (4, 12)}
    ran = {(sample.arm, sample.context) for sample in result.samples if not sample.is_resident}
    assert ran == expected
    stock = [sample.arm for sample in result.samples if sample.arm.startswith("transformers")]
    assert stock == ["transformers eager"] * 2
    assert all(sample.is_equal for sample in result.samples)

    config = json.loads((output / "config.json").read_text())
    assert config["suite"] == "speculating-experts"
    assert (output / "summary.md").read_text() == result.summary
    for name in names:
        assert f"| {name} | " in result.summary
    for name in ESTIMATED:
        assert f"Left out: {name}, which needs an estimator" in result.summary
    written = {path.name for path in output.glob("*.png")}
    figures = {"tpot-by-context-25.png", "quality-25-4.png", "quality-25-12.png", "recall.png"}
    assert written == figures | {f"timeline-{name}-25.png" for name in names}
    lines = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    judged = [line for line in lines if line.get("is_lossy")]
    assert {line["arm"] for line in judged} == set(LOSSY) - set(ESTIMATED)
    assert all(len(line["quality"]["kl"]) == NUM_DECODE_TOKENS - 1 for line in judged)


def test_executed_guesses_are_never_fetched_again(run: Run) -> None:
    samples = by_arm(run(arms=("on-demand", "speculate-default-vectors")))
    exact, lossy = samples["on-demand"], samples["speculate-default-vectors"]
    assert exact.hit_rate == 0
    assert exact.quality == {}
    assert lossy.speculated_fraction > 0, "random default vectors guess wrong"
    assert max(lossy.quality["kl"]) > 0
    missed = 1 - lossy.hit_rate - lossy.late_rate
    assert missed == pytest.approx(1 / 4), "the first of four layers demands, the others execute"
    assert lossy.prefetch_precision == 1
    assert lossy.wasted_bytes_per_token == 0
    assert sorted(lossy.recall_at_n) == [1, 2, 3], "the first MoE layer has its true router"


def test_without_a_cache_guesses_serve_one_token_only(run: Run) -> None:
    samples = by_arm(run(arms=("prefetch", "cache-prefetch")))
    bare, cached = samples["prefetch"], samples["cache-prefetch"]
    assert (bare.eviction, cached.eviction) == ("none", "history")
    assert bare.bytes_per_token > cached.bytes_per_token


def test_the_less_weight_is_waited_for_the_less_is_moved(run: Run) -> None:
    samples = by_arm(run(arms=("cache-speculate-when-98", "cache-speculate-when-70")))
    strict, loose = samples["cache-speculate-when-98"], samples["cache-speculate-when-70"]
    assert strict.speculated_fraction < loose.speculated_fraction
    assert loose.bytes_per_token < strict.bytes_per_token


def test_the_speculating_arms_are_the_papers_and_ours() -> None:
    settings = {arm.name: EngineConfig.from_dict(arm.settings or {}) for arm in SPECULATION_ARMS}
    assert {name for name, config in settings.items() if config.policy != "exact"} == set(LOSSY)
    for name, config in settings.items():
        assert (config.eviction == "none") is not name.startswith("cache")
        if config.policy == "speculate":
            assert config.lookahead_layers == 1
    confidences = [c.confidence for c in settings.values() if c.policy == "speculate-when"]
    assert confidences == sorted(confidences, reverse=True)


def write_estimator(directory: Path) -> None:
    """Write an estimator that knows nothing and was chosen for the last of four layers only."""
    spec = load_model(directory).spec
    torch.manual_seed(0)
    networks = {
        layer: LayerNetwork(spec.hidden_size, spec.num_experts, 4)
        for layer in range(1, spec.num_moe_layers)
    }
    for network in networks.values():
        nn.init.normal_(network.outer.bias, std=10)
    vectors = torch.zeros(spec.num_moe_layers, spec.num_experts, spec.hidden_size)
    choices = (*["lookahead"] * (spec.num_moe_layers - 1), "estimator")
    trained = TrainedEstimator(networks, choices, vectors)
    trained.write(estimator_path(default_cache_dir(), spec.identity), spec.identity)


def test_the_estimator_alone_speaks_for_every_layer_and_in_the_hybrid_where_chosen(
    run: Run, tiny_checkpoint: Path
) -> None:
    write_estimator(tiny_checkpoint)
    result = run(arms=("speculate-lookahead", *ESTIMATED))
    samples = by_arm(result)
    recalls = {arm: sample.recall_at_n for arm, sample in samples.items()}
    assert recalls["speculate-hybrid"][1] == recalls["speculate-lookahead"][1]
    assert recalls["speculate-estimator"][1] != recalls["speculate-lookahead"][1]
    assert recalls["speculate-hybrid"][3] != recalls["speculate-lookahead"][3]
    assert result.left_out == {}


def test_an_arm_by_name_needs_its_estimator(run: Run) -> None:
    with pytest.raises(ConfigError, match="speculate-hybrid needs an estimator"):
        run(arms=("on-demand", "speculate-hybrid"))


def test_random_weights_have_times_and_no_quality(run: Run, checkpoint_copy: Path) -> None:
    config = json.loads((checkpoint_copy / "config.json").read_text())
    config["foreload_random_weights"] = True
    (checkpoint_copy / "config.json").write_text(json.dumps(config))
    result = run(model=str(checkpoint_copy), arms=("on-demand", "speculate-lookahead"))
    assert by_arm(result)["speculate-lookahead"].quality == {}
    assert "Random weights" in result.summary
    line = next(x for x in result.summary.splitlines() if x.startswith("| speculate-lookahead |"))
    assert "random weights" in line
