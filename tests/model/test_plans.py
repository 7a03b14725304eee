"""Plans bring exactly the bytes transformers would have put into its packed parameters."""

from __future__ import annotations

import json
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from streaming import read_expert

import zoo
from foreload.errors import CheckpointError
from foreload.memory.checkpoint import CheckpointIndex
from foreload.model.architecture import build_meta_model, find_sites, read_architecture
from foreload.model.plans import CheckpointPlan, plan_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from foreload.types import ExpertPlan

LAYOUTS = [
    arch
    for arch in (
        "qwen3_moe",
        "granitemoe",
        "qwen3_vl_moe",
        "inkling2",
        "nemotron_h",
        "deepseek_v4",
    )
    if arch in zoo.decorated_architectures()
]


def plan_folder(folder: Path, dtype: torch.dtype | str = "auto", **options: Any) -> CheckpointPlan:
    index = CheckpointIndex.open(folder)
    architecture = read_architecture(index, dtype=dtype, **options)
    meta = build_meta_model(architecture)
    return plan_checkpoint(meta, find_sites(meta, architecture), index, architecture)


def check_against_reference(plan: CheckpointPlan, reference: Any) -> None:
    experts = [module for module in reference.modules() if zoo.is_experts(module)]
    assert len(plan.experts) == len(experts)
    for layer, module in zip(plan.experts, experts, strict=True):
        assert len(layer) == module.num_experts
        for number, expert in enumerate(layer):
            check_expert(expert, module, number)


def check_expert(plan: ExpertPlan, module: Any, number: int) -> None:
    found = read_expert(plan)
    assert set(found) == {tensor.name for tensor in plan.tensors}
    for tensor in plan.tensors:
        wanted = getattr(module, tensor.name)[number]
        value = found[tensor.name]
        assert value.is_contiguous()
        assert str(value.dtype) == f"torch.{tensor.dtype}" == str(wanted.dtype)
        assert tuple(value.shape) == tensor.shape == tuple(wanted.shape)
        assert value.nbytes == tensor.num_bytes
        assert torch.equal(value, wanted), tensor.name
    for one, next_one in zip(plan.spans, plan.spans[1:], strict=False):
        same_file = one.path == next_one.path
        assert not same_file or one.offset + one.num_bytes < next_one.offset


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("arch", [*zoo.SEVEN_FAMILIES, *LAYOUTS[1:]])
def test_experts_are_byte_identical(tmp_path: Path, arch: str, dtype: torch.dtype) -> None:
    save = zoo.save_family if arch in zoo.SEVEN_FAMILIES else zoo.save_tiny
    checkpoint = save(arch, tmp_path, dtype)
    plan = plan_folder(tmp_path, dtype, model_class=checkpoint.model_class)
    check_against_reference(plan, checkpoint.load_reference(dtype))
    assert not plan.unused_names
    for tensor in plan.experts[0][0].tensors:
        if tensor.span >= 0:
            assert tensor.start % dtype.itemsize == 0


@pytest.mark.parametrize(
    ("kind", "arch"), [("fp8", "qwen3_moe"), ("fp8", "deepseek_v3"), ("mxfp4", "gpt_oss")]
)
def test_quantised_experts_are_dequantised_as_transformers_does(
    tmp_path: Path, kind: Any, arch: str
) -> None:
    checkpoint = zoo.save_quantised(kind, arch, tmp_path)
    plan = plan_folder(checkpoint.path, torch.bfloat16)
    assert not plan.is_direct
    check_against_reference(plan, checkpoint.load_reference(torch.bfloat16))
    expert = plan.experts[0][0]
    assert expert.read_bytes < expert.num_bytes


def test_a_cast_is_a_conversion(tmp_path: Path) -> None:
    checkpoint = zoo.save_family("gpt_oss", tmp_path, torch.float32)
    plan = plan_folder(tmp_path, torch.bfloat16)
    assert not plan.is_direct
    check_against_reference(plan, checkpoint.load_reference(torch.bfloat16))


