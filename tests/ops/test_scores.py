"""The rule that makes weights of logits is found from a router's own answers, or none is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F

from foreload.ops.scores import ScoreRule, find_scores

if TYPE_CHECKING:
    from torch import Tensor

SCORES = {
    ScoreRule.SOFTMAX: lambda logits: logits.softmax(-1),
    ScoreRule.SIGMOID: torch.sigmoid,
    ScoreRule.SQRT_SOFTPLUS: lambda logits: F.softplus(logits).sqrt(),
}


def logits(num_tokens: int = 6, num_experts: int = 16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(num_tokens, num_experts, generator=generator)


def route(scores: Tensor, *, normalise: bool, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    weights, index = scores.topk(4, -1)
    if normalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return index, scale * weights


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", SCORES)
def test_a_rule_is_found_with_and_without_normalisation_and_scale(
    rule: ScoreRule, dtype: torch.dtype, scale: float, normalise: bool
) -> None:
    index, weights = route(SCORES[rule](logits()), normalise=normalise, scale=scale)
    found = find_scores(logits(), index, weights.to(dtype))
    assert found is not None
    assert found.rule is rule
    assert found.is_normalised is normalise


def test_routers_may_give_scores_for_logits() -> None:
    given = logits().softmax(-1) ** 2
    found = find_scores(given, *route(given, normalise=True))
    assert found is not None
    assert found.rule is ScoreRule.GIVEN


def test_choosing_with_a_bias_or_in_groups_does_not_hide_the_rule() -> None:
    scores = logits().sigmoid()
    biased = scores + torch.linspace(-1, 1, 16)
    index = biased.topk(4, -1).indices
    found = find_scores(logits(), index, scores.gather(-1, index))
    assert found is not None
    assert found == (ScoreRule.SIGMOID, False)


def test_weights_of_another_kind_have_no_rule() -> None:
    index, _ = route(logits(), normalise=True)
    noise = torch.rand(index.shape, generator=torch.Generator().manual_seed(1)) + 0.1
    assert find_scores(logits(), index, noise) is None


@pytest.mark.parametrize("case", ["one token", "one expert", "a zero", "a placeholder"])
def test_answers_that_tell_nothing_have_no_rule(case: str) -> None:
    given = logits()
    index, weights = route(given.softmax(-1), normalise=True)
    if case == "one token":
        given, index, weights = given[:1], index[:1], weights[:1]
    elif case == "one expert":
        index, weights = index[:, :1], weights[:, :1]
    elif case == "a zero":
        weights[2, 3] = 0
    else:
        index[1, 1] = given.shape[-1]
    assert find_scores(given, index, weights) is None


@pytest.mark.parametrize("rule", SCORES)
def test_scores_are_proportional_to_the_weights(rule: ScoreRule) -> None:
    index, weights = route(SCORES[rule](logits()), normalise=True, scale=2.5)
    found = find_scores(logits(), index, weights)
    assert found is not None
    for token in range(len(index)):
        scores = torch.tensor(found.scores(logits()[token]))
        assert scores.shape == (16,)
        ratio = scores[index[token]] / weights[token]
        assert torch.allclose(ratio, ratio[:1].expand(4), rtol=1e-4)


@pytest.mark.parametrize("rule", ScoreRule)
def test_gradients_reach_the_logits(rule: ScoreRule) -> None:
    given = logits().abs().requires_grad_()
    rule.log_scores(given)[:, 0].sum().backward()
    assert given.grad is not None
    assert given.grad.isfinite().all()
    assert bool((given.grad[:, 0] != 0).all())
