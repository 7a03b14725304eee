"""The expert memory is a ceiling: the process stays below it plus what must be in memory anyway."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from transformers import AutoConfig

from foreload.bench.random_models import write_random_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

EXPERTS_BYTES = 1_208_000_000
SLACK_BYTES = 96_000_000
"""Beside what the imports take: activations, buffers, and what the allocator keeps."""

RUN = """
import json, psutil, sys

def peak():
    # ru_maxrss would count the memory of the process that started this one
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024

import torch
torch.set_num_threads(1)
import foreload.engine
import transformers.models.qwen3_moe.modeling_qwen3_moe
imported = psutil.Process().memory_info().rss
from foreload import Engine
with Engine.from_pretrained(sys.argv[1], expert_memory="10%", predictor="lookahead") as engine:
    result = engine.generate(list(range(5, 69)), max_new_tokens=5)
    print(json.dumps({
        "imported": imported,
        "peak": peak(),
        "dense": engine.spec.dense_bytes,
        "experts": engine.spec.total_expert_bytes,
        "budget": engine.expert_memory_bytes,
        "moved": engine.metrics.bytes_moved,
        "num_tokens": len(result.token_ids),
    }))
"""


@pytest.fixture(scope="module")
def large_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen3-MoE with 8 layers of 32 experts of 4.7 MB each."""
    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=1000,
        hidden_size=1024,
        intermediate_size=768,
        moe_intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=32,
        num_experts_per_tok=4,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return write_random_checkpoint(config, tmp_path_factory.mktemp("large") / "model")


@pytest.mark.slow
def test_a_model_ten_times_its_memory_runs_inside_its_budget(large_checkpoint: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(large_checkpoint)],
        capture_output=True,
        text=True,
        timeout=300,
        env={"OMP_NUM_THREADS": "1", "PATH": ""},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["num_tokens"] == 5
    assert found["experts"] > 0.99 * EXPERTS_BYTES
    assert found["budget"] <= 0.1 * found["experts"] * 1.02
    assert found["moved"] > 0.8 * found["experts"], "hardly any expert was read: no test"
    allowed = found["imported"] + found["dense"] + found["budget"] + SLACK_BYTES
    assert found["peak"] < allowed, found
