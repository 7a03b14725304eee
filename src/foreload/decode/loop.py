"""Prefill in chunks, then token by token or round by round, until something says stop.

Works on any callable from token ids and a KV cache to logits, and on any drafter: knows neither
transformers nor where experts come from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, Self

import torch

from foreload.decode.sampling import sample, verify

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from torch import Tensor

    from foreload.config import SamplingConfig

__all__ = ["Drafter", "Forward", "Round", "Step", "decode"]


class Forward(Protocol):
    """Runs the model on new tokens of a sequence whose past the KV cache holds."""

    def __call__(self, token_ids: Tensor, kv_cache: Any) -> Tensor:
        """Give the last position's logits (V,) for `token_ids` (1, T)."""


class Step(Protocol):
    """Runs the model on one more token of the sequence in a KV cache of its own."""

    def __call__(self, token: int) -> Tensor:
        """Give the logits (V,) behind `token`."""

    def likeliest(self, token: int) -> int:
        """Give the likeliest token behind `token`, and run nothing else."""


class Round(Protocol):
    """Some tokens drafted, and one forward of the target over all of them.

    Between rounds the KV cache holds the target's keys and values of every token but the last. A
    round that is left without `settle` leaves the cache to be thrown away.
    """

    def __enter__(self) -> Self:
        """Begin."""

    def __exit__(self, *error: object) -> None:
        """End, settled or not: nothing of the round goes on."""

    def draft(self, token: int, choose: Callable[[Tensor], int | None]) -> None:
        """Draft behind `token`, choosing each by its logits (V,); None ends it early."""

    def verify(self, token_ids: Sequence[int]) -> Tensor:
        """Give the target's logits (T, V) behind each of the tokens."""

    def settle(self, num_accepted: int) -> None:
        """Keep the first verified token and the accepted ones behind it; forget the others."""


class Drafter(Protocol):
    """Makes rounds."""

    def begin(self, kv_cache: Any, most: int) -> Round:
        """Make a round that drafts as many tokens as pays, at most `most`; none is a choice."""


def decode(
    forward: Forward,
    prompt_ids: Sequence[int],
    kv_cache: Any,
    config: SamplingConfig,
    *,
    prefill_chunk: int,
    prefill: Forward | None = None,
    step: Step | None = None,
    drafter: Drafter | None = None,
    ends: Collection[int] = (),
    is_cancelled: Callable[[], bool] = lambda: False,
) -> Iterator[int]:
    """Generate token ids one by one; the caller stops by no longer asking.

    Args:
        forward: Runs the model.
        prompt_ids: The prompt, at least one token.
        kv_cache: Empty cache of this sequence.
        config: Sampling settings.
        prefill_chunk: Most prompt tokens per forward.
        prefill: Runs the model on the prompt; `forward` where None.
        step: Runs the model on single tokens behind the prompt, on the same cache; `forward` where
            None.
        drafter: Decodes in rounds instead of token by token.
        ends: Tokens behind which nothing is worth drafting.
        is_cancelled: Asked between forwards of the prompt and of a draft; true ends without
            another token.
    """
    generator = torch.Generator()
    if config.seed is None:
        generator.seed()
    else:
        generator.manual_seed(config.seed)
    logits = None
    for start in range(0, len(prompt_ids), prefill_chunk):
        if is_cancelled():
            return
        chunk = torch.tensor([list(prompt_ids[start : start + prefill_chunk])])
        logits = (prefill or forward)(chunk, kv_cache)
    if logits is None:
        raise ValueError("the prompt is empty")
    token = sample(logits, config, generator)
    yield token
    if drafter is not None:
        yield from _rounds(drafter, token, kv_cache, config, generator, ends, is_cancelled)
        return
    for _ in range(config.max_new_tokens - 1):
        if step is not None and config.temperature == 0:
            token = step.likeliest(token)
        else:
            one = torch.tensor([[token]])
            logits = forward(one, kv_cache) if step is None else step(token)
            token = sample(logits, config, generator)
        yield token


def _rounds(
    drafter: Drafter,
    token: int,
    kv_cache: Any,
    config: SamplingConfig,
    generator: torch.Generator,
    ends: Collection[int],
    is_cancelled: Callable[[], bool],
) -> Iterator[int]:
    """Generate what follows the first token, in rounds."""
    draft_ids: list[int] = []
    draft_logits: list[Tensor] = []

    def choose(logits: Tensor) -> int | None:
        # Drawing needs them on the CPU, now and when they are verified; the likeliest does not.
        if config.temperature > 0:
            logits = logits.cpu()
        draft_ids.append(sample(logits, config, generator))
        draft_logits.append(logits)
        return None if draft_ids[-1] in ends or is_cancelled() else draft_ids[-1]

    left = config.max_new_tokens - 1
    while left > 0:
        draft_ids.clear()
        draft_logits.clear()
        # The round's own token comes in any case.
        with drafter.begin(kv_cache, left - 1) as this_round:
            this_round.draft(token, choose)
            if is_cancelled():
                return
            logits = this_round.verify([token, *draft_ids])
            verdict = verify(draft_ids, draft_logits, logits, config, generator)
            this_round.settle(verdict.num_accepted)
        emitted = [*draft_ids[: verdict.num_accepted], verdict.token]
        left -= len(emitted)
        token = emitted[-1]
        yield from emitted
