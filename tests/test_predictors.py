"""A setting makes the predictor it names, of what there is, and says what is missing."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest
from safetensors.torch import load_file, save_file

from fakes import write_random_estimator, write_random_vectors
from foreload import Engine
from foreload.config import EngineConfig
from foreload.errors import CheckpointError, ConfigError
from foreload.model.hf import load_model
from foreload.predict.calibration import calibration_path
from foreload.predict.choice import MeasuredChoice
from foreload.predict.estimator import LayerNetwork, estimator_path
from foreload.predictors import (
    corrected_routers,
    early_routers,
    make_predictor,
    make_tensor_predictor,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Open = Callable[..., Engine]

PROMPT = list(range(40, 52))


def test_default_vectors_need_a_calibration(open_engine: Open, tmp_path: Path) -> None:
    threads = threading.active_count()
    with pytest.raises(ConfigError, match="calibration") as caught:
        open_engine(predictor="default-vectors")
    assert "foreload calibrate" in str(caught.value.hint)
    assert threading.active_count() == threads, "a failed start leaves threads behind"
    engine = open_engine(predictor="default-vectors", cache_dir=tmp_path)
    assert engine.runtime.predictor.name == "default-vectors"


def test_auto_measures_the_predictors_it_has(
    open_engine: Open, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    assert open_engine().runtime.predictor.name == "lookahead"
    write_random_vectors(tmp_path, load_model(tiny_checkpoint).spec)
    engine = open_engine(cache_dir=tmp_path)
    assert isinstance(engine.runtime.predictor, MeasuredChoice)
    assert open_engine(predictor="none").runtime.predictor is None


def test_a_damaged_calibration_is_reported(
    open_engine: Open, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    engine = open_engine(predictor="default-vectors", cache_dir=tmp_path)
    (file,) = tmp_path.rglob("*.safetensors")
    file.write_bytes(b"damage")
    threads = threading.active_count()
    with pytest.raises(CheckpointError, match="calibration"):
        Engine.from_pretrained(tiny_checkpoint, predictor="default-vectors", cache_dir=tmp_path)
    assert threading.active_count() == threads
    assert engine.generate(PROMPT, max_new_tokens=2).finish_reason == "length"


@pytest.mark.parametrize("damage", [b"damage", b"", "identity", "choices"], ids=str)
def test_auto_does_without_what_is_damaged_and_says_so(
    tiny_checkpoint: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    damage: bytes | str,
) -> None:
    loaded = load_model(tiny_checkpoint)
    spec = loaded.spec
    write_random_vectors(tmp_path, spec)
    write_random_estimator(tmp_path, spec)
    path = estimator_path(tmp_path, spec.identity)
    if isinstance(damage, bytes):
        path.write_bytes(damage)
    else:
        metadata = {"identity": spec.identity, "choices": "[]", damage: "5"}
        save_file(load_file(path), path, metadata=metadata)

    def auto() -> list[str | None]:
        settings = EngineConfig(predictor="auto")
        host = make_predictor(settings, loaded, tmp_path)
        device = make_tensor_predictor(settings, loaded, tmp_path)
        names = [each.name for each in getattr(host, "_candidates", [host])]
        return [*names, None if device is None else device.name]

    assert auto() == ["lookahead", "default-vectors", "default-vectors"]
    assert caplog.text.count(str(path)) == 2
    assert "train-estimator" in caplog.text
    calibration_path(tmp_path, spec.identity).write_bytes(b"damage")
    assert auto() == ["lookahead", "lookahead"]
    for name in ("estimator", "default-vectors"):
        for make in (make_predictor, make_tensor_predictor):
            with pytest.raises(CheckpointError, match=name.partition("-")[0] + "|calibration"):
                make(EngineConfig(predictor=name), loaded, tmp_path)


def test_guesses_that_stay_on_the_device_come_of_what_there_is(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    loaded = load_model(tiny_checkpoint)

    def name(wanted: str) -> str | None:
        made = make_tensor_predictor(EngineConfig(predictor=wanted), loaded, tmp_path)
        return None if made is None else made.name

    assert name("none") is None
    assert name("auto") == "lookahead"
    with pytest.raises(ConfigError, match="calibration"):
        name("default-vectors")
    write_random_vectors(tmp_path, loaded.spec)
    assert [name(wanted) for wanted in ("lookahead", "auto", "default-vectors")] == [
        "lookahead",
        "default-vectors",
        "default-vectors",
    ]
    with pytest.raises(ConfigError, match="an estimator"):
        name("estimator")
    write_random_estimator(tmp_path, loaded.spec)
    assert [name(wanted) for wanted in ("default-vectors", "auto", "estimator")] == [
        "default-vectors",
        "estimator",
        "estimator",
    ]


def test_layers_without_a_network_have_no_corrected_router(tiny_checkpoint: Path) -> None:
    loaded = load_model(tiny_checkpoint)
    assert len(early_routers(loaded)) == loaded.spec.num_moe_layers
    spec = loaded.spec
    network = LayerNetwork(spec.hidden_size, spec.num_experts, 4)
    routers = corrected_routers(loaded, {1: network})
    assert [router is None for router in routers] == [
        layer != 1 for layer in range(loaded.spec.num_moe_layers)
    ]
