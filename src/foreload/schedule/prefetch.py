"""Decides which guesses are worth a copy, and whether guessing pays at all.

`GuessOdds` turns a rank in a prediction into a measured probability; `PrefetchSwitch` compares
steps with and without prefetching and keeps the faster way. Torch-free; moves nothing.
"""

from __future__ import annotations

import statistics

__all__ = ["GuessOdds", "PrefetchSwitch"]


class GuessOdds:
    """Measured probability that the expert at a rank of a prediction is demanded.

    Ranks are told relative to the number of experts demanded, so that one token's and many
    tokens' predictions share what is learned.

    Args:
        num_layers: MoE layers.
        keep: Weight of the past in the moving average.
    """

    def __init__(self, num_layers: int, *, keep: float = 0.98) -> None:
        self._keep = keep
        self._odds: dict[tuple[int, int, int], float] = {}
        self._num_layers = num_layers

    def get(self, layer: int, distance: int, rank: int, num_expected: int) -> float:
        """Give the probability; before anything was measured, a cautious prior."""
        bucket = _bucket(rank, num_expected)
        prior = max(0.05, 0.9 - 0.12 * bucket) if bucket < 4 else 0.15
        return self._odds.get((layer, distance, bucket), prior**distance)

    def learn(
        self, layer: int, distance: int, rank: int, num_expected: int, *, was_right: bool
    ) -> None:
        """Average one outcome in."""
        bucket = _bucket(rank, num_expected)
        old = self.get(layer, distance, rank, num_expected)
        self._odds[layer, distance, bucket] = self._keep * old + (1 - self._keep) * was_right


def _bucket(rank: int, num_expected: int) -> int:
    """Cut the expected experts into four quarters; everything beyond in steps of a quarter."""
    return min(4 * rank // max(num_expected, 1), 11)


class PrefetchSwitch:
    """Switches prefetching off while measured step times say that it loses.

    Windows of steps with and without prefetching are compared by their median step time. The
    current winner runs; the other is tried again for one window now and then.

    Args:
        window: Steps per window.
        trial_every: Windows of the winner between trials of the other.
        margin: How much faster (share) without prefetching must be to switch it off.
    """

    def __init__(self, *, window: int = 6, trial_every: int = 16, margin: float = 0.02) -> None:
        self._window = window
        self._trial_every = trial_every
        self._margin = margin
        self._medians: dict[bool, float] = {}
        self._times: list[float] = []
        self._windows_run = 0
        self._prefers = True
        self.is_on = True

    def record(self, step_s: float) -> None:
        """Tell the duration of one single-token step."""
        self._times.append(step_s)
        if len(self._times) < self._window:
            return
        median = statistics.median(self._times)
        self._times = []
        old = self._medians.get(self.is_on)
        self._medians[self.is_on] = median if old is None else 0.5 * (old + median)
        self._windows_run += 1
        if len(self._medians) == 2:
            self._prefers = self._medians[True] <= self._medians[False] * (1 + self._margin)
        is_trial = self._windows_run % self._trial_every == 0
        self.is_on = self._prefers != is_trial
