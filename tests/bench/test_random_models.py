import json
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from foreload.bench import random_models
from foreload.bench.random_models import (
    RANDOM_MODELS,
    make_random_checkpoint,
    random_model_config,
    write_random_checkpoint,
)
from foreload.errors import ConfigError

# Parameters in billions, as the models' authors publish them.
PUBLISHED = {
    "deepseek-v2-lite": 15.7,
    "gpt-oss-120b": 116.8,
    "gpt-oss-20b": 20.9,
    "mixtral-8x7b": 46.7,
    "olmoe-1b-7b": 6.9,
    "phi-3.5-moe": 41.9,
    "qwen1.5-moe-a2.7b": 14.3,
    "qwen3-235b-a22b": 235.1,
    "qwen3-30b-a3b": 30.5,
}


@pytest.fixture(autouse=True)
def small_block(monkeypatch):
    monkeypatch.setattr(random_models, "BLOCK_ELEMENTS", 10_007)
    monkeypatch.setattr(random_models, "PIECE_ELEMENTS", 3_000)


def shrink(name):
    """Give the named model's configuration with every dimension cut."""
    settings = RANDOM_MODELS[name] | {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    for key, value in {
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
        "num_experts": 12,
        "num_local_experts": 12,
        "n_routed_experts": 12,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
    }.items():
        if key in settings:
            settings[key] = value
    if settings["model_type"] == "deepseek_v2":
        settings |= {"head_dim": 4, "num_key_value_heads": 4}
    return AutoConfig.for_model(settings.pop("model_type"), **settings)


@pytest.mark.parametrize("name", RANDOM_MODELS)
def test_shapes_have_the_published_number_of_parameters(name):
    _, layout = random_models._checkpoint_layout(random_model_config(name))
    total = sum(math.prod(shape) for shape in layout.values())
    assert total / 1e9 == pytest.approx(PUBLISHED[name], abs=0.06)


@pytest.mark.parametrize("name", RANDOM_MODELS)
def test_transformers_loads_every_family_and_routing_spreads(tmp_path, name):
    write_random_checkpoint(shrink(name), tmp_path / "out", dtype="float32")
    model, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, experts_implementation="eager"
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    chosen = []
    for module_name, module in model.named_modules():
        if module_name.endswith(".experts"):
            module.register_forward_pre_hook(lambda _, inputs: chosen.append(inputs[1].clone()))
    with torch.no_grad():
        logits = model(torch.arange(64)[None]).logits
    assert logits.isfinite().all()
    assert 0.1 < logits.std() < 10
    assert chosen
    assert all(index.unique().numel() >= 10 for index in chosen)


def test_names_and_order_are_those_of_save_pretrained(tmp_path):
    config = shrink("mixtral-8x7b")
    write_random_checkpoint(config, tmp_path / "out", dtype="float32")
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "saved")
    with (
        safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as ours,
        safe_open(tmp_path / "saved" / "model.safetensors", framework="pt") as theirs,
    ):
        assert set(ours.keys()) == set(theirs.keys())
        for name in theirs.keys():  # noqa: SIM118
            assert ours.get_slice(name).get_shape() == theirs.get_slice(name).get_shape()
        parts = [name for name in ours.offset_keys() if ".experts.10." in name]
        assert parts == [name for name in theirs.offset_keys() if ".experts.10." in name]


def test_the_seed_decides_every_byte(tmp_path):
    config = shrink("qwen3-30b-a3b")
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_random_checkpoint(config, tmp_path / name, seed=seed)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_weights_are_random_and_rows_differ(tmp_path):
    write_random_checkpoint(shrink("olmoe-1b-7b"), tmp_path / "out", dtype="float32")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    assert embedding.unique(dim=0).shape[0] == 97
    assert embedding.std().item() == pytest.approx(1.0, abs=0.1)
    router = tensors["model.layers.0.mlp.gate.weight"]
    assert router.std().item() == pytest.approx(32**-0.5, rel=0.2)
    experts = [tensors[f"model.layers.0.mlp.experts.{e}.up_proj.weight"] for e in (0, 1)]
    assert not torch.equal(*experts)
    assert torch.equal(tensors["model.norm.weight"], torch.ones(32))


def test_the_result_says_what_it_is(tmp_path):
    calls = []
    out = write_random_checkpoint(
        shrink("gpt-oss-20b"), tmp_path / "out", progress=lambda *call: calls.append(call)
    )
    config = json.loads((out / "config.json").read_text())
    assert config["foreload_random_weights"] is True
    assert config["architectures"] == ["GptOssForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert "timing only" in (out / "README.md").read_text()
    assert not list(out.glob("tokenizer*"))
    assert calls[-1][0] == calls[-1][1] > 0


def test_num_layers_cuts_the_named_model():
    config = random_model_config("gpt-oss-20b", num_layers=3)
    assert config.num_hidden_layers == 3
    assert len(config.layer_types) == 3
    assert random_model_config("qwen3-30b-a3b").eos_token_id is None


def test_make_random_checkpoint_writes_the_named_model(tmp_path, monkeypatch):
    monkeypatch.setitem(
        RANDOM_MODELS, "small", {"model_type": "qwen3_moe"} | shrink_settings("qwen3-30b-a3b")
    )
    out = make_random_checkpoint("small", tmp_path / "out", num_layers=1, dtype="float16")
    config = json.loads((out / "config.json").read_text())
    assert (config["num_hidden_layers"], config["dtype"]) == (1, "float16")


def shrink_settings(name):
    config = shrink(name).to_dict()
    return {
        key: config[key] for key in RANDOM_MODELS[name] if key in config and key != "model_type"
    }


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("qwen4", {}, "not a known shape"),
        ("olmoe-1b-7b", {"num_layers": 0}, "num_layers cannot be 0"),
        ("olmoe-1b-7b", {"num_layers": 17}, "num_layers cannot be 17"),
        ("deepseek-v2-lite", {"num_layers": 1}, "1 of them dense"),
        ("olmoe-1b-7b", {"dtype": "int4"}, "dtype must be one of"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, name, settings, words):
    with pytest.raises(ConfigError, match=words):
        make_random_checkpoint(name, tmp_path / "out", **settings)
    assert list(tmp_path.iterdir()) == []
