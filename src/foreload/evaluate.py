"""Measure what an engine's policy costs in quality, beside what it saves in waiting.

A text is cut into windows. Each is decoded twice in the same engine, its tokens forced: under the
engine's policy, and exactly. Changes nothing about the engine it is given.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from foreload.config import check_whole
from foreload.decode.prompt import encode_text
from foreload.errors import ConfigError, ShapeError
from foreload.schedule.policy import Exact

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from foreload.engine import Engine
    from foreload.metrics import Metrics
    from foreload.schedule.policy import ExecutionPolicy

    Progress = Callable[[str, int, int], None]

__all__ = [
    "EvaluationReport",
    "Interval",
    "TokenQuality",
    "bootstrap_interval",
    "compare_logits",
    "evaluate",
    "prefill_exactly",
]

_WINDOW_TOKENS = 512
_BLOCK_TOKENS = 64
_MIN_BLOCKS = 8
_NUM_RESAMPLES = 4000


class TokenQuality(NamedTuple):
    """What exact and other logits say about each token that follows, (T,) each.

    `nll_exact` and `nll` are negative log-likelihoods in nats, `kl` is KL(exact || other) in nats,
    all float64; `agrees` tells whether both name the same token as the likeliest.
    """

    nll_exact: Tensor
    nll: Tensor
    kl: Tensor
    agrees: Tensor


def compare_logits(exact_logits: Tensor, logits: Tensor, next_ids: Tensor) -> TokenQuality:
    """Compare logits with those of the exact model, token by token.

    Equal logits have a `kl` of exactly 0.

    Args:
        exact_logits: (T, V) of the exact model.
        logits: (T, V) to judge.
        next_ids: (T,) int64, the tokens that follow in the text.

    Raises:
        ShapeError: The shapes do not agree.
    """
    if exact_logits.shape != logits.shape or logits.shape[:1] != next_ids.shape:
        shapes = [tuple(tensor.shape) for tensor in (exact_logits, logits, next_ids)]
        raise ShapeError(f"logits and tokens do not agree: {shapes}")
    exact_log, log = (rows.double().log_softmax(-1) for rows in (exact_logits, logits))
    share = exact_log.exp()
    # A token that the exact model rules out adds nothing, whatever the other thinks of it.
    terms = torch.where(share > 0, share * (exact_log - log), 0.0)
    chosen = next_ids[:, None]
    return TokenQuality(
        -exact_log.gather(-1, chosen)[:, 0],
        -log.gather(-1, chosen)[:, 0],
        terms.sum(-1).clamp(min=0.0),
        exact_logits.argmax(-1) == logits.argmax(-1),
    )


def prefill_exactly(engine: Engine, token_ids: Sequence[int]) -> tuple[Any, Tensor]:
    """Read a prompt into a new KV cache as generation does: exactly, even if it is one token.

    Args:
        engine: Runs the prompt.
        token_ids: The prompt, at least one token.

    Returns:
        The KV cache, and the logits (V,) after the last token.

    Raises:
        ConfigError: The prompt is empty.
    """
    if not token_ids:
        raise ConfigError("the prompt is empty", hint="give at least one token")
    cache = engine.make_cache()
    with engine.runtime.prefilling():
        for chunk in _cut(token_ids, engine.config.prefill_chunk):
            logits = engine.forward(torch.tensor([chunk]), cache)
    return cache, logits


@dataclass(frozen=True, slots=True)
class Interval:
    """A measured value and the bounds of its 95 % confidence interval."""

    value: float
    low: float
    high: float

    def map(self, function: Callable[[float], float]) -> Interval:
        """Apply a rising function to value and bounds."""
        return Interval(function(self.value), function(self.low), function(self.high))


def bootstrap_interval(
    values: Sequence[float],
    blocks: Sequence[int],
    *,
    weights: Sequence[float] | None = None,
    seed: int = 0,
) -> Interval:
    """Estimate a mean, sum(values) / sum(weights), and how far it may be off.

    Whole blocks are drawn with replacement: what lies in one block may be correlated, as tokens
    that follow each other are. The same blocks and seed draw the same resamples, so that a
    difference per token has a paired interval.

    Args:
        values: What is averaged.
        blocks: For each value, the number of its block.
        weights: What each value counts; None for 1 each.
        seed: Seed of the draws.

    Raises:
        ValueError: There is nothing to average.

    Reference:
        Efron 1979, "Bootstrap Methods: Another Look at the Jackknife"; percentile intervals.
    """
    _, place = np.unique(np.asarray(blocks), return_inverse=True)
    over = np.bincount(place, weights=np.asarray(values, dtype=np.float64))
    under = np.bincount(place, weights=None if weights is None else np.asarray(weights))
    if not under.sum() > 0:
        raise ValueError("there is nothing to average")
    num_blocks = len(over)
    draws = np.random.default_rng(seed).multinomial(
        num_blocks, np.full(num_blocks, 1 / num_blocks), size=_NUM_RESAMPLES
    )
    totals = draws @ under
    means = (draws @ over)[totals > 0] / totals[totals > 0]
    low, high = np.quantile(means, (0.025, 0.975))
    return Interval(float(over.sum() / under.sum()), float(low), float(high))


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationReport:
    """What an evaluation measured, each number with its 95 % interval.

    Attributes:
        identity: The checkpoint's identity.
        num_tokens: Tokens that were decoded and scored.
        num_windows: Contexts they come from.
        num_prompt_tokens: Tokens of each context that were prefilled and not scored.
        block_tokens: Consecutive tokens that are resampled as one.
        perplexity: exp of the mean negative log-likelihood under the policy.
        exact_perplexity: The same of the exact model.
        perplexity_ratio: perplexity / exact_perplexity; a paired interval.
        kl_vs_exact: KL(exact || policy) per token, nats.
        top1_agreement: Share of the tokens for which both name the same one as the likeliest.
        speculated_fraction: num_speculated / num_executed under the policy.
        hit_rate: num_hits / num_lookups under the policy.
        stall_s_per_token: Seconds compute waited for copies under the policy, per token.
    """

    identity: str
    num_tokens: int
    num_windows: int
    num_prompt_tokens: int
    block_tokens: int
    perplexity: Interval
    exact_perplexity: Interval
    perplexity_ratio: Interval
    kl_vs_exact: Interval
    top1_agreement: Interval
    speculated_fraction: Interval
    hit_rate: Interval
    stall_s_per_token: Interval

    def to_dict(self) -> dict[str, Any]:
        """Give the report as plain values, ready for JSON."""
        return asdict(self)


def evaluate(
    engine: Engine,
    text: str | Sequence[int],
    *,
    max_tokens: int = 4096,
    num_prompt_tokens: int = 64,
    seed: int = 0,
    progress: Progress | None = None,
) -> EvaluationReport:
    """Compare an engine's policy with the exact model on a text.

    Of each window, the prompt is prefilled exactly and the rest forced one token per forward,
    because policies act on single tokens. An exact policy gives a `kl_vs_exact` of exactly 0.

    Args:
        engine: With the settings to judge. Its expert memory is used as it is found.
        text: Text that the model was not trained or calibrated on, or its token ids.
        max_tokens: Most tokens of the text to use.
        num_prompt_tokens: Tokens at the start of each window that are not scored.
        seed: Seed of the intervals.
        progress: Called with what is being done, tokens done, and tokens in all.

    Raises:
        ConfigError: The text is too short or no text, a number makes no sense, or there is no
            tokenizer.
        TransferError: A copy failed; the engine stays usable.
    """
    check_whole("max_tokens", max_tokens, least=1)
    check_whole("num_prompt_tokens", num_prompt_tokens, least=1)
    check_whole("seed", seed, least=0)
    token_ids, prefix = _encode(engine, text, max_tokens)
    window_size = _window_size(engine)
    if num_prompt_tokens + 2 > window_size:
        raise ConfigError(
            f"prompts of {num_prompt_tokens} tokens leave nothing to score in windows of "
            f"{window_size}",
            hint=f"set num_prompt_tokens to {window_size - 2} at most",
        )
    windows = [
        prefix + window
        for window in _cut(token_ids, window_size - len(prefix))
        if len(prefix) + len(window) >= num_prompt_tokens + 2
    ]
    num_tokens = sum(len(window) - num_prompt_tokens - 1 for window in windows)
    if num_tokens < _MIN_BLOCKS:
        raise ConfigError(
            f"{len(token_ids)} tokens of text leave {num_tokens} to score after prompts of "
            f"{num_prompt_tokens}; {_MIN_BLOCKS} are needed",
            hint="give a longer text, more max_tokens or fewer num_prompt_tokens",
        )
    block_tokens = min(_BLOCK_TOKENS, num_tokens // _MIN_BLOCKS)
    policy = engine.runtime.policy
    blocks: list[_Block] = []
    done = 0

    def tell() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress("Evaluating", done, 2 * num_tokens)

    try:
        for window in windows:
            blocks += _compare(engine, window, num_prompt_tokens, block_tokens, policy, tell)
    finally:
        engine.runtime.policy = policy
    return EvaluationReport(
        identity=engine.spec.identity,
        num_tokens=num_tokens,
        num_windows=len(windows),
        num_prompt_tokens=num_prompt_tokens,
        block_tokens=block_tokens,
        **_summarise(blocks, seed),
    )


class _Block(NamedTuple):
    """Some consecutive tokens: what was counted under the policy, and what they were worth."""

    counted: Metrics
    quality: TokenQuality


def _compare(
    engine: Engine,
    window: list[int],
    num_prompt_tokens: int,
    block_tokens: int,
    policy: ExecutionPolicy,
    tell: Callable[[], None],
) -> Iterator[_Block]:
    """Decode a window under the policy, then exactly; give its blocks."""
    prompt, rest = window[:num_prompt_tokens], torch.tensor(window[num_prompt_tokens:])
    fed_blocks = torch.split(rest[:-1], block_tokens)
    next_blocks = torch.split(rest[1:], block_tokens)
    # The policy goes first: eviction learns from a text, and would know it the second time.
    engine.runtime.policy = policy
    cache, _ = prefill_exactly(engine, prompt)
    under_policy: list[tuple[Metrics, Tensor]] = []
    for fed in fed_blocks:
        before = engine.metrics.snapshot()
        logits = _force(engine, fed, cache, tell)
        under_policy.append((engine.metrics.since(before), logits))
    engine.runtime.policy = Exact()
    cache, _ = prefill_exactly(engine, prompt)
    for fed, next_ids, (counted, logits) in zip(fed_blocks, next_blocks, under_policy, strict=True):
        exact_logits = _force(engine, fed, cache, tell)
        yield _Block(counted, compare_logits(exact_logits, logits, next_ids))


def _force(engine: Engine, token_ids: Tensor, kv_cache: Any, tell: Callable[[], None]) -> Tensor:
    """Feed tokens (T,) one per forward; give the logits after each, (T, V)."""
    rows = []
    for token in token_ids:
        rows.append(engine.forward(token.view(1, 1), kv_cache))
        tell()
    return torch.stack(rows)


def _summarise(blocks: Sequence[_Block], seed: int) -> dict[str, Interval]:
    numbers = range(len(blocks))
    lengths = [len(block.quality.kl) for block in blocks]
    counts = [block.counted for block in blocks]

    def ratio(over: Sequence[float], under: Sequence[int]) -> Interval:
        return bootstrap_interval(over, numbers, weights=under, seed=seed)

    def per_token(column: Callable[[TokenQuality], Tensor]) -> Interval:
        return ratio([float(column(block.quality).sum()) for block in blocks], lengths)

    return {
        "perplexity": per_token(lambda tokens: tokens.nll).map(math.exp),
        "exact_perplexity": per_token(lambda tokens: tokens.nll_exact).map(math.exp),
        "perplexity_ratio": per_token(lambda tokens: tokens.nll - tokens.nll_exact).map(math.exp),
        "kl_vs_exact": per_token(lambda tokens: tokens.kl),
        "top1_agreement": per_token(lambda tokens: tokens.agrees),
        "speculated_fraction": ratio(
            [count.num_speculated for count in counts], [count.num_executed for count in counts]
        ),
        "hit_rate": ratio(
            [count.num_hits for count in counts], [count.num_lookups for count in counts]
        ),
        "stall_s_per_token": ratio([count.stall_s for count in counts], lengths),
    }


def _encode(
    engine: Engine, text: str | Sequence[int], max_tokens: int
) -> tuple[list[int], list[int]]:
    """Give the text's token ids, and those every window begins with."""
    token_ids = encode_text(text, engine.tokenizer, engine.vocab_size, max_tokens=max_tokens + 1)
    first = getattr(engine.tokenizer, "bos_token_id", None)
    is_begun = isinstance(text, str) and token_ids[:1] == [first]
    prefix = token_ids[:1] if is_begun else []
    return token_ids[len(prefix) :][:max_tokens], prefix


def _window_size(engine: Engine) -> int:
    return min(_WINDOW_TOKENS, engine.max_positions or _WINDOW_TOKENS)


def _cut(token_ids: Sequence[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(token_ids), size):
        yield list(token_ids[start : start + size])
