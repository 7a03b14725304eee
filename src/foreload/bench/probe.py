"""Measures in seconds what a machine does with a model it may not have the weights of.

`probe_experts` copies and computes experts of the model's own size and type, apart and at once;
`probe_layers` runs the shipped demo for what else a layer and a copy cost. Nothing is decided
here: the figures go into `foreload.cost`. They are means, as a time per token is: a machine that
halts now and then is slower.
"""

from __future__ import annotations

import itertools
import os
import random
import statistics
import time
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch

from foreload.config import EngineConfig
from foreload.engine import Engine
from foreload.errors import ConfigError
from foreload.memory.arena import SlotArena
from foreload.memory.available import available_bytes
from foreload.memory.disk import DiskBackend
from foreload.memory.transfer import TransferEngine
from foreload.model.headers import read_headers
from foreload.model.hf import load_model
from foreload.model.sites import EarlyRouter
from foreload.model.source import DEMO_NAME, resolve_model
from foreload.ops.reference import expert_forward
from foreload.predict.lookahead import Lookahead
from foreload.resolution import default_cache_dir, resolve
from foreload.types import ExpertKey, Priority, Span

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from foreload.memory.transfer import CopyBackend, Transfer
    from foreload.model.headers import ModelHeaders
    from foreload.model.hf import LoadedModel
    from foreload.types import ExpertPlan, Predictor

    Weights = Mapping[str, Tensor]

T = TypeVar("T")

__all__ = ["ExpertProbe", "LayerProbe", "has_weights", "probe_experts", "probe_layers"]

_ARENA_BYTES = 768 << 20
"""Memory to work in: more than most processors' caches, and filled in a second or less."""
_NUM_ROUNDS = 3
_PHASE_S = 0.3
_LONGEST_FILL_S = 2.0
_MOST_COPIES = 4000
_MATMUL_FLOP = 4e9
_NUM_STEPS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertProbe:
    """What computing and copying experts came to.

    Attributes:
        expert_s: Seconds of one expert on one token alone.
        flop_s: FLOP per second of one expert on many tokens.
        disk_bytes_s: Bytes per second of copies alone; None where nothing was copied.
        compute_share: Share of its speed that computing kept beside copies.
        copy_share: Share of their bandwidth that copies kept beside computing.
    """

    expert_s: float
    flop_s: float
    disk_bytes_s: float | None = None
    compute_share: float = 1.0
    copy_share: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerProbe:
    """What a layer and a copy cost beside their bytes, see `MachineRates`."""

    layer_s: float
    prediction_s: float
    call_s: float


def has_weights(plans: Sequence[Sequence[ExpertPlan]]) -> bool:
    """Tell whether a checkpoint's files hold weights, and not holes of the same size."""
    stats = [os.stat(path) for path in {span.path for p in plans[0] for span in p.spans}]
    # Half: filesystems that compress store fewer blocks than bytes as well.
    return sum(s.st_blocks * 512 for s in stats) > sum(s.st_size for s in stats) / 2


