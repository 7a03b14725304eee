"""A replayed trace counts the engine's own hits, step for step: limits are made of replays.

That holds where all copies of a layer start at once: enough workers, and slots for the whole
layer. Otherwise what leaves depends on which expert the engine happened to compute first.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest
import torch

from foreload.trace.record import RoutingRecorder
from foreload.trace.replay import replay

if TYPE_CHECKING:
    from collections.abc import Callable

    from foreload import Engine

DECODED = 20
TOKENS = torch.randint(3, 320, (1, 12 + DECODED), generator=torch.Generator().manual_seed(5))


# A prompt of 12 tokens wants nearly all 16 experts of a layer at once, one token wants 4.
@pytest.mark.parametrize(
    ("memory", "prompt_tokens"),
    [("minimum", 1), ("12%", 1), ("25%", 12), ("40%", 12), ("75%", 12), ("100%", 12)],
)
@pytest.mark.parametrize("eviction", ["lru", "lfu", "least-stale", "next-use", "history"])
def test_replay_counts_the_engines_hits(
    open_engine: Callable[..., Engine], eviction: str, memory: str, prompt_tokens: int
) -> None:
    engine: Any = open_engine(
        predictor="none", eviction=eviction, expert_memory=memory, num_workers=8
    )
    recorder = RoutingRecorder(engine.spec.num_moe_layers, engine.spec.num_experts)
    engine.runtime.on_routing = recorder
    cache = engine.make_cache()
    counted = []
    engine.forward(TOKENS[:, :prompt_tokens], cache)
    counted.append((engine.metrics.num_hits, engine.metrics.num_misses))
    for place in range(prompt_tokens, prompt_tokens + DECODED):
        before = engine.metrics.snapshot()
        engine.forward(TOKENS[:, place : place + 1], cache)
        step = engine.metrics.since(before)
        counted.append((step.num_hits, step.num_misses))

    trace, slots = recorder.trace, engine.tiers.num_slots
    assert len(trace.steps) == 1 + DECODED
    assert engine.metrics.num_late == 0
    # What is left out when counting begins one step later.
    left = [replay(trace, slots, eviction, count_from=n) for n in range(len(counted) + 1)]
    replayed = [
        (a.num_hits - b.num_hits, a.num_misses - b.num_misses) for a, b in itertools.pairwise(left)
    ]
    assert replayed == counted
    assert replay(trace, slots, "belady").num_misses <= engine.metrics.num_misses


@pytest.mark.parametrize("num_workers", [1, 2])
def test_no_engine_misses_less_than_belady(
    open_engine: Callable[..., Engine], num_workers: int
) -> None:
    """With few copies in flight experts leave early, which the best eviction must allow for."""
    engine: Any = open_engine(
        predictor="none", eviction="history", expert_memory="minimum", num_workers=num_workers
    )
    recorder = RoutingRecorder(engine.spec.num_moe_layers, engine.spec.num_experts)
    engine.runtime.on_routing = recorder
    cache = engine.make_cache()
    for place in range(TOKENS.shape[1]):
        engine.forward(TOKENS[:, place : place + 1], cache)
    best = replay(recorder.trace, engine.tiers.num_slots, "belady")
    assert 0 < best.num_misses <= engine.metrics.num_misses