def repack(folder: Path, order: Callable[[str], Any]) -> None:
    """Write the checkpoint in `folder` again as one file, its tensors in the given order."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
        file.unlink()
    (folder / "model.safetensors.index.json").unlink()
    numbered = {f"{i:06d}": tensors[n] for i, n in enumerate(sorted(tensors, key=order))}
    save_file(numbered, folder / "model.safetensors")
    raw = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    names = sorted(tensors, key=order)
    renamed = {names[int(key)] if key.isdigit() else key: value for key, value in header.items()}
    text = json.dumps(renamed).encode()
    text += b" " * (-len(text) % 64)
    (folder / "model.safetensors").write_bytes(
        len(text).to_bytes(8, "little") + text + raw[8 + length :]
    )


def test_an_expert_that_lies_in_one_piece_is_one_span(tmp_path: Path) -> None:
    checkpoint = zoo.save_family("qwen3_moe", tmp_path, torch.bfloat16)
    repack(tmp_path, order=lambda name: name)
    plan = plan_folder(tmp_path)
    assert plan.is_direct
    assert plan.layout == "per-expert"
    expert = plan.experts[1][7]
    (span,) = expert.spans
    assert span.num_bytes == expert.num_bytes == expert.read_bytes
    starts = {tensor.name: tensor.start for tensor in expert.tensors}
    down = next(tensor for tensor in expert.tensors if tensor.name == "down_proj")
    assert starts == {"down_proj": 0, "gate_up_proj": down.num_bytes}
    check_against_reference(plan, checkpoint.load_reference(torch.bfloat16))


def test_gate_and_up_apart_are_joined_by_copying(tmp_path: Path) -> None:
    checkpoint = zoo.save_family("mixtral", tmp_path, torch.bfloat16)
    repack(tmp_path, order=lambda name: (".w1." in name, ".w3." in name, name))
    plan = plan_folder(tmp_path)
    assert not plan.is_direct
    convert: Any = plan.experts[0][0].convert
    assert all(recipe.pieces is not None for recipe in convert.recipes)
    check_against_reference(plan, checkpoint.load_reference(torch.bfloat16))


def test_up_before_gate_is_not_taken_as_it_lies(tmp_path: Path) -> None:
    checkpoint = zoo.save_family("mixtral", tmp_path, torch.bfloat16)
    repack(tmp_path, order=lambda name: name.replace(".w1.", ".w9."))
    plan = plan_folder(tmp_path)
    assert not plan.is_direct
    check_against_reference(plan, checkpoint.load_reference(torch.bfloat16))


def test_one_convert_may_run_on_many_threads(tmp_path: Path) -> None:
    checkpoint = zoo.save_quantised("mxfp4", "gpt_oss", tmp_path)
    plan = plan_folder(checkpoint.path, torch.bfloat16).experts[0]
    wanted = [read_expert(expert) for expert in plan]
    failures = []

    def work(expert: int) -> None:
        for _ in range(5):
            found = read_expert(plan[expert])
            if any(not torch.equal(found[n], wanted[expert][n]) for n in found):
                failures.append(expert)

    threads = [threading.Thread(target=work, args=(i % 4,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def edit_shards(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    index = folder / "model.safetensors.index.json"
    weight_map = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)
        weight_map |= dict.fromkeys(tensors, file.name)
    index.write_text(json.dumps({"weight_map": weight_map}))


def test_experts_may_be_stored_transposed_as_on_the_hub(tmp_path: Path) -> None:
    checkpoint = zoo.save_tiny("qwen3_vl_moe", tmp_path)
    reference = checkpoint.load_reference()

    def transpose(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
                tensors[name] = tensors[name].mT.contiguous()

    edit_shards(tmp_path, transpose)
    plan = plan_folder(tmp_path)
    assert not plan.is_direct
    assert plan.layout == "packed"
    check_against_reference(plan, reference)


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    zoo.save_family("qwen3_moe", tmp_path)
    name = "model.layers.2.mlp.experts.5.up_proj.weight"
    edit_shards(tmp_path, lambda tensors: tensors.pop(name, None))
    with pytest.raises(CheckpointError, match=f"missing {name}"):
        plan_folder(tmp_path)


def test_a_layer_without_experts_is_named(tmp_path: Path) -> None:
    zoo.save_family("gpt_oss", tmp_path)
    name = "model.layers.1.mlp.experts.down_proj"
    edit_shards(tmp_path, lambda tensors: tensors.pop(name, None))
    with pytest.raises(CheckpointError, match=f"no tensor for {name}"):
        plan_folder(tmp_path)


def test_a_configuration_of_another_size_is_an_error(tmp_path: Path) -> None:
    zoo.save_family("gpt_oss", tmp_path)
    change_config(tmp_path, num_local_experts=8)
    with pytest.raises(CheckpointError, match=r"16.*needs 8 experts"):
        plan_folder(tmp_path)


@pytest.mark.parametrize("arch", ["qwen3_moe", "gpt_oss"])
def test_experts_of_another_shape_are_an_error(tmp_path: Path, arch: str) -> None:
    zoo.save_family(arch, tmp_path)
    change_config(tmp_path, hidden_size=32)
    with pytest.raises(CheckpointError, match=r"experts.*shape"):
        plan_folder(tmp_path)


def test_experts_that_differ_are_an_error(tmp_path: Path) -> None:
    zoo.save_family("olmoe", tmp_path)
    name = "model.layers.0.mlp.experts.3.up_proj.weight"

    def shorten(tensors: dict[str, Tensor]) -> None:
        if name in tensors:
            tensors[name] = tensors[name][:-1].contiguous()

    edit_shards(tmp_path, shorten)
    with pytest.raises(CheckpointError, match=f"differ.*{name}"):
        plan_folder(tmp_path)


def change_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def test_tensors_nobody_asks_for_are_left_out(tmp_path: Path) -> None:
    zoo.save_family("olmoe", tmp_path)
    extra = "model.layers.99.mtp.weight"

    def add(tensors: dict[str, Tensor]) -> None:
        if "lm_head.weight" in tensors:
            tensors[extra] = torch.zeros(2)

    edit_shards(tmp_path, add)
    plan = plan_folder(tmp_path)
    assert plan.unused_names == (extra,)
    assert "lm_head.weight" in plan.dense_names
    assert not any(".experts." in name for name in plan.dense_names)


def write_headers(folder: Path, layers: int, experts: int) -> None:
    """Write a checkpoint with the tensors of a large Qwen3-MoE, its data a hole in the file."""
    hidden, inner, heads = 2048, 768, 32
    shapes: dict[str, list[int]] = {
        "model.embed_tokens.weight": [1000, hidden],
        "lm_head.weight": [1000, hidden],
        "model.norm.weight": [hidden],
    }
    for layer in range(layers):
        prefix = f"model.layers.{layer}.mlp"
        shapes[f"{prefix}.gate.weight"] = [experts, hidden]
        for expert in range(experts):
            for name, shape in (
                ("gate_proj", [inner, hidden]),
                ("up_proj", [inner, hidden]),
                ("down_proj", [hidden, inner]),
            ):
                shapes[f"{prefix}.experts.{expert}.{name}.weight"] = shape
    header, end = {}, 0
    for name in sorted(shapes):
        size = 2 * torch.Size(shapes[name]).numel()
        header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    config = {
        "model_type": "qwen3_moe",
        "hidden_size": hidden,
        "moe_intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_experts": experts,
        "num_experts_per_tok": 8,
        "num_attention_heads": heads,
        "vocab_size": 1000,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))


def test_a_large_model_is_planned_in_seconds(tmp_path: Path) -> None:
    write_headers(tmp_path, layers=48, experts=128)
    index = CheckpointIndex.open(tmp_path)
    architecture = read_architecture(index)
    meta = build_meta_model(architecture)
    sites = find_sites(meta, architecture)
    start = time.process_time()
    plan = plan_checkpoint(meta, sites, index, architecture)
    # measured 0.5 s of processor time, 2026-11-21; the margin is for slow machines
    assert time.process_time() - start < 5
    assert plan.is_direct
    assert sum(len(layer) for layer in plan.experts) == 48 * 128
    assert {len(expert.spans) for layer in plan.experts for expert in layer} == {1}
