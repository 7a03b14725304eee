"""What a trace says about slots of each layer's own: what they would miss, and how to divide them.

Where a device decides, every layer has slots of its own, and evicts who was wanted longest ago. A
prompt passes them by: its last token's experts are there afterwards, and its others in slots that
were empty. Replays here follow that rule without prefetching; the shared cache of the host's loop
is the business of `trace.replay`. Torch-free.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from foreload.errors import ConfigError
from foreload.schedule.slot_plan import plan_slots
from foreload.trace.replay import ReplayCounts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from foreload.trace.record import LayerVisit, RoutingTrace
    from foreload.types import ModelSpec

__all__ = [
    "RECENT_TOKENS",
    "SlotPlanGain",
    "check_trace",
    "miss_curves",
    "plan_from_trace",
    "replay_layers",
    "slot_plan_gain",
]

RECENT_TOKENS = 32
"""Last tokens of a prompt, whose experts come before others where slots are empty. On two real
traces, 38 slots for 128 experts, a prompt of 92 tokens: in the 16 tokens behind it 1.67 and 1.99
misses per layer and token where only the last token's experts stay, 0.67 and 0.87 with those that
the whole prompt wants most, 0.45 and 0.82 with those of its last 32 tokens; November 2026."""

_NEVER = np.iinfo(np.int64).min


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotPlanGain:
    """What planned slots miss beside equal ones, experts per decoded token.

    Attributes:
        num_slots: Slots over all layers.
        slots: The planned slots of each layer.
        equal_misses: With equal slots.
        planned_misses: With slots planned from the whole trace, on the same trace.
        unseen_equal_misses: With equal slots, in the second half of the decoded tokens.
        unseen_planned_misses: There with slots planned from all that comes before.
    """

    num_slots: int
    slots: tuple[int, ...]
    equal_misses: float
    planned_misses: float
    unseen_equal_misses: float
    unseen_planned_misses: float

    def to_dict(self) -> dict[str, Any]:
        """Give the gain as JSON-ready values."""
        return asdict(self)


def check_trace(trace: RoutingTrace, spec: ModelSpec) -> None:
    """Check that slots of a model can be planned from a trace.

    Raises:
        ConfigError: It is of another checkpoint or shape, or has no decoded token.
    """
    hint = "give a trace of this model: `foreload trace` records one"
    found = (trace.num_layers, trace.num_experts)
    if found != (spec.num_moe_layers, spec.num_experts):
        raise ConfigError(
            f"the trace has {found[0]} MoE layers of {found[1]} experts, the model "
            f"{spec.num_moe_layers} of {spec.num_experts}",
            hint=hint,
        )
    info = trace.info
    if info is not None and info.top_k != spec.top_k:
        raise ConfigError(
            f"the trace has {info.top_k} experts per token, the model {spec.top_k}", hint=hint
        )
    if info is not None and info.identity not in ("", spec.identity):
        raise ConfigError(f"the trace is of another checkpoint ({info.model})", hint=hint)
    _require_decoded(trace)


def miss_curves(trace: RoutingTrace) -> NDArray[np.int64]:
    """Give what each layer misses of the decoded tokens, by its slots: (L, E + 1).

    An expert is there as long as fewer distinct ones than there are slots were wanted after it:
    one pass gives the misses of every number of slots. The tables break ties between experts that
    were last wanted together by their slots, and here by their numbers, so a replay may miss a
    few more or less.

    Raises:
        ConfigError: The trace has no decoded token.
    """
    _require_decoded(trace)
    most = trace.num_experts
    curves = np.empty((trace.num_layers, most + 1), dtype=np.int64)
    for layer in range(trace.num_layers):
        depths = np.zeros(most + 1, dtype=np.int64)
        # When each was wanted last, no two at once; what a prompt leaves is staler than all before.
        last = np.full(most, _NEVER)
        now, stalest = 0, -1
        for visits in trace.steps:
            visit = visits[layer]
            if visit.is_prefill:
                wanted, others = (
                    np.asarray(part, dtype=np.int64) for part in _left_by(visit, most)
                )
                others = others[last[others] == _NEVER]
                last[others] = stalest - np.arange(len(others))
                stalest -= len(others)
            else:
                wanted = np.asarray(visit.experts, dtype=np.int64)
                since = last[wanted]
                depth = (last > since[:, None]).sum(1)
                np.add.at(depths, np.where(since > _NEVER, depth, most), 1)
            last[wanted] = now + np.arange(len(wanted))
            now += len(wanted)
        curves[layer] = depths.sum() - np.concatenate(([0], depths[:most].cumsum()))
    return curves


def plan_from_trace(trace: RoutingTrace, num_slots: int, *, least: int) -> tuple[int, ...]:
    """Divide slots over the layers so that the trace's decoded tokens miss least.

    Args:
        trace: Recorded routing.
        num_slots: Slots to give, over all layers.
        least: Fewest of a layer.

    Raises:
        ConfigError: The trace has no decoded token.
        ValueError: There are too few slots.
    """
    return plan_slots(miss_curves(trace), num_slots, least=least)


def replay_layers(
    trace: RoutingTrace, slots: Sequence[int], *, count_from: int = 0
) -> ReplayCounts:
    """Run a trace through slots of each layer's own, from empty and without prefetching.

    Args:
        trace: Recorded routing.
        slots: Slots of each layer.
        count_from: First step that is counted; earlier ones and prefills only fill the slots.
    """
    hits = lookups = 0
    for layer, num_slots in enumerate(slots):
        held = _LayerSlots(num_slots)
        for step, visits in enumerate(trace.steps):
            visit = visits[layer]
            if visit.is_prefill:
                held.read(*_left_by(visit, trace.num_experts))
                continue
            num_hits = held.serve(visit.experts)
            if step >= count_from:
                hits += num_hits
                lookups += len(visit.experts)
    return ReplayCounts(hits, lookups)


def slot_plan_gain(trace: RoutingTrace, num_slots: int, *, least: int) -> SlotPlanGain | None:
    """Tell what a plan from a trace gains over equal slots, by replay.

    Args:
        trace: Recorded routing.
        num_slots: Slots over all layers, rounded down to equal ones.
        least: Fewest of a layer.

    Returns:
        The gain; None where there are too few slots, or too few decoded tokens.
    """
    number = min(num_slots // trace.num_layers, trace.num_experts)
    decoded = [step for step in range(len(trace.steps)) if not trace.is_prefill(step)]
    if number < least or len(decoded) < 2:
        return None
    half = decoded[len(decoded) // 2]
    equal = (number,) * trace.num_layers
    plan = plan_from_trace(trace, sum(equal), least=least)
    earlier = replace(trace, steps=trace.steps[:half])
    earlier_plan = plan_from_trace(earlier, sum(equal), least=least)

    def misses(slots: Sequence[int], first: int = 0) -> float:
        tokens = sum(v[0].num_tokens for v in trace.steps[first:] if not v[0].is_prefill)
        return replay_layers(trace, slots, count_from=first).num_misses / tokens

    return SlotPlanGain(
        num_slots=sum(equal),
        slots=plan,
        equal_misses=misses(equal),
        planned_misses=misses(plan),
        unseen_equal_misses=misses(equal, half),
        unseen_planned_misses=misses(earlier_plan, half),
    )


class _LayerSlots:
    """The slots of one layer, as the device's tables keep them."""

    def __init__(self, num_slots: int) -> None:
        self._slot_of: dict[int, int] = {}
        self._expert_of = [-1] * num_slots
        self._stamp = [-1] * num_slots
        self._now = 0

    def serve(self, wanted: Sequence[int]) -> int:
        """Give every wanted expert a slot; tell how many had one."""
        self._now += 1
        missing = [expert for expert in wanted if expert not in self._slot_of]
        taken = {self._slot_of[expert] for expert in wanted if expert in self._slot_of}
        free = [slot for slot in range(len(self._stamp)) if slot not in taken]
        victims = sorted(free, key=lambda slot: (self._stamp[slot], slot))
        for expert, slot in zip(missing, victims, strict=False):
            self._slot_of.pop(self._expert_of[slot], None)
            self._slot_of[expert], self._expert_of[slot] = slot, expert
        for expert in wanted:
            if expert in self._slot_of:
                self._stamp[self._slot_of[expert]] = self._now
        return len(wanted) - len(missing)

    def read(self, last: Sequence[int], others: Sequence[int]) -> None:
        """Read a prompt: serve its last token, and fill empty slots, the lower ones last."""
        self.serve(last)
        empty = [slot for slot, stamp in enumerate(self._stamp) if stamp < 0]
        missing = [expert for expert in others if expert not in self._slot_of]
        for expert, slot in zip(missing, reversed(empty), strict=False):
            self._slot_of[expert], self._expert_of[slot] = slot, expert
            self._stamp[slot] = 0


def _left_by(visit: LayerVisit, num_experts: int) -> tuple[list[int], list[int]]:
    """Give whom a prompt's last token wants, and the others, by how often and lately."""
    if not visit.routing:
        return list(visit.experts), []
    last = [expert for expert in visit.routing[-1] if expert < num_experts]
    recent = Counter(expert for row in visit.routing[-RECENT_TOKENS:] for expert in row)
    counts = dict(zip(visit.experts, visit.counts, strict=True))
    others = sorted(set(visit.experts) - set(last), key=lambda e: (-recent[e], -counts[e], e))
    return last, others


def _require_decoded(trace: RoutingTrace) -> None:
    if all(trace.is_prefill(step) for step in range(len(trace.steps))):
        raise ConfigError("the trace has no decoded token", hint="record a longer text")
