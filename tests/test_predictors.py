"""A setting makes the predictor it names, of what there is, and says what is missing."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

from fakes import write_random_estimator, write_random_vectors
from foreload.config import EngineConfig
from foreload.errors import CheckpointError, ConfigError
from foreload.model.hf import load_model
from foreload.predict.choice import MeasuredChoice
from foreload.predict.estimator import LayerNetwork
from foreload.predictors import corrected_routers, early_routers, make_tensor_predictor

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from foreload import Engine

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


def test_a_damaged_calibration_is_reported(open_engine: Open, tmp_path: Path) -> None:
    engine = open_engine(predictor="default-vectors", cache_dir=tmp_path)
    (file,) = tmp_path.rglob("*.safetensors")
    file.write_bytes(b"damage")
    threads = threading.active_count()
    with pytest.raises(CheckpointError, match="calibration"):
        open_engine(cache_dir=tmp_path)
    assert threading.active_count() == threads
    assert engine.generate(PROMPT, max_new_tokens=2).finish_reason == "length"


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
