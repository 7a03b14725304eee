"""A checkpoint is described from its headers, supported or not."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

import zoo
from foreload.errors import CheckpointError
from foreload.model.describe import describe
from foreload.model.hf import load_model

if TYPE_CHECKING:
    from pathlib import Path


def test_a_report_of_a_plain_checkpoint(tmp_path: Path) -> None:
    zoo.save_family("qwen3_moe", tmp_path, torch.bfloat16)
    report = describe(tmp_path)
    spec = load_model(tmp_path).spec
    assert report.supported
    assert not report.reason
    assert report.architecture == spec.architecture == "Qwen3MoeForCausalLM"
    assert report.dense_bytes == spec.dense_bytes
    assert report.expert_bytes == report.stored_expert_bytes == spec.expert_bytes == 18432
    assert report.total_expert_bytes == report.stored_experts_bytes == 48 * 18432
    assert report.token_bytes == 3 * 4 * 18432
    assert (report.num_layers, report.num_moe_layers) == (4, 3)
    assert (report.num_experts, report.top_k) == (16, 4)
    assert (report.hidden_size, report.intermediate_size) == (64, 48)
    assert (report.layout, report.quantization) == ("per-expert", None)
    assert report.has_shared_experts is False
    assert report.identity == spec.identity
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()


@pytest.mark.parametrize(
    ("arch", "layout", "shared", "inner"),
    [
        ("deepseek_v3", "per-expert", True, 48),
        ("gpt_oss", "packed", False, 64),
        ("olmoe", "per-expert", False, 48),
    ],
)
def test_layouts_and_shared_experts(
    tmp_path: Path, arch: str, layout: str, shared: bool, inner: int
) -> None:
    zoo.save_family(arch, tmp_path)
    report = describe(tmp_path)
    assert (report.layout, report.has_shared_experts) == (layout, shared)
    assert report.intermediate_size == inner


def test_stored_and_loaded_bytes_differ_when_quantised(tmp_path: Path) -> None:
    report = describe(zoo.save_quantised("mxfp4", "gpt_oss", tmp_path).path)
    assert report.quantization == "mxfp4"
    assert report.is_direct is False
    assert report.stored_expert_bytes is not None
    assert report.expert_bytes is not None
    assert report.stored_expert_bytes < 0.4 * report.expert_bytes
    assert report.token_bytes == 4 * 4 * report.stored_expert_bytes


def write(folder: Path, **config: Any) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"weight": torch.zeros(4)}, folder / "model.safetensors")


def test_a_refused_model_is_reported_with_the_reason(tmp_path: Path) -> None:
    write(tmp_path, model_type="dbrx", architectures=["DbrxForCausalLM"])
    report = describe(tmp_path)
    assert not report.supported
    assert "one matrix" in report.reason
    assert "transformers" in report.hint
    assert report.architecture == "DbrxForCausalLM"
    assert report.checkpoint_bytes == 16
    assert report.expert_bytes is None


def test_damage_is_raised_not_reported(tmp_path: Path) -> None:
    zoo.save_family("olmoe", tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        describe(tmp_path)
