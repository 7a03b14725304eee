"""Layouts and bytes of the device path, asked before anything is allocated."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import pytest
import torch

from foreload.errors import UnsupportedModelError
from foreload.model.device_plan import (
    block_bytes,
    device_layouts,
    draft_layouts,
    kv_bytes_per_token,
    stream_blocks,
    workspace_bytes,
)
from foreload.model.hf import load_model
from foreload.ops.device_layout import StoredFormat

if TYPE_CHECKING:
    from pathlib import Path

    from foreload.model.hf import LoadedModel


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint: Path) -> LoadedModel:
    return load_model(tiny_checkpoint)


def test_every_layer_has_a_layout_for_its_experts(loaded: LoadedModel) -> None:
    layouts = device_layouts(loaded)
    assert len(layouts) == loaded.spec.num_moe_layers
    assert {layout.dtype for layout in layouts} == {torch.float32}
    assert block_bytes(layouts) >= loaded.spec.expert_bytes
    assert block_bytes(layouts) % 4096 == 0


def test_experts_that_are_not_alike_are_refused(loaded: LoadedModel) -> None:
    plan = loaded.plans[1][3]
    other = dataclasses.replace(
        plan, tensors=tuple(dataclasses.replace(t, shape=(1, *t.shape[1:])) for t in plan.tensors)
    )
    plans = [list(row) for row in loaded.plans]
    plans[1][3] = other
    with pytest.raises(UnsupportedModelError, match="not alike"):
        device_layouts(dataclasses.replace(loaded, plans=plans))


def test_element_types_that_are_not_computed_with_are_refused(loaded: LoadedModel) -> None:
    plans = [
        [
            dataclasses.replace(
                plan,
                tensors=tuple(dataclasses.replace(t, dtype="float64") for t in plan.tensors),
            )
            for plan in row
        ]
        for row in loaded.plans
    ]
    with pytest.raises(UnsupportedModelError, match="float64"):
        device_layouts(dataclasses.replace(loaded, plans=plans))


def test_a_token_in_the_cache_takes_its_keys_and_values(loaded: LoadedModel) -> None:
    config = loaded.model.config
    each = config.num_key_value_heads * config.head_dim * 2 * 4
    assert kv_bytes_per_token(loaded) == config.num_hidden_layers * each


def test_a_forward_takes_logits_and_eager_scores(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = loaded.model.config
    # Every head its own: nothing is copied for them.
    monkeypatch.setattr(config, "num_key_value_heads", config.num_attention_heads)
    fused = workspace_bytes(loaded, 16, 256)
    assert fused >= 16 * config.vocab_size * (4 + 4)
    assert workspace_bytes(loaded, 32, 256) == 2 * fused
    assert workspace_bytes(loaded, 16, 512) == fused
    monkeypatch.setattr(config, "_attn_implementation", "eager")
    scores = 16 * config.num_attention_heads * 256 * (4 + 4)
    assert workspace_bytes(loaded, 16, 256) == fused + scores


def test_heads_that_share_keys_have_them_copied_over_the_whole_context(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = loaded.model.config
    heads = config.num_attention_heads
    assert config.num_key_value_heads < heads
    found = [workspace_bytes(loaded, 16, context) for context in (0, 256)]
    keys_and_values = 2 * heads * config.head_dim * 256 * 4
    assert found[1] - found[0] == 2 * keys_and_values + 16 * 256 * (1 + 4)


def test_a_drafts_layouts_are_the_targets_quantised(loaded: LoadedModel) -> None:
    layouts = device_layouts(loaded)
    for kind in ("int4", "int8"):
        for target, draft in zip(layouts, draft_layouts(loaded, layouts, kind), strict=True):
            assert draft.first.stored is draft.down.stored is StoredFormat(kind)
            assert (draft.dtype, draft.hidden_size) == (target.dtype, target.hidden_size)
            # 48 columns: not even 32 of them share a scale.
            assert draft.down.scale_columns == 16
            assert draft.num_bytes < target.num_bytes


def test_a_draft_whose_groups_do_not_fit_is_refused(loaded: LoadedModel) -> None:
    narrow = {(96, 64): (80, 64), (64, 48): (64, 40)}
    plans = [
        [
            dataclasses.replace(
                plan,
                tensors=tuple(
                    dataclasses.replace(t, shape=narrow.get(t.shape, t.shape)) for t in plan.tensors
                ),
            )
            for plan in row
        ]
        for row in loaded.plans
    ]
    other = dataclasses.replace(loaded, plans=plans)
    layouts = device_layouts(other)
    with pytest.raises(UnsupportedModelError, match="has no int4 draft"):
        draft_layouts(other, layouts, "int4")


def test_long_inputs_stream_through_buffers_of_64_mib_or_less() -> None:
    sizes = [9 << 20, 1 << 20, 4096, 352 << 20]
    assert [stream_blocks(128, size) for size in sizes] == [7, 64, 128, 1]
