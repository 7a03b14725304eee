"""Grouping and summing agree with transformers' eager experts, bit for bit."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import zoo
from foreload.ops.reference import (
    ExpertGroup,
    SumRule,
    accumulate,
    expert_forward,
    group_by_expert,
)


def group_naively(index: list[list[int]], num_experts: int) -> list[tuple[int, list, list]]:
    """Group as transformers' eager experts do: by expert, then place in the top-k, then token."""
    groups = []
    for expert in range(num_experts):
        rows = [
            (token, place)
            for place in range(len(index[0]))
            for token in range(len(index))
            if index[token][place] == expert
        ]
        if rows:
            groups.append((expert, [token for token, _ in rows], [place for _, place in rows]))
    return groups


def plain(groups: list[ExpertGroup]) -> list[tuple[int, list, list]]:
    return [(group.expert, group.token.tolist(), group.position.tolist()) for group in groups]


@given(st.data())
def test_groups_are_those_of_a_naive_loop(data: st.DataObject) -> None:
    num_experts = data.draw(st.integers(1, 6))
    top_k = data.draw(st.integers(1, 4))
    # duplicates within a token, and the sentinels of expert parallelism
    row = st.lists(st.integers(0, num_experts + 1), min_size=top_k, max_size=top_k)
    index = data.draw(st.lists(row, min_size=1, max_size=7))
    assert plain(group_by_expert(torch.tensor(index), num_experts)) == group_naively(
        index, num_experts
    )


@pytest.mark.parametrize(
    "index", [[[3, 0, 2]], [[1, 1, 1]], [[4, 0, 4]], [[4, 4, 4]], [[4, 3, 2], [3, 4, 2]]], ids=str
)
def test_duplicates_and_sentinels_are_grouped_too(index: list[list[int]]) -> None:
    assert plain(group_by_expert(torch.tensor(index), 4)) == group_naively(index, 4)


def test_groups_index_like_the_input() -> None:
    for rows in ([[2, 0]], [[2, 0], [0, 1]]):
        for group in group_by_expert(torch.tensor(rows), 4):
            assert group.token.dtype == group.position.dtype == torch.int64
            assert group.token.shape == group.position.shape


def make_experts(family: str, dtype: torch.dtype) -> tuple[torch.nn.Module, int]:
    model = zoo.build_family(family, dtype)
    experts = next(module for module in model.modules() if zoo.is_experts(module))
    return experts, model.config.num_experts_per_tok


def run_eager(experts: torch.nn.Module, *inputs: Tensor) -> Tensor:
    """Run the experts as transformers does, in its eager order."""
    experts.config._experts_implementation = "eager"
    with torch.no_grad():
        return experts(*inputs)


def run_ours(
    experts: torch.nn.Module, hidden: Tensor, index: Tensor, weights: Tensor, order: list[int]
) -> Tensor:
    """Run the experts in `order`, as if they had arrived so."""
    groups = group_by_expert(index, experts.num_experts)
    by_expert = {group.expert: group for group in groups}
    parameters = dict(experts.named_parameters())
    outputs = {}
    with torch.no_grad():
        for expert in order:
            if expert in by_expert:
                group = by_expert[expert]
                own = {name: value[expert] for name, value in parameters.items()}
                output = expert_forward(experts, hidden[group.token], own)
                outputs[expert] = output * weights[group.token, group.position, None]
        return accumulate(hidden, weights.dtype, groups, outputs)


@pytest.mark.parametrize("family", zoo.SEVEN_FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_tokens", [1, 9])
def test_experts_in_any_order_give_what_eager_experts_give(
    family: str, dtype: torch.dtype, num_tokens: int
) -> None:
    experts, top_k = make_experts(family, dtype)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, 64, generator=generator).to(dtype)
    scores = torch.rand(num_tokens, experts.num_experts, generator=generator)
    weights, index = scores.topk(top_k)
    weights = weights.to(dtype)
    wanted = run_eager(experts, hidden, index, weights)
    order = list(range(experts.num_experts))
    for seed in range(3):
        random.Random(seed).shuffle(order)
        result = run_ours(experts, hidden, index, weights, order)
        assert result.dtype == wanted.dtype
        assert torch.equal(result, wanted), f"order {order}"


def test_summing_in_another_order_would_differ() -> None:
    """The order matters at all: else the tests above would pin nothing down."""
    experts, top_k = make_experts("qwen3_moe", torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 64, generator=generator).bfloat16()
    weights, index = torch.rand(9, experts.num_experts, generator=generator).topk(top_k)
    groups = group_by_expert(index, experts.num_experts)
    outputs = {g.expert: torch.randn(len(g.token), 64, generator=generator) for g in groups}
    assert weights.shape == index.shape
    forth = accumulate(hidden, hidden.dtype, groups, outputs)
    back = accumulate(hidden, hidden.dtype, groups[::-1], outputs)
    assert not torch.equal(forth, back)
    assert torch.allclose(forth.float(), back.float(), atol=0.1)


@pytest.mark.parametrize(
    ("rule", "wanted"),
    [(SumRule.HIDDEN, 256.0), (SumRule.WEIGHTS, 258.0), (SumRule.FLOAT32, 258.0)],
)
@pytest.mark.parametrize("num_tokens", [1, 2])
def test_the_rule_decides_in_which_type_is_summed(
    rule: SumRule, wanted: float, num_tokens: int
) -> None:
    # 256 + 1 is 256 in bfloat16, and 256 + 1 + 1 is 258
    hidden = torch.zeros(num_tokens, 1, dtype=torch.bfloat16)
    groups = group_by_expert(torch.tensor([[0, 1, 2]] * num_tokens), 3)
    outputs = {e: torch.full((num_tokens, 1), v) for e, v in enumerate((256.0, 1.0, 1.0))}
    total = accumulate(hidden, torch.float32, groups, outputs, rule)
    assert total.dtype == torch.bfloat16
    assert total.flatten().tolist() == [wanted] * num_tokens


def test_a_token_chosen_twice_by_one_expert_is_counted_twice() -> None:
    hidden = torch.zeros(1, 3)
    groups = group_by_expert(torch.tensor([[2, 2]]), 4)
    outputs = {2: torch.tensor([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]])}
    assert accumulate(hidden, hidden.dtype, groups, outputs).tolist() == [[11.0, 22.0, 33.0]]


def test_tokens_without_experts_get_zero() -> None:
    hidden = torch.ones(2, 3)
    index = torch.tensor([[9, 9], [0, 9]])
    groups = group_by_expert(index, 4)
    total = accumulate(hidden, hidden.dtype, groups, {0: torch.full((1, 3), 5.0)})
    assert total.tolist() == [[0.0] * 3, [5.0] * 3]


def test_eager_is_not_one_of_the_registered_functions() -> None:
    """The reference is the decorated forward itself, not a function of the registry."""
    assert "eager" not in ALL_EXPERTS_FUNCTIONS.valid_keys()
