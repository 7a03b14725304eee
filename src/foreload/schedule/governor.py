"""Chooses how many tokens to draft in each round, by measured costs and acceptance.

The Amortization Roofline Model with its inputs tracked while text is generated: what a draft token
and a verification take to compute, what a round copies, how much of that is hidden, how often the
draft is right. Drafting nothing is one of the choices. Torch-free, and without a clock. Rounds of
several threads may ask and tell it.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from foreload.cost import (
    accept_length,
    amortised_intensity,
    compute_roof,
    io_roof,
    round_s,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Governor", "RoofPoint", "RoundReport"]

_KEEP = 0.85
"""Weight of the past in moving averages of times: they follow the last dozen rounds."""
_KEEP_ACCEPTANCE = 0.98
"""The same for whether a token was accepted: yes or no says little, so more of them are heard."""
_TESTS_OF_ONE = 12
"""Tests of one position that weigh as much as what is known of all positions together."""
_MARGIN = 1.04
"""Another number of draft tokens must promise this much more to be taken."""
_FIRST_ROUNDS = (0, 4, 0, 8, 0)
"""What the first rounds draft: both ways, and as far as it goes, lest it be a guess."""
_HOPE = 0.7
"""Share of plain decoding's rate that the longest round must promise to be one of the first: where
drafting loses clearly it is the dearest of them."""
_PLAIN_EVERY = 48
"""Tokens of rounds with a draft after which decoding without is tried, while it promises nearly as
much. Often enough to be right within some hundred tokens, and seldom enough to cost 1 % or 2."""
_PLAIN_RUN = 4
"""Rounds without a draft in a row when that is tried: their few tokens cost little."""
_SETTLING = 2
"""Rounds without a draft, behind one with it, that say nothing of plain decoding: the cache holds
what the draft wanted. They took some 10 % longer than plain decoding of the same text, up to 20
(widened demo, 40 and 50 % of the experts' memory, means of 25 texts, November 2026)."""
_UNSETTLED = 1.06
"""How much faster plain decoding is on its own than in its runs between rounds with a draft, the
first rounds left out (the same, texts that mostly drafted: a median of 1.06, 0.95 to 1.18)."""
_NEARLY = 0.8
_PLAIN_SELDOM = 480
"""The same where it promises less than that share of the choice's rate."""
_DOUBT_EVERY = 3
_DOUBT = 0.25
"""While it drafts, every third round may go to a number whose rate, were it better by this over the
root of one more than its rounds, would be above the choice's: first rounds fill a cold cache, and
what they showed of a number would keep it from ever being measured again."""
_IDLE_PROBES = (20, 160)
"""Rounds without a draft until one is tried again; doubled, up to the second, while it loses."""
_HOPED_ACCEPTANCE = 0.97
_HOPED_TESTS = 20
"""What is thought of a draft at first, and how many tests that weighs. Rather too much: where it is
wrong drafting soon shows it; a draft thought too little of would not be tried, and stay so."""
_PRIOR_GROWTH = 0.7
"""Bytes copied grow with tokens verified to this power (small trained model, November 2026)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundReport:
    """What one round took and brought.

    Attributes:
        num_draft_tokens: Tokens drafted; 0 for plain decoding.
        num_accepted_tokens: Of these, accepted.
        draft_s: Seconds of drafting.
        verify_s: Seconds of the target's forward, waiting included.
        stall_s: Seconds of it waiting for copies.
        copied_bytes: Bytes that arrived since the round began.
        link_s: Seconds in which copies were on their way.
        num_lookups: Distinct experts the target demanded, over all layers.
    """

    num_draft_tokens: int
    num_accepted_tokens: int
    draft_s: float
    verify_s: float
    stall_s: float
    copied_bytes: int
    link_s: float
    num_lookups: int


class RoofPoint(NamedTuple):
    """One choice under both roofs: tokens per second.

    `union` is the distinct experts a verification demands, `intensity` tokens per byte copied,
    `io_roof` and `compute_roof` what link and computing allow, `predicted` what the model expects,
    `num_rounds` how often it was chosen.
    """

    num_draft_tokens: int
    union: float
    intensity: float
    io_roof: float
    compute_roof: float
    predicted: float
    num_rounds: int


class Governor:
    """Chooses the number of draft tokens, round by round.

    Args:
        most: Most tokens to draft.
        pinned: Draft this many, whatever the model says; None lets the model choose.

    Reference:
        Wang et al. 2025, "MoE-SpeQ", arXiv:2511.14102, the governor of section 4, with the bonus
        token, the overlap of copies and the growth of what a round copies.
    """

    def __init__(self, *, most: int = 8, pinned: int | None = None) -> None:
        self.most = most if pinned is None else pinned
        self.rounds_by_draft: Counter[int] = Counter()
        self._pinned = pinned
        self._choice = 0
        self._num_rounds = 0
        self._num_idle = 0
        self._num_plain = _SETTLING
        self._num_tokens_since = 0
        self._num_to_come = 0
        self._patience = self._next_probe = _IDLE_PROBES[0]
        self._acceptance = _Average(
            _HOPED_ACCEPTANCE, keep=_KEEP_ACCEPTANCE, num_prior=_HOPED_TESTS
        )
        self._acceptance_at = [_Average(keep=_KEEP_ACCEPTANCE) for _ in range(self.most)]
        self._draft_token_s = _Average()
        self._link_bytes_s = _Average()
        self._overlap = {False: _Average(0.5), True: _Average(0.8)}
        self._compute = _Curve()
        self._bytes = _Curve(_PRIOR_GROWTH)
        self._lookups = _Curve(_PRIOR_GROWTH)
        self._error: dict[int, _Average] = {}
        self._lock = threading.Lock()

    @property
    def draft_token_s(self) -> float:
        """Give the seconds of drafting one token; 0 before any was."""
        return self._draft_token_s.value

    @property
    def link_bytes_s(self) -> float:
        """Give the bytes per second that copies were measured at; 0 before any was."""
        return self._link_bytes_s.value

    @property
    def num_idle_rounds(self) -> int:
        """Give for how many rounds in a row nothing was drafted, probes aside."""
        return self._num_idle

    def chances(self, num_draft_tokens: int) -> list[float]:
        """Give, for the tokens a round feeds the draft, the chance that the text comes to them."""
        chances, reached = [], 1.0
        for position in range(num_draft_tokens):
            chances.append(reached)
            reached *= self.acceptance(position)
        return chances

    def acceptance(self, position: int) -> float:
        """Give p_j, the chance that a draft token is accepted if all before it are."""
        own = self._acceptance_at[position]
        trust = own.count / (own.count + _TESTS_OF_ONE)
        return trust * own.value + (1 - trust) * self._acceptance.value

    def choose(self, most: int) -> int:
        """Give the number of tokens to draft in the coming round.

        Args:
            most: What the text still has room for.
        """
        with self._lock:
            return self._choose(most)

    def learn(self, report: RoundReport) -> None:
        """Average in what a round has shown."""
        with self._lock:
            self._learn(report)

    def rate(self, num_draft_tokens: int) -> float:
        """Give the tokens per second that a number of draft tokens promises: Theta(k)."""
        taken_s = self._modelled_s(num_draft_tokens) * self._correction(num_draft_tokens)
        return self._length(num_draft_tokens) / taken_s if taken_s > 0 else 0.0

    def roofs(self) -> list[RoofPoint]:
        """Give every choice under both roofs, for statistics and figures."""
        points = []
        with self._lock:
            for number in range(self.most + 1):
                length = self._length(number)
                intensity = amortised_intensity(length, self._bytes.at(number + 1))
                draft_s, verify_s = self._draft_s(number), self._compute.at(number + 1)
                points.append(
                    RoofPoint(
                        number,
                        self._lookups.at(number + 1),
                        intensity,
                        io_roof(intensity, self.link_bytes_s),
                        compute_roof(length, draft_s, verify_s) if verify_s > 0 else 0.0,
                        self.rate(number),
                        self.rounds_by_draft[number],
                    )
                )
        return points

    def _choose(self, most: int) -> int:
        if self._pinned is not None:
            return min(self._pinned, most)
        if most == 0:
            # No choice, so none of the turns that others wait for either.
            return 0
        if self._num_rounds < len(_FIRST_ROUNDS):
            self._num_tokens_since = 0
            return min(self._look(), most)
        if self._num_to_come:
            self._num_to_come -= 1
            return 0
        rates = [self.rate(number) for number in range(self.most + 1)]
        best = max(range(1, self.most + 1), key=rates.__getitem__, default=0)
        plain = rates[0] * (_UNSETTLED if self._num_plain <= 2 * _PLAIN_RUN else 1.0)
        kept = rates[self._choice] if self._choice else plain
        if rates[best] > _MARGIN * max(kept, plain):
            self._choice = best
        elif plain >= kept:
            self._choice = 0
        self._num_idle = 0 if self._choice else self._num_idle + 1
        return min(self._probe(rates), most)

    def _learn(self, report: RoundReport) -> None:
        drafted, width = report.num_draft_tokens, report.num_draft_tokens + 1
        self._num_rounds += 1
        self.rounds_by_draft[drafted] += 1
        if report.link_s > 0:
            self._link_bytes_s.add(report.copied_bytes / report.link_s)
        self._num_plain = 0 if drafted else self._num_plain + 1
        if drafted:
            self._num_tokens_since += report.num_accepted_tokens + 1
        # The first look has nothing else to go by.
        if 0 < self._num_plain <= _SETTLING and self._num_rounds > len(_FIRST_ROUNDS):
            return
        compute_s = report.verify_s - report.stall_s
        self._compute.add(width, compute_s)
        self._bytes.add(width, report.copied_bytes)
        self._lookups.add(width, report.num_lookups)
        if drafted:
            self._draft_token_s.add(report.draft_s / drafted)
            # What comes behind the first rejected token was never put to the test.
            for position in range(min(report.num_accepted_tokens + 1, drafted)):
                was_accepted = position < report.num_accepted_tokens
                self._acceptance.add(float(was_accepted))
                self._acceptance_at[position].add(float(was_accepted))
        self._learn_overlap(report, compute_s)
        measured_s = report.draft_s + report.verify_s
        expected_s = self._modelled_s(drafted)
        if expected_s > 0:
            self._error.setdefault(drafted, _Average()).add(measured_s / expected_s)

    def _look(self) -> int:
        """Give what a first round drafts: no long one where a short one has left no hope of it."""
        number = min(_FIRST_ROUNDS[self._num_rounds], self.most)
        seen = max(self.rounds_by_draft, default=0)
        if 0 < seen < number and self.rate(number) < _HOPE * self.rate(0):
            return 0
        return number

    def _probe(self, rates: Sequence[float]) -> int:
        """Give the choice, or in its turn another one to be measured again."""
        if self._choice == 0:
            self._num_tokens_since = 0
            if self._num_idle < self._next_probe:
                return 0
            self._patience = min(2 * self._patience, _IDLE_PROBES[1])
            self._next_probe = self._num_idle + self._patience
            return max(range(1, self.most + 1), key=rates.__getitem__)
        self._patience = self._next_probe = _IDLE_PROBES[0]
        is_near = rates[0] > _NEARLY * rates[self._choice]
        if self._num_tokens_since >= (_PLAIN_EVERY if is_near else _PLAIN_SELDOM):
            self._num_to_come = _PLAIN_RUN - 1
            self._num_tokens_since = 0
            return 0
        if self._num_rounds % _DOUBT_EVERY:
            return self._choice
        hopes = [
            rate if number == self._choice else rate * (1 + self._doubt(number))
            for number, rate in enumerate(rates)
        ]
        return max(range(1, self.most + 1), key=hopes.__getitem__)

    def _doubt(self, num_draft_tokens: int) -> float:
        """Give by how much the rate of a number may be better than its few rounds have shown."""
        return _DOUBT / math.sqrt(1 + self.rounds_by_draft[num_draft_tokens])

    def _length(self, num_draft_tokens: int) -> float:
        return accept_length([self.acceptance(position) for position in range(num_draft_tokens)])

    def _draft_s(self, num_draft_tokens: int) -> float:
        return num_draft_tokens * self._draft_token_s.value

    def _copies_s(self, width: int) -> float:
        rate = self._link_bytes_s.value
        return self._bytes.at(width) / rate if rate > 0 else 0.0

    def _modelled_s(self, num_draft_tokens: int) -> float:
        width = num_draft_tokens + 1
        return round_s(
            self._draft_s(num_draft_tokens),
            self._compute.at(width),
            self._copies_s(width),
            self._overlap[num_draft_tokens > 0].value,
        )

    def _correction(self, num_draft_tokens: int) -> float:
        """Give measured / modelled, the more trusted the more often it was seen."""
        seen = self._error.get(num_draft_tokens)
        others = [
            error.value
            for number, error in self._error.items()
            if (number > 0) == (num_draft_tokens > 0)
        ]
        usual = sum(others) / len(others) if others else 1.0
        if seen is None:
            return usual
        trust = seen.count / (seen.count + 1)
        return trust * seen.value + (1 - trust) * usual

    def _learn_overlap(self, report: RoundReport, compute_s: float) -> None:
        """See how much of the shorter of computing and copying was hidden."""
        busy_s = report.draft_s + compute_s
        shorter = min(busy_s, report.link_s)
        if shorter <= 0:
            return
        measured_s = report.draft_s + report.verify_s
        hidden = 1 - (measured_s - max(busy_s, report.link_s)) / shorter
        self._overlap[report.num_draft_tokens > 0].add(min(max(hidden, 0.0), 1.0))


class _Average:
    """A moving average; of all values alike while they are few, a prior counting as some."""

    __slots__ = ("_keep", "_num_values", "count", "value")

    def __init__(
        self, prior: float | None = None, *, keep: float = _KEEP, num_prior: int = 1
    ) -> None:
        self._keep = keep
        self.value = 0.0 if prior is None else prior
        self.count = 0
        self._num_values = 0 if prior is None else num_prior

    def add(self, value: float) -> None:
        """Average a value in."""
        self.count += 1
        self._num_values += 1
        self.value += max(1 - self._keep, 1 / self._num_values) * (value - self.value)


class _Curve:
    """What is measured at some widths, and a line through it for those seldom or never seen.

    Args:
        exponent: Fit a power of the width instead of a line, and take this one while only one
            width is known. None fits a line, through the origin while only one width is known.
    """

    def __init__(self, exponent: float | None = None) -> None:
        self._exponent = exponent
        self._means: dict[int, _Average] = {}

    def add(self, width: int, value: float) -> None:
        """Add a measurement."""
        self._means.setdefault(width, _Average()).add(value)

    def at(self, width: int) -> float:
        """Give the value to expect at a width; 0 where nothing was measured."""
        is_power = self._exponent is not None
        points = [
            (math.log(w) if is_power else w, math.log(m.value) if is_power else m.value)
            for w, m in self._means.items()
            if m.value > 0
        ]
        if not points:
            return 0.0
        mean_x = sum(x for x, _ in points) / len(points)
        mean_y = sum(y for _, y in points) / len(points)
        spread = sum((x - mean_x) ** 2 for x, _ in points)
        if spread > 0:
            slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
        else:
            slope = mean_y / mean_x if self._exponent is None else self._exponent
        # Wider rounds never cost less: what noise says against it is not believed.
        height = mean_y + max(slope, 0.0) * ((math.log(width) if is_power else width) - mean_x)
        line = math.exp(height) if is_power else height
        own = self._means.get(width)
        if own is None or own.value <= 0:
            return line
        # What others show says little of a width that was seen itself.
        trust = own.count / (own.count + 1)
        return trust * own.value + (1 - trust) * line
