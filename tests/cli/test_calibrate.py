"""`foreload calibrate` and what it stands on: saved whole or not at all, and counted right."""

from __future__ import annotations

import errno
import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from foreload import ConfigError, Engine
from foreload.calibrate import PREVIOUS_TOKEN, calibrate
from foreload.predict import calibration
from foreload.predict.calibration import calibration_path

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture
def engine(checkpoint: Path, tmp_path: Path) -> Iterator[Engine]:
    settings = {"predictor": "lookahead", "lookahead_layers": 1, "cache_dir": tmp_path}
    with Engine.from_pretrained(checkpoint, **settings) as opened:
        yield opened


def test_it_writes_what_the_predictors_read(
    call: Callable[..., Any], checkpoint: Path, text_file: Path, tmp_path: Path
) -> None:
    cache_dir = tmp_path / "cache"
    words = ("calibrate", checkpoint, "--text", text_file, "--cache-dir", cache_dir)
    result = call(*words, "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["depths"] == [2, 4]
    assert set(report["recall_at_n"]) == {"lookahead", "default-vectors", PREVIOUS_TOKEN}
    assert set(report["recall_at_n"]["lookahead"]) == {"1", "2", "3"}
    assert set(report["recall_at_n"][PREVIOUS_TOKEN]) == {"0", "1", "2", "3"}
    assert load_file(report["path"])["default_vectors"].shape == (4, 8, 32)

    generated = call(
        *("generate", checkpoint, "-p", "def", "--max-new-tokens", "2"),
        *("--predictor", "default-vectors", "--cache-dir", cache_dir),
    )
    assert generated.exit_code == 0, generated.stderr


def test_the_table_has_a_row_per_layer_and_a_mean(
    call: Callable[..., Any], checkpoint: Path, text_file: Path
) -> None:
    result = call("calibrate", checkpoint, "--text", text_file)
    assert result.exit_code == 0, result.stderr
    for word in ("layer", "lookahead", "default-vectors", PREVIOUS_TOKEN, "mean"):
        assert word in result.stdout
    assert "saved to" in result.stderr


def test_a_second_run_replaces_the_first(
    call: Callable[..., Any], checkpoint: Path, text_file: Path, tmp_path: Path
) -> None:
    words = ("calibrate", checkpoint, "--text", text_file, "--json")
    path = json.loads(call(*words).stdout)["path"]
    first = load_file(path)["default_vectors"]
    text_file.write_text(text_file.read_text()[::-1])
    assert json.loads(call(*words).stdout)["path"] == path
    assert not torch.equal(load_file(path)["default_vectors"], first)


def test_a_full_disk_leaves_the_earlier_one(
    call: Callable[..., Any],
    checkpoint: Path,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ("calibrate", checkpoint, "--text", text_file, "--json")
    path = json.loads(call(*words).stdout)["path"]
    with open(path, "rb") as stream:
        before = stream.read()

    def fill_up(tensors: Any, part: Path, **settings: Any) -> None:
        part.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(calibration, "save_file", fill_up)
    result = call(*words)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "No space left on device" in result.stderr
    assert "hint: " in result.stderr
    with open(path, "rb") as stream:
        assert stream.read() == before


def test_a_shipped_text_is_the_default(
    call: Callable[..., Any], checkpoint: Path, text_file: Path, tmp_path: Path
) -> None:
    result = call("calibrate", checkpoint)
    assert result.exit_code == 2
    assert "--text" in result.stderr
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    shutil.copy(text_file, folder / "calibration.txt")
    assert call("calibrate", folder).exit_code == 0


@pytest.mark.parametrize("stage", ["Default vectors", "Recall"])
def test_an_interruption_leaves_whole_files_and_no_hooks(
    stage: str, engine: Engine, text_file: Path, tmp_path: Path
) -> None:
    path = calibration_path(tmp_path, engine.spec.identity)
    path.parent.mkdir()
    path.write_bytes(b"earlier")

    def interrupt(now: str, done: int, total: int) -> None:
        if now == stage:
            raise KeyboardInterrupt

    engine.cache_dir = tmp_path
    with pytest.raises(KeyboardInterrupt):
        calibrate(engine, text_file.read_text(), progress=interrupt)
    assert engine.runtime.on_output is None
    assert engine.runtime.on_routing is None
    if stage == "Recall":
        assert load_file(path)["default_vectors"].shape == (4, 8, 32)
    else:
        assert path.read_bytes() == b"earlier"


def test_recall_of_the_previous_token_is_counted_right(
    engine: Engine, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foreload.calibrate._WINDOW_TOKENS", 16)
    token_ids = engine.tokenizer(text_file.read_text())["input_ids"]
    engine.cache_dir = tmp_path
    report = calibrate(engine, token_ids)
    held_out = token_ids[report.num_tokens :][: report.num_held_out_tokens]
    assert len(held_out) > 32

    right = {(layer, n): 0 for layer in range(4) for n in (2, 4)}
    demanded = 0
    for start in range(0, len(held_out), 16):
        routed = route_one_by_one(engine, held_out[start : start + 16])
        demanded += 2 * (len(routed[0]) - 1)
        for layer, rows in routed.items():
            recent = rows[0]
            for row in rows[1:]:
                for n in (2, 4):
                    right[layer, n] += len(set(row) & set(recent[:n]))
                recent = row + [expert for expert in recent if expert not in row]
    for (layer, n), count in right.items():
        assert report.recall_at_n[PREVIOUS_TOKEN][layer][n] == pytest.approx(count / demanded)
    assert report.mean_recall("lookahead")[4] >= report.mean_recall("lookahead")[2]


def route_one_by_one(engine: Engine, token_ids: list[int]) -> dict[int, list[list[int]]]:
    """Give the experts of each token, by layer."""
    routed: dict[int, list[list[int]]] = {}
    engine.runtime.on_routing = lambda event, wanted: routed.setdefault(event.layer, []).append(
        event.top_k_index[0].tolist()
    )
    cache = engine.make_cache()
    for token in token_ids:
        engine.forward(torch.tensor([[token]]), cache)
    return routed


def test_default_vectors_are_the_mean_outputs(engine: Engine, tmp_path: Path) -> None:
    token_ids = list(range(40, 90))
    engine.cache_dir = tmp_path
    report = calibrate(engine, token_ids)
    outputs: dict[int, list[torch.Tensor]] = {}

    def keep(layer: int, expert: int, output: torch.Tensor) -> None:
        if layer == 1:
            outputs.setdefault(expert, []).append(output)

    engine.runtime.on_output = keep
    engine.forward(torch.tensor([token_ids[: report.num_tokens]]), engine.make_cache())
    vectors = load_file(report.path)["default_vectors"][1]
    for expert, pieces in outputs.items():
        assert torch.allclose(vectors[expert], torch.cat(pieces).mean(0), atol=1e-5)


def test_it_refuses_what_cannot_work(checkpoint: Path, engine: Engine) -> None:
    with pytest.raises(ConfigError, match="at least 32 tokens"):
        calibrate(engine, "too short")
    for settings in ({"max_held_out_tokens": 1}, {"max_tokens": 31}, {"max_tokens": -1}):
        with pytest.raises(ConfigError, match=f"{next(iter(settings))}=.* of at least"):
            calibrate(engine, list(range(99)), **settings)
    with pytest.raises(ConfigError, match="token 9999 of the text is outside the vocabulary"):
        calibrate(engine, [9999] * 99)
    assert engine.metrics.num_steps == 0
    with (
        Engine.from_pretrained(checkpoint, predictor="none") as blind,
        pytest.raises(ConfigError, match="residual stream"),
    ):
        calibrate(blind, list(range(40)))


@pytest.mark.parametrize("verb", ["calibrate", "evaluate", "train-estimator"])
def test_watching_experts_needs_the_host(
    call: Callable[..., Any], checkpoint: Path, text_file: Path, verb: str
) -> None:
    result = call(verb, checkpoint, "--text", text_file, "--orchestration", "device")
    assert result.exit_code == 2
    assert "No such option" in result.stderr


def test_an_engine_whose_device_decides_shows_nothing(checkpoint: Path) -> None:
    opened = Engine.from_pretrained(checkpoint, device="cpu", orchestration="device")
    with opened as engine, pytest.raises(ConfigError, match="needs the host to decide"):
        calibrate(engine, list(range(40)))
