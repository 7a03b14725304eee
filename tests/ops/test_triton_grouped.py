"""Many tokens by kernels are what they are by the twin: interpreted, or compiled on a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from foreload.errors import UnsupportedModelError
from foreload.ops.device_experts import LayerMemory
from foreload.ops.device_layout import StoredFormat, expert_layout, pack_expert
from foreload.ops.grouped import Chunk, SortedPairs, TwinGrouped, sort_pairs
from foreload.ops.reference import SumRule
from foreload.types import Routing
from plain_experts import KINDS, PlainExperts, random_weights, shapes_of

pytest.importorskip("triton", reason="the triton extra is not installed")

from foreload.ops.triton_grouped import TritonGrouped, choose_grouped_tile

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from foreload.ops.device_layout import MatrixLayout
    from foreload.ops.triton import Tile

IS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if IS_GPU else "cpu"
# The interpreter cannot multiply matrices of bfloat16.
TOLERANCES = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def small_tile(matrix: MatrixLayout, dtype: torch.dtype) -> Tile:
    """Tiles so small that the matrices below need several in both directions."""
    tile = choose_grouped_tile(matrix, dtype)
    columns = 1 if matrix.stored.is_plain else matrix.scale_columns
    packing = 2 if matrix.stored.is_packed else 1
    return tile._replace(num_rows=32, num_columns=max(columns, 16 * packing))


class Pair:
    """The same layer twice: by kernels on the device, by the twin on the CPU."""

    def __init__(
        self,
        experts: PlainExperts,
        stored: StoredFormat,
        dtype: torch.dtype,
        sizes: tuple[int, int],
        *,
        rule: SumRule = SumRule.HIDDEN,
        tile: Any = small_tile,
    ) -> None:
        self.experts, self.dtype, self.hidden_size = experts, dtype, sizes[0]
        layout = expert_layout(experts, shapes_of(experts, *sizes), stored, dtype=dtype)
        self.host = torch.zeros(experts.num_experts, layout.num_bytes, dtype=torch.uint8)
        for expert, block in enumerate(self.host):
            pack_expert(layout, random_weights(experts, *sizes, seed=expert), block)
        self.memory = LayerMemory(layout, self.host, self.host, self.host.data_ptr(), rule)
        self.kernels = TritonGrouped(tile=tile)

    def chunks(self, wanted: list[int], device: str) -> Iterator[Chunk]:
        """Give experts as they come: some from slots in any order, others through one buffer."""
        residents, streamed = wanted[::3], [e for e in wanted if e not in wanted[::3]]
        slots = self.host.flip(0).to(device)
        yield Chunk(residents, slots, [len(slots) - 1 - expert for expert in residents])
        buffer = torch.full((2, self.host.shape[1]), 0xFF, dtype=torch.uint8, device=device)
        for start in range(0, len(streamed), 2):
            some = streamed[start : start + 2]
            buffer[: len(some)] = self.host[some].to(device)
            yield Chunk(some, buffer, range(len(some)))
            buffer.fill_(0xFF)

    def run(self, index: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Run both, compare, and give what the kernels gave."""
        generator = torch.Generator().manual_seed(len(index))
        if hidden is None:
            hidden = torch.randn(len(index), self.hidden_size, generator=generator).to(self.dtype)
        weights = torch.rand(index.shape, generator=generator).to(self.dtype)
        num_experts = self.experts.num_experts
        wanted = sorted({expert for expert in index.flatten().tolist() if expert < num_experts})
        results = []
        for kernels, device in ((self.kernels, DEVICE), (TwinGrouped(), "cpu")):
            order, starts = sort_pairs(index.to(device), num_experts)
            result = kernels.forward(
                self.memory,
                SortedPairs(order, starts.tolist()),
                self.chunks(wanted, device),
                self.experts,
                hidden.to(device),
                Routing(index.to(device), weights.to(device)),
            )
            results.append(result.cpu())
        found, true = results
        assert found.dtype == true.dtype
        scale = max(true[true.isfinite()].abs().max().item(), 1e-30)
        atol = TOLERANCES[self.dtype] * scale
        torch.testing.assert_close(found.float(), true.float(), rtol=0, atol=atol, equal_nan=True)
        return found


