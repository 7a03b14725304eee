import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from foreload.bench import widen as widen_module
from foreload.bench.widen import widen_checkpoint
from foreload.errors import CheckpointError, ConfigError, UnsupportedModelError
from foreload.memory.writer import SafetensorsStreamWriter

COMMON = {
    "vocab_size": 61,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
FAMILIES = {
    "qwen3_moe": {
        "head_dim": 8,
        "num_experts": 6,
        "moe_intermediate_size": 12,
        "intermediate_size": 20,
        "mlp_only_layers": [0],
        "num_hidden_layers": 3,
    },
    "qwen2_moe": {
        "num_experts": 6,
        "moe_intermediate_size": 12,
        "shared_expert_intermediate_size": 10,
        "intermediate_size": 20,
    },
    "mixtral": {"num_local_experts": 6, "intermediate_size": 12},
    "phimoe": {
        "num_local_experts": 6,
        "intermediate_size": 12,
        "attention_bias": True,
        "lm_head_bias": True,
    },
    "olmoe": {"num_experts": 6, "intermediate_size": 12, "attention_bias": True},
}
TIED = {"qwen3_moe-tied": ("qwen3_moe", True)}
CASES = {name: (name, False) for name in FAMILIES} | TIED


def make_checkpoint(path, model_type="qwen3_moe", is_tied=False, dtype=torch.float32):
    settings = COMMON | FAMILIES[model_type] | {"tie_word_embeddings": is_tied}
    config = AutoConfig.for_model(model_type, **settings)
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norms and biases too, so that a wrong rule for them shows.
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if "norm.weight" in name else 0.3 * noise)
    model.to(dtype).save_pretrained(path)
    (path / "tokenizer.json").write_text("{}")
    return path


