"""The shared words add up."""

from __future__ import annotations

import dataclasses

import pytest

from foreload.types import ExpertKey, ExpertPlan, ExpertTensor, Priority, Span


def test_a_plan_counts_what_is_read_and_what_is_kept() -> None:
    spans = (Span("a", 0, 100), Span("b", 50, 30))
    tensors = (ExpertTensor("up", "float32", (4,), 16), ExpertTensor("down", "int8", (7,), 7))
    plan = ExpertPlan(spans, tensors)
    assert (plan.read_bytes, plan.num_bytes) == (130, 23)
    assert plan.convert is None


def test_keys_are_their_layer_and_expert() -> None:
    assert ExpertKey(2, 5) == (2, 5)
    assert sorted([ExpertKey(1, 0), ExpertKey(0, 9)]) == [(0, 9), (1, 0)]


def test_demands_go_before_prefetches() -> None:
    assert Priority.DEMAND < Priority.PREFETCH


def test_plans_cannot_be_changed() -> None:
    plan = ExpertPlan((Span("a", 0, 1),), ())
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.spans = ()  # type: ignore[misc]
    assert hash(plan) == hash(ExpertPlan((Span("a", 0, 1),), ()))
