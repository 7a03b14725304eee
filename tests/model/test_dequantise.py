"""The fast dequantisers give the bits of transformers' operations, and are used."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import Mxfp4Dequantize, dequantize_convertops

import zoo
from foreload.memory.checkpoint import CheckpointIndex
from foreload.model.architecture import build_meta_model, find_sites, read_architecture
from foreload.model.dequantise import BlockFp8, PackedFp4, guess_dequantiser
from foreload.model.plans import plan_checkpoint
from foreload.model.recipes import Source, derive_recipe

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

ROWS, GROUPS = 900, 4


def noise(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def same_bits(one: Tensor, other: Tensor) -> bool:
    same = one.view(torch.int16) == other.view(torch.int16)
    return bool((same | (one.isnan() & other.isnan())).all())


def fp4_sources() -> tuple[Source, Source]:
    return (
        Source("up_proj_blocks", torch.uint8, (1, ROWS, GROUPS, 16)),
        Source("up_proj_scales", torch.uint8, (1, ROWS, GROUPS)),
    )


@pytest.mark.parametrize("swapped", [False, True])
def test_every_byte_and_exponent_of_mxfp4(swapped: bool) -> None:
    sources = fp4_sources()[::-1] if swapped else fp4_sources()
    shape = (GROUPS * 32, ROWS)
    fast = guess_dequantiser(sources, [], shape, torch.bfloat16)
    assert isinstance(fast, PackedFp4)
    blocks, scales = noise(ROWS, GROUPS, 16), noise(ROWS, GROUPS)
    assert len(blocks.unique()) == len(scales.unique()) == 256
    parts = [blocks.flatten(), scales.flatten()]
    # transformers 5.17 always gives bfloat16
    names = inspect.signature(dequantize_convertops).parameters
    named = {"dtype": torch.bfloat16} if "dtype" in names else {}
    wanted = dequantize_convertops(blocks[None], scales[None], **named)[0]
    assert same_bits(fast(parts[::-1] if swapped else parts), wanted.detach())


def fp8_sources(scale: torch.dtype, end: str = "") -> tuple[Source, ...]:
    return (
        Source(f"gate.weight{end}", torch.float8_e4m3fn, (32, 48)),
        Source(f"gate.weight_scale_inv{end}", scale, (2, 3)),
        Source(f"up.weight{end}", torch.float8_e4m3fn, (64, 48)),
        Source(f"up.weight_scale_inv{end}", scale, (4, 3)),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shift", "end"), [(0, ""), (1, ""), (0, "$")])
def test_blocks_of_fp8_below_each_other(
    scale: torch.dtype, dtype: torch.dtype, shift: int, end: str
) -> None:
    sources = fp8_sources(scale, end)
    patterns = [source.pattern for source in sources]
    fast = guess_dequantiser(sources, patterns, (96, 48), dtype)
    assert isinstance(fast, BlockFp8)
    tensors: list[Tensor] = []
    parts = []
    for source in sources:
        weight = source.dtype.itemsize == 1
        value = noise(*source.shape) if weight else torch.rand(source.shape).to(scale)
        tensors.append(value.view(source.dtype))
        pad = torch.zeros(shift, dtype=torch.uint8)
        parts.append(torch.cat([pad, value.flatten().view(torch.uint8)])[shift:])
    operation: Any = Fp8Dequantize(None)
    wanted = [
        operation._dequantize_one(tensors[i], tensors[i + 1], output_dtype=dtype) for i in (0, 2)
    ]
    assert same_bits(fast(parts), torch.cat(wanted))


@pytest.mark.parametrize(
    ("sources", "shape", "dtype"),
    [
        (fp4_sources(), (GROUPS * 32, ROWS), torch.float32),
        (fp4_sources(), (ROWS, GROUPS * 31), torch.bfloat16),
        (fp4_sources()[:1], (GROUPS * 32, ROWS), torch.bfloat16),
        (fp8_sources(torch.uint8), (96, 48), torch.bfloat16),
        (fp8_sources(torch.float32)[:3], (96, 48), torch.bfloat16),
        (fp8_sources(torch.float32), (48, 96), torch.bfloat16),
    ],
)
def test_what_does_not_look_alike_is_left_to_transformers(
    sources: tuple[Source, ...], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    patterns = [source.pattern for source in sources]
    assert guess_dequantiser(sources, patterns, shape, dtype) is None


def test_a_wrong_guess_is_not_used() -> None:
    class Doubled(Mxfp4Dequantize):
        def convert(self, *args: Any, **kwargs: Any) -> Any:
            return {key: 2 * value for key, value in super().convert(*args, **kwargs).items()}

    sources = fp4_sources()
    sources = tuple(
        Source(s.pattern.replace("up_proj", "down_proj"), s.dtype, s.shape) for s in sources
    )
    for operation, expected in ((Mxfp4Dequantize(None), PackedFp4), (Doubled(None), type(None))):
        rule = SimpleNamespace(
            operations=[operation],
            source_patterns=[source.pattern for source in sources],
            target_patterns=["down_proj"],
        )
        recipe = derive_recipe(
            "experts.down_proj",
            sources,
            rule,
            shape=(GROUPS * 32, ROWS),
            dtype=torch.bfloat16,
            config=None,
        )
        assert isinstance(recipe.shortcut, expected)


@pytest.mark.parametrize(
    ("kind", "arch", "expected"),
    [
        ("fp8", "qwen3_moe", BlockFp8),
        ("fp8", "deepseek_v3", BlockFp8),
        ("mxfp4", "gpt_oss", PackedFp4),
    ],
)
def test_real_layouts_take_the_short_way(
    tmp_path: Path, kind: Any, arch: str, expected: type
) -> None:
    index = CheckpointIndex.open(zoo.save_quantised(kind, arch, tmp_path).path)
    architecture = read_architecture(index)
    meta = build_meta_model(architecture)
    plan = plan_checkpoint(meta, find_sites(meta, architecture), index, architecture)
    convert: Any = plan.experts[0][0].convert
    for tensor, recipe in zip(convert.tensors, convert.recipes, strict=True):
        if not tensor.name.endswith("bias"):
            assert isinstance(recipe.shortcut, expected), tensor.name
