"""Recipes are learned from what operations do, not from what they are called."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from foreload.errors import CheckpointError, UnsupportedModelError
from foreload.model.recipes import ConvertExpert, Piece, Recipe, Source, derive_recipe, torch_dtype
from foreload.types import ExpertTensor

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

NAME = "layers.0.experts.up"
ROWS, COLUMNS = 4, 6


class Operation:
    def __init__(self, work: Callable[..., Tensor]) -> None:
        self.work = work

    def convert(self, collected: dict[str, list[Tensor]], **context: Any) -> dict[str, Tensor]:
        return {"experts.up": self.work(*(tensors[0] for tensors in collected.values()))}


def converter(work: Callable[..., Tensor], *patterns: str) -> Any:
    return SimpleNamespace(
        operations=[Operation(work)], source_patterns=patterns, target_patterns=["experts.up"]
    )


def source(pattern: str, rows: int = ROWS, dtype: torch.dtype = torch.float32) -> Source:
    return Source(pattern, dtype, (rows, COLUMNS))


def derive(work: Callable[..., Tensor], *sources: Source, shape: tuple[int, ...]) -> Recipe:
    rule = converter(work, *(s.pattern for s in sources))
    return derive_recipe(NAME, sources, rule, shape=shape, dtype=torch.float32, config=None)


def build(recipe: Recipe, *values: Tensor) -> Tensor:
    return recipe.build([value.contiguous().view(-1).view(torch.uint8) for value in values])


def test_a_concatenation_is_copies() -> None:
    recipe = derive(lambda a, b: torch.cat([b, a]), source("a"), source("b"), shape=(8, COLUMNS))
    size = ROWS * COLUMNS * 4
    assert recipe.pieces == (Piece(1, 0, size), Piece(0, 0, size))
    assert recipe.is_copy
    a, b = torch.randn(2, ROWS, COLUMNS)
    assert torch.equal(build(recipe, a, b), torch.cat([b, a]))


def test_a_part_of_a_source_is_a_copy_of_that_part() -> None:
    recipe = derive(lambda a: a[1:3], source("a"), shape=(2, COLUMNS))
    assert recipe.pieces == (Piece(0, COLUMNS * 4, 2 * COLUMNS * 4),)


@pytest.mark.parametrize(
    "work",
    [
        lambda a: a.t().contiguous(),
        lambda a: a + 1,
        lambda a: -a,
        lambda a: a * 2.0,
        lambda a: a[:5] + 1,
    ],
    ids=["transpose", "shift", "negate", "scale", "shifted-part"],
)
def test_more_than_copying_runs_the_operations(work: Callable[[Tensor], Tensor]) -> None:
    big = Source("a", torch.float32, (96, 80))
    value = torch.randn(96, 80)
    recipe = derive(work, big, shape=tuple(work(value).shape))
    assert recipe.pieces is None
    assert not recipe.is_copy
    assert torch.equal(build(recipe, value), work(value))


def test_sources_of_different_types_run_the_operations() -> None:
    recipe = derive(
        lambda a, s: a.float() * s.float()[:, :1],
        source("a", dtype=torch.float8_e4m3fn),
        source("s"),
        shape=(ROWS, COLUMNS),
    )
    assert recipe.pieces is None


def test_a_result_of_another_shape_is_an_error() -> None:
    with pytest.raises(CheckpointError, match=r"shape \[6, 4\] per expert, the model needs"):
        derive(lambda a: a.t().contiguous() + 0.5, source("a"), shape=(5, COLUMNS))
    with pytest.raises(CheckpointError, match=r"shape \[4, 6\] per expert"):
        derive_recipe(NAME, (source("a"),), None, shape=(3, 3), dtype=torch.float32, config=None)


def test_operations_that_fail_are_an_error() -> None:
    with pytest.raises(CheckpointError, match="cannot be converted"):
        derive(lambda a: a.view(7, 7), source("a"), shape=(7, 7))


def test_two_sources_without_a_rule_are_an_error() -> None:
    with pytest.raises(CheckpointError, match="2 sources"):
        derive_recipe(
            NAME,
            (source("a"), source("b")),
            None,
            shape=(ROWS, COLUMNS),
            dtype=torch.float32,
            config=None,
        )


def test_a_converted_expert_may_begin_at_any_byte() -> None:
    value = torch.randn(ROWS, COLUMNS)
    recipe = derive_recipe(
        NAME, (source("a"),), None, shape=(ROWS, COLUMNS), dtype=torch.float32, config=None
    )
    tensor = ExpertTensor("up", "float32", (ROWS, COLUMNS), value.nbytes)
    convert = ConvertExpert((tensor,), (recipe,), (((0, 3),),))
    span = torch.cat([torch.zeros(3, dtype=torch.uint8), value.view(-1).view(torch.uint8)])
    assert torch.equal(convert([span])["up"], value)


def test_an_unknown_element_type_is_refused() -> None:
    assert torch_dtype("BF16") is torch.bfloat16
    with pytest.raises(UnsupportedModelError, match="type F4"):
        torch_dtype("F4")
