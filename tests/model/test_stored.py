"""Quantised experts keep the form they are stored in, and stand for the same numbers."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import pytest
import torch

import zoo
from fakes import make_engine
from foreload.memory.expert_reader import read_experts
from foreload.model.dequantise import BlockFp8
from foreload.model.device_plan import block_bytes, block_plans, device_layouts
from foreload.model.hf import load_model
from foreload.model.kv_cache import pass_cache
from foreload.model.recipes import ConvertExpert
from foreload.model.stored import stored_layout
from foreload.ops.device_layout import StoredFormat, store_expert, unpack_expert

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Literal

CASES = [
    ("fp8", "qwen3_moe", StoredFormat.FP8),
    ("fp8", "deepseek_v3", StoredFormat.FP8),
    ("mxfp4", "gpt_oss", StoredFormat.MXFP4),
]


@pytest.mark.parametrize(("kind", "arch", "stored"), CASES)
def test_a_block_stands_for_what_dequantising_gives_bit_for_bit(
    kind: Literal["fp8", "mxfp4"], arch: str, stored: StoredFormat, tmp_path: Path
) -> None:
    loaded = load_model(zoo.save_quantised(kind, arch, tmp_path).path)
    layouts = device_layouts(loaded)
    plans = block_plans(loaded, layouts)
    for layout, layer, as_stored in zip(layouts, loaded.plans, plans, strict=True):
        assert layout.first.stored is layout.down.stored is stored
        read, kept = read_experts(layer), read_experts(as_stored)
        for weights, parts in zip(read, kept, strict=True):
            block = torch.full((layout.num_bytes,), 0xFF, dtype=torch.uint8)
            store_expert(layout, parts, block)
            found = unpack_expert(layout, block)
            assert set(found) == set(weights)
            for name, weight in weights.items():
                assert torch.equal(found[name].view(torch.int16), weight.view(torch.int16)), name


@pytest.mark.parametrize(("kind", "arch"), [case[:2] for case in CASES])
@pytest.mark.parametrize("share", ["25%", "100%"])
def test_an_engine_on_stored_experts_has_the_dequantised_models_logits(
    kind: Literal["fp8", "mxfp4"], arch: str, share: str, tmp_path: Path
) -> None:
    checkpoint = zoo.save_quantised(kind, arch, tmp_path)
    reference = checkpoint.load_reference(torch.bfloat16)
    ids = zoo.prompt(44)
    with (
        make_engine(
            checkpoint.path, device="cpu", orchestration="device", expert_memory=share
        ) as engine,
        torch.inference_mode(),
    ):
        caches: list[Any] = [None, None]
        # A prompt that streams its experts, one token, and a few that want several each.
        for some in ids[:, :44].split((40, 1, 3), dim=1):
            found, wanted = (
                model(some, **pass_cache(model, cache), use_cache=True)
                for model, cache in zip((engine.model, reference), caches, strict=True)
            )
            caches = [found.past_key_values, wanted.past_key_values]
            assert torch.equal(found.logits, wanted.logits)


@pytest.mark.parametrize(("kind", "arch"), [case[:2] for case in CASES])
def test_a_draft_made_of_stored_experts_changes_no_token(
    kind: Literal["fp8", "mxfp4"], arch: str, tmp_path: Path
) -> None:
    path = zoo.save_quantised(kind, arch, tmp_path).path
    texts = []
    for draft in ("none", "int8"):
        with make_engine(
            path, device="cpu", orchestration="device", expert_memory="2MiB", draft=draft
        ) as engine:
            result = engine.generate(zoo.prompt()[0].tolist(), max_new_tokens=12)
            texts.append(result.token_ids)
    assert texts[0] == texts[1]
    assert result.stats.acceptance_rate is not None


def test_what_travels_is_what_is_stored(tmp_path: Path) -> None:
    loaded = load_model(zoo.save_quantised("mxfp4", "gpt_oss", tmp_path).path)
    plan = loaded.plans[0][0]
    with make_engine(
        tmp_path / "mxfp4", device="cpu", orchestration="device", expert_memory="25%"
    ) as engine:
        result = engine.generate([1, 2, 3], max_new_tokens=4)
        moved = result.stats.bytes_moved
        size = block_bytes(device_layouts(loaded))
    assert 0 < moved == moved // size * size
    # In blocks of whole pages.
    assert plan.read_bytes <= size < plan.read_bytes + 8192 < plan.num_bytes + 4096


def test_experts_made_in_different_ways_are_dequantised(tmp_path: Path) -> None:
    loaded = load_model(zoo.save_quantised("fp8", "qwen3_moe", tmp_path).path)
    experts, plans = loaded.sites[0].experts, loaded.plans[0]
    assert stored_layout(experts, plans) is not None
    convert = plans[1].convert
    assert isinstance(convert, ConvertExpert)
    plain = tuple(dataclasses.replace(recipe, shortcut=None) for recipe in convert.recipes)
    slow = dataclasses.replace(plans[1], convert=dataclasses.replace(convert, recipes=plain))
    assert stored_layout(experts, [plans[0], slow]) is None
    assert stored_layout(experts, [slow]) is None


def test_scales_shared_by_gate_and_up_are_no_layout(tmp_path: Path) -> None:
    loaded = load_model(zoo.save_quantised("fp8", "qwen3_moe", tmp_path).path)
    experts, plan = loaded.sites[0].experts, loaded.plans[0][0]
    convert = plan.convert
    assert isinstance(convert, ConvertExpert)
    first = convert.recipes[0].shortcut
    assert isinstance(first, BlockFp8)
    gate = first.matrices[0]
    # As if gate and up were one matrix, whose middle scale belonged to both.
    both = dataclasses.replace(gate, rows=2 * gate.rows, scale_rows=1)
    recipe = dataclasses.replace(
        convert.recipes[0], shortcut=dataclasses.replace(first, matrices=(both,))
    )
    other = dataclasses.replace(convert, recipes=(recipe, *convert.recipes[1:]))
    assert stored_layout(experts, [dataclasses.replace(plan, convert=other)]) is None
