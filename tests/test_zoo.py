"""The zoo itself: every decorated architecture builds, and the fixtures are what they claim."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors import safe_open

import zoo

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

ARCHITECTURES = zoo.decorated_architectures()


def run_eager(model: PreTrainedModel, **inputs: torch.Tensor) -> torch.Tensor:
    model.set_experts_implementation("eager")
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_decorated_architecture_builds_and_runs(arch: str) -> None:
    if arch in zoo.CANNOT_BUILD:
        with pytest.raises(Exception, match=r"."):
            run_eager(zoo.build_tiny(arch), input_ids=zoo.prompt())
        return
    model = zoo.build_tiny(arch)
    experts = [module for module in model.modules() if zoo.is_experts(module)]
    chosen: list[torch.Tensor] = []
    for module in experts:
        module.register_forward_pre_hook(lambda _, args: chosen.append(args[1]))
    logits = run_eager(model, input_ids=zoo.prompt(), **zoo.extra_inputs(arch))

    assert not model.training
    assert len(chosen) >= 2, "two layers with experts must run"
    assert {module.num_experts for module in experts} == {zoo.EXPERTS}
    assert model.config.get_text_config().hidden_size <= 64
    assert sum(parameter.numel() for parameter in model.parameters()) < 1_000_000
    assert logits.isfinite().all()
    assert logits.std() > 0.01
    for index in chosen:  # (T, K)
        assert index.unique().numel() > index.shape[1], "the router must tell tokens apart"


def test_cannot_build_gives_a_reason_for_each_name() -> None:
    assert all(reason.strip() for reason in zoo.CANNOT_BUILD.values())


@pytest.mark.parametrize("arch", zoo.SEVEN_FAMILIES)
def test_the_same_seed_gives_the_same_weights(arch: str) -> None:
    first, again, other = (zoo.build_family(arch, seed=seed) for seed in (0, 0, 1))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
        assert not torch.equal(tensor, other.state_dict()[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_saved_model_loads_as_it_was(tmp_path: Path, dtype: torch.dtype) -> None:
    checkpoint = zoo.save_tiny("deepseek_v3", tmp_path, dtype)
    assert len(list(tmp_path.glob("*.safetensors"))) >= 3
    built = zoo.build_tiny("deepseek_v3", dtype)
    loaded = checkpoint.load_reference(dtype)
    for name, tensor in built.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    assert next(loaded.parameters()).dtype is dtype
    expected = run_eager(built, input_ids=checkpoint.input_ids)
    assert torch.equal(run_eager(loaded, input_ids=checkpoint.input_ids), expected)


@pytest.mark.parametrize(
    ("kind", "arch", "suffix", "dtype"),
    [
        ("fp8", "qwen3_moe", "down_proj.weight_scale_inv", torch.float32),
        ("fp8", "deepseek_v3", "down_proj.weight_scale_inv", torch.float32),
        ("mxfp4", "gpt_oss", "experts.down_proj_blocks", torch.uint8),
    ],
)
def test_a_quantised_checkpoint_loads_dequantised(
    tmp_path: Path, kind: str, arch: str, suffix: str, dtype: torch.dtype
) -> None:
    checkpoint = zoo.save_quantised(kind, arch, tmp_path)  # type: ignore[arg-type]
    index = json.loads((checkpoint.path / "model.safetensors.index.json").read_text())
    name = next(n for n in index["weight_map"] if "experts" in n and n.endswith(suffix))
    with safe_open(checkpoint.path / index["weight_map"][name], "pt") as shard:
        assert shard.get_tensor(name).dtype is dtype
    model = checkpoint.load_reference(torch.bfloat16)
    # transformers 5.24 keeps DeepSeek's routers in float32
    routers = {name for name, _ in model.named_parameters() if name.endswith("mlp.gate.weight")}
    kinds = {parameter.dtype for name, parameter in model.named_parameters() if name not in routers}
    assert kinds == {torch.bfloat16}
    logits = run_eager(model, input_ids=checkpoint.input_ids)
    assert logits.isfinite().all()
    assert logits.std() > 0.01
    if kind == "fp8":  # MXFP4 experts are new, block-scaled ones stay close to the old
        plain = zoo.build_family(arch, torch.bfloat16).state_dict()
        for n, tensor in model.state_dict().items():
            assert torch.allclose(tensor.float(), plain[n].float(), rtol=0.1, atol=0.01), n
