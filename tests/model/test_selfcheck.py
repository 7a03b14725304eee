"""Every experts class shows by itself in which element type it sums, or is refused."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoo
from foreload.errors import UnsupportedModelError
from foreload.model import selfcheck
from foreload.model.hf import strip_experts
from foreload.model.selfcheck import find_sum_rule, find_sum_rules
from foreload.ops.reference import SumRule

# What is not the type of the hidden states in bfloat16; None where nothing reproduces the class.
IN_BFLOAT16 = {
    "inkling2": SumRule.FLOAT32,
    "inkling2_loop": SumRule.FLOAT32,
    "nemotron_h": SumRule.WEIGHTS,
    # Computes in float32 throughout; the engine refuses the architecture for other reasons too.
    "openai_privacy_filter": None,
}


def make_experts(arch: str, dtype: torch.dtype = torch.bfloat16) -> list[Any]:
    """Give one experts module of each class of an architecture, on meta, without weights."""
    with torch.device("meta"):
        model = zoo.model_class(arch)._from_config(zoo.tiny_config(arch), dtype=dtype)
    strip_experts(model)
    found = {type(module): module for module in model.modules() if zoo.is_experts(module)}
    for experts in found.values():
        # Whatever an experts module has beside its experts is loaded with the dense weights.
        for module in experts.modules():
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(torch.ones(parameter.shape, dtype=dtype)))
    return list(found.values())


@pytest.mark.parametrize("arch", zoo.buildable_architectures())
def test_every_architecture_shows_its_rule(arch: str) -> None:
    modules = make_experts(arch)
    assert modules
    for experts in modules:
        assert experts.down_proj.is_meta, "no weights are needed"
        # Where all types are one, the rules are one.
        assert find_sum_rule(experts, torch.float32) is SumRule.HIDDEN
        expected = IN_BFLOAT16.get(arch, SumRule.HIDDEN)
        if expected is not None:
            assert find_sum_rule(experts, torch.bfloat16) is expected
            continue
        with pytest.raises(UnsupportedModelError, match=type(experts).__name__):
            find_sum_rule(experts, torch.bfloat16)


def plain_class() -> Any:
    """Give a class with mixtral's arithmetic, to be changed."""
    (experts,) = make_experts("mixtral")
    experts.__class__ = type("OwnExperts", (type(experts),), {})
    return experts


def test_float32_is_told_from_the_routing_weights_type() -> None:
    """Sums of two terms would not tell: both types round them to the same value."""
    experts = plain_class()

    def forward(self: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        total = torch.zeros_like(hidden, dtype=torch.float32)
        for expert in range(self.num_experts):
            token, place = torch.where(index == expert)
            row = nn.functional.linear(hidden[token], self.gate_up_proj[expert])
            row = nn.functional.linear(self._apply_gate(row), self.down_proj[expert])
            total.index_add_(0, token, (row * weights[token, place, None]).float())
        return total.to(hidden.dtype)

    type(experts).forward = forward
    assert find_sum_rule(experts, torch.bfloat16) is SumRule.FLOAT32


@pytest.mark.parametrize("change", ["scaled", "weighted before"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_another_arithmetic_is_refused(change: str, dtype: torch.dtype) -> None:
    experts = plain_class()
    eager = selfcheck.inspect.unwrap(type(experts).forward)

    def forward(self: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        if change == "scaled":
            result: Tensor = eager(self, hidden, index, weights) * 1.01
            return result
        total = torch.zeros_like(hidden)
        for place in range(index.shape[1]):
            one = slice(place, place + 1)
            total += eager(self, hidden, index[:, one], weights[:, one])
        return total

    type(experts).forward = forward
    with pytest.raises(UnsupportedModelError, match="OwnExperts computes its experts in a way"):
        find_sum_rule(experts, dtype)


def test_the_module_itself_is_left_as_it_was() -> None:
    (experts,) = make_experts("gpt_oss")
    before = copy.copy(experts.__dict__)
    find_sum_rule(experts, torch.bfloat16)
    assert experts.__dict__.keys() == before.keys()
    assert all(experts.__dict__[name] is value for name, value in before.items())


def test_stand_ins_are_small_whatever_the_layout() -> None:
    for arch in ("mixtral", "gpt_oss", "nemotron_h"):
        (experts,) = make_experts(arch)
        width = selfcheck.expert_parameters(experts)["down_proj"].shape[
            2 if experts.is_transposed else 1
        ]
        stand_in, weights = selfcheck._make_stand_in(experts, torch.bfloat16)
        assert stand_in.num_experts == selfcheck._NUM_EXPERTS
        for name, weight in weights.items():
            assert weight.dtype is torch.bfloat16
            assert weight.shape[0] == selfcheck._NUM_EXPERTS
            assert set(weight.shape[1:]) <= {width, selfcheck._INNER, 2 * selfcheck._INNER}, name
            assert getattr(stand_in, name) is weight


def test_sites_of_one_class_share_a_check(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[Any] = []
    rules = {"MixtralExperts": SumRule.HIDDEN, "NemotronHExperts": SumRule.WEIGHTS}

    def find(experts: Any, dtype: torch.dtype) -> SumRule:
        checked.append(experts)
        return rules[type(experts).__name__]

    monkeypatch.setattr(selfcheck, "find_sum_rule", find)
    one, other = make_experts("mixtral")[0], make_experts("nemotron_h")[0]
    sites: Any = [SimpleNamespace(experts=experts) for experts in (one, other, one)]
    assert find_sum_rules(sites, torch.bfloat16) == [
        SumRule.HIDDEN,
        SumRule.WEIGHTS,
        SumRule.HIDDEN,
    ]
    assert checked == [one, other]
