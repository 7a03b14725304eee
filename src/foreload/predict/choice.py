"""Picks among predictors by measuring their recall on the text at hand."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from foreload.types import Prediction, Predictor, RoutingEvent

__all__ = ["MeasuredChoice"]


class MeasuredChoice:
    """Runs all candidates for a while, then only the one with the best recall one layer ahead.

    Args:
        candidates: Predictors, the preferred one first: it is used until the choice is made, and
            wins ties.
        num_samples: Layer visits of single tokens to measure on.
    """

    name = "auto"

    def __init__(self, candidates: Sequence[Predictor], *, num_samples: int = 256) -> None:
        self._candidates = list(candidates)
        self._num_samples = num_samples
        self._seen = 0
        self._right = [0] * len(self._candidates)
        self._pending: dict[int, list[tuple[int, ...]]] = {}

    @property
    def chosen(self) -> Predictor:
        """Give the predictor in use."""
        best = max(range(len(self._right)), key=lambda i: (self._right[i], -i))
        return self._candidates[best]

    def predict(self, event: RoutingEvent) -> list[Prediction]:
        """Predict with the best candidate so far; measure the others while it is still open."""
        if self._seen >= self._num_samples or event.top_k_index.shape[0] != 1:
            return self.chosen.predict(event)
        true = set(event.top_k_index[0].tolist())
        guesses = self._pending.pop(event.layer, None)
        if guesses is not None:
            self._seen += 1
            for index, guess in enumerate(guesses):
                self._right[index] += len(true.intersection(guess))
        answers = [candidate.predict(event) for candidate in self._candidates]
        self._pending[event.layer + 1] = [_one_ahead(answer, event.layer + 1) for answer in answers]
        return answers[self._candidates.index(self.chosen)]


def _one_ahead(answer: list[Prediction], layer: int) -> tuple[int, ...]:
    """Give as many experts as `layer` is expected to demand; none where nothing was said of it."""
    guesses = [guess for guess in answer if guess.layer == layer]
    return guesses[0].experts[: guesses[0].num_expected] if guesses else ()
