"""The kernel chooses as its twin does: interpreted, or compiled where there is a GPU."""

from __future__ import annotations

import pytest
import torch

from foreload.ops.present import choose_present
from foreload.ops.scores import LayerScores, ScoreRule
from foreload.types import Routing

pytest.importorskip("triton", reason="the triton extra is not installed")

from foreload.ops import triton_present

IS_GPU = torch.cuda.is_available()


@pytest.fixture(scope="module")
def device() -> str:
    return "cuda" if IS_GPU else "cpu"


@pytest.mark.parametrize("num_experts", [6, 37])
@pytest.mark.parametrize("rule", [None, *ScoreRule])
def test_it_chooses_as_its_twin_does(rule: ScoreRule | None, num_experts: int, device: str) -> None:
    chance = torch.Generator().manual_seed(num_experts)
    num_changed = num_filled = 0
    for number in range(12):
        dtype = torch.bfloat16 if number % 4 == 3 else torch.float32
        top_k = int(torch.randint(1, min(num_experts, 9) + 1, (), generator=chance))
        shape = (1, num_experts)
        logits = 2 * torch.randn(shape, generator=chance)
        if rule is ScoreRule.GIVEN:
            logits = logits.softmax(-1)
        if number % 5 == 0:
            logits = logits.round()
        scores = rule.log_scores(logits).exp() if rule else torch.rand(shape, generator=chance)
        weights, index = scores.topk(top_k)
        if number % 6 == 0:
            index[0, -1] = num_experts + number % 4 if number % 12 == 0 else index[0, 0]
        if number == 11:
            weights.zero_()
        true = Routing(index, weights.to(dtype))
        slots = torch.where(torch.rand(num_experts, generator=chance) < 0.5, -1, 7).int()
        how = {
            "most_lost": min(float(torch.rand((), generator=chance)) * (number % 3), 0.999),
            "rule": None if rule is None else LayerScores(rule, number % 2 == 0),
        }
        counted = torch.tensor([3, 4])
        wanted = choose_present(true, slots, counted, logits=logits, **how)
        pairs = torch.tensor([3, 4], device=device)
        found = triton_present.choose_present(
            Routing(*(values.to(device) for values in true)),
            slots.to(device),
            pairs,
            logits=logits.to(device),
            **how,
        )
        assert pairs.tolist() == counted.tolist()
        assert torch.equal(found.top_k_index.cpu(), wanted.top_k_index), number
        # The interpreter cuts bfloat16 off; a GPU's exponentials are its own.
        tolerance = 1e-6 if dtype is torch.float32 else 2e-2
        found_weights = found.top_k_weights.cpu()
        torch.testing.assert_close(found_weights, wanted.top_k_weights, rtol=tolerance, atol=1e-9)
        assert found_weights.dtype == dtype
        num_changed += counted[1] > 4
        num_filled += bool(
            ((wanted.top_k_index != index) & (wanted.top_k_index < num_experts)).any()
        )
    assert num_changed >= 4
    assert num_filled >= (2 if rule else 0)


def test_one_layer_of_a_models_tables_is_read_where_it_lies(device: str) -> None:
    tables = torch.full((3, 8), -1, dtype=torch.int32, device=device)
    tables[1, 0] = 5
    true = Routing(torch.tensor([[0, 1]]), torch.tensor([[0.75, 0.25]]))
    true = Routing(*(values.to(device) for values in true))
    pairs = torch.zeros(2, dtype=torch.int64, device=device)
    found = triton_present.choose_present(true, tables[1, :6], pairs, most_lost=0.5)
    assert found.top_k_index.tolist() == [[0, 6]]
    assert found.top_k_weights.tolist() == [[1.0, 0.0]]
    assert pairs.tolist() == [2, 1]
