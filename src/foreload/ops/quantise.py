"""Group-wise symmetric quantisation in plain torch: the truth that packed kernels are held to.

A row of a matrix is cut into groups of columns; each group has one scale, and an element is its
code times that scale. Scales are searched for, and are rounded to bfloat16 before the codes are
chosen, because that is what the kernels multiply with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Quantised", "choose_group", "dequantise", "quantise"]

_GROUPS = (128, 64, 32)
_SHRINK = (1.0, 0.93, 0.86, 0.79)
"""Shares of the widest range that are tried as a group's range: clipping its largest element costs
less than a coarse step for all others. Finer steps gain nothing (demo model, November 2026)."""
_ROWS = 256
"""Rows at a time: what the search works on stays in the processor's cache."""


class Quantised(NamedTuple):
    """A quantised matrix: `codes` (N, K) int8 and `scales` (N, K / group) bfloat16."""

    codes: Tensor
    scales: Tensor


def choose_group(num_columns: int) -> int:
    """Give the largest of 128, 64 and 32 that divides the columns; 32 where none does."""
    return next((group for group in _GROUPS if num_columns % group == 0), _GROUPS[-1])


def quantise(
    weight: Tensor, *, bits: int, group: int, importance: Tensor | None = None, search: bool = True
) -> Quantised:
    """Quantise a matrix, group by group.

    Args:
        weight: (N, K), K a multiple of `group`.
        bits: Bits of a code, which goes from -2 ** (bits - 1) to 2 ** (bits - 1) - 1.
        group: Columns that share a scale.
        importance: (K,) how much an error in each column counts, such as the mean square of what
            the column is multiplied with; None counts all alike.
        search: Whether to look for the scales with the least squared error; otherwise the largest
            element of a group gets the largest code (round to nearest).

    Cost:
        With `search` about 60 element-wise operations per weight.
    """
    num_rows, num_columns = weight.shape
    codes = torch.empty(num_rows, num_columns, dtype=torch.int8)
    scales = torch.empty(num_rows, num_columns // group, dtype=torch.bfloat16)
    counts = None
    if importance is not None:
        counts = importance.float().view(num_columns // group, group)
    for start in range(0, num_rows, _ROWS):
        rows = slice(start, start + _ROWS)
        grouped = _grouped(weight[rows], group)
        found = _search(grouped, bits, counts) if search else _nearest(grouped, bits)
        codes[rows], scales[rows] = found[0].flatten(1), found[1]
    return Quantised(codes, scales)


def dequantise(matrix: Quantised, group: int) -> Tensor:
    """Give what the codes stand for, (N, K) float32."""
    return (_grouped(matrix.codes, group) * matrix.scales.float()[..., None]).flatten(1)


def _grouped(matrix: Tensor, group: int) -> Tensor:
    """Cut rows into groups of columns, (n, K / group, group) float32."""
    return matrix.float().reshape(matrix.shape[0], -1, group)


def _nearest(grouped: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Give codes and scales where the largest element of a group gets the largest code."""
    limit = 2 ** (bits - 1)
    scales = (grouped.abs().amax(-1) / (limit - 1)).bfloat16()
    return _encode(grouped, scales, limit), scales


def _search(grouped: Tensor, bits: int, counts: Tensor | None) -> tuple[Tensor, Tensor]:
    """Try several scales per group, each refitted to its codes, and keep the best."""
    limit = 2 ** (bits - 1)
    codes, scales = _nearest(grouped, bits)
    error = _error(grouped, codes, scales, counts)
    # There is one negative code more: the sign of the scale lets the largest element have it.
    peak = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True)).squeeze(-1)
    for shrink in _SHRINK:
        tried = (peak * (-shrink / limit)).bfloat16()
        tried_codes = _encode(grouped, tried, limit)
        for candidate in (tried, _refit(grouped, tried_codes, tried, counts)):
            found = _error(grouped, tried_codes, candidate, counts)
            is_better = found < error
            error = torch.where(is_better, found, error)
            scales = torch.where(is_better, candidate, scales)
            codes = torch.where(is_better[..., None], tried_codes, codes)
    return codes, scales


def _encode(grouped: Tensor, scales: Tensor, limit: int) -> Tensor:
    steps = scales.float()[..., None]
    # A group of zeros has the scale 0, and codes of 0.
    ratio = torch.where(steps == 0, 0.0, grouped / steps)
    return ratio.round_().clamp_(-limit, limit - 1).to(torch.int8)


def _refit(grouped: Tensor, codes: Tensor, scales: Tensor, counts: Tensor | None) -> Tensor:
    """Give the scales with the least squared error for these codes."""
    values = codes.float()
    weighted = values if counts is None else values * counts
    fitted = (weighted * grouped).sum(-1) / (weighted * values).sum(-1)
    return torch.where(fitted.isfinite(), fitted, scales.float()).bfloat16()


def _error(grouped: Tensor, codes: Tensor, scales: Tensor, counts: Tensor | None) -> Tensor:
    squares = (grouped - codes.float() * scales.float()[..., None]).square_()
    return (squares if counts is None else squares * counts).sum(-1)
