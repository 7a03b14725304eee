"""What foreload cannot run is refused by name, with a reason and a way out."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

import zoo
from foreload.errors import CheckpointError, UnsupportedModelError
from foreload.memory.checkpoint import CheckpointIndex
from foreload.model.architecture import (
    Architecture,
    build_meta_model,
    find_sites,
    quiet_transformers,
    read_architecture,
)

if TYPE_CHECKING:
    from pathlib import Path


def write(folder: Path, stored: torch.dtype = torch.bfloat16, /, **config: Any) -> CheckpointIndex:
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"weight": torch.zeros(4, dtype=stored)}, folder / "model.safetensors")
    return CheckpointIndex.open(folder)


def qwen(**changes: Any) -> dict[str, Any]:
    return {"model_type": "qwen3_moe", **zoo.SEVEN_FAMILIES["qwen3_moe"], **changes}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llama4"}, "llama4 is not supported: .*all tokens"),
        ({"model_type": "dbrx"}, "dbrx is not supported"),
        ({"model_type": "jetmoe"}, "jetmoe is not supported"),
        ({"model_type": "longcat_flash"}, "longcat_flash is not supported"),
        ({"model_type": "step3p7"}, "step3p7 is not supported"),
        ({"model_type": "switch_transformers"}, "encoder-decoder"),
        ({"model_type": "nllb-moe"}, "encoder-decoder"),
        ({"model_type": "ernie4_5_vl_moe"}, "text and vision experts"),
        ({"model_type": "diffusion_gemma"}, "diffusion"),
        ({"model_type": "made_up"}, "does not know the model type 'made_up'"),
        ({"model_type": "made_up", "auto_map": {"AutoConfig": "x.Y"}}, "own code"),
        ({"model_type": "vit", "architectures": ["ViTModel"]}, "not a model that writes text"),
        (qwen(quantization_config={"quant_method": "gptq", "bits": 4}), "quantised by gptq"),
        (qwen(quantization_config={"quant_method": "awq"}), "quantised by awq"),
        (qwen(quantization_config={"load_in_4bit": True}), "quantised by unnamed"),
        (qwen(quantization_config={"quant_method": "compressed-tensors"}), "compressed-tensors"),
        (qwen(quantization_config={"quant_method": "fp8"}), "fp8 without blocks"),
    ],
)
def test_refusals_name_what_and_what_would_work(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    index = write(tmp_path, **config)
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        read_architecture(index)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "no model_type"),
        ({"model_type": 3}, "no model_type"),
        (qwen(quantization_config="fp8"), "quantization_config is not an object"),
        (qwen(num_experts="many"), "config.json"),
        (qwen(hidden_size=-1), "config.json"),
    ],
)
def test_a_damaged_configuration_is_a_checkpoint_error(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    index = write(tmp_path, **config)
    with pytest.raises(CheckpointError, match=message):
        build_meta_model(read_architecture(index))


def test_code_of_a_known_architecture_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('this code was run')")
    maps = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    architecture = read_architecture(write(tmp_path, **qwen(auto_map=maps)))
    assert architecture.model_class.__module__.startswith("transformers.")


@pytest.mark.parametrize(
    ("asked", "declared", "stored", "expected"),
    [
        ("auto", "bfloat16", torch.float32, torch.bfloat16),
        ("auto", None, torch.float16, torch.float16),
        ("float32", "bfloat16", torch.bfloat16, torch.float32),
        (torch.float64, "bfloat16", torch.bfloat16, torch.float64),
    ],
)
def test_the_element_type_is_asked_declared_or_stored(
    tmp_path: Path, asked: Any, declared: str | None, stored: torch.dtype, expected: torch.dtype
) -> None:
    config = qwen(dtype=declared) if declared else qwen()
    assert read_architecture(write(tmp_path, stored, **config), dtype=asked).dtype is expected


@pytest.mark.parametrize("name", ["int8", "bfloat", "Tensor"])
def test_an_element_type_that_is_none_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UnsupportedModelError, match=name):
        read_architecture(write(tmp_path, **qwen()), dtype=name)


def architecture_of(tmp_path: Path, arch: str) -> Architecture:
    return read_architecture(CheckpointIndex.open(zoo.save_tiny(arch, tmp_path).path))


@pytest.mark.parametrize(
    ("arch", "expected"),
    [
        ("mixtral", "MixtralForCausalLM"),
        ("qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration"),
        ("gemma4", "Gemma4ForCausalLM"),
        ("nemotron_h", "NemotronHForCausalLM"),
    ],
)
def test_the_class_that_writes_text_is_chosen(tmp_path: Path, arch: str, expected: str) -> None:
    architecture = architecture_of(tmp_path, arch)
    assert architecture.model_class.__name__ == expected
    assert find_sites(build_meta_model(architecture), architecture)


def test_more_experts_per_token_than_there_are_is_a_damaged_configuration(tmp_path: Path) -> None:
    architecture = read_architecture(write(tmp_path, **qwen(num_experts_per_tok=99)))
    with pytest.raises(CheckpointError, match=r"config.json gives each token 99 experts of 16"):
        find_sites(build_meta_model(architecture), architecture)


def test_the_meta_model_takes_no_memory(tmp_path: Path) -> None:
    architecture = read_architecture(write(tmp_path, **qwen(num_experts=4096, hidden_size=8192)))
    model = build_meta_model(architecture)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {architecture.dtype}


def test_a_quantised_configuration_is_freed_of_its_quantisation(tmp_path: Path) -> None:
    settings = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    architecture = read_architecture(write(tmp_path, **qwen(quantization_config=settings)))
    assert architecture.quantization == "fp8"
    assert architecture.quantizer.quantization_config.dequantize
    assert not hasattr(architecture.config, "quantization_config")


def test_a_dense_model_has_no_sites(tmp_path: Path) -> None:
    config = {"model_type": "qwen3", **zoo.SEVEN_FAMILIES["qwen3_moe"]}
    del config["num_experts"]
    architecture = read_architecture(write(tmp_path, **config))
    with pytest.raises(UnsupportedModelError, match="has no experts"):
        find_sites(build_meta_model(architecture), architecture)


def test_experts_that_cannot_be_exchanged_are_not_called_missing(tmp_path: Path) -> None:
    config = {"model_type": "qwen3", **zoo.SEVEN_FAMILIES["qwen3_moe"]}
    architecture = read_architecture(write(tmp_path, **config))
    with pytest.raises(UnsupportedModelError, match="does not let them be exchanged"):
        find_sites(build_meta_model(architecture), architecture)


def test_quiet_restores_verbosity_after_an_error() -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with pytest.raises(ZeroDivisionError), quiet_transformers():
        raise ZeroDivisionError
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
