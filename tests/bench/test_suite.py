"""The suite runs every arm interleaved, and writes all it has measured."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from fakes import write_random_vectors
from foreload.bench import suite
from foreload.bench.suite import ENGINE_ARMS, ENGINE_SUITE, SuiteOptions, run_suite
from foreload.errors import CapacityError, ConfigError
from foreload.model.hf import load_model
from foreload.resolution import default_cache_dir

if TYPE_CHECKING:
    from pathlib import Path

ALL = [arm.name for arm in ENGINE_ARMS]
STOCK = [f"transformers {name}" for name in ("eager", "grouped_mm", "batched_mm")]
PNG = b"\x89PNG\r\n"


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home of its own: no calibration but what a test writes."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def options(tiny_checkpoint: Path, tmp_path: Path) -> Any:
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat, then the rat ate the hat. " * 20)

    def make(**values: Any) -> SuiteOptions:
        given = {"num_trials": 1, "contexts": (8,), "num_decode_tokens": 3, "budgets": (0.25,)}
        return SuiteOptions(**{"model": str(tiny_checkpoint), "text": text, **given, **values})

    return make


def start(options: SuiteOptions) -> Any:
    return suite._SuiteRun(ENGINE_SUITE, options, None)


def test_all_arms_run_and_everything_is_written(
    options: Any, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    write_random_vectors(default_cache_dir(), load_model(tiny_checkpoint).spec)
    told: list[tuple[str, int, int]] = []
    output = tmp_path / "results" / "today"
    result = run_suite(options(num_trials=2, output=output), lambda *heard: told.append(heard))

    assert [done for _, done, _ in told] == list(range(16))
    assert {total for _, _, total in told} == {16}
    arms = [sample.arm for sample in result.samples]
    assert arms[:11] == [*STOCK, "all-resident", *ALL]
    assert arms[11:] == [*STOCK, "all-resident", *ALL[1:], ALL[0]], "trials begin with another arm"
    assert all(sample.is_equal for sample in result.samples)
    assert [limit.trial for limit in result.limits] == [0, 1]
    for limit in result.limits:
        assert limit.num_slots == 16
        assert limit.hit_rates["none"] == 0
        assert min(limit.misses_per_token.values()) == limit.misses_per_token["belady"]
        assert limit.misses_per_token["none"] == pytest.approx(16)

    assert json.loads((output / "machine.json").read_text()) == result.machine
    config = json.loads((output / "config.json").read_text())
    assert config["text"] == str(tmp_path / "text.txt")
    assert config["num_trials"] == 2
    assert config["suite"] == "engine"
    assert (config["arms"], config["budgets"], config["contexts"]) == (ALL, [0.25], [8])
    lines = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    assert [line["arm"] for line in lines[:22]] == arms
    assert all(len(line["step_s"]) == 3 for line in lines[:22])
    assert [line["limits"]["num_slots"] for line in lines[22:]] == [16, 16]
    assert (output / "summary.md").read_text() == result.summary
    for name in [*STOCK, "all-resident", *ALL]:
        assert f"| {name} | " in result.summary
    assert "logits differ" not in result.summary
    assert "Random weights" not in result.summary
    figures = {"tpot-25.png", *(f"timeline-{name}-25.png" for name in ALL)}
    assert {path.name for path in output.glob("*.png")} == figures
    assert all(path.read_bytes().startswith(PNG) for path in output.glob("*.png"))


def test_trials_decode_different_windows_that_the_seed_decides(options: Any) -> None:
    def windows(seed: int) -> list[Any]:
        return start(options(num_trials=2, with_stock=False, seed=seed)).workloads

    first, second = windows(1)
    assert first != second
    assert windows(1) == [first, second]
    assert windows(2) != [first, second]


def test_without_stock_the_resident_arm_is_the_reference(options: Any, tmp_path: Path) -> None:
    result = run_suite(options(with_stock=False, arms=("lru",), budgets=(0.25, 0.5)))
    assert [(s.arm, s.budget) for s in result.samples] == [
        ("all-resident", 1.0),
        ("lru", 0.25),
        ("lru", 0.5),
    ]
    assert all(sample.is_equal for sample in result.samples)
    assert "those of the all-resident arm" in result.summary
    assert not list(tmp_path.rglob("*.png")), "no output, no files"


def test_an_arm_whose_logits_differ_is_kept_and_gets_no_time(
    options: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run_arm = suite.run_engine_arm

    def disturbed(loaded: Any, arm: Any, workload: Any, **settings: Any) -> Any:
        if arm.name == "history":
            settings["reference"] = settings["reference"] + 1e-6
        return run_arm(loaded, arm, workload, **settings)

    monkeypatch.setattr(suite, "run_engine_arm", disturbed)
    output = tmp_path / "out"
    result = run_suite(options(with_stock=False, arms=("lru", "history"), output=output))
    assert [s.is_equal for s in result.samples] == [True, True, False]
    assert "| history | logits differ |" in result.summary
    assert "| lru | logits differ |" not in result.summary
    assert {path.name for path in output.glob("*.png")} == {"tpot-25.png", "timeline-lru-25.png"}


def test_random_weights_are_labelled_in_the_summary(options: Any, checkpoint_copy: Path) -> None:
    config = json.loads((checkpoint_copy / "config.json").read_text())
    config["foreload_random_weights"] = True
    (checkpoint_copy / "config.json").write_text(json.dumps(config))
    result = run_suite(options(model=str(checkpoint_copy), with_stock=False, arms=("lru",)))
    assert "Random weights: times only, routing means nothing." in result.summary


def test_an_unknown_arm_is_refused_before_anything_is_loaded(options: Any) -> None:
    with pytest.raises(ConfigError, match="unknown arm 'teleport'"):
        run_suite(options(model="/nowhere", arms=("lru", "teleport")))


def test_default_vectors_by_name_need_a_calibration(options: Any) -> None:
    with pytest.raises(ConfigError, match="default-vectors needs a calibration"):
        run_suite(options(arms=("default-vectors",)))


def test_default_vectors_are_left_out_where_nobody_asked(options: Any) -> None:
    made = start(options(with_stock=False))
    assert [arm.name for arm in made.arms] == [n for n in ALL if n != "default-vectors"]
    result = run_suite(options(with_stock=False))
    assert result.left_out == {"default-vectors": "a calibration (`foreload calibrate`)"}
    assert "Left out: default-vectors, which needs a calibration" in result.summary


def test_too_short_a_text_is_refused(options: Any, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the cat")
    with pytest.raises(ConfigError, match="windows of 11 are wanted"):
        run_suite(options(with_stock=False))


def test_a_text_that_cannot_be_read_is_named(options: Any, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ConfigError, match=r"cannot read the text .*text\.txt"):
        run_suite(options(with_stock=False))


def test_what_was_measured_outlives_an_interruption(
    options: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "new" / "out"
    run_arm = suite.run_engine_arm
    ran: list[str] = []

    def interrupted(loaded: Any, arm: Any, *given: Any, **settings: Any) -> Any:
        ran.append(arm.name)
        if len(ran) == 3:
            raise KeyboardInterrupt
        return run_arm(loaded, arm, *given, **settings)

    monkeypatch.setattr(suite, "run_engine_arm", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_suite(options(with_stock=False, arms=("lru", "history"), output=output))
    lines = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    assert [line["arm"] for line in lines if "arm" in line] == ["all-resident", "lru"]
    assert json.loads((output / "config.json").read_text())["arms"] == ["lru", "history"]
    assert (output / "machine.json").is_file()


def test_what_cannot_be_is_refused_before_anything_runs(
    options: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite, "run_engine_arm", lambda *given, **settings: pytest.fail("it ran"))
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ConfigError, match="cannot write to"):
        run_suite(options(with_stock=False, output=tmp_path / "file" / "out"))
    with pytest.raises(CapacityError, match="expert_memory"):
        run_suite(options(with_stock=False, budgets=(0.5, 0.0001)))


def test_contexts_share_the_tokens_that_are_decoded(options: Any, tmp_path: Path) -> None:
    output = tmp_path / "out"
    chosen = options(with_stock=False, arms=("lru", "history"), contexts=(4, 12), output=output)
    result = run_suite(chosen)
    placed = [(sample.arm, sample.context) for sample in result.samples]
    short = [("all-resident", 4), ("lru", 4), ("history", 4)]
    assert placed == [*short, ("all-resident", 12), ("history", 12), ("lru", 12)]
    assert all(sample.is_equal for sample in result.samples)
    assert [limit.context for limit in result.limits] == [4, 12]
    (window,) = start(chosen).workloads
    assert window.num_prompt_tokens == 12
    figures = {"tpot-25-4.png", "tpot-25-12.png"}
    assert {path.name for path in output.glob("tpot*.png")} == figures
    timelines = {path.name for path in output.glob("timeline*.png")}
    assert timelines == {"timeline-lru-25.png", "timeline-history-25.png"}


def test_a_context_beyond_the_models_own_is_for_random_weights_only(
    options: Any, checkpoint_copy: Path
) -> None:
    config = json.loads((checkpoint_copy / "config.json").read_text())
    config["max_position_embeddings"] = 16
    path = checkpoint_copy / "config.json"
    path.write_text(json.dumps(config))
    chosen = options(model=str(checkpoint_copy), with_stock=False, arms=("lru",), contexts=(14,))
    with pytest.raises(ConfigError, match="more than the model's context of 16"):
        run_suite(chosen)
    path.write_text(json.dumps(config | {"foreload_random_weights": True}))
    assert [sample.context for sample in run_suite(chosen).samples] == [14, 14]
