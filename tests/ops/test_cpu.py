"""Packed products and packed experts give what their dequantised weights give."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from foreload.ops.cpu import (
    LayerDraft,
    MatrixFormat,
    PackedMatrix,
    UnpackedMatrix,
    draft_forward,
    matrix_format,
    nibble_places,
    pack,
    unpack,
)
from foreload.ops.quantise import dequantise, quantise
from foreload.ops.reference import SumRule, accumulate, expert_forward, group_by_expert

# Groups of 128, 64 and 32; rows no multiple of 16, columns no multiple of 32.
SHAPES = [(32, 128), (48, 192), (16, 96), (64, 48), (5, 7), (17, 33), (1, 200), (96, 256)]
EXPERTS, HIDDEN, INNER = 6, 40, 24


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def truth_of(matrix: PackedMatrix | UnpackedMatrix) -> Tensor:
    """Give what a matrix stands for, (N, K) float32."""
    shape = matrix.format
    if isinstance(matrix, PackedMatrix):
        matrix = unpack(matrix, nibble_places(shape) if shape.bits == 4 else None)
    return dequantise(matrix.matrix, shape.group)[: shape.num_rows, : shape.num_columns]


def assert_near(found: Tensor, wanted: Tensor, share: float = 0.02) -> None:
    """Check that the largest gap is a small share of the largest value."""
    assert found.shape == wanted.shape
    gap = (found.float() - wanted.float()).abs().max()
    assert gap <= share * wanted.float().abs().max(), f"{gap} of {wanted.abs().max()}"


class TestFormats:
    @pytest.mark.parametrize("bits", [4, 8])
    @pytest.mark.parametrize(("num_rows", "num_columns"), SHAPES)
    def test_a_format_tells_shapes_and_bytes_of_what_is_packed(
        self, bits: int, num_rows: int, num_columns: int
    ) -> None:
        shape = matrix_format(num_rows, num_columns, bits)
        matrix = pack(gaussian(num_rows, num_columns), shape, search=False)
        assert matrix.format == shape
        assert tuple(matrix.weight.shape) == shape.weight_shape
        assert tuple(matrix.scales.shape) == shape.scale_shape
        assert matrix.weight.element_size() == 1
        assert matrix.scales.dtype == torch.bfloat16
        assert shape.num_bytes == matrix.weight.nbytes + matrix.scales.nbytes

    def test_padding_goes_to_the_next_multiple_and_no_further(self) -> None:
        shapes = [matrix_format(*size, 4) for size in ((16, 32), (17, 33), (1, 1))]
        padded = [(shape.padded_rows, shape.padded_columns) for shape in shapes]
        assert padded == [(16, 32), (32, 64), (16, 32)]

    @pytest.mark.parametrize(
        ("num_columns", "group"), [(128, 128), (256, 128), (192, 64), (48, 64), (96, 32), (7, 32)]
    )
    def test_four_bits_share_scales_by_group_and_eight_by_row(
        self, num_columns: int, group: int
    ) -> None:
        assert matrix_format(16, num_columns, 4).group == group
        wide = matrix_format(16, num_columns, 8)
        assert wide.group == wide.padded_columns

    def test_four_bits_take_little_more_than_half_a_byte_per_weight(self) -> None:
        assert 0.5 < matrix_format(512, 2048, 4).num_bytes / (512 * 2048) < 0.55
        assert 1.0 < matrix_format(512, 2048, 8).num_bytes / (512 * 2048) < 1.01


class TestProducts:
    @pytest.mark.parametrize("bits", [4, 8])
    @pytest.mark.parametrize(("num_rows", "num_columns"), SHAPES)
    @pytest.mark.parametrize("num_tokens", [1, 5])
    def test_a_packed_product_is_that_of_the_dequantised_matrix(
        self, bits: int, num_rows: int, num_columns: int, num_tokens: int
    ) -> None:
        weight = gaussian(num_rows, num_columns)
        shape = matrix_format(num_rows, num_columns, bits)
        rows = gaussian(num_tokens, num_columns, seed=1).bfloat16()
        # Quantised here once more: what `pack` and `unpack` agree on might be wrong in both.
        padded = F.pad(
            weight, (0, shape.padded_columns - num_columns, 0, shape.padded_rows - num_rows)
        )
        found = quantise(padded, bits=bits, group=shape.group, search=bits == 4)
        truth = dequantise(found, shape.group)[:num_rows, :num_columns]
        product = pack(weight, shape)(rows)
        assert product.dtype == torch.bfloat16
        assert_near(product, rows.float() @ truth.t())

    @pytest.mark.parametrize("bits", [4, 8])
    def test_what_is_padded_adds_nothing(self, bits: int) -> None:
        narrow, wide = gaussian(20, 50), torch.zeros(32, 64)
        wide[:20, :50] = narrow
        rows = gaussian(3, 50, seed=1).bfloat16()
        one = pack(narrow, matrix_format(20, 50, bits))(rows)
        other = pack(wide, matrix_format(32, 64, bits))(F.pad(rows, (0, 14)))
        assert torch.equal(one, other[:, :20])
        assert not other[:, 20:].any()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_weights_of_any_type_are_packed(self, dtype: torch.dtype) -> None:
        weight = gaussian(16, 64).to(dtype)
        shape = matrix_format(16, 64, 4)
        one, other = (pack(w, shape) for w in (weight, weight.float()))
        assert torch.equal(one.weight, other.weight)
        assert torch.equal(one.scales, other.scales)

    def test_importance_reaches_the_search_in_odd_shapes_too(self) -> None:
        weight, shape = gaussian(16, 100), matrix_format(16, 100, 4)
        importance = torch.ones(100)
        importance[7] = 1e6
        plain, weighted = (pack(weight, shape, importance=i) for i in (None, importance))
        errors = [(truth_of(m) - weight)[:, 7].abs().sum() for m in (plain, weighted)]
        assert errors[1] < 0.8 * errors[0]


class TestUnpacking:
    @pytest.mark.parametrize(
        ("num_rows", "num_columns"), [(16, 32), (48, 192), (17, 33), (96, 256)]
    )
    def test_nibbles_lie_at_different_places_and_cover_all(
        self, num_rows: int, num_columns: int
    ) -> None:
        shape = matrix_format(num_rows, num_columns, 4)
        places = nibble_places(shape)
        assert places.shape == (shape.padded_rows * shape.padded_columns // 2, 2)
        assert torch.equal(places.flatten().sort().values, torch.arange(places.numel()))

    @pytest.mark.parametrize("bits", [4, 8])
    @pytest.mark.parametrize(("num_rows", "num_columns"), [(16, 32), (48, 192), (96, 256)])
    def test_what_was_packed_is_read_back(self, bits: int, num_rows: int, num_columns: int) -> None:
        weight, shape = gaussian(num_rows, num_columns), matrix_format(num_rows, num_columns, bits)
        wanted = quantise(weight, bits=bits, group=shape.group, search=bits == 4)
        found = unpack(pack(weight, shape), nibble_places(shape) if bits == 4 else None)
        assert found.format == shape
        assert torch.equal(found.matrix.codes, wanted.codes)
        assert torch.equal(found.matrix.scales, wanted.scales)

    @pytest.mark.parametrize("bits", [4, 8])
    @pytest.mark.parametrize(("num_rows", "num_columns"), SHAPES)
    def test_unpacked_products_are_the_packed_ones(
        self, bits: int, num_rows: int, num_columns: int
    ) -> None:
        shape = matrix_format(num_rows, num_columns, bits)
        packed = pack(gaussian(num_rows, num_columns), shape)
        rows = gaussian(4, num_columns, seed=1).bfloat16()
        bare = unpack(packed, nibble_places(shape) if bits == 4 else None)(rows)
        assert bare.dtype == torch.bfloat16
        assert_near(bare, packed(rows))


def make_module(*, has_gate: bool = True, has_bias: bool = False, **more: Any) -> Any:
    """Give what the draft wants of transformers' experts module."""

    def apply_gate(both: Tensor) -> Tensor:
        gate, up = both.chunk(2, -1)
        return F.silu(gate) * up

    return SimpleNamespace(
        num_experts=EXPERTS,
        has_gate=has_gate,
        has_bias=has_bias,
        is_transposed=False,
        act_fn=F.silu,
        _apply_gate=apply_gate,
        **more,
    )


