"""Decides which guesses are worth a copy, and whether guessing pays at all.

`GuessOdds` turns a guess into a measured probability; `PrefetchSwitch` compares
steps with and without prefetching and keeps the faster way. Torch-free; moves nothing.
"""

from __future__ import annotations

import bisect
import math
import statistics

__all__ = ["GuessOdds", "PrefetchSwitch"]


class GuessOdds:
    """Measured probability that a guessed expert which is not in memory is demanded.

    Guesses are sorted by kind (how far ahead, one token or several) and by confidence. Only
    experts that were absent when guessed are learned from: residents are the popular ones, and
    easier to guess.

    Args:
        keep: Weight of the past in the moving average.
    """

    def __init__(self, *, keep: float = 0.98) -> None:
        self._keep = keep
        self._odds: dict[tuple[int, bool, int], float] = {}

    def get(self, distance: int, is_single: bool, confidence: float) -> float:
        """Give the probability; before anything was measured, a prior by confidence alone.

        Args:
            distance: MoE layers between guess and demand.
            is_single: Whether the forward has one token.
            confidence: As in `Prediction`; infinite means known for certain.
        """
        if confidence == math.inf:
            return 1.0
        bucket = bisect.bisect(_EDGES, confidence)
        prior = _PRIOR[bucket] if is_single else _PRIOR_SEVERAL
        return self._odds.get((distance, is_single, bucket), prior)

    def learn(self, distance: int, is_single: bool, confidence: float, *, was_right: bool) -> None:
        """Average one outcome in."""
        old = self.get(distance, is_single, confidence)
        bucket = bisect.bisect(_EDGES, confidence)
        self._odds[distance, is_single, bucket] = self._keep * old + (1 - self._keep) * was_right


_EDGES = (-0.6, -0.3, -0.15, 0.0, 0.15, 0.3, 0.6, 1.0, 1.6)
"""Of confidence, in standard deviations of router logits (one token) or token shares (several)."""

_PRIOR = (0.02, 0.06, 0.12, 0.2, 0.4, 0.55, 0.7, 0.85, 0.92, 0.97)
_PRIOR_SEVERAL = 0.9
# Both measured on a small trained model, 25 % of its experts resident, November 2026.


class PrefetchSwitch:
    """Switches prefetching off while measured step times say that it loses.

    Windows of steps with and without prefetching are compared by their median step time. The
    current winner runs; the other is tried early on, and again for one window now and then.

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
        is_trial = self._windows_run == 2 or self._windows_run % self._trial_every == 0
        self.is_on = self._prefers != is_trial
