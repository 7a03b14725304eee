"""Checks at load time that foreload sums experts as the model's own eager experts do.

Architectures differ in the element type they sum in. Instead of knowing them by name, a small
stand-in of each experts class, with random weights, runs its own eager forward, and the rule that
reproduces it bit for bit is kept. No rule, no service: results are never quietly different.
"""

from __future__ import annotations

import copy
import inspect
from typing import TYPE_CHECKING, Any

import torch

from foreload.errors import UnsupportedModelError
from foreload.model.sites import expert_parameters
from foreload.ops.reference import SumRule, accumulate, expert_forward, group_by_expert

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from foreload.model.sites import MoeSite

__all__ = ["find_sum_rule", "find_sum_rules"]

_NUM_EXPERTS = 6
_TOP_K = 4
"""More than two: a sum of two terms is rounded to the same value in either element type."""
_INNER = 8
_TOKENS = 16


def find_sum_rules(sites: Sequence[MoeSite], dtype: torch.dtype) -> list[SumRule]:
    """Give each site's rule; sites of one class share a check.

    Raises:
        UnsupportedModelError: No rule reproduces the model's own experts.
    """
    known: dict[type, SumRule] = {}
    for site in sites:
        if type(site.experts) not in known:
            known[type(site.experts)] = find_sum_rule(site.experts, dtype)
    return [known[type(site.experts)] for site in sites]


def find_sum_rule(experts: nn.Module, dtype: torch.dtype) -> SumRule:
    """Find the element type in which a class of experts sums.

    Args:
        experts: The experts module; its weights are not needed.
        dtype: Element type of the model.

    Raises:
        UnsupportedModelError: No rule reproduces the class's eager forward bit for bit.

    Cost:
        A few forwards of six experts, eight wide.
    """
    stand_in, weights = _make_stand_in(experts, dtype)
    eager = inspect.unwrap(type(experts).forward)
    fitting = list(SumRule)
    for weights_dtype in (dtype, torch.float32):
        hidden, index, shares = _make_input(stand_in, dtype, weights_dtype)
        with torch.no_grad():
            wanted = eager(stand_in, hidden, index, shares)
            groups = group_by_expert(index, _NUM_EXPERTS)
            outputs = {}
            for group in groups:
                own = {name: tensor[group.expert] for name, tensor in weights.items()}
                output = expert_forward(stand_in, hidden[group.token], own)
                outputs[group.expert] = output * shares[group.token, group.position, None]
            fitting = [
                rule
                for rule in fitting
                if torch.equal(accumulate(hidden, shares.dtype, groups, outputs, rule), wanted)
            ]
    if not fitting:
        raise UnsupportedModelError(
            f"{type(experts).__name__} computes its experts in a way foreload does not reproduce",
            hint="run this model with transformers itself, and report it to foreload",
        )
    return fitting[0]


def _make_stand_in(experts: nn.Module, dtype: torch.dtype) -> tuple[Any, dict[str, Tensor]]:
    """Copy the module with few, narrow, random experts in place of its own."""
    before, after = (2, 1) if experts.is_transposed else (1, 2)
    inner_axis = {
        "gate_up_proj": before,
        "gate_up_proj_bias": 1,
        "up_proj": before,
        "up_proj_bias": 1,
        "down_proj": after,
    }
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, tensor in expert_parameters(experts).items():
        shape = [_NUM_EXPERTS, *tensor.shape[1:]]
        if name in inner_axis:
            shape[inner_axis[name]] = 2 * _INNER if name.startswith("gate_up") else _INNER
        weights[name] = torch.randn(shape, generator=generator).to(dtype) * 0.3
    stand_in = copy.copy(experts)
    stand_in.__dict__ = {**experts.__dict__, **weights, "num_experts": _NUM_EXPERTS}
    return stand_in, weights


def _make_input(
    stand_in: Any, dtype: torch.dtype, weights_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    down = stand_in.down_proj
    width = down.shape[2] if stand_in.is_transposed else down.shape[1]
    hidden = torch.randn(_TOKENS, width, generator=generator).to(dtype)
    index = torch.rand(_TOKENS, _NUM_EXPERTS, generator=generator).argsort(-1)[:, :_TOP_K]
    shares = torch.rand(_TOKENS, _TOP_K, generator=generator).to(weights_dtype)
    return hidden, index, shares