def make_layer(
    module: Any, bits: int, dtype: torch.dtype = torch.float32
) -> tuple[LayerDraft, list[dict[str, Tensor]]]:
    """Quantise made-up experts; give them, and what they stand for by parameter name."""
    width = 2 * INNER if module.has_gate else INNER
    name = "gate_up_proj" if module.has_gate else "up_proj"

    def matrices(num_rows: int, num_columns: int, seed: int) -> list[PackedMatrix]:
        shape: MatrixFormat = matrix_format(num_rows, num_columns, bits)
        weights = gaussian(EXPERTS, num_rows, num_columns, seed=seed) / num_columns**0.5
        return [pack(weight, shape) for weight in weights]

    first, down = matrices(width, HIDDEN, 2), matrices(HIDDEN, INNER, 3)
    biases: list[Tensor | None] = [None, None]
    if module.has_bias:
        biases = [gaussian(EXPERTS, size, seed=4).bfloat16() for size in (width, HIDDEN)]
    truth = []
    for expert in range(EXPERTS):
        own = {name: truth_of(first[expert]), "down_proj": truth_of(down[expert])}
        for parameter, bias in zip((name, "down_proj"), biases, strict=True):
            if bias is not None:
                own[f"{parameter}_bias"] = bias[expert]
        truth.append({key: value.to(dtype) for key, value in own.items()})
    return LayerDraft(first, down, *biases), truth


