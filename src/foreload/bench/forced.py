"""Decodes a given text, token by token or in rounds, and keeps logits and times.

A model's own greedy text loops; the text of a workload does not. What is fed is always the text.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from foreload.bench.workload import Workload
    from foreload.decode.loop import Drafter

    Forward = Callable[[Tensor, Any], Tensor]

__all__ = ["ForcedRun", "run_forced", "run_rounds"]


@dataclass(slots=True)
class ForcedRun:
    """Logits and times of one forced decode."""

    logits: Tensor
    prefill_s: float
    step_s: list[float]


def run_forced(forward: Forward, workload: Workload, kv_cache: Any) -> ForcedRun:
    """Prefill the prompt, then feed the rest one token at a time.

    Args:
        forward: From token ids (1, T) and a cache to the last position's logits (V,).
        workload: What to feed.
        kv_cache: Empty cache.
    """
    ids = torch.tensor([workload.token_ids])
    start = time.perf_counter()
    rows = [forward(ids[:, : workload.num_prompt_tokens], kv_cache)]
    prefill_s = time.perf_counter() - start
    step_s = []
    for place in range(workload.num_prompt_tokens, ids.shape[1]):
        start = time.perf_counter()
        rows.append(forward(ids[:, place : place + 1], kv_cache))
        step_s.append(time.perf_counter() - start)
    return ForcedRun(torch.stack(rows), prefill_s, step_s)


def run_rounds(drafter: Drafter, prefill: Forward, workload: Workload, kv_cache: Any) -> ForcedRun:
    """Prefill the prompt, then decode the rest in rounds of drafting and verifying.

    The text is forced here too: the draft is fed the text's own tokens, and one counts as accepted
    where draft and target agree which token is the likeliest.

    Args:
        drafter: Makes the rounds.
        prefill: From the prompt's token ids (1, T) and a cache, which it leaves as rounds need it,
            to the last position's logits (V,).
        workload: What to feed.
        kv_cache: Empty cache that can go back.

    Returns:
        The logits of every step, and the seconds of every round.
    """
    ids = list(workload.token_ids)
    place = workload.num_prompt_tokens
    start = time.perf_counter()
    rows = [prefill(torch.tensor([ids[:place]]), kv_cache)]
    prefill_s = time.perf_counter() - start
    step_s = []
    drafted: list[int] = []
    while place < len(ids):
        start = time.perf_counter()
        drafted.clear()
        with drafter.begin(kv_cache, len(ids) - place - 1) as this_round:

            def choose(logits: Tensor, place: int = place) -> int:
                drafted.append(int(logits.argmax()))
                return ids[place + len(drafted)]

            this_round.draft(ids[place], choose)
            logits = this_round.verify(ids[place : place + 1 + len(drafted)])
            best = logits.argmax(-1).tolist()
            agreed = [one == other for one, other in zip(drafted, best, strict=False)]
            accepted = agreed.index(False) if False in agreed else len(agreed)
            this_round.settle(accepted)
        # Where the device decides, the next round's will be where these are.
        rows.extend(logits[: accepted + 1].to(rows[0].device, copy=True))
        place += accepted + 1
        step_s.append(time.perf_counter() - start)
    return ForcedRun(torch.stack(rows), prefill_s, step_s)
