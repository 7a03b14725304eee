"""What benchmarks decode: windows of real held-out text, forced one token at a time.

A model's own greedy text loops, and loops flatter every cache and every predictor.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from foreload.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Workload", "check_contexts", "make_workloads"]


def check_contexts(contexts: Sequence[int], num_decode_tokens: int, limit: int | None) -> None:
    """Refuse contexts that a trained model was not made for: its text there means nothing.

    Args:
        contexts: Lengths of prompts.
        num_decode_tokens: Tokens decoded behind each.
        limit: The model's own context; None where it has none.

    Raises:
        ConfigError: One of them is too long.
    """
    longest = max(contexts)
    if limit is not None and longest + num_decode_tokens > limit:
        raise ConfigError(
            f"{longest} tokens of prompt and {num_decode_tokens} decoded are more than the model's "
            f"context of {limit}",
            hint="give shorter contexts, or time a model with random weights",
        )


@dataclass(frozen=True, slots=True)
class Workload:
    """One window of text: `token_ids` of which the first `num_prompt_tokens` are the prompt."""

    token_ids: tuple[int, ...]
    num_prompt_tokens: int

    @property
    def num_decode_tokens(self) -> int:
        """Give how many tokens are decoded one at a time."""
        return len(self.token_ids) - self.num_prompt_tokens

    def shortened(self, num_prompt_tokens: int) -> Workload:
        """Copy with only the last tokens of the prompt; what is decoded stays the same."""
        start = self.num_prompt_tokens - num_prompt_tokens
        return Workload(self.token_ids[start:], num_prompt_tokens)


def make_workloads(
    tokenizer: Any | None,
    text: str,
    *,
    num_workloads: int,
    num_prompt_tokens: int,
    num_decode_tokens: int,
    vocab_size: int,
    seed: int = 0,
) -> list[Workload]:
    """Cut windows that do not overlap out of a text, at places a seed decides.

    Without a tokenizer (random-weight checkpoints) tokens are drawn at random.

    Raises:
        ConfigError: The text is too short.
    """
    length = num_prompt_tokens + num_decode_tokens
    draw = random.Random(seed)
    if tokenizer is None:
        return [
            Workload(tuple(draw.randrange(vocab_size) for _ in range(length)), num_prompt_tokens)
            for _ in range(num_workloads)
        ]
    ids: Sequence[int] = tokenizer(text, verbose=False)["input_ids"]
    places = list(range(len(ids) // length))
    if len(places) < num_workloads:
        raise ConfigError(
            f"the text has {len(ids)} tokens; {num_workloads} windows of {length} are wanted",
            hint="give a longer text, or fewer trials",
        )
    draw.shuffle(places)
    return [
        Workload(tuple(ids[place * length : (place + 1) * length]), num_prompt_tokens)
        for place in places[:num_workloads]
    ]