def probe_experts(
    headers: ModelHeaders,
    *,
    folder: Path | None = None,
    link: Callable[[CopyBackend], CopyBackend] | None = None,
) -> ExpertProbe:
    """Compute experts of the model's shape, copy the checkpoint's, and both at once.

    In turn, several times: what else the machine does disturbs all of them alike.

    Args:
        headers: The model.
        folder: On the disk that is meant: a scratch file of experts is written there where the
            checkpoint holds no weights. None leaves the copies out.
        link: What copies go through; None takes them as they are.

    Raises:
        ConfigError: No scratch file can be written in `folder`.
        TransferError: The checkpoint cannot be read.

    Cost:
        One second of computing and three with copies; 768 MiB of memory or a quarter of what is
        free, two experts at least.
    """
    room = min(_ARENA_BYTES, available_bytes() // 4)
    num_slots = max(2, min(room // headers.slot_bytes, headers.num_experts))
    with ExitStack() as stack:
        probe = stack.enter_context(closing(_Probe(headers, num_slots, link)))
        if folder is not None:
            probe.plans = stack.enter_context(_readable(headers, folder, num_slots))
            # Memory that was never touched before takes longer to fill: this round is not counted.
            rough_bytes_s = probe.fill()
        rounds = []
        for _ in range(_NUM_ROUNDS):
            alone_s = probe.compute()
            if folder is None:
                rounds.append(_Round(alone_s))
                continue
            _, bytes_s = probe.copy_while(lambda: time.sleep(_PHASE_S), rough_bytes_s)
            beside_s, beside_bytes_s = probe.copy_while(probe.compute, bytes_s)
            rounds.append(_Round(alone_s, bytes_s, alone_s / beside_s, beside_bytes_s / bytes_s))
        alone_s, bytes_s, compute_share, copy_share = (
            statistics.median(values) for values in zip(*rounds, strict=True)
        )
        return ExpertProbe(
            expert_s=alone_s,
            flop_s=probe.multiply(),
            disk_bytes_s=None if folder is None else bytes_s,
            compute_share=min(1.0, compute_share),
            copy_share=min(1.0, copy_share),
        )


def probe_layers(memory_bytes_s: float) -> LayerProbe:
    """Run the demo for what its layers and its copies cost beside bytes, and what guessing costs.

    Its layers are so narrow that nearly all of their time is calls and bookkeeping, which a wide
    model needs as well. What there is of dense bytes and experts' products is taken off. It runs
    all in memory, and once more keeping nothing.

    Args:
        memory_bytes_s: What a product of a matrix and one vector reads.

    Cost:
        Two seconds.
    """
    folder = resolve_model(DEMO_NAME)
    work = read_headers(folder).work
    loaded = load_model(folder)
    with _open_demo(loaded, "100%", EngineConfig().eviction) as engine:
        products = _load_and_time(engine, loaded)
        plain_s, guessing_s = _time_steps(engine, (None, _make_lookahead(loaded)))
    with _open_demo(loaded, "50%", "none") as engine:
        (on_demand_s,) = _time_steps(engine, (None,))
    num_experts = work.num_layers * work.top_k
    experts_s = num_experts * statistics.fmean(products)
    rest_s = plain_s - experts_s - work.dense_bytes / memory_bytes_s
    return LayerProbe(
        layer_s=max(0.0, rest_s / work.num_layers),
        prediction_s=max(0.0, (guessing_s - plain_s) / work.num_layers),
        call_s=max(0.0, (on_demand_s - plain_s) / num_experts),
    )


def _open_demo(loaded: LoadedModel, memory: str, eviction: str) -> Engine:
    config = EngineConfig(
        expert_memory=memory, predictor="none", eviction=eviction, orchestration="host"
    )
    # A predictor from the start has the engine watch what later ones want to see.
    return Engine(
        loaded,
        None,
        resolve(config, loaded),
        cache_dir=default_cache_dir(),
        predictor=_make_lookahead(loaded),
    )


def _make_lookahead(loaded: LoadedModel) -> Lookahead:
    return Lookahead(
        [EarlyRouter(site) for site in loaded.sites],
        max_distance=EngineConfig().lookahead_layers,
        num_extra=max(1, loaded.spec.top_k // 2),
    )


def _load_and_time(engine: Engine, loaded: LoadedModel) -> list[float]:
    """Bring every expert into memory; give the seconds of each on one token."""
    row = torch.ones(1, loaded.spec.hidden_size, dtype=loaded.model.dtype)
    times = []
    for layer, site in enumerate(loaded.sites):
        for _, weights in engine.tiers.demand(layer, list(range(site.num_experts))):
            times += _time_experts(site.experts, row, [weights, weights])[1:]
    return times


def _time_steps(engine: Engine, predictors: Sequence[Predictor | None]) -> list[float]:
    """Give the mean seconds of a token with each predictor, time spent waiting left out."""
    engine.early_routers()
    kv_cache = engine.make_cache()
    engine.forward(torch.ones(1, 8, dtype=torch.long), kv_cache)
    times: list[list[float]] = [[] for _ in predictors]
    for step in range(_NUM_STEPS):
        for predictor, taken in zip(predictors, times, strict=True):
            engine.runtime.predictor = predictor
            stall_s, start = engine.metrics.stall_s, time.perf_counter()
            engine.forward(torch.tensor([[step]]), kv_cache)
            taken.append(time.perf_counter() - start - (engine.metrics.stall_s - stall_s))
    return [statistics.fmean(taken[1:]) for taken in times]


class _Round(NamedTuple):
    """What one turn of computing, copying and both came to."""

    expert_s: float
    bytes_s: float = 0.0
    compute_share: float = 1.0
    copy_share: float = 1.0


class _Probe:
    """Slots: the first half holds numbers to compute with, the second takes copies.

    Attributes:
        plans: What is copied, one after the other and round again.
    """

    def __init__(
        self,
        headers: ModelHeaders,
        num_slots: int,
        link: Callable[[CopyBackend], CopyBackend] | None,
    ) -> None:
        self.plans: Sequence[ExpertPlan] = ()
        self._headers = headers
        self._arena = SlotArena(num_slots, headers.slot_bytes)
        half = (num_slots + 1) // 2
        block = _numbers()
        for slot in range(half):
            buffer = self._arena.buffer(slot)
            for at in range(0, len(buffer), len(block)):
                part = buffer[at : at + len(block)]
                part[:] = block[: len(part)]
        plan = headers.plans[0][0]
        self._weights = [self._arena.tensors(slot, plan) for slot in range(half)]
        self._slots = range(half, num_slots)
        dtype = getattr(torch, headers.spec.dtype)
        self._row = torch.ones(1, headers.spec.hidden_size, dtype=dtype)
        copies = DiskBackend(self._arena)
        self._transfers = TransferEngine(
            copies if link is None else link(copies), num_workers=EngineConfig().num_workers
        )

    def close(self) -> None:
        """Stop the copies and let the memory go."""
        self._transfers.close()
        self._arena.release()

    def compute(self) -> float:
        """Compute experts on one token for `_PHASE_S`; give the mean seconds of one."""
        times: list[float] = []
        end = time.perf_counter() + _PHASE_S
        while time.perf_counter() < end:
            times += _time_experts(self._headers.experts, self._row, self._weights)
        return statistics.fmean(times)

    def multiply(self) -> float:
        """Give the FLOP per second of one expert on many tokens."""
        flop = self._headers.work.expert_flop
        num_tokens = min(512, max(16, int(_MATMUL_FLOP / flop)))
        rows = self._row.expand(num_tokens, -1).contiguous()
        best = min(_time_experts(self._headers.experts, rows, self._weights[:1] * 3))
        return num_tokens * flop / best

    def fill(self) -> float:
        """Copy into each slot once, or for as long as is reasonable; give bytes per second."""
        start = time.perf_counter()
        transfers = self._submit(len(self._slots))
        while self._transfers.wait() and time.perf_counter() - start < _LONGEST_FILL_S:
            pass
        return self._end(transfers, start)

    def copy_while(self, action: Callable[[], T], bytes_s: float) -> tuple[T, float]:
        """Keep copies queued during `action`; give its result, and the copies' bytes per second.

        Args:
            action: Runs beside the copies, for about `_PHASE_S`.
            bytes_s: About what the copies deliver.
        """
        wanted = 3 * _PHASE_S * bytes_s / self._headers.work.stored_bytes
        start = time.perf_counter()
        transfers = self._submit(min(8 + int(wanted), _MOST_COPIES))
        result = action()
        if not any(transfer.busy for transfer in transfers):
            self._transfers.wait()
        return result, self._end(transfers, start)

    def _submit(self, count: int) -> list[Transfer]:
        turns = zip(itertools.cycle(self._slots), itertools.cycle(self.plans), strict=False)
        return [
            self._transfers.submit(ExpertKey(0, slot), plan, slot, Priority.DEMAND)
            for slot, plan in itertools.islice(turns, count)
        ]

    def _end(self, transfers: Sequence[Transfer], start_s: float) -> float:
        """Call off what is left; give what was moved over the time until its last piece."""
        for transfer in transfers:
            self._transfers.cancel(transfer)
        while self._transfers.num_open:
            self._transfers.wait()
        for transfer in transfers:
            if transfer.error is not None:
                raise transfer.error
        last_s = max(end for transfer in transfers for _, end in transfer.busy)
        return sum(transfer.bytes_moved for transfer in transfers) / (last_s - start_s)


def _time_experts(experts: object, rows: Tensor, weights: Sequence[Weights]) -> list[float]:
    times = []
    with torch.inference_mode():
        for one in weights:
            start = time.perf_counter()
            expert_forward(experts, rows, one)
            times.append(time.perf_counter() - start)
    return times


@contextmanager
def _readable(headers: ModelHeaders, folder: Path, num_slots: int) -> Iterator[list[ExpertPlan]]:
    """Give plans of experts whose bytes exist: the checkpoint's, or those of a scratch file."""
    every = [plan for layer in headers.plans for plan in layer]
    if has_weights(headers.plans):
        yield every
        return
    with ExitStack() as stack:
        try:
            file = stack.enter_context(NamedTemporaryFile(dir=folder, prefix="foreload-"))
            block = _numbers()
            for _ in range(-(-num_slots * every[0].read_bytes // len(block))):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        except OSError as error:
            raise ConfigError(
                f"no scratch file can be written in {folder}: {error.strerror}",
                hint="give the disk's speed with --disk-bandwidth",
            ) from error
        yield [_moved(every[0], file.name, index) for index in range(num_slots)]


def _numbers() -> bytes:
    """Give 1 MiB that is numbers of ordinary size in every element type: 0x30 to 0x3f."""
    return bytes(byte & 0x0F | 0x30 for byte in random.Random(0).randbytes(1 << 20))


def _moved(plan: ExpertPlan, path: str, index: int) -> ExpertPlan:
    """Copy a plan with its spans laid out in another file, as expert number `index` there."""
    spans = []
    at = index * plan.read_bytes
    for span in plan.spans:
        spans.append(Span(path, at, span.num_bytes))
        at += span.num_bytes
    return replace(plan, spans=tuple(spans))
