"""The spec is the same before and after loading."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import zoo
from foreload.memory.checkpoint import CheckpointIndex
from foreload.model.architecture import build_meta_model, find_sites, read_architecture
from foreload.model.hf import load_model
from foreload.model.plans import plan_checkpoint
from foreload.model.spec import make_spec

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("arch", ["qwen3_moe", "gpt_oss", "phimoe"])
def test_the_meta_model_has_the_spec_of_the_loaded_one(tmp_path: Path, arch: str) -> None:
    zoo.save_family(arch, tmp_path)
    index = CheckpointIndex.open(tmp_path)
    architecture = read_architecture(index)
    meta = build_meta_model(architecture)
    sites = find_sites(meta, architecture)
    plan = plan_checkpoint(meta, sites, index, architecture)
    assert make_spec(architecture, meta, sites, plan.experts, index) == load_model(tmp_path).spec
