"""Simulator and engine report the same hits on the same trace: what is simulated is what ships.

Without prefetch that holds on the real clock, where all copies of a layer start at once. With
prefetch hits depend on times, so there the engine itself is put on the virtual clock and link.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from foreload.recording import record_trace
from foreload.trace.read import read_trace
from foreload.trace.record import RoutingRecorder
from foreload.trace.simulate import SimulationSettings, simulate
from foreload.trace.virtual import VirtualClock, VirtualTransfers

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from foreload import Engine
    from foreload.memory.transfer import Transfer
    from foreload.metrics import Metrics

DECODED = 24
TOKENS = torch.randint(3, 320, (1, 6 + DECODED), generator=torch.Generator().manual_seed(5))
EVICTIONS = ("none", "lru", "lfu", "least-stale", "next-use", "history")


@pytest.mark.parametrize("eviction", EVICTIONS)
@pytest.mark.parametrize("memory", ["25%", "40%", "75%"])
def test_the_simulator_counts_the_engines_hits(
    open_engine: Callable[..., Engine], tmp_path: Path, eviction: str, memory: str
) -> None:
    engine = open_engine(predictor="none", eviction=eviction, expert_memory=memory, num_workers=8)
    report = record_trace(engine, TOKENS[0].tolist(), tmp_path / "trace", num_prompt_tokens=6)
    trace = read_trace(tmp_path / "trace")
    result = simulate(trace, settings_of(engine, trace.info, eviction=eviction, num_workers=8))
    assert result.num_steps == DECODED
    assert result.hit_rate == report.hit_rate
    assert (result.hit_rate == 0) is (eviction == "none")


class CopyingTransfers(VirtualTransfers):
    """The simulated link, which also brings the bytes once a copy is done."""

    def __init__(self, backend: Any, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._backend = backend

    def poll(self) -> list[Transfer]:
        return [self._bring(transfer) for transfer in super().poll()]

    def wait(self, timeout: float | None = None) -> list[Transfer]:
        return [self._bring(transfer) for transfer in super().wait(timeout)]

    def close(self) -> None:
        super().close()
        self._backend.close()

    def _bring(self, transfer: Transfer) -> Transfer:
        for piece in range(self._backend.num_pieces(transfer.plan)):
            self._backend.copy_piece(transfer.plan, transfer.slot, piece)
        return transfer


@pytest.mark.parametrize("eviction", ["lru", "history", "none"])
@pytest.mark.parametrize("memory", ["minimum", "30%", "60%"])
@pytest.mark.parametrize("bandwidth_bytes_s", [2e7, 2e8])
def test_with_prefetch_both_do_the_same_copies_at_the_same_times(
    open_engine: Callable[..., Engine],
    eviction: str,
    memory: str,
    bandwidth_bytes_s: float,
) -> None:
    engine: Any = open_engine(
        predictor="lookahead", eviction=eviction, expert_memory=memory, num_workers=2
    )
    machine = {
        "bandwidth_bytes_s": bandwidth_bytes_s,
        "expert_s": 3e-4,
        "latency_s": 1e-5,
    }
    clock = put_on_virtual_clock(engine, **machine)
    engine.runtime._switch = None
    recorder = RoutingRecorder(4, 16)
    engine.runtime.on_routing = recorder
    engine.runtime.on_predictions = recorder.see_predictions
    cache = engine.make_cache()
    recorder.is_prefill = True
    engine.forward(TOKENS[:, :6], cache)
    recorder.is_prefill = False
    before, start_s = engine.metrics.snapshot(), clock()
    for place in range(6, 6 + DECODED):
        engine.forward(TOKENS[:, place : place + 1], cache)
    counted: Metrics = engine.metrics.since(before)
    elapsed_s = clock() - start_s

    settings = settings_of(engine, None, eviction=eviction, predictor="trace", **machine)
    result = simulate(recorder.trace, settings)
    # Below one token-cycle LRU finds nobody who may leave for a guess.
    assert counted.num_prefetched > 0 or (eviction, memory) == ("lru", "minimum")
    assert (result.num_hits, result.num_late, result.num_misses) == (
        counted.num_hits,
        counted.num_late,
        counted.num_misses,
    )
    assert result.bytes_per_token * DECODED == counted.bytes_moved
    assert result.prefetch_bytes_per_token * DECODED == counted.prefetch_bytes
    assert result.wasted_bytes_per_token * DECODED == counted.wasted_bytes
    assert result.prefetch_precision == counted.prefetch_precision
    assert result.recall_at_n == counted.recall_at_n
    assert result.tpot_s * DECODED == pytest.approx(elapsed_s)
    assert result.stall_s_per_token * DECODED == pytest.approx(counted.stall_s)


def put_on_virtual_clock(
    engine: Any, *, bandwidth_bytes_s: float, latency_s: float, expert_s: float
) -> VirtualClock:
    """Let the engine's copies take simulated time; each computed expert takes `expert_s`."""
    clock = VirtualClock()
    real = engine.tiers._transfers
    engine.tiers._transfers = CopyingTransfers(
        real._backend,
        clock,
        bandwidth_bytes_s=bandwidth_bytes_s,
        latency_s=latency_s,
        num_workers=real.num_workers,
    )
    real.close()
    engine.tiers._clock = clock
    engine.runtime.on_output = lambda layer, expert, output: clock.advance(expert_s)
    return clock


def settings_of(engine: Any, info: Any, **values: Any) -> SimulationSettings:
    machine = {"bandwidth_bytes_s": 1e9, "dense_s": 0.0, "expert_s": 1e-4}
    return SimulationSettings(
        num_slots=engine.tiers.num_slots,
        expert_bytes=engine.tiers.expert_bytes if info is None else info.expert_bytes,
        **{**machine, **values},
    )