def run(path, prompt):
    """Give logits (T, V), the experts chosen in prefill, and 32 greedy tokens."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    model.set_experts_implementation("eager")
    chosen = []
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs: chosen.append(inputs[1].clone()))
        for name, module in model.named_modules()
        if name.endswith(".experts")
    ]
    with torch.no_grad():
        logits = model(prompt).logits[0]
        for hook in hooks:
            hook.remove()
        tokens = model.generate(prompt, max_new_tokens=32, do_sample=False)
    return logits, torch.stack(chosen), tokens


@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_widened_model_computes_the_same_function(tmp_path, case, factor):
    model_type, is_tied = CASES[case]
    source = make_checkpoint(tmp_path / "source", model_type, is_tied)
    widened = widen_checkpoint(source, tmp_path / "wide", factor)
    prompt = torch.arange(3, 12)[None]
    logits, chosen, tokens = run(source, prompt)
    wide_logits, wide_chosen, wide_tokens = run(widened, prompt)
    assert torch.allclose(wide_logits, logits, rtol=1e-4, atol=1e-4 * logits.abs().max().item())
    assert chosen.unique().numel() > 2
    assert torch.equal(wide_chosen.sort().values, chosen.sort().values)
    assert tokens.shape[1] == 9 + 32
    assert torch.equal(wide_tokens, tokens)


def test_experts_grow_by_the_square_of_the_factor_and_division_is_exact(tmp_path):
    source = make_checkpoint(tmp_path / "source", dtype=torch.bfloat16)
    widened = widen_checkpoint(source, tmp_path / "wide", 4)
    before = load_file(source / "model.safetensors")
    after = load_file(widened / "model.safetensors")
    assert after.keys() == before.keys()
    expert = "model.layers.1.mlp.experts.3."
    for part in ("gate_proj", "up_proj", "down_proj"):
        old, new = before[f"{expert}{part}.weight"], after[f"{expert}{part}.weight"]
        assert new.dtype == torch.bfloat16
        assert new.nbytes == 16 * old.nbytes
        assert torch.equal(new * 4, old.repeat(4, 4))
    kept = "model.layers.0.self_attn.q_norm.weight"
    assert torch.equal(after[kept], before[kept])


def test_tied_embeddings_stay_tied_with_the_final_norm_divided(tmp_path):
    source = make_checkpoint(tmp_path / "source", is_tied=True)
    widened = widen_checkpoint(source, tmp_path / "wide", 2)
    before = load_file(source / "model.safetensors")
    after = load_file(widened / "model.safetensors")
    assert "lm_head.weight" not in after
    assert json.loads((widened / "config.json").read_text())["tie_word_embeddings"] is True
    assert torch.equal(after["model.norm.weight"] * 2, before["model.norm.weight"].repeat(2))
    assert torch.equal(
        after["model.embed_tokens.weight"], before["model.embed_tokens.weight"].repeat(1, 2)
    )


def test_config_grows_and_other_files_come_along(tmp_path):
    source = make_checkpoint(tmp_path / "source", "qwen2_moe")
    widened = widen_checkpoint(source, tmp_path / "wide", 4)
    config = json.loads((widened / "config.json").read_text())
    assert config["hidden_size"] == 64
    assert config["moe_intermediate_size"] == 48
    assert config["intermediate_size"] == 80
    assert config["shared_expert_intermediate_size"] == 40
    assert config["num_attention_heads"] == 4
    assert config["head_dim"] == 4
    assert config["foreload_widen_factor"] == 4
    assert (widened / "tokenizer.json").read_text() == "{}"
    assert (widened / "generation_config.json").exists()
    assert "widened 4 times" in (widened / "README.md").read_text()


def test_widening_twice_equals_widening_by_the_product(tmp_path):
    source = make_checkpoint(tmp_path / "source", "olmoe")
    once = widen_checkpoint(source, tmp_path / "once", 4)
    half = widen_checkpoint(source, tmp_path / "half", 2)
    twice = widen_checkpoint(half, tmp_path / "twice", 2)
    assert (once / "config.json").read_bytes() == (twice / "config.json").read_bytes()
    wide = load_file(once / "model.safetensors")
    for name, tensor in load_file(twice / "model.safetensors").items():
        assert torch.equal(tensor, wide[name]), name


def test_a_sharded_source_gives_the_same_result(tmp_path):
    source = make_checkpoint(tmp_path / "source")
    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(sharded, max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    one = load_file(widen_checkpoint(source, tmp_path / "a", 2) / "model.safetensors")
    other = load_file(widen_checkpoint(sharded, tmp_path / "b", 2) / "model.safetensors")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_memory_stays_bounded_by_the_piece(tmp_path, monkeypatch):
    source = make_checkpoint(tmp_path / "source")
    whole = load_file(widen_checkpoint(source, tmp_path / "whole", 4) / "model.safetensors")
    sizes = []
    append = SafetensorsStreamWriter._append

    def record(self, piece):
        sizes.append(piece.nbytes)
        append(self, piece)

    monkeypatch.setattr(SafetensorsStreamWriter, "_append", record)
    monkeypatch.setattr(widen_module, "PIECE_BYTES", 1000)
    pieces = load_file(widen_checkpoint(source, tmp_path / "pieces", 4) / "model.safetensors")
    assert max(sizes) <= 1000
    assert max(tensor.nbytes for tensor in whole.values()) > 10_000
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)


def test_progress_ends_at_the_total(tmp_path):
    source = make_checkpoint(tmp_path / "source")
    calls = []
    widen_checkpoint(source, tmp_path / "wide", 2, progress=lambda *call: calls.append(call))
    assert calls == sorted(calls)
    assert calls[-1][0] == calls[-1][1] > 0


@pytest.mark.parametrize("factor", [-2, 0, 1, 3, 6])
def test_only_powers_of_two_are_factors(tmp_path, factor):
    with pytest.raises(ConfigError, match="power of two"):
        widen_checkpoint(tmp_path, tmp_path / "wide", factor)


def test_existing_output_is_refused(tmp_path):
    source = make_checkpoint(tmp_path / "source")
    with pytest.raises(ConfigError, match="not an empty directory"):
        widen_checkpoint(source, source, 2)


def test_unknown_tensors_are_refused_by_name(tmp_path):
    source = make_checkpoint(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.self_attn.sinks"] = torch.zeros(4)
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.self_attn\.sinks"):
        widen_checkpoint(source, tmp_path / "wide", 2)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def edit_config(source, **changes):
    path = source / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"model_type": "gemma4"}, UnsupportedModelError, "'gemma4' cannot be widened"),
        ({"quantization_config": {"bits": 4}}, UnsupportedModelError, "quantised"),
        ({"moe_intermediate_size": None}, CheckpointError, "does not give moe_intermediate_size"),
        ({"num_attention_heads": None}, CheckpointError, "does not give num_attention_heads"),
    ],
)
def test_configs_that_do_not_do_are_refused(tmp_path, changes, error, words):
    source = make_checkpoint(tmp_path / "source")
    edit_config(source, **changes)
    with pytest.raises(error, match=words):
        widen_checkpoint(source, tmp_path / "wide", 2)
    assert not (tmp_path / "wide").exists()


def test_a_head_that_is_missing_without_being_tied_is_refused(tmp_path):
    source = make_checkpoint(tmp_path / "source", is_tied=True)
    edit_config(source, tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"neither lm_head\.weight nor tied"):
        widen_checkpoint(source, tmp_path / "wide", 2)


def test_integer_weights_are_refused(tmp_path):
    source = make_checkpoint(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(16, dtype=torch.int8)
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match=r"model\.norm\.weight of type I8"):
        widen_checkpoint(source, tmp_path / "wide", 2)


def test_damaged_or_missing_files_are_named(tmp_path):
    source = make_checkpoint(tmp_path / "source")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        widen_checkpoint(tmp_path / "nowhere", tmp_path / "wide", 2)
    (source / "model.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        widen_checkpoint(source, tmp_path / "wide", 2)
    (source / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        widen_checkpoint(source, tmp_path / "wide", 2)
    (source / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="JSON object"):
        widen_checkpoint(source, tmp_path / "wide", 2)
