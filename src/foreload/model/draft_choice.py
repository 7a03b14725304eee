"""Whether a draft is worth its memory, asked before anything has been generated.

Times a few experts of the model as they are read, computed and computed quantised, and asks the
cost model what rounds would bring with what is left for the cache. A first guess: the governor
measures, and an optional draft that does not pay is let go of.
"""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from foreload.cost import accept_length, round_s, union_experts
from foreload.memory.arena import SlotArena, slot_bytes
from foreload.memory.disk import DiskBackend
from foreload.memory.transfer import TransferEngine
from foreload.model.draft_layout import DRAFT_BITS, pack_expert
from foreload.ops.cpu import draft_forward
from foreload.ops.reference import expert_forward
from foreload.types import ExpertKey, Priority

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from foreload.model.sites import MoeSite
    from foreload.types import ExpertPlan, ModelSpec

__all__ = ["DraftFigures", "draft_pays", "measure_figures"]

_NUM_READ = 6
_MOST = 8
_ACCEPTANCE = 0.85
_OVERLAP = 0.8
_GROWTH = 0.8
"""Of the union of experts; neighbouring tokens share some (small trained model, November 2026)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftFigures:
    """Seconds per expert.

    Attributes:
        copy_s: Copying it, the queue full.
        one_s: Computing it for one token.
        four_s: Computing it for four tokens.
        draft_s: Computing it quantised, for one token.
        dense_s: Everything but the experts, for one token.
    """

    copy_s: float
    one_s: float
    four_s: float
    draft_s: float
    dense_s: float


def draft_pays(
    spec: ModelSpec, figures: DraftFigures, *, plain_slots: int, slots_beside: int
) -> bool:
    """Tell whether rounds promise more tokens per second than plain decoding with more cache.

    Hit rates are the share of the experts that fits, as for routing that is uniform and knows no
    past; copies beside computation are hidden but for a fifth.

    Args:
        spec: The model.
        figures: What an expert takes.
        plain_slots: Experts that fit without a draft.
        slots_beside: Experts that fit beside the draft.
    """
    plain = 1 / _round_s(spec, figures, 0, plain_slots)
    rates = (
        accept_length([_ACCEPTANCE] * number) / _round_s(spec, figures, number, slots_beside)
        for number in range(1, _MOST + 1)
    )
    return max(rates) > plain


def _round_s(spec: ModelSpec, figures: DraftFigures, number: int, num_slots: int) -> float:
    """Give the seconds of a round of so many draft tokens."""
    layers, width = spec.num_moe_layers, number + 1
    union = union_experts(width, spec.num_experts, spec.top_k, _GROWTH)
    rows = width * spec.top_k / union
    expert_s = figures.one_s + (figures.four_s - figures.one_s) * (rows - 1) / 3
    misses = 1 - min(1.0, num_slots / (layers * spec.num_experts))
    return round_s(
        number * (figures.dense_s + layers * spec.top_k * figures.draft_s),
        width * figures.dense_s + layers * union * expert_s,
        layers * union * misses * figures.copy_s,
        _OVERLAP,
    )


def measure_figures(
    sites: Sequence[MoeSite],
    plans: Sequence[Sequence[ExpertPlan]],
    spec: ModelSpec,
    kind: str,
    *,
    num_workers: int,
) -> DraftFigures:
    """Read and compute a few experts of the first layer.

    Cost:
        Less than a second, and the memory of six experts.
    """
    some = plans[0][:_NUM_READ]
    arena = SlotArena(len(some), max(slot_bytes(plan) for plan in some))
    transfers = TransferEngine(DiskBackend(arena), num_workers=num_workers)
    with closing(transfers):
        # The first pass pays for memory that was never touched.
        for _ in range(2):
            start = time.perf_counter()
            for number, plan in enumerate(some):
                transfers.submit(ExpertKey(0, number), plan, number, Priority.DEMAND)
            open_copies = len(some)
            while open_copies:
                open_copies -= len(transfers.wait())
            copy_s = (time.perf_counter() - start) / len(some)
    experts: Any = sites[0].experts
    weights = [arena.tensors(number, plan) for number, plan in enumerate(some)]
    dtype = getattr(torch, spec.dtype)
    rows = torch.full((4, spec.hidden_size), 0.1, dtype=dtype)
    layer = pack_expert(experts, some[0], weights[0], DRAFT_BITS[kind])
    index, share = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)
    with torch.inference_mode():
        one_s = _time([partial(expert_forward, experts, rows[:1], w) for w in weights])
        four_s = _time([partial(expert_forward, experts, rows, w) for w in weights])
        draft_s = _time([lambda: draft_forward(layer, experts, rows[:1], index, share)] * 4)
    read_bytes_s = spec.expert_bytes / one_s
    arena.release()
    return DraftFigures(
        copy_s=copy_s,
        one_s=one_s,
        four_s=four_s,
        draft_s=draft_s,
        dense_s=spec.dense_bytes / read_bytes_s,
    )


def _time(works: Sequence[Callable[[], object]]) -> float:
    """Give the seconds of one of several works, a first round left out."""
    for work in works:
        work()
    start = time.perf_counter()
    for work in works:
        work()
    return (time.perf_counter() - start) / len(works)
