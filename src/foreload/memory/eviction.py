"""How long until an expert is wanted again: the estimate by which the cache evicts.

Every policy answers one question, in one unit: the expected number of tokens until each expert's
next use. The cache evicts the longest wait, and compares a guess with a victim on the same scale.
Torch-free; a policy neither knows the slots nor changes them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

from foreload.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    Routing = Sequence[Sequence[int]]

__all__ = [
    "LFU",
    "LRU",
    "Belady",
    "EvictionPolicy",
    "History",
    "LeastStale",
    "NextUse",
    "make_eviction",
]

_SHORT = 16
"""Tokens of a forward up to which it is a round of decoding rather than a part of a prompt."""
_LONG_AGO = -(10**12)
"""Layer visit at which an expert that was never used counts as last used."""


class EvictionPolicy(Protocol):
    """Estimates, for every expert, the tokens until its next use."""

    def observe(
        self,
        layer: int,
        counts: Mapping[int, int],
        num_tokens: int,
        routing: Routing | None = None,
    ) -> None:
        """Learn the true routing of one forward at one layer.

        Args:
            layer: MoE layer.
            counts: How many tokens of the forward want each demanded expert.
            num_tokens: Tokens in the forward.
            routing: The experts of each token, (T, K); not needed for a single token.
        """

    def expected_wait(self) -> NDArray[np.float64]:
        """Give the expected tokens until next use, (L * E,), as of the last `observe`."""


class _Position:
    """Counts forwards and remembers the layer, so that a wait can be told in tokens."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.num_layers = num_layers
        self.num_experts = num_experts
        self.layer = num_layers - 1
        self.visits = 0
        self._layer_of = np.repeat(np.arange(num_layers), num_experts)

    def advance(self, layer: int) -> None:
        """Move to `layer`, counting the layers passed over; a token-cycle has `num_layers`."""
        self.visits += (layer - self.layer - 1) % self.num_layers + 1
        self.layer = layer

    def layers_away(self) -> NDArray[np.float64]:
        """Give the share of a token-cycle until each expert's layer comes round, (L * E,)."""
        away: NDArray[np.float64] = (
            (self._layer_of - self.layer - 1) % self.num_layers
        ) / self.num_layers
        return away

    def flat(self, layer: int, experts: Sequence[int]) -> NDArray[np.int64]:
        """Give flat indices of a layer's experts."""
        return layer * self.num_experts + np.asarray(experts, dtype=np.int64)


class LRU:
    """Least recently used: an expert is expected to stay away as long as it has been away.

    Evicts everything just before it is needed when fewer slots than one token-cycle
    (layers times top_k) are given.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self._at = _Position(num_layers, num_experts)
        self._last = np.full(num_layers * num_experts, _LONG_AGO)

    def observe(
        self,
        layer: int,
        counts: Mapping[int, int],
        num_tokens: int,
        routing: Routing | None = None,
    ) -> None:
        """Stamp the demanded experts with the present."""
        self._at.advance(layer)
        self._last[self._at.flat(layer, list(counts))] = self._at.visits

    def expected_wait(self) -> NDArray[np.float64]:
        """Give the tokens since last use."""
        wait: NDArray[np.float64] = (self._at.visits - self._last) / self._at.num_layers
        return wait


class LFU:
    """Decayed frequency: uses per token, forgotten with a half-life of `half_life` tokens."""

    def __init__(self, num_layers: int, num_experts: int, *, half_life: float = 32.0) -> None:
        self._at = _Position(num_layers, num_experts)
        self._rate = _UseRate(num_layers, num_experts, half_life)

    def observe(
        self,
        layer: int,
        counts: Mapping[int, int],
        num_tokens: int,
        routing: Routing | None = None,
    ) -> None:
        """Update the frequencies of one layer."""
        self._at.advance(layer)
        self._rate.update(layer, counts, num_tokens)

    def expected_wait(self) -> NDArray[np.float64]:
        """Give the mean gap that the decayed frequency stands for."""
        wait: NDArray[np.float64] = 1.0 / np.maximum(self._rate.values, 1e-9)
        return wait


class LeastStale:
    """Evict first what this token-cycle has already passed, oldest first.

    Experts of layers still to come in this cycle are kept over those of layers just passed.

    Reference:
        "SpecMD", arXiv:2602.03921.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self._at = _Position(num_layers, num_experts)
        self._last = np.full(num_layers * num_experts, _LONG_AGO)

    def observe(
        self,
        layer: int,
        counts: Mapping[int, int],
        num_tokens: int,
        routing: Routing | None = None,
    ) -> None:
        """Stamp the demanded experts with the present."""
        self._at.advance(layer)
        self._last[self._at.flat(layer, list(counts))] = self._at.visits

    def expected_wait(self) -> NDArray[np.float64]:
        """Give whole cycles since last use, plus the way to the expert's layer."""
        cycles = (self._at.visits - self._last) // self._at.num_layers
        wait: NDArray[np.float64] = cycles + self._at.layers_away()
        return wait