def draw(num_tokens: int, top_k: int, experts: list[int]) -> Tensor:
    generator = torch.Generator().manual_seed(num_tokens)
    places = [torch.randperm(len(experts), generator=generator)[:top_k] for _ in range(num_tokens)]
    return torch.tensor(experts)[torch.stack(places)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_layout_computes_what_the_twin_does(kind: str) -> None:
    pair = Pair(KINDS[kind], StoredFormat.FLOAT32, torch.float32, (37, 21))
    # Experts without a token, and one that has most of them.
    index = draw(19, 2, [0, 2, 3])
    index[3:, 0] = 5
    pair.run(index)


@pytest.mark.parametrize("stored", StoredFormat, ids=lambda stored: stored.value)
@pytest.mark.parametrize("kind", ["gated", "gpt-oss"] if IS_GPU else ["gpt-oss"])
def test_every_format_computes_what_the_twin_does(kind: str, stored: StoredFormat) -> None:
    # FP8 has squares that end inside the matrix, and two in a row.
    sizes = {StoredFormat.FP8: (150, 40)}.get(stored, (41, 19) if stored.is_plain else (96, 32))
    dtype = stored.code_dtype if stored.is_plain else torch.float32
    if dtype == torch.bfloat16 and not IS_GPU:
        pytest.skip("the interpreter cannot multiply matrices of bfloat16")
    Pair(KINDS[kind], stored, dtype, sizes).run(draw(19, 2, [0, 3, 5]))


@pytest.mark.parametrize("num_tokens", [18, 33, 64, 101])
def test_experts_with_more_tokens_than_a_block_has(num_tokens: int) -> None:
    pair = Pair(
        replace(KINDS["gated"], num_experts=3), StoredFormat.FLOAT32, torch.float32, (24, 16)
    )
    pair.run(draw(num_tokens, 2, [0, 1, 2]))
    pair.run(torch.full((num_tokens, 1), 2))


def test_the_chosen_tiles_fit_small_matrices_too() -> None:
    pair = Pair(
        KINDS["gated"], StoredFormat.FLOAT32, torch.float32, (70, 33), tile=choose_grouped_tile
    )
    pair.run(draw(20, 3, [0, 1, 3, 4, 5]))


@pytest.mark.parametrize("rule", SumRule)
def test_outputs_are_summed_in_the_layers_element_type(rule: SumRule) -> None:
    pair = Pair(KINDS["gated"], StoredFormat.FLOAT16, torch.float16, (24, 16), rule=rule)
    pair.run(draw(21, 4, list(range(6))))


def test_placeholders_and_one_expert_twice() -> None:
    pair = Pair(KINDS["normed"], StoredFormat.FLOAT32, torch.float32, (16, 8))
    index = draw(18, 2, list(range(9)))
    index[0], index[1] = torch.tensor([7, 6]), torch.tensor([4, 4])
    found = pair.run(index)
    assert not found[0].any(), "nobody was asked"
    pair.run(index[:1].repeat(17, 1))


# The interpreter multiplies with numpy, which may remark on what is no number.
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
def test_one_tokens_numbers_do_not_leak_into_anothers() -> None:
    pair = Pair(KINDS["gated"], StoredFormat.FLOAT32, torch.float32, (16, 8))
    hidden = torch.randn(20, 16, generator=torch.Generator().manual_seed(0))
    hidden[7] = float("nan")
    found = pair.run(draw(20, 2, [0, 1, 2]), hidden)
    assert found.isnan().any(1).nonzero().flatten().tolist() == [7]


def test_hidden_states_in_another_element_type_are_refused() -> None:
    pair = Pair(KINDS["gated"], StoredFormat.FLOAT32, torch.float32, (16, 8))
    with pytest.raises(UnsupportedModelError, match="float16"):
        pair.run(draw(17, 2, [0, 1, 2]), torch.zeros(17, 16, dtype=torch.float16))
