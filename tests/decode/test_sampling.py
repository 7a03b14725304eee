"""Tokens are drawn from exactly the distribution that the settings describe."""

from __future__ import annotations

import pytest
import torch

from foreload.config import SamplingConfig
from foreload.decode.sampling import probabilities, sample

LOGITS = torch.tensor([1.0, 3.0, 2.0, 0.0])


def shares(logits: torch.Tensor = LOGITS, **settings: float) -> list[float]:
    config = SamplingConfig(**{"temperature": 1.0, **settings})
    return probabilities(logits, config).tolist()


def test_plain_sampling_is_softmax() -> None:
    assert shares() == pytest.approx(LOGITS.softmax(-1).tolist())


@pytest.mark.parametrize("temperature", [0.3, 0.7, 2.0])
def test_logits_are_divided_by_the_temperature(temperature: float) -> None:
    wanted = (LOGITS / temperature).softmax(-1).tolist()
    assert shares(temperature=temperature) == pytest.approx(wanted)


def test_temperature_zero_takes_the_first_of_the_likeliest() -> None:
    tied = torch.tensor([1.0, 5.0, 5.0, 0.0])
    assert shares(tied, temperature=0.0) == [0.0, 1.0, 0.0, 0.0]
    config = SamplingConfig(temperature=0.0)
    assert sample(tied, config, torch.Generator()) == 1


@pytest.mark.parametrize("temperature", [1e-4, 1e-20, 1e-37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_tiny_temperature_is_nearly_greedy_and_no_error(
    temperature: float, dtype: torch.dtype
) -> None:
    logits = torch.tensor([30.0, -20.0, 40.0, -1e4]).to(dtype)
    assert shares(logits, temperature=temperature) == [0.0, 0.0, 1.0, 0.0]
    config = SamplingConfig(temperature=temperature)
    assert sample(logits, config, torch.Generator()) == 2


@pytest.mark.parametrize(
    ("top_k", "kept"), [(1, [1]), (2, [1, 2]), (3, [0, 1, 2]), (4, [0, 1, 2, 3]), (99, range(4))]
)
def test_top_k_keeps_that_many(top_k: int, kept: list[int]) -> None:
    result = shares(top_k=top_k)
    assert [i for i, share in enumerate(result) if share > 0] == list(kept)
    wanted = LOGITS[list(kept)].softmax(-1).tolist()
    assert [result[i] for i in kept] == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.01, [0]), (0.5, [0]), (0.51, [0, 1]), (0.8, [0, 1]), (0.81, [0, 1, 2])]
)
def test_top_p_keeps_the_fewest_that_reach_it(top_p: float, kept: list[int]) -> None:
    logits = torch.tensor([0.5, 0.3, 0.2]).log()
    result = shares(logits, top_p=top_p)
    assert [i for i, share in enumerate(result) if share > 0] == kept
    assert sum(result) == pytest.approx(1.0)


def test_top_k_is_applied_before_top_p() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    # among the first two the shares are 4/7 and 3/7: the first alone reaches 0.5
    assert shares(logits, top_k=2, top_p=0.5) == pytest.approx([1.0, 0.0, 0.0, 0.0])
    assert shares(logits, top_p=0.5)[1] > 0


def test_temperature_is_applied_before_top_p() -> None:
    assert shares(temperature=0.2, top_p=0.9)[2] == 0.0
    assert shares(temperature=5.0, top_p=0.9)[2] > 0.0


def test_leading_dimensions_are_kept_apart() -> None:
    logits = torch.stack([LOGITS, LOGITS.flip(0)])[:, None]
    config = SamplingConfig(temperature=0.7, top_k=3, top_p=0.8)
    result = probabilities(logits, config)
    assert result.shape == (2, 1, 4)
    assert torch.equal(result[0, 0], probabilities(LOGITS, config))
    assert torch.equal(result[1, 0], result[0, 0].flip(0))


def test_low_precision_logits_give_float32_shares() -> None:
    result = probabilities(LOGITS.bfloat16(), SamplingConfig(temperature=0.5))
    assert result.dtype == torch.float32
    assert result.sum().item() == pytest.approx(1.0, abs=1e-6)


def test_samples_follow_the_shares() -> None:
    config = SamplingConfig(temperature=1.3, top_k=3)
    generator = torch.Generator().manual_seed(0)
    drawn = [sample(LOGITS, config, generator) for _ in range(4000)]
    wanted = probabilities(LOGITS, config)
    counts = torch.bincount(torch.tensor(drawn), minlength=4)
    assert counts[3] == 0
    expected = wanted[:3] * 4000
    chi_square = ((counts[:3] - expected) ** 2 / expected).sum().item()
    assert chi_square < 13.8  # two degrees of freedom, p = 0.001


def test_greedy_choices_leave_the_generator_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    sample(LOGITS, SamplingConfig(temperature=0.0), generator)
    assert torch.equal(generator.get_state(), before)
    sample(LOGITS, SamplingConfig(temperature=1.0), generator)
    assert not torch.equal(generator.get_state(), before)
