"""Decides which guesses are worth a copy, and whether guessing pays at all.

`GuessOdds` turns a guess into a measured probability; `Prefetcher` starts the copies that are
worth it and learns from what came true; `PrefetchSwitch` compares steps with and without
prefetching and keeps the faster way. Torch-free: engine and simulator run the same code.
"""

from __future__ import annotations

import bisect
import math
import statistics
from typing import TYPE_CHECKING, NamedTuple, Protocol

from foreload.types import ExpertKey

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from foreload.metrics import Metrics
    from foreload.types import Prediction

__all__ = ["GuessOdds", "PrefetchSwitch", "PrefetchTarget", "Prefetcher", "most_prefetches"]


class PrefetchTarget(Protocol):
    """Where prefetches go; `memory.tiers.ExpertTiers` is one."""

    @property
    def num_open_prefetches(self) -> int:
        """Give how many guessed experts are queued or on their way."""

    def is_absent(self, key: ExpertKey) -> bool:
        """Tell whether an expert is neither readable nor on its way."""

    def prefetch(self, key: ExpertKey, *, expected_wait: float, order: float) -> bool:
        """Start to bring an absent expert on a guess; False where that would not pay."""


def most_prefetches(num_slots: int, top_k: int) -> int:
    """Give how many guessed experts may be queued or on their way at once: a quarter of the slots.

    Args:
        num_slots: Experts that fit into the expert memory.
        top_k: Experts per token and layer.
    """
    return max(top_k, num_slots // 4)


class Prefetcher:
    """Starts the copies of guessed experts, and scores guesses when their layer is reached.

    Args:
        target: Where copies are started.
        metrics: Where predictions are counted; its `num_steps` numbers the steps.
        num_layers: MoE layers.
        max_prefetches: Most guessed experts queued or on their way at once: the byte cap.
        min_odds: Guesses less probable than this are not prefetched.

    Attributes:
        max_prefetches: As given; may be changed at any time.
    """

    def __init__(
        self,
        target: PrefetchTarget,
        metrics: Metrics,
        *,
        num_layers: int,
        max_prefetches: int,
        min_odds: float = 0.5,
    ) -> None:
        self._target = target
        self._metrics = metrics
        self._num_layers = num_layers
        self.max_prefetches = max_prefetches
        self._min_odds = min_odds
        self._odds = GuessOdds()
        self._guesses: dict[int, list[_OpenGuess]] = {}

    def begin_step(self, layer: int) -> None:
        """Drop guesses about layers that a new step, begun at `layer`, will not score."""
        self._guesses = {at: old for at, old in self._guesses.items() if at <= layer}

    def score(self, layer: int, wanted: Sequence[int]) -> None:
        """Learn from what came true.

        Args:
            layer: The layer reached.
            wanted: The distinct experts its true router chose.
        """
        true = set(wanted)
        for guess, absent, is_single in self._guesses.pop(layer, ()):
            place = (layer, guess.distance)
            metrics = self._metrics
            right = len(true.intersection(guess.experts[: len(wanted)]))
            metrics.num_predicted[place] = metrics.num_predicted.get(place, 0) + len(wanted)
            metrics.num_predicted_right[place] = metrics.num_predicted_right.get(place, 0) + right
            for expert, confidence in absent:
                self._odds.learn(guess.distance, is_single, confidence, was_right=expert in true)

    def prefetch(self, guesses: Iterable[Prediction], *, is_single: bool) -> None:
        """Start the copies that are worth it: near layers and likely experts first.

        Args:
            guesses: Predictions made at one layer, the nearest first.
            is_single: Whether the forward has one token.
        """
        room = self.max_prefetches - self._target.num_open_prefetches
        for guess in guesses:
            absent = [
                (expert, confidence)
                for expert, confidence in zip(guess.experts, guess.confidence, strict=True)
                if self._target.is_absent(ExpertKey(guess.layer, expert))
            ]
            self._guesses.setdefault(guess.layer, []).append(_OpenGuess(guess, absent, is_single))
            for expert, confidence in absent:
                odds = self._odds.get(guess.distance, is_single, confidence)
                if room <= 0 or odds < self._min_odds:
                    break
                # Used with probability p per visit, an expert waits (1 - p) / p visits on average.
                wait = guess.distance / self._num_layers + (1 - odds) / odds
                room -= self._start(guess, expert, wait, odds)

    def commit(self, guess: Prediction, executed: Sequence[int], *, is_single: bool) -> None:
        """Start copies of experts that will be executed, whatever the odds.

        Args:
            guess: The prediction that a policy is going to execute.
            executed: Its experts, the heaviest first.
            is_single: Whether the forward has one token.
        """
        self._guesses.setdefault(guess.layer, []).append(_OpenGuess(guess, [], is_single))
        for expert in executed:
            if self._target.is_absent(ExpertKey(guess.layer, expert)):
                self._start(guess, expert, guess.distance / self._num_layers, 1.0)

    def _start(self, guess: Prediction, expert: int, wait: float, odds: float) -> bool:
        order = self._metrics.num_steps * self._num_layers + guess.layer - odds
        key = ExpertKey(guess.layer, expert)
        return self._target.prefetch(key, expected_wait=wait, order=order)


class _OpenGuess(NamedTuple):
    """A guess whose layer has not been reached, and what of it was absent when it was made."""

    guess: Prediction
    absent: list[tuple[int, float]]
    is_single: bool


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
