"""`foreload train-estimator` and what it stands on: trained, chosen by layer, saved, resumed."""

from __future__ import annotations

import errno
import json
import shutil
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoTokenizer

from foreload import ConfigError, Engine, UnsupportedModelError
from foreload.model.sites import EarlyRouter
from foreload.predict import estimator
from foreload.predict.choice import MeasuredChoice
from foreload.predict.estimator import Estimator, estimator_path, read_estimator
from foreload.schedule.policy import Exact
from foreload.train_estimator import train_estimator

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SHAPE = (4, 8, 32)
TOKENS = [(7 * at * at + 3 * at) % 280 for at in range(400)]


@pytest.fixture
def engine(checkpoint: Path, tmp_path: Path) -> Iterator[Engine]:
    settings = {"predictor": "lookahead", "lookahead_layers": 1, "cache_dir": tmp_path}
    with Engine.from_pretrained(checkpoint, **settings) as opened:
        yield opened


def test_it_writes_what_the_predictor_reads(
    call: Callable[..., Any], checkpoint: Path, text_file: Path, tmp_path: Path
) -> None:
    cache_dir = tmp_path / "cache"
    given = ("--text", text_file, "--text", text_file, "--cache-dir", cache_dir, "--width", 8)
    result = call("train-estimator", checkpoint, *given, "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["depths"] == [2, 4]
    names = {"lookahead", "default-vectors", "estimator", "hybrid"}
    assert set(report["recall_at_n"]) == set(report["mean_recall_at_n"]) == names
    assert set(report["recall_at_n"]["hybrid"]) == set(report["on_policy_recall"])
    assert report["num_parameters"] == 3 * (8 * (2 * 32 + 1 + 8) + 8)
    for layer, choice in list(enumerate(report["choices"]))[1:]:
        assert (
            report["recall_at_n"]["hybrid"][str(layer)]
            == (report["recall_at_n"][choice][str(layer)])
        )

    generated = call(
        *("generate", checkpoint, "-p", "def", "--max-new-tokens", "2"),
        *("--predictor", "estimator", "--policy", "speculate", "--cache-dir", cache_dir),
    )
    assert generated.exit_code == 0, generated.stderr


def test_the_table_has_a_row_per_layer_and_the_cost_beside_it(
    call: Callable[..., Any], checkpoint: Path, text_file: Path
) -> None:
    words = ("train-estimator", checkpoint, "--text", text_file, "--held-out", text_file)
    result = call(*words)
    assert result.exit_code == 0, result.stderr
    num_tokens = len(AutoTokenizer.from_pretrained(checkpoint)(text_file.read_text())["input_ids"])
    assert f"on {num_tokens} held-out tokens" in result.stdout.replace("\n", " ")
    for word in ("layer", "lookahead", "default-vectors", "estimator", "hybrid", "mean"):
        assert word in result.stdout
    for word in ("held out", "parameters", "MFLOP", "best by layer", "saved to"):
        assert word in result.stderr


def test_a_shipped_text_is_the_default(
    call: Callable[..., Any], checkpoint: Path, text_file: Path, tmp_path: Path
) -> None:
    assert call("train-estimator", checkpoint).exit_code == 2
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    shutil.copy(text_file, folder / "calibration.txt")
    assert call("train-estimator", folder).exit_code == 0


def test_training_makes_better_guesses_and_leaves_the_engine_as_it_was(engine: Engine) -> None:
    before = engine.runtime.predictor
    tokens = TOKENS * 4
    report = train_estimator(engine, tokens, num_passes=20, width=32)
    assert report.mean_recall("estimator")[2] > report.mean_recall("default-vectors")[2] + 0.02
    assert report.mean_recall("hybrid")[2] >= report.mean_recall("default-vectors")[2]
    assert engine.runtime.predictor is before
    assert isinstance(engine.runtime.policy, Exact)
    assert engine.runtime.on_routing is None
    assert not list(estimator_path(engine.cache_dir, "x").parent.glob("*.training"))


def test_it_stays_below_one_percent_of_the_models_parameters(engine: Engine) -> None:
    report = train_estimator(engine, TOKENS, num_passes=1)
    per_unit = 3 * (2 * 32 + 1 + 8)
    of_model = report.num_parameters / report.parameter_share
    assert report.num_parameters < 0.01 * of_model < report.num_parameters + per_unit
    assert report.flop_per_token == 3 * 2 * (report.width * (2 * 32 + 8) + 8 * 32)


def test_the_same_seed_gives_the_same_file(engine: Engine) -> None:
    files = []
    for seed in (1, 1, 2):
        report = train_estimator(engine, TOKENS, num_passes=2, width=4, seed=seed)
        networks = read_estimator(
            estimator_path(engine.cache_dir, engine.spec.identity), report.identity, SHAPE
        ).networks
        files.append(networks[2].inner.weight)
    assert torch.equal(files[0], files[1])
    assert not torch.equal(files[0], files[2])


class TestInterruption:
    def interrupted(self, engine: Engine, at_note: int, **settings: Any) -> None:
        notes: list[str] = []

        def interrupt(text: str) -> None:
            notes.append(text)
            if len(notes) == at_note:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train_estimator(engine, TOKENS, num_passes=3, width=4, note=interrupt, **settings)
        assert engine.runtime.on_routing is None
        assert isinstance(engine.runtime.policy, Exact)

    # A buffer for one window: two parts of the text, and the on-policy one after them.
    @pytest.mark.parametrize("at_note", [1, 2, 3])
    def test_going_on_ends_like_going_through(self, engine: Engine, at_note: int) -> None:
        path = estimator_path(engine.cache_dir, engine.spec.identity)
        train_estimator(engine, TOKENS, num_passes=3, width=4)
        wanted = read_estimator(path, engine.spec.identity, SHAPE)
        path.unlink()
        self.interrupted(engine, at_note)
        assert not path.exists(), "nothing is there before it is complete"
        notes: list[str] = []
        train_estimator(engine, TOKENS, num_passes=3, width=4, note=notes.append)
        assert "going on" in notes[0]
        assert len(notes) == 1 + 4 - at_note
        found = read_estimator(path, engine.spec.identity, SHAPE)
        for layer, network in wanted.networks.items():
            for name, value in network.state_dict().items():
                assert torch.equal(found.networks[layer].state_dict()[name], value)

    def test_other_settings_are_refused_by_name(self, engine: Engine) -> None:
        self.interrupted(engine, 1)
        with pytest.raises(ConfigError, match="other num_passes, tokens") as caught:
            train_estimator(engine, TOKENS[:300], num_passes=2, width=4)
        assert ".training" in str(caught.value.hint)

    def test_an_earlier_estimator_stays(self, engine: Engine) -> None:
        train_estimator(engine, TOKENS, num_passes=1, width=4)
        path = estimator_path(engine.cache_dir, engine.spec.identity)
        before = path.read_bytes()
        self.interrupted(engine, 2)
        assert path.read_bytes() == before


def test_a_buffer_smaller_than_the_text_is_refilled(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foreload.feature_collection._WINDOW_TOKENS", 64)
    stages: list[tuple[str, int]] = []
    notes: list[str] = []
    train_estimator(
        engine,
        TOKENS,
        num_passes=1,
        width=4,
        buffer_bytes=128 * 3 * (2 * 32 * 4 + 4 * 8 + 8 * 2),
        progress=lambda stage, done, total: stages.append((stage, total)),
        note=notes.append,
    )
    assert {total for stage, total in stages if stage == "Collecting"} == {128, 104}
    assert {total for stage, total in stages if stage == "Collecting on-policy"} == {64}
    assert len(notes) == 4


def test_a_full_disk_is_one_clear_line(
    call: Callable[..., Any], checkpoint: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_up(tensors: Any, part: Path, **settings: Any) -> None:
        part.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(estimator, "save_file", fill_up)
    result = call("train-estimator", checkpoint, "--text", text_file)
    assert result.exit_code == 1
    assert "No space left on device" in result.stderr
    assert "hint: " in result.stderr


def test_it_refuses_what_cannot_work(
    checkpoint: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="at least 64 tokens"):
        train_estimator(engine, list(range(40)))
    for name in ("num_passes", "width", "buffer_bytes", "max_tokens"):
        with pytest.raises(ConfigError, match=f"{name}=0 must be a whole number"):
            train_estimator(engine, TOKENS, **{name: 0})
    for seed in (-1, 10**30):
        with pytest.raises(ConfigError, match=r"seed=.* must be a whole number from 0"):
            train_estimator(engine, TOKENS, seed=seed)
    with pytest.raises(ConfigError, match="held_out needs at least 32 tokens, and its text has 9"):
        train_estimator(engine, TOKENS, held_out=TOKENS[:9])
    for texts in (([9999] * 99, None), (TOKENS, [9999] * 99)):
        with pytest.raises(ConfigError, match="token 9999 of the text is outside"):
            train_estimator(engine, texts[0], held_out=texts[1])
    assert engine.metrics.num_steps == 0
    with (
        Engine.from_pretrained(checkpoint, predictor="none") as blind,
        pytest.raises(ConfigError, match="residual stream"),
    ):
        train_estimator(blind, TOKENS)
    monkeypatch.setattr(EarlyRouter, "route", lambda self, hidden: None)
    with pytest.raises(UnsupportedModelError, match=r"Qwen3MoeForCausalLM: .* gives no logits"):
        train_estimator(engine, TOKENS)
    monkeypatch.undo()
    site = engine.early_routers()[2].site
    site.is_predictable = False
    with pytest.raises(UnsupportedModelError, match=r"MoE layer 2 cannot be asked"):
        train_estimator(engine, TOKENS)


class TestPredictorSetting:
    def test_an_estimator_has_to_be_there(self, checkpoint: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="an estimator") as caught:
            Engine.from_pretrained(checkpoint, predictor="estimator", cache_dir=tmp_path)
        assert "train-estimator" in str(caught.value.hint)

    def test_it_is_used_by_name_and_measured_by_auto(
        self, checkpoint: Path, engine: Engine, tmp_path: Path
    ) -> None:
        train_estimator(engine, TOKENS, num_passes=1, width=4)
        with Engine.from_pretrained(
            checkpoint, predictor="estimator", cache_dir=tmp_path
        ) as opened:
            assert isinstance(opened.runtime.predictor, Estimator)
            exact = opened.generate([5, 6, 7], max_new_tokens=4).token_ids
        with Engine.from_pretrained(checkpoint, cache_dir=tmp_path) as opened:
            assert isinstance(opened.runtime.predictor, MeasuredChoice)
            assert opened.generate([5, 6, 7], max_new_tokens=4).token_ids == exact
        with Engine.from_pretrained(
            checkpoint, predictor="default-vectors", cache_dir=tmp_path
        ) as opened:
            assert opened.config.predictor == "default-vectors"


def test_it_trains_on_the_cpu_only() -> None:
    runtime = SimpleNamespace(predictor=object())
    engine: Any = SimpleNamespace(
        runtime=runtime, model=SimpleNamespace(device=torch.device("cuda", 0))
    )
    with pytest.raises(ConfigError, match="the model is on cuda:0"):
        train_estimator(engine, "text")
