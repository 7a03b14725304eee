"""The comparison with other engines: what of it can be tested without them."""

from __future__ import annotations

import importlib
import json
import mmap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

RIVALS = Path(__file__).parents[2] / "benchmarks" / "rivals"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(RIVALS))
    return importlib.import_module


def sample(arm: str, trial: int, step_s: list[float], predicted: list[int]) -> dict[str, Any]:
    phase = {"s": 1.0, "read_bytes": 2_000_000_000}
    return {
        "arm": arm,
        "trial": trial,
        "step_s": step_s,
        "predicted": predicted,
        "load": phase,
        "prefill": phase,
        "decode": phase,
        "peak_rss_bytes": 2**30,
        "anonymous_bytes": 2**29,
    }


def test_windows_do_not_overlap_and_cover_the_text_evenly(load: Any) -> None:
    windows = load("run").cut_windows(range(20), num_prompt=2, num_decode=3, num_windows=3)
    assert windows == [([0, 1], [2, 3, 4]), ([6, 7], [8, 9, 10]), ([12, 13], [14, 15, 16])]


def test_a_text_that_is_too_short_is_refused(load: Any) -> None:
    with pytest.raises(SystemExit, match="9 tokens"):
        load("run").cut_windows(range(9), num_prompt=2, num_decode=3, num_windows=2)


def test_every_arm_runs_first_in_some_trial(load: Any) -> None:
    rotate = load("run").rotate
    assert [rotate("abc", trial)[0] for trial in range(4)] == ["a", "b", "c", "a"]
    assert sorted(rotate("abc", 2)) == ["a", "b", "c"]


def test_the_table_compares_medians_with_the_reference(load: Any) -> None:
    samples = [
        sample("ours", 0, [1.0, 1.0], [5, 6, 7]),
        sample("theirs", 0, [4.0, 2.0], [5, 6, 8]),
        sample("ours", 1, [1.0, 2.0], [1, 1, 1]),
        sample("theirs", 1, [3.0, 3.0], [1, 1, 1]),
        {"arm": "absent", "trial": 0, "skipped": "not installed"},
    ]
    ours, theirs, absent = load("run").table_rows(samples, reference="ours")
    assert ours[1] == "1.250 (1.000 to 1.500)"
    assert ours[3] == "1.00"
    assert theirs[1:4] == ["3.000 (3.000 to 3.000)", "2.500 (2.000 to 3.000)", "2.40"]
    assert theirs[6] == "1.00 (1.00 to 1.00)"
    assert theirs[9] == "0.833"
    assert absent == ["absent", "not installed"]


def test_the_hog_leaves_what_it_was_told(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hog = load("hog")
    chunks: list[Any] = []
    memory = 100 * hog.CHUNK_BYTES
    monkeypatch.setattr(hog, "read_available_bytes", lambda: memory - len(chunks) * hog.CHUNK_BYTES)
    monkeypatch.setattr(hog, "make_touched_chunk", lambda: mmap.mmap(-1, 1))
    hog.balance(chunks, left_bytes=30 * hog.CHUNK_BYTES)
    assert len(chunks) == 70
    hog.balance(chunks, left_bytes=40 * hog.CHUNK_BYTES)
    assert len(chunks) == 60


def test_the_hog_dies_with_its_owner(load: Any) -> None:
    hog = load("hog")
    limiter = hog.MemoryHog(hog.read_available_bytes())
    with limiter:
        limiter.balance()
        assert limiter.is_alive
    assert not limiter.is_alive


def test_conversion_keeps_every_bit(load: Any, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    path = load("to_gguf").convert(tmp_path / "checkpoint", tmp_path / "model.gguf")
    found = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    assert len(found) == 2 + 12  # embeddings and final norm; one layer
    stacked = torch.stack(
        [checkpoint[f"model.layers.0.mlp.experts.{e}.down_proj.weight"] for e in range(3)]
    )
    down = torch.from_numpy(found["blk.0.ffn_down_exps.weight"].copy()).view(torch.bfloat16)
    assert torch.equal(down, stacked)
    norm = torch.from_numpy(found["blk.0.attn_norm.weight"].copy())
    assert torch.equal(norm, checkpoint["model.layers.0.input_layernorm.weight"].float())


def test_conversion_refuses_what_llama_cpp_would_compute_differently(load: Any) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed")
    with pytest.raises(SystemExit, match="norm_topk_prob"):
        load("to_gguf").check_config({"model_type": "qwen3_moe"})


def write_checkpoint(directory: Path) -> dict[str, torch.Tensor]:
    config = {
        "model_type": "qwen3_moe",
        "norm_topk_prob": True,
        "tie_word_embeddings": True,
        "num_hidden_layers": 1,
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "hidden_size": 8,
        "intermediate_size": 16,
        "moe_intermediate_size": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "max_position_embeddings": 32,
        "vocab_size": 6,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    shapes = {
        "input_layernorm.weight": (8,),
        "post_attention_layernorm.weight": (8,),
        "self_attn.q_proj.weight": (8, 8),
        "self_attn.k_proj.weight": (4, 8),
        "self_attn.v_proj.weight": (4, 8),
        "self_attn.o_proj.weight": (8, 8),
        "self_attn.q_norm.weight": (4,),
        "self_attn.k_norm.weight": (4,),
        "mlp.gate.weight": (3, 8),
    }
    for expert in range(3):
        shapes |= {
            f"mlp.experts.{expert}.gate_proj.weight": (4, 8),
            f"mlp.experts.{expert}.up_proj.weight": (4, 8),
            f"mlp.experts.{expert}.down_proj.weight": (8, 4),
        }
    shapes = {f"model.layers.0.{name}": shape for name, shape in shapes.items()}
    shapes |= {"model.embed_tokens.weight": (6, 8), "model.norm.weight": (8,)}
    tensors = {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}
    tokenizer = {
        "added_tokens": [{"id": 0, "content": "<|end|>", "special": True}],
        "model": {"type": "BPE", "vocab": {"a": 1, "b": 2, "ab": 3}, "merges": [["a", "b"]]},
    }
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    save_file(tensors, directory / "model.safetensors")
    return tensors
