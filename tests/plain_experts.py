"""Experts modules with every layout flag, as transformers' are, but without weights or a model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from foreload.ops.reference import SumRule, accumulate, expert_forward, group_by_expert

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from foreload.types import Routing


@dataclass
class PlainExperts:
    """What the experts forward asks of a module."""

    num_experts: int = 6
    has_gate: bool = True
    is_transposed: bool = False
    is_concatenated: bool = True
    has_bias: bool = False
    has_post_expert_norm: bool = False
    act_fn: Callable[[Tensor], Tensor] = field(default=F.silu)
    post_expert_norm: Callable[[Tensor], Tensor] = field(
        default=lambda rows: F.rms_norm(rows, rows.shape[-1:])
    )

    def split(self, products: Tensor) -> tuple[Tensor, Tensor]:
        if self.is_concatenated:
            gate, up = products.chunk(2, dim=-1)
            return gate, up
        return products[..., ::2], products[..., 1::2]

    def _apply_gate(self, products: Tensor) -> Tensor:
        gate, up = self.split(products)
        return self.act_fn(gate) * up


@dataclass
class ClampedExperts(PlainExperts):
    """Gates as gpt-oss does."""

    limit: float = 7.0
    alpha: float = 1.702

    def _apply_gate(self, products: Tensor) -> Tensor:
        gate, up = self.split(products)
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return (up + 1) * (gate * torch.sigmoid(gate * self.alpha))


# Every way in which modules of transformers differ, by what is special.
KINDS: Mapping[str, PlainExperts] = {
    "gated": PlainExperts(),
    "ungated": PlainExperts(has_gate=False, act_fn=lambda rows: F.relu(rows).square()),
    "transposed": PlainExperts(is_transposed=True),
    "gpt-oss": ClampedExperts(is_transposed=True, is_concatenated=False, has_bias=True),
    "interleaved": PlainExperts(is_concatenated=False, act_fn=F.gelu),
    "biased": PlainExperts(
        has_gate=False, has_bias=True, act_fn=lambda x: F.gelu(x, approximate="tanh")
    ),
    "unknown": PlainExperts(act_fn=torch.sin),
    "normed": PlainExperts(has_post_expert_norm=True, act_fn=F.relu),
}


def shapes_of(experts: PlainExperts, hidden: int, intermediate: int) -> dict[str, tuple[int, ...]]:
    """Give the parameters' shapes without the experts dimension."""
    rows = intermediate * (2 if experts.has_gate else 1)
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    matrices = {first: (rows, hidden), "down_proj": (hidden, intermediate)}
    shapes: dict[str, tuple[int, ...]] = {
        name: shape[::-1] if experts.is_transposed else shape for name, shape in matrices.items()
    }
    if experts.has_bias:
        shapes |= {f"{name}_bias": (shape[0],) for name, shape in matrices.items()}
    return shapes


def random_weights(
    experts: PlainExperts, hidden: int, intermediate: int, seed: int
) -> dict[str, Tensor]:
    """Make one expert's parameters, of a size that keeps outputs near one."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) * (2 / max(shape) ** 0.5)
        for name, shape in shapes_of(experts, hidden, intermediate).items()
    }


def reference(
    experts: PlainExperts,
    weights: Sequence[Mapping[str, Tensor]],
    hidden_states: Tensor,
    routing: Routing,
    rule: SumRule,
) -> Tensor:
    """Compute a layer by `ops.reference` from plain parameters."""
    index, shares = routing
    groups = group_by_expert(index, experts.num_experts)
    outputs = {}
    for group in groups:
        output = expert_forward(experts, hidden_states[group.token], weights[group.expert])
        outputs[group.expert] = output * shares[group.token, group.position, None]
    return accumulate(hidden_states, shares.dtype, groups, outputs, rule)