def run_truth(
    module: Any, truth: list[dict[str, Tensor]], hidden: Tensor, index: Tensor, weights: Tensor
) -> Tensor:
    """Run dequantised experts as the engine runs true ones."""
    groups = group_by_expert(index, EXPERTS)
    outputs = {
        group.expert: expert_forward(module, hidden[group.token], truth[group.expert])
        * weights[group.token, group.position, None]
        for group in groups
    }
    return accumulate(hidden, weights.dtype, groups, outputs, SumRule.FLOAT32)


def make_routing(num_tokens: int, top_k: int = 3) -> tuple[Tensor, Tensor]:
    scores = torch.rand(num_tokens, EXPERTS, generator=torch.Generator().manual_seed(5))
    weights, index = scores.topk(top_k)
    return index, weights


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("has_gate", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("num_tokens", [1, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_gives_what_its_dequantised_experts_give(
    bits: int, has_gate: bool, has_bias: bool, num_tokens: int, dtype: torch.dtype
) -> None:
    module = make_module(has_gate=has_gate, has_bias=has_bias)
    layer, truth = make_layer(module, bits, dtype)
    hidden = gaussian(num_tokens, HIDDEN, seed=6).to(dtype)
    index, weights = make_routing(num_tokens)
    result = draft_forward(layer, module, hidden, index, weights.to(dtype))
    assert result.dtype == dtype
    assert_near(result, run_truth(module, truth, hidden, index, weights.to(dtype)), 0.03)


def test_each_token_alone_gets_what_it_gets_among_others() -> None:
    module = make_module()
    layer, _ = make_layer(module, 4)
    hidden = gaussian(6, HIDDEN, seed=6)
    index, weights = make_routing(6)
    together = draft_forward(layer, module, hidden, index, weights)
    for token in range(6):
        rows = slice(token, token + 1)
        alone = draft_forward(layer, module, hidden[rows], index[rows], weights[rows])
        assert_near(alone, together[rows])


@pytest.mark.parametrize(
    "index",
    [
        [[2, EXPERTS, 0]],
        [[EXPERTS + 3, 1, EXPERTS]],
        [[4, 4, 1]],
        [[3, 3, 3]],
        [[EXPERTS, 5, 2], [5, 5, 1], [EXPERTS, EXPERTS, EXPERTS]],
    ],
    ids=str,
)
def test_placeholders_add_nothing_and_an_expert_chosen_twice_counts_twice(
    index: list[list[int]],
) -> None:
    module = make_module(has_bias=True)
    layer, truth = make_layer(module, 8)
    hidden = gaussian(len(index), HIDDEN, seed=6)
    _, weights = make_routing(len(index))
    result = draft_forward(layer, module, hidden, torch.tensor(index), weights)
    assert_near(result, run_truth(module, truth, hidden, torch.tensor(index), weights), 0.03)


@pytest.mark.parametrize("num_tokens", [1, 2])
def test_tokens_with_placeholders_only_get_zero(num_tokens: int) -> None:
    module = make_module()
    layer, _ = make_layer(module, 4)
    hidden = gaussian(num_tokens, HIDDEN).bfloat16()
    index = torch.full((num_tokens, 2), EXPERTS)
    result = draft_forward(layer, module, hidden, index, torch.ones(num_tokens, 2))
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, torch.zeros_like(hidden))


@pytest.mark.parametrize("num_tokens", [1, 4])
def test_a_norm_behind_each_expert_is_applied_before_its_weight(num_tokens: int) -> None:
    module = make_module(
        has_post_expert_norm=True, post_expert_norm=lambda rows: F.rms_norm(rows, rows.shape[-1:])
    )
    layer, truth = make_layer(module, 8)
    hidden = gaussian(num_tokens, HIDDEN, seed=6)
    index, weights = make_routing(num_tokens)
    result = draft_forward(layer, module, hidden, index, weights)
    assert_near(result, run_truth(module, truth, hidden, index, weights), 0.03)


def test_the_weights_decide_how_much_of_each_expert_there_is() -> None:
    module = make_module()
    layer, _ = make_layer(module, 8)
    hidden, index = gaussian(1, HIDDEN), torch.tensor([[1, 4]])
    one, other, both = (
        draft_forward(layer, module, hidden, index, torch.tensor([weights]))
        for weights in ([1.0, 0.0], [0.0, 1.0], [0.5, 2.0])
    )
    assert_near(both, 0.5 * one + 2.0 * other, 1e-4)
