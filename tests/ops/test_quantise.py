"""Codes and scales come as close to a matrix as their bits allow, and closest where it counts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from foreload.ops.quantise import Quantised, choose_group, dequantise, quantise


def gaussian(num_rows: int, num_columns: int, seed: int = 0) -> Tensor:
    return torch.randn(num_rows, num_columns, generator=torch.Generator().manual_seed(seed))


def group_errors(
    weight: Tensor, matrix: Quantised, group: int, importance: Tensor | None = None
) -> Tensor:
    """Give the squared error of each group, (N, K / group), in float64."""
    squares = (weight.double() - dequantise(matrix, group).double()) ** 2
    if importance is not None:
        squares = squares * importance.double()
    return squares.unflatten(1, (-1, group)).sum(-1)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("search", [True, False])
def test_codes_stay_within_their_bits(bits: int, search: bool) -> None:
    weight = gaussian(40, 192)
    matrix = quantise(weight, bits=bits, group=64, search=search)
    assert matrix.codes.dtype == torch.int8
    assert matrix.codes.shape == (40, 192)
    assert matrix.scales.dtype == torch.bfloat16
    assert matrix.scales.shape == (40, 3)
    limit = 2 ** (bits - 1)
    assert -limit <= int(matrix.codes.min()) <= -limit + 1, "the range is used"
    assert limit - 2 <= int(matrix.codes.max()) <= limit - 1


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 128), (8, 32), (8, 256)])
def test_rounding_to_nearest_errs_by_half_a_step_at_most(bits: int, group: int) -> None:
    weight = 3.0 * gaussian(8, 256)
    matrix = quantise(weight, bits=bits, group=group, search=False)
    error = (weight - dequantise(matrix, group)).abs().unflatten(1, (-1, group))
    half = matrix.scales.float().abs()[..., None] / 2
    assert bool((error <= half * 1.001).all())
    assert bool((matrix.scales > 0).all())


@pytest.mark.parametrize(("bits", "most"), [(4, 0.09), (8, 0.006)])
def test_more_bits_come_closer(bits: int, most: float) -> None:
    weight = gaussian(16, 256)
    matrix = quantise(weight, bits=bits, group=32)
    gap = (weight - dequantise(matrix, 32)).norm() / weight.norm()
    assert most / 2 < gap < most


@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_what_can_be_said_exactly_is(bits: int, search: bool) -> None:
    limit = 2 ** (bits - 1)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-limit + 1, limit, (6, 64), generator=generator)
    codes[:, ::32] = limit - 1  # what sets a group's step
    steps = torch.tensor([[0.25, 2.0]]).repeat_interleave(32, 1)
    matrix = quantise(codes * steps, bits=bits, group=32, search=search)
    assert torch.equal(matrix.codes.long(), codes)
    assert torch.equal(dequantise(matrix, 32), codes * steps)


@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("importance", [None, torch.zeros(64), torch.ones(64)])
def test_a_group_of_zeros_stays_zero(search: bool, importance: Tensor | None) -> None:
    weight = gaussian(3, 64)
    weight[1, 32:] = 0.0
    matrix = quantise(weight, bits=4, group=32, search=search, importance=importance)
    assert bool(matrix.scales.isfinite().all())
    assert matrix.codes[1, 32:].tolist() == [0] * 32
    assert dequantise(matrix, 32)[1, 32:].tolist() == [0.0] * 32


@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("size", [1e-38, 1e-39, 1e-40, 1e-45])
def test_numbers_too_small_for_a_scale_do_no_harm(size: float, search: bool) -> None:
    weight = torch.zeros(2, 64)
    weight[0, ::3] = size
    weight[1, 32:] = 7.0
    matrix = quantise(weight, bits=4, group=32, search=search)
    assert -8 <= int(matrix.codes.min()) <= int(matrix.codes.max()) <= 7
    assert dequantise(matrix, 32)[0].abs().max() <= 2e-38
    assert torch.equal(dequantise(matrix, 32)[1], weight[1])


NUMBERS = st.floats(-1e4, 1e4, width=32)


@given(
    st.lists(NUMBERS, min_size=16, max_size=16),
    st.none() | st.lists(st.floats(0, 100, width=32), min_size=16, max_size=16),
    st.sampled_from([4, 8]),
)
def test_searching_is_never_worse_than_rounding_to_nearest(
    numbers: list[float], counts: list[float] | None, bits: int
) -> None:
    weight = torch.tensor([numbers])
    importance = None if counts is None else torch.tensor(counts)
    near, found = (
        quantise(weight, bits=bits, group=8, importance=importance, search=search)
        for search in (False, True)
    )
    # Errors are compared in float32, beside the squares they are small parts of.
    squares = weight**2 if importance is None else weight**2 * importance
    rounding = 1e-6 * squares.unflatten(1, (-1, 8)).sum(-1)
    limit = group_errors(weight, near, 8, importance) + rounding
    assert bool((group_errors(weight, found, 8, importance) <= limit).all())


def test_searching_gains_on_what_weights_look_like() -> None:
    weight = gaussian(64, 256)
    near, found = (quantise(weight, bits=4, group=128, search=s) for s in (False, True))
    errors = [group_errors(weight, matrix, 128).sum() for matrix in (near, found)]
    assert errors[1] < 0.85 * errors[0]


def test_columns_that_count_more_err_less() -> None:
    weight = gaussian(64, 128)
    importance = torch.ones(128)
    importance[::16] = 1000.0
    alike, weighted = (
        quantise(weight, bits=4, group=128, importance=counts) for counts in (None, importance)
    )
    errors = [((weight - dequantise(m, 128)) ** 2)[:, ::16].sum() for m in (alike, weighted)]
    assert errors[1] < 0.8 * errors[0]
    whole = [group_errors(weight, m, 128).sum() for m in (alike, weighted)]
    assert whole[0] < whole[1], "which is paid for by the others"


def test_importance_of_one_for_all_changes_nothing() -> None:
    weight = gaussian(16, 64)
    alike = quantise(weight, bits=4, group=64)
    ones = quantise(weight, bits=4, group=64, importance=torch.ones(64))
    assert all(torch.equal(one, other) for one, other in zip(alike, ones, strict=True))


def test_rows_do_not_depend_on_each_other() -> None:
    weight = gaussian(600, 64)  # more than are worked on at a time
    whole = quantise(weight, bits=4, group=32)
    for rows in (slice(0, 1), slice(250, 260), slice(599, 600)):
        part = quantise(weight[rows], bits=4, group=32)
        assert torch.equal(part.codes, whole.codes[rows])
        assert torch.equal(part.scales, whole.scales[rows])


def test_a_scaled_matrix_has_scaled_scales() -> None:
    weight = gaussian(8, 64)
    one, other = (quantise(factor * weight, bits=4, group=64) for factor in (1.0, 1024.0))
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.scales.float() * 1024, other.scales.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_of_low_precision_are_taken_for_what_they_are(dtype: torch.dtype) -> None:
    weight = gaussian(8, 64).to(dtype)
    one, other = (quantise(w, bits=4, group=64) for w in (weight, weight.float()))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_dequantising_multiplies_codes_by_their_groups_scale() -> None:
    codes = torch.tensor([[1, -2, 3, 7]], dtype=torch.int8)
    scales = torch.tensor([[0.5, -2.0]], dtype=torch.bfloat16)
    assert dequantise(Quantised(codes, scales), 2).tolist() == [[0.5, -1.0, -6.0, -14.0]]


@pytest.mark.parametrize(
    ("num_columns", "group"),
    [(2048, 128), (128, 128), (192, 64), (64, 64), (96, 32), (32, 32), (7, 32)],
)
def test_the_largest_group_that_divides_the_columns_is_taken(num_columns: int, group: int) -> None:
    assert choose_group(num_columns) == group