class NextUse:
    """Expected time to next use from a fast and a slow use rate and the layer's position.

    An expert used with probability p per token waits (1 - p) / p tokens on average, counted
    from when its layer next comes round. p mixes a slow rate (what the text is about) and a fast
    one (what it is doing now). Unlike recency it does not fall to zero below one token-cycle.
    """

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        *,
        slow_half_life: float = 64.0,
        fast_half_life: float = 4.0,
        fast_weight: float = 0.4,
    ) -> None:
        self._at = _Position(num_layers, num_experts)
        self._slow = _UseRate(num_layers, num_experts, slow_half_life)
        self._fast = _UseRate(num_layers, num_experts, fast_half_life)
        self._fast_weight = fast_weight

    def observe(
        self,
        layer: int,
        counts: Mapping[int, int],
        num_tokens: int,
        routing: Routing | None = None,
    ) -> None:
        """Update both rates of one layer."""
        self._at.advance(layer)
        self._slow.update(layer, counts, num_tokens)
        self._fast.update(layer, counts, num_tokens)

    def expected_wait(self) -> NDArray[np.float64]:
        """Give the way to the expert's layer plus the mean gap between its uses."""
        wait: NDArray[np.float64] = self._at.layers_away() + 1.0 / self.rates() - 1.0
        return wait

    def rates(self) -> NDArray[np.float64]:
        """Give the probability of use per token, (L * E,), never quite zero."""
        rate = self._slow.values + self._fast_weight * (self._fast.values - self._slow.values)
        return np.clip(rate, 1e-4, 1.0)


