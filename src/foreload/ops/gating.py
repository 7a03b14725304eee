"""What an experts module computes between its two products, found out by trying it.

A kernel that computes it as well saves a pass over memory. No module is known by name here: what
answers like one of the curves below on a grid of numbers is that curve.
"""

from __future__ import annotations

import itertools
import math
from enum import IntEnum
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

__all__ = ["Curve", "Gating", "KnownGatings", "find_gating"]

_TOLERANCE = 1e-5
"""Relative to one plus the value; the two GELUs differ by 5e-4."""
_QUICK_GELU = 1.702


class Curve(IntEnum):
    """An activation."""

    SILU = 0
    GELU = 1
    GELU_TANH = 2
    RELU = 3
    RELU_SQUARED = 4

    def __call__(self, values: Tensor) -> Tensor:
        """Apply it."""
        match self:
            case Curve.SILU:
                return F.silu(values)
            case Curve.GELU:
                return F.gelu(values)
            case Curve.GELU_TANH:
                return F.gelu(values, approximate="tanh")
            case Curve.RELU:
                return F.relu(values)
            case Curve.RELU_SQUARED:
                return F.relu(values).square()


class Gating(NamedTuple):
    """`curve(alpha * g) / alpha * (u + up_offset)`: g the gate up to `gate_max`, u the clipped up.

    Without a gate `curve(alpha * g) / alpha` alone.

    Attributes:
        curve: The activation.
        has_gate: Whether there is a gate.
        is_interleaved: Whether gate and up alternate, rather than follow each other.
        alpha: Steepness; other than 1 for SILU only.
        gate_max: The gate is clipped above it.
        up_max: The up projection is clipped to plus and minus this.
        up_offset: Added to the up projection.
    """

    curve: Curve
    has_gate: bool
    is_interleaved: bool
    alpha: float = 1.0
    gate_max: float = math.inf
    up_max: float = math.inf
    up_offset: float = 0.0

    def __call__(self, products: Tensor) -> Tensor:
        """Apply it to (n, 2I) gated, (n, I) otherwise."""
        if not self.has_gate:
            return self.curve(products * self.alpha) / self.alpha
        if self.is_interleaved:
            gate, up = products[..., ::2], products[..., 1::2]
        else:
            gate, up = products.chunk(2, dim=-1)
        gate, up = gate.clamp(max=self.gate_max), up.clamp(-self.up_max, self.up_max)
        return self.curve(gate * self.alpha) / self.alpha * (up + self.up_offset)


class KnownGatings:
    """Remembers what was found out, by the experts module: trying it takes longer than a step."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[Any, Gating | None]] = {}

    def of(self, experts: Any) -> Gating | None:
        """Give what `find_gating` says of a module."""
        found = self._found.get(id(experts))
        if found is None:
            found = self._found[id(experts)] = (experts, find_gating(experts))
        return found[1]


def find_gating(experts: Any) -> Gating | None:
    """Find out what a module's `_apply_gate`, or `act_fn` without a gate, computes.

    Args:
        experts: transformers' experts module; its numbers are tried as limits and steepness.

    Returns:
        What it is, or None where no curve answers like it, or it cannot be tried on numbers of any
        width on the CPU: such a module is computed by itself.

    Cost:
        At most some thousand evaluations of a few hundred numbers, once.
    """
    numbers = sorted(
        {
            float(value)
            for value in vars(experts).values()
            if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
        }
    )
    reach = max([8.0, *(2 * number for number in numbers if isinstance(number, float))])
    line = torch.cat([torch.linspace(-8, 8, 61), torch.linspace(-reach, reach, 31)])
    gate, up = (axis.flatten() for axis in torch.meshgrid(line, line.flip(0), indexing="ij"))
    function = experts._apply_gate if experts.has_gate else experts.act_fn
    arranged = {False: gate[None]}
    if experts.has_gate:
        arranged = {
            False: torch.cat([gate, up])[None],
            True: torch.stack([gate, up], -1).view(1, -1),
        }
    with torch.no_grad():
        for is_interleaved, products in arranged.items():
            try:
                wanted = function(products.clone())
            except (RuntimeError, ValueError):
                # What torch says of a gate with parameters elsewhere, or of its own width only.
                return None
            for gating in _candidates(experts.has_gate, is_interleaved, numbers):
                found = gating(products)
                if found.shape == wanted.shape and _agree(found, wanted):
                    return gating
    return None


def _candidates(has_gate: bool, is_interleaved: bool, numbers: list[float]) -> Iterator[Gating]:
    """Give everything to try, the plain curves first."""
    plain = [(curve, 1.0) for curve in Curve]
    steep = [(Curve.SILU, alpha) for alpha in (_QUICK_GELU, *numbers) if alpha != 1]
    limits = [(math.inf, math.inf)]
    if has_gate:
        limits += [(limit, limit) for limit in numbers]
        limits += [pair for limit in numbers for pair in ((limit, math.inf), (math.inf, limit))]
    for limit, (curve, alpha) in itertools.product(limits, plain + steep):
        for offset in (0.0, 1.0) if has_gate else (0.0,):
            yield Gating(curve, has_gate, is_interleaved, alpha, *limit, offset)


def _agree(found: Tensor, wanted: Tensor) -> bool:
    return bool(((found - wanted).abs() <= _TOLERANCE * (1 + wanted.abs())).all())
