"""Headers tell a token's work: what is read of experts and of everything else."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch

import zoo
from foreload.errors import UnsupportedModelError
from foreload.model.headers import read_headers
from foreload.model.hf import load_model
from foreload.ops.reference import expert_forward

if TYPE_CHECKING:
    from pathlib import Path


def test_work_is_what_the_loaded_model_has(tiny_checkpoint: Path) -> None:
    headers = read_headers(tiny_checkpoint)
    loaded = load_model(tiny_checkpoint)
    assert headers.spec == loaded.spec
    work = headers.work
    assert (work.num_layers, work.num_experts, work.top_k) == (4, 16, 4)
    assert work.expert_bytes == loaded.spec.expert_bytes
    assert work.stored_bytes == loaded.plans[0][0].read_bytes
    assert work.expert_flop == 2 * work.expert_bytes // 4  # float32
    embedding = loaded.model.get_input_embeddings().weight
    norm = loaded.model.model.norm.weight
    beside = (embedding.numel() + norm.numel()) * 4
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in loaded.model.buffers())
    assert work.dense_bytes == loaded.spec.dense_bytes - beside - buffers
    assert work.dense_flop == 2 * work.dense_bytes // 4


def test_an_embedding_that_is_the_output_too_is_read_whole(tmp_path: Path) -> None:
    work = []
    for tied in (False, True):
        cls = zoo.model_class("qwen3_moe")
        settings = {**zoo.SEVEN_FAMILIES["qwen3_moe"], "tie_word_embeddings": tied}
        model = zoo._build(cls, cls.config_class(**settings), torch.float32, seed=0)
        folder = tmp_path / str(tied)
        zoo._save(model, folder)
        work.append(read_headers(folder).work)
    assert work[0].dense_bytes == work[1].dense_bytes


def test_quantised_experts_travel_smaller_than_they_are_read(tmp_path: Path) -> None:
    work = read_headers(zoo.save_quantised("mxfp4", "gpt_oss", tmp_path).path).work
    assert work.stored_bytes < work.expert_bytes


def test_holes_are_enough(tiny_checkpoint: Path, hollow_checkpoint: Path) -> None:
    assert read_headers(hollow_checkpoint).work == read_headers(tiny_checkpoint).work


@pytest.mark.parametrize("arch", ["qwen3_moe", "gpt_oss"])
def test_the_experts_module_computes_with_given_weights(tmp_path: Path, arch: str) -> None:
    zoo.save_family(arch, tmp_path)
    headers = read_headers(tmp_path)
    weights = {
        tensor.name: torch.zeros(tensor.shape, dtype=getattr(torch, tensor.dtype))
        for tensor in headers.plans[0][0].tensors
    }
    dtype = next(iter(weights.values())).dtype
    rows = torch.ones(1, headers.spec.hidden_size, dtype=dtype)
    output = expert_forward(headers.experts, rows, weights)
    assert output.shape == rows.shape
    assert not output.is_meta


def test_slots_are_the_engines(tiny_checkpoint: Path) -> None:
    headers = read_headers(tiny_checkpoint)
    assert headers.num_experts == 4 * 16
    assert headers.slot_bytes % 4096 == 0
    assert headers.slot_bytes >= headers.spec.expert_bytes


def test_what_cannot_run_is_refused(checkpoint_copy: Path) -> None:
    config = json.loads((checkpoint_copy / "config.json").read_text())
    (checkpoint_copy / "config.json").write_text(json.dumps(config | {"model_type": "dbrx"}))
    with pytest.raises(UnsupportedModelError, match="dbrx"):
        read_headers(checkpoint_copy)
