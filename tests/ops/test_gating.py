"""What a module computes between its products is found out, or honestly not."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import zoo
from foreload.ops.gating import Curve, Gating, KnownGatings, find_gating
from plain_experts import ClampedExperts, PlainExperts

INFINITY = math.inf


@pytest.mark.parametrize("curve", Curve, ids=lambda curve: curve.name)
@pytest.mark.parametrize("is_concatenated", [True, False])
def test_every_curve_is_told_from_the_others(curve: Curve, is_concatenated: bool) -> None:
    experts = PlainExperts(act_fn=curve, is_concatenated=is_concatenated)
    assert find_gating(experts) == Gating(curve, True, not is_concatenated)
    assert find_gating(replace(experts, has_gate=False)) == Gating(curve, False, False)


def test_limits_and_steepness_are_found_among_the_modules_numbers() -> None:
    experts = ClampedExperts(is_concatenated=False, limit=5.5, alpha=1.3)
    found = Gating(Curve.SILU, True, True, alpha=1.3, gate_max=5.5, up_max=5.5, up_offset=1.0)
    # The module does not divide by alpha: it multiplies by the gate itself, which is the same.
    assert find_gating(experts) == found


@pytest.mark.parametrize(
    "function",
    [torch.sin, lambda x: F.silu(x).clamp(max=7.0), F.mish, F.elu],
    ids=["sin", "clamped silu", "mish", "elu"],
)
def test_what_is_not_known_is_not_guessed(function: object) -> None:
    assert find_gating(PlainExperts(act_fn=function)) is None


def test_a_module_that_cannot_be_tried_is_left_alone() -> None:
    elsewhere, narrow = torch.ones(1, device="meta"), torch.ones(7)
    for own in (elsewhere, narrow):
        assert (
            find_gating(PlainExperts(act_fn=lambda values, own=own: F.silu(values) * own)) is None
        )


def test_a_module_that_is_broken_is_not_taken_for_one_that_is_unknown() -> None:
    with pytest.raises(TypeError, match="NoneType"):
        find_gating(PlainExperts(act_fn=None))


@pytest.mark.parametrize("family", zoo.SEVEN_FAMILIES)
def test_transformers_modules_are_known(family: str) -> None:
    model = zoo.build_family(family, torch.float32)
    experts = next(module for module in model.modules() if zoo.is_experts(module))
    gating = find_gating(experts)
    assert gating is not None
    assert gating.is_interleaved == (not experts.is_concatenated)
    products = 6 * torch.randn(50, 96, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(gating(products), experts._apply_gate(products))


def test_a_module_is_tried_once() -> None:
    calls = []

    def watched(values: torch.Tensor) -> torch.Tensor:
        calls.append(len(values))
        return F.silu(values)

    known = KnownGatings()
    first, second = PlainExperts(act_fn=watched), PlainExperts(act_fn=torch.sin)
    assert known.of(first) == Gating(Curve.SILU, True, False)
    tried = len(calls)
    assert known.of(second) is None
    assert known.of(first) == Gating(Curve.SILU, True, False)
    assert len(calls) == tried
