"""Tokens are drawn from exactly the distribution that the settings describe, drafted or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from foreload.config import SamplingConfig
from foreload.decode.sampling import Verdict, probabilities, sample, verify

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
    ("top_p", "kept"),
    [(5e-324, [0]), (0.01, [0]), (0.5, [0]), (0.51, [0, 1]), (0.8, [0, 1]), (0.81, [0, 1, 2])],
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


def one_hot(*tokens: int, size: int = 6) -> Tensor:
    """Give logits whose likeliest tokens are these, row by row."""
    return 5.0 * torch.nn.functional.one_hot(torch.tensor(tokens), size)


class TestGreedyVerdicts:
    @pytest.mark.parametrize(
        ("drafted", "target", "verdict"),
        [
            ([], [3], Verdict(0, 3)),
            ([3], [3, 1], Verdict(1, 1)),
            ([2], [3, 1], Verdict(0, 3)),
            ([3, 1, 4], [3, 1, 4, 5], Verdict(3, 5)),
            ([3, 1, 4], [3, 1, 5, 2], Verdict(2, 5)),
            ([3, 1, 4], [3, 0, 4, 2], Verdict(1, 0)),
            ([3, 1, 4], [0, 1, 4, 2], Verdict(0, 0)),
        ],
    )
    def test_tokens_stand_as_far_as_the_target_would_have_chosen_them(
        self, drafted: list[int], target: list[int], verdict: Verdict
    ) -> None:
        # What the draft thought of them plays no part.
        draft_logits = [torch.zeros(6)] * len(drafted)
        generator = torch.Generator().manual_seed(0)
        before = generator.get_state()
        config = SamplingConfig(temperature=0.0, top_k=1, top_p=0.5)
        assert verify(drafted, draft_logits, one_hot(*target), config, generator) == verdict
        assert torch.equal(generator.get_state(), before)

    def test_ties_are_broken_as_sampling_breaks_them(self) -> None:
        tied = torch.tensor([[1.0, 5.0, 5.0], [5.0, 0.0, 5.0]])
        config, generator = SamplingConfig(temperature=0.0), torch.Generator()
        assert verify([1], [tied[0]], tied, config, generator) == Verdict(1, 0)
        assert verify([2], [tied[0]], tied, config, generator) == Verdict(0, 1)


TARGET = torch.tensor([1.0, 2.2, 0.3, -0.5, 1.6])
AFTER = torch.tensor([0.0, 0.5, 2.0, 1.0, -1.0])
DRAFTS = {
    "the target": TARGET,
    "nearly the target": TARGET + torch.tensor([0.3, -0.4, 0.1, 0.5, -0.2]),
    "uniform": torch.zeros(5),
    "the opposite": -TARGET,
    "sure of the likeliest": torch.tensor([0.0, 9.0, 0.0, 0.0, 0.0]),
    "sure of the unlikeliest": torch.tensor([0.0, 0.0, 0.0, 9.0, 0.0]),
}
SAMPLINGS: dict[str, dict[str, Any]] = {
    "plain": {"temperature": 1.0},
    "warm": {"temperature": 1.7},
    "top-k": {"temperature": 1.0, "top_k": 3},
    "top-p": {"temperature": 0.8, "top_p": 0.8},
    "both": {"temperature": 1.3, "top_k": 4, "top_p": 0.9},
}
# Of chi-square with so many degrees of freedom, exceeded with a probability of 0.001.
CRITICAL = {0: 0.0, 1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47}


def assert_drawn_from(counts: Tensor, shares: Tensor) -> None:
    """Check counts against a distribution; what it leaves out must never have been drawn."""
    kept = shares > 0
    assert not counts[~kept].any(), f"{counts} of {shares}"
    expected = shares[kept] * counts.sum()
    chi_square = float(((counts[kept] - expected) ** 2 / expected).sum())
    assert chi_square <= CRITICAL[int(kept.sum()) - 1], f"{counts} of {shares}"


class TestSampledVerdicts:
    @pytest.mark.parametrize("sampling", SAMPLINGS)
    @pytest.mark.parametrize("draft", DRAFTS)
    def test_the_first_token_is_distributed_as_the_targets_own(
        self, draft: str, sampling: str
    ) -> None:
        config, num_draws = SamplingConfig(**SAMPLINGS[sampling]), 1500
        generator = torch.Generator().manual_seed(0)
        logits = torch.stack([TARGET, AFTER])
        counts, num_accepted = torch.zeros(5), 0
        for _ in range(num_draws):
            token = sample(DRAFTS[draft], config, generator)
            verdict = verify([token], [DRAFTS[draft]], logits, config, generator)
            counts[token if verdict.num_accepted else verdict.token] += 1
            num_accepted += verdict.num_accepted
        wanted, drafted = (probabilities(rows, config) for rows in (TARGET, DRAFTS[draft]))
        assert_drawn_from(counts, wanted)
        # As often as two distributions can be made to agree, and no less.
        chance = float(torch.minimum(wanted, drafted).sum())
        deviation = (chance * (1 - chance) / num_draws) ** 0.5
        assert num_accepted / num_draws == pytest.approx(chance, abs=4 * deviation + 1e-6)

    @pytest.mark.parametrize("sampling", SAMPLINGS)
    def test_a_draft_that_stands_is_followed_by_the_targets_next_token(self, sampling: str) -> None:
        config = SamplingConfig(**SAMPLINGS[sampling])
        generator = torch.Generator().manual_seed(1)
        logits = torch.stack([TARGET, TARGET, AFTER])
        counts = torch.zeros(5)
        for _ in range(1500):
            drafted = [sample(TARGET, config, generator) for _ in range(2)]
            verdict = verify(drafted, [TARGET, TARGET], logits, config, generator)
            assert verdict.num_accepted == 2, "what the target would draw itself always stands"
            counts[verdict.token] += 1
        assert_drawn_from(counts, probabilities(AFTER, config))

    def test_two_tokens_together_are_distributed_as_the_targets_own(self) -> None:
        config, generator = SamplingConfig(temperature=1.0), torch.Generator().manual_seed(2)
        first, draft = torch.tensor([0.5, 1.0]), torch.tensor([1.0, 0.0])
        # What comes second depends on what came first, in the target as in the draft.
        following, draft_following = (
            torch.tensor([[1.0, -0.5], [-1.0, 0.5]]), torch.tensor([[-0.5, 0.5], [0.0, 0.0]])
        )  # fmt: skip
        counts = torch.zeros(2, 2)
        for _ in range(3000):
            one = sample(draft, config, generator)
            two = sample(draft_following[one], config, generator)
            rows = torch.stack([first, following[one], torch.zeros(2)])
            drafted, thoughts = [one, two], [draft, draft_following[one]]
            verdict = verify(drafted, thoughts, rows, config, generator)
            emitted = [*drafted[: verdict.num_accepted], verdict.token][:2]
            if len(emitted) < 2:
                emitted.append(sample(following[emitted[0]], config, generator))
            counts[emitted[0], emitted[1]] += 1
        wanted = first.softmax(-1)[:, None] * following.softmax(-1)
        assert_drawn_from(counts.flatten(), wanted.flatten())

    def test_without_a_draft_a_verdict_is_a_sample(self) -> None:
        config = SamplingConfig(temperature=1.0)
        one, other = (torch.Generator().manual_seed(7) for _ in range(2))
        for _ in range(20):
            verdict = verify([], [], TARGET[None], config, one)
            assert verdict == Verdict(0, sample(TARGET, config, other))

    def test_the_seed_decides_the_verdict(self) -> None:
        config = SamplingConfig(temperature=1.0)
        logits = torch.stack([TARGET, AFTER])

        def judge(seed: int) -> list[Verdict]:
            generator = torch.Generator().manual_seed(seed)
            return [verify([0], [torch.zeros(5)], logits, config, generator) for _ in range(30)]

        assert judge(3) == judge(3) != judge(4)
