"""An expert's block gives back what was put into it, and no two parts of it overlap."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from foreload.errors import ShapeError, UnsupportedModelError
from foreload.ops.device_layout import (
    ExpertLayout,
    StoredFormat,
    expert_layout,
    pack_expert,
    stored_parts,
    unpack_expert,
)
from foreload.ops.quantise import dequantise, quantise
from plain_experts import KINDS, PlainExperts, random_weights, shapes_of

PLAIN = [stored for stored in StoredFormat if stored.is_plain]
# Largest error of an element, as a share of the largest element that shares its scale.
STEPS = {
    StoredFormat.INT8: 0.5 / 127 + 2**-8,
    StoredFormat.INT4: 0.5 / 7 + 2**-8,
    StoredFormat.FP8: 2**-4,
    StoredFormat.MXFP4: 0.25,
}


def lay_out(
    experts: Any, stored: StoredFormat, sizes: tuple[int, int], **more: Any
) -> ExpertLayout:
    dtype = stored.code_dtype if stored.is_plain else torch.float32
    return expert_layout(experts, shapes_of(experts, *sizes), stored, dtype=dtype, **more)


@pytest.mark.parametrize("stored", StoredFormat, ids=lambda stored: stored.value)
@pytest.mark.parametrize("kind", KINDS)
def test_a_block_gives_back_what_was_put_into_it(kind: str, stored: StoredFormat) -> None:
    experts = KINDS[kind]
    sizes = (37, 51) if stored.is_plain else (160, 96)
    layout = lay_out(experts, stored, sizes)
    weights = random_weights(experts, *sizes, seed=0)
    block = torch.full((layout.num_bytes,), 0xFF, dtype=torch.uint8)
    pack_expert(layout, weights, block)
    found = unpack_expert(layout, block)
    assert found.keys() == weights.keys()
    for name, wanted in weights.items():
        assert found[name].dtype == layout.dtype
        assert found[name].is_contiguous()
        if stored.is_plain or name.endswith("bias"):
            assert torch.equal(found[name], wanted.to(layout.dtype)), name
        else:
            error = (found[name] - wanted).abs().max()
            assert 0 < error <= STEPS[stored] * wanted.abs().max(), name


@pytest.mark.parametrize("stored", StoredFormat, ids=lambda stored: stored.value)
def test_parts_are_aligned_and_do_not_overlap(stored: StoredFormat) -> None:
    layout = lay_out(KINDS["gpt-oss"], stored, (64, 96))
    block = torch.zeros(layout.num_bytes, dtype=torch.uint8)
    parts = stored_parts(layout, block)
    spans = sorted(
        (part.data_ptr() - block.data_ptr(), part.numel() * part.element_size())
        for part in parts.values()
    )
    assert len(parts) == (4 if stored.is_plain else 6)
    assert all(start % 256 == 0 for start, _ in spans)
    for (start, length), (following, _) in itertools.pairwise(spans):
        assert start + length <= following
    assert sum(spans[-1]) <= layout.num_bytes
    assert layout.num_bytes % 4096 == 0


def test_int4_is_what_quantise_gives_two_columns_to_a_byte() -> None:
    layout = lay_out(PlainExperts(has_gate=False), StoredFormat.INT4, (64, 32))
    weights = random_weights(PlainExperts(has_gate=False), 64, 32, seed=1)
    block = torch.zeros(layout.num_bytes, dtype=torch.uint8)
    pack_expert(layout, weights, block)
    wanted = quantise(weights["up_proj"], bits=4, group=32, search=False)
    codes = stored_parts(layout, block)["up_proj"].int()
    assert codes.shape == (32, 32)
    assert torch.equal((codes & 15) - 8, wanted.codes[:, ::2].int())
    assert torch.equal((codes >> 4) - 8, wanted.codes[:, 1::2].int())
    assert torch.equal(unpack_expert(layout, block)["up_proj"], dequantise(wanted, 32))


def test_gate_and_up_have_fp8_scales_of_their_own() -> None:
    """A square of scales must not reach from the last rows of the gate into the up projection."""
    layout = lay_out(PlainExperts(), StoredFormat.FP8, (130, 150))
    assert layout.first.scale_shape == (4, 2)
    assert layout.down.scale_shape == (2, 2)
    weights = random_weights(PlainExperts(), 130, 150, seed=2)
    weights["gate_up_proj"][150:] *= 1000
    block = torch.zeros(layout.num_bytes, dtype=torch.uint8)
    pack_expert(layout, weights, block)
    gate = unpack_expert(layout, block)["gate_up_proj"][:150]
    wanted = weights["gate_up_proj"][:150]
    assert (gate - wanted).abs().max() < 2**-4 * wanted.abs().max()


@pytest.mark.parametrize("byte", range(16))
def test_mxfp4_bytes_mean_what_the_standard_says(byte: int) -> None:
    layout = lay_out(PlainExperts(has_gate=False), StoredFormat.MXFP4, (32, 32))
    block = torch.zeros(layout.num_bytes, dtype=torch.uint8)
    parts = stored_parts(layout, block)
    parts["up_proj"][0, 0] = byte
    parts["up_proj_scales"][0, 0] = 127 + 3
    exponent, mantissa = byte >> 1 & 3, byte & 1
    magnitude = math.ldexp(1 + mantissa / 2, exponent - 1) if exponent else mantissa / 2
    value = unpack_expert(layout, block)["up_proj"][0, 0].item()
    assert value == (-1 if byte & 8 else 1) * magnitude * 8


def test_what_cannot_be_laid_out_is_refused_with_the_reason() -> None:
    experts = PlainExperts()
    shapes = shapes_of(experts, 64, 48)

    def refuse(error: type[Exception], match: str, **changed: Any) -> None:
        settings = {"shapes": shapes, "stored": StoredFormat.BFLOAT16, "dtype": torch.bfloat16}
        settings |= changed
        module = settings.pop("experts", experts)
        with pytest.raises(error, match=match):
            expert_layout(module, **settings)

    refuse(UnsupportedModelError, "cannot be stored as float16", stored=StoredFormat.FLOAT16)
    refuse(UnsupportedModelError, "cannot compute in", stored=StoredFormat.FP8, dtype=torch.float64)
    refuse(UnsupportedModelError, r"48 columns.*int4 in groups of 32", stored=StoredFormat.INT4)
    refuse(UnsupportedModelError, "groups of 24", stored=StoredFormat.INT8, group=24)
    refuse(UnsupportedModelError, "parameters", shapes={**shapes, "norm": (64,)})
    refuse(UnsupportedModelError, "parameters", experts=replace(experts, has_bias=True))
    refuse(ShapeError, "gate_up_proj", shapes={**shapes, "down_proj": (64, 47)})
    refuse(ShapeError, "no matrix", shapes={**shapes, "down_proj": (64,)})
    biased = {**shapes, "gate_up_proj_bias": (96,), "down_proj_bias": (48,)}
    refuse(ShapeError, "down_proj_bias", shapes=biased, experts=replace(experts, has_bias=True))


@pytest.mark.parametrize("columns", [32, 64, 128, 256])
def test_a_row_of_int4_has_two_scales_at_least(columns: int) -> None:
    # The kernel for one token, compiled, gives wrong products where it has one.
    layout = lay_out(PlainExperts(), StoredFormat.INT4, (columns, columns))
    for matrix in (layout.first, layout.down):
        assert matrix.scale_shape[1] >= 2
    assert lay_out(PlainExperts(), StoredFormat.INT8, (64, 64)).first.scale_shape[1] == 1


def test_a_group_may_be_chosen() -> None:
    layout = lay_out(PlainExperts(), StoredFormat.INT8, (64, 48), group=16)
    assert layout.down.scale_shape == (64, 3)
