"""Who is executed on a device: by the host's rules, whatever lies in the slots."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fakes import finish
from foreload.model.device_policy import DevicePolicy
from foreload.model.runtime import ExpertRuntime
from foreload.ops.device_tables import ABSENT
from foreload.ops.scores import LayerScores, ScoreRule
from foreload.schedule.policy import Exact, Speculate, SpeculateWhen
from foreload.types import RouterOutput, Routing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

EXPERTS, LAYERS = 12, 2


def slots_of(*experts: int, num_experts: int = EXPERTS) -> Tensor:
    """Give the slots of a layer that holds these experts."""
    slots = torch.full((num_experts,), ABSENT, dtype=torch.int32)
    slots[list(experts)] = torch.arange(len(experts), dtype=torch.int32)
    return slots


def ask_host(
    policy: SpeculateWhen,
    true: Routing,
    experts: Sequence[int],
    rule: LayerScores | None,
    logits: Tensor | None,
    num_experts: int = EXPERTS,
) -> Routing:
    """Ask the host's loop, with these experts in memory."""
    tiers = SimpleNamespace(
        poll=lambda: None,
        is_arriving=lambda key: key.expert in experts,
        is_ready=lambda key: key.expert in experts,
    )
    runtime: Any = SimpleNamespace(_tiers=tiers, score_rules=[rule] * LAYERS)
    return ExpertRuntime._choose_present(runtime, policy, 1, true, logits, num_experts)


def pairs(routing: Routing, num_experts: int = EXPERTS) -> list[tuple[int, float]]:
    """Give whom a routing executes, sorted, with the very weights."""
    index, weights = routing.top_k_index[0].tolist(), routing.top_k_weights[0].tolist()
    found = zip(index, weights, strict=True)
    return sorted((e, w) for e, w in found if e != num_experts or w != 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", [None, *ScoreRule])
def test_it_chooses_bit_for_bit_as_the_host_does(
    rule: ScoreRule | None, dtype: torch.dtype
) -> None:
    chance = torch.Generator().manual_seed(0)
    num_changed = 0
    for number in range(150):
        top_k = int(torch.randint(1, 7, (), generator=chance))
        shape = (1, EXPERTS)
        logits = (2 * torch.randn(shape, generator=chance)).to(dtype)
        if rule is ScoreRule.GIVEN:
            logits = logits.softmax(-1)
        if number % 5 == 0:
            logits = logits.round()
        scores = rule.log_scores(logits).exp() if rule else torch.rand(shape, generator=chance)
        weights, index = scores.topk(top_k)
        is_normalised = number % 2 == 0
        if is_normalised:
            weights = weights / weights.sum()
        if number % 7 == 0 and top_k > 1:
            index[0, -1] = EXPERTS + number % 2 if number % 14 == 0 else index[0, 0]
        true = Routing(index, weights.to(dtype))
        size = int(torch.randint(0, EXPERTS, (), generator=chance))
        experts = torch.randperm(EXPERTS, generator=chance)[:size].tolist()
        policy = SpeculateWhen(float(torch.rand((), generator=chance)) * (number % 3 > 0))
        layer_rule = None if rule is None else LayerScores(rule, is_normalised)
        device = DevicePolicy(policy, "cpu", [layer_rule] * LAYERS)
        device.see_logits(1, logits)
        found = device.decide(1, true, slots_of(*experts))
        wanted = ask_host(policy, true, experts, layer_rule, logits)
        assert pairs(found) == pairs(wanted), number
        lost = sum(e not in wanted.top_k_index[0].tolist() for e in index[0].tolist())
        assert device.pairs.tolist() == [top_k, lost]
        num_changed += lost > 0
        assert found.top_k_index.shape == true.top_k_index.shape
    assert num_changed > 40


def test_layers_may_have_fewer_experts_than_others() -> None:
    few = EXPERTS - 4
    true = Routing(torch.tensor([[0, 1]]), torch.tensor([[0.75, 0.25]]))
    logits = torch.zeros(1, few)
    rule = LayerScores(ScoreRule.SOFTMAX, is_normalised=True)
    device = DevicePolicy(SpeculateWhen(0.5), "cpu", [rule] * LAYERS)
    device.see_logits(1, logits)
    found = device.decide(1, true, slots_of(0, 6, num_experts=few))
    wanted = ask_host(SpeculateWhen(0.5), true, [0, 6], rule, logits, few)
    assert pairs(found, few) == pairs(wanted, few)
    assert found.top_k_index.tolist() == [[0, 6]]


TRUE = Routing(torch.tensor([[0, 1]]), torch.tensor([[0.75, 0.25]]))
GUESS = RouterOutput(torch.tensor([[1, 2]]), torch.tensor([[0.5, 0.5]]), None)


@pytest.mark.parametrize("policy", [Exact(), SpeculateWhen(1.0), Speculate()])
def test_the_true_router_decides_where_nothing_else_was_asked_for(policy: Any) -> None:
    device = DevicePolicy(policy, "cpu")
    assert device.decide(1, TRUE, slots_of()) is TRUE
    assert device.pairs.tolist() == [0 if isinstance(policy, Exact) else 2, 0]


@pytest.mark.parametrize("policy", [Speculate(), SpeculateWhen(0.5)])
def test_prompts_and_several_tokens_follow_the_true_router(policy: Any) -> None:
    device = DevicePolicy(policy, "cpu")
    device.see_guess(1, GUESS)
    assert device.decide(1, TRUE, slots_of(), is_prefill=True) is TRUE
    two = Routing(*(rows.expand(2, -1) for rows in TRUE))
    assert device.decide(1, two, slots_of()) is two
    assert device.pairs.tolist() == [6, 0]


def test_a_guess_is_executed_once_and_in_its_layer_only() -> None:
    device = DevicePolicy(Speculate(), "cpu")
    device.see_guess(1, GUESS)
    found = device.decide(1, TRUE, slots_of())
    assert torch.equal(found.top_k_index, GUESS.top_k_index)
    assert device.pairs.tolist() == [2, 1]
    assert device.decide(1, TRUE, slots_of()) is TRUE
    device.see_guess(1, GUESS)
    assert device.decide(0, TRUE, slots_of()) is TRUE
    device.see_guess(1, GUESS._replace(top_k_weights=None))
    assert device.decide(1, TRUE, slots_of()) is TRUE, "without weights it cannot be"
    finish(lambda: device.see_guess(1, GUESS))
    assert device.decide(1, TRUE, slots_of()) is TRUE, "it was another thread's"
    device.see_guess(1, GUESS)
    device.forget()
    assert device.decide(1, TRUE, slots_of()) is TRUE


def test_logits_are_used_once_and_by_their_thread_only() -> None:
    rule = LayerScores(ScoreRule.SOFTMAX, is_normalised=True)
    device = DevicePolicy(SpeculateWhen(0.5), "cpu", [rule] * LAYERS)

    def decide() -> list[int]:
        return device.decide(1, TRUE, slots_of(0, 5)).top_k_index[0].tolist()

    device.see_logits(1, torch.zeros(1, EXPERTS))
    assert [decide(), decide()] == [[0, 5], [0, EXPERTS]]
    finish(lambda: device.see_logits(1, torch.zeros(1, EXPERTS)))
    assert decide() == [0, EXPERTS]
    device.see_logits(1, torch.zeros(1, EXPERTS))
    device.forget()
    assert decide() == [0, EXPERTS]