class History:
    """Expect what followed when the routing last looked like this.

    Text repeats itself, and so does its routing. The routing of the last token and of this one as
    far as it has come is compared with all earlier ones; what the most similar of them were
    followed by is what is expected now, mixed with the use rates of `NextUse`. Nothing is trained.

    Args:
        num_layers: MoE layers.
        num_experts: Experts per layer.
        capacity: Tokens remembered, L * E bytes each (twice that is allocated).
        num_neighbours: Earlier tokens that are followed.
        sharpness: How much more a more similar token counts: exp(sharpness * similarity).
        trust: Weight of the followed tokens against the use rates, once 64 tokens are known.
        horizon: Tokens ahead that are followed.

    Cost:
        Per token N * L * K lookups for N remembered tokens, and at most eight times (at every
        layer up to fifteen) horizon * num_neighbours * L * E multiply-adds.
    """

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        *,
        capacity: int = 512,
        num_neighbours: int = 32,
        sharpness: float = 10.0,
        trust: float = 0.9,
        horizon: int = 8,
    ) -> None:
        self._rates = NextUse(num_layers, num_experts)
        self._num_layers = num_layers
        self._capacity = capacity
        self._num_neighbours = num_neighbours
        self._sharpness = sharpness
        self._trust = trust
        self._horizon = horizon
        self._past = np.zeros((2 * capacity, num_layers, num_experts), dtype=np.uint8)
        self._end = 0
        self._width = 0
        self._layer = num_layers
        self._score = np.zeros(0, dtype=np.float32)
        self._wait: NDArray[np.float64] | None = None
        # Deep models follow the past eight times per token, not at every layer: it would cost more
        # than the little it changes from one layer to the next.
        self._stride = max(1, num_layers // 8)
        self._layer_of = np.repeat(np.arange(num_layers), num_experts)

    def observe(
        self,
        layer: int,
        counts: Mapping[int, int],
        num_tokens: int,
        routing: Routing | None = None,
    ) -> None:
        """Remember the routing, and compare a single token's with the past."""
        self._rates.observe(layer, counts, num_tokens)
        # Forwards of several threads may interleave: what does not fit the last one begins another.
        if layer <= self._layer or min(num_tokens, self._capacity) != self._width:
            self._begin(num_tokens)
        if layer % self._stride == 0 or self._width > _SHORT:
            self._wait = None
        self._layer = layer
        rows = self._past[self._end - self._width : self._end, layer]
        if self._width == 1:
            rows[0, list(counts)] = 1
        elif routing is not None:
            for row, experts in zip(rows, routing[-self._width :], strict=True):
                row[[expert for expert in experts if expert < row.size]] = 1
        if self._width <= _SHORT:
            self._compare(rows, layer)

    def expected_wait(self) -> NDArray[np.float64]:
        """Give the mean time to next use along the followed tokens, then by use rate."""
        if self._wait is None:
            now = self._end - 1
            is_comparable = self._width <= _SHORT and len(self._score) >= 2
            self._wait = self._follow(now) if is_comparable else self._rates.expected_wait()
        return self._wait

    def _compare(self, rows: NDArray[np.uint8], layer: int) -> None:
        """Add how much every earlier token is like the forward's last one at a layer."""
        past = self._past[: self._end - self._width, layer]
        self._score += past[:, rows[-1].nonzero()[0]].sum(1, dtype=np.float32)
        if len(rows) > 1:
            # The token before belongs to the same forward: it is compared as it comes, too.
            self._score[1:] += past[:-1][:, rows[-2].nonzero()[0]].sum(1, dtype=np.float32)

    def _follow(self, now: int) -> NDArray[np.float64]:
        """Follow the tokens most like token `now`, (L * E,)."""
        rates = self._rates.rates()
        near, weights = self._neighbours()
        trust = self._trust * min(1.0, now / 64)
        away = (self._layer_of - self._layer) / self._num_layers
        wait = np.zeros_like(rates)
        alive = np.ones_like(rates)
        for ahead in range(self._horizon + 1):
            known = near + ahead < now
            if not known.any():
                break
            rows = self._past[near[known] + ahead].reshape(-1, rates.size).astype(np.float32)
            followed = weights[known] @ rows / weights[known].sum()
            chance = np.minimum((1 - trust) * rates + trust * followed, 0.999)
            if ahead == 0:
                chance[away <= 0] = 0.0
            wait += alive * chance * (ahead + away)
            alive *= 1.0 - chance
        wait += alive * (self._horizon + away + 1.0 / rates)
        return wait

    def _begin(self, num_tokens: int) -> None:
        """Make room for the tokens of a new forward; compare the last one with the past."""
        self._width = min(num_tokens, self._capacity)
        if self._end + self._width > len(self._past):
            kept = min(self._capacity, self._end)
            self._past[:kept] = self._past[self._end - kept : self._end].copy()
            self._end = kept
        self._past[self._end : self._end + self._width] = 0
        self._end += self._width
        before = self._end - self._width
        self._score = np.zeros(before, dtype=np.float32)
        if self._width == 1 and before >= 2:
            flat = self._past[:before].reshape(before, -1)
            last = flat[before - 1].nonzero()[0]
            self._score[1:] = flat[: before - 1][:, last].sum(1, dtype=np.float32)

    def _neighbours(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Give the earlier tokens most similar to this one, and their weights."""
        scores = self._score[1:]
        count = min(self._num_neighbours, scores.size)
        near = np.argpartition(-scores, count - 1)[:count]
        # Of the last token before this forward: this one's routing is not known to its end.
        per_token = max(float(self._past[len(self._score) - 1].sum()), 1.0)
        similarity = (scores[near] - scores[near].max()) / per_token
        weights: NDArray[np.float32] = np.exp(self._sharpness * similarity)
        return near + 1, weights


class _UseRate:
    """Exponentially averaged uses per token, unbiased while young, one row per layer."""

    def __init__(self, num_layers: int, num_experts: int, half_life: float) -> None:
        self._num_experts = num_experts
        self._keep = 0.5 ** (1.0 / half_life)
        self._sum = np.zeros((num_layers, num_experts))
        self._weight = np.zeros(num_layers)
        self._rate = np.zeros((num_layers, num_experts))

    def update(self, layer: int, counts: Mapping[int, int], num_tokens: int) -> None:
        """Average in one forward of `num_tokens` tokens at once."""
        keep = self._keep**num_tokens
        row = self._sum[layer]
        row *= keep
        share = (1.0 - keep) / num_tokens
        for expert, count in counts.items():
            row[expert] += share * count
        self._weight[layer] = self._weight[layer] * keep + (1.0 - keep)
        np.divide(row, self._weight[layer], out=self._rate[layer])

    @property
    def values(self) -> NDArray[np.float64]:
        """Give uses per token, (L * E,)."""
        return self._rate.reshape(-1)


class Belady:
    """The true wait, read off a recorded trace: the best any eviction can do. Replays only.

    Args:
        num_layers: MoE layers.
        num_experts: Experts per layer.
        trace: The demanded experts of every layer of every forward, in order.

    Reference:
        Belady 1966, "A study of replacement algorithms for a virtual-storage computer".
    """

    def __init__(
        self, num_layers: int, num_experts: int, trace: Sequence[Sequence[Sequence[int]]]
    ) -> None:
        self._num_layers = num_layers
        self._num_experts = num_experts
        self._uses: list[list[int]] = [[] for _ in range(num_layers * num_experts)]
        for step, layers in enumerate(trace):
            for layer, experts in enumerate(layers):
                for expert in experts:
                    self._uses[layer * num_experts + expert].append(step * num_layers + layer)
        self._cursor = [0] * len(self._uses)
        never = (len(trace) + 1) * num_layers * 10
        self._never = never
        self._next = np.array([uses[0] if uses else never for uses in self._uses], dtype=float)
        self._now = -1

    def observe(
        self,
        layer: int,
        counts: Mapping[int, int],
        num_tokens: int,
        routing: Routing | None = None,
    ) -> None:
        """Step to the next recorded layer visit; its experts' next use is the one after."""
        self._now += (layer - self._now - 1) % self._num_layers + 1
        for expert in counts:
            flat = layer * self._num_experts + expert
            uses = self._uses[flat]
            cursor = self._cursor[flat]
            while cursor < len(uses) and uses[cursor] <= self._now:
                cursor += 1
            self._cursor[flat] = cursor
            self._next[flat] = uses[cursor] if cursor < len(uses) else self._never

    def expected_wait(self) -> NDArray[np.float64]:
        """Give the true tokens until next use."""
        wait: NDArray[np.float64] = (self._next - self._now) / self._num_layers
        return wait


def make_eviction(name: str, num_layers: int, num_experts: int) -> EvictionPolicy:
    """Make the policy a setting names.

    Raises:
        ConfigError: No such policy.
    """
    match name:
        case "history":
            return History(num_layers, num_experts)
        case "next-use":
            return NextUse(num_layers, num_experts)
        case "lru" | "none":
            return LRU(num_layers, num_experts)
        case "lfu":
            return LFU(num_layers, num_experts)
        case "least-stale":
            return LeastStale(num_layers, num_experts)
    raise ConfigError(
        f"unknown eviction policy {name!r}",
        hint="use history, next-use, lru, lfu, least-stale or none",
    )
