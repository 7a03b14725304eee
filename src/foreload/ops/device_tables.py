"""Which expert is in which slot, kept on the device so that a step never asks the host.

Plain torch: the truth that the kernels are held to. These versions may loop and wait for the
device; what they leave in the tables and in the work list is what the kernels leave there.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from foreload.errors import ForeloadError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = [
    "ABSENT",
    "Counters",
    "DeviceTables",
    "WorkList",
    "assign_prefetch",
    "assign_slots",
    "make_tables",
]

ABSENT = -1
"""Stands for no expert and for no slot."""


class Counters(NamedTuple):
    """Experts of one layer since the tables were made.

    Attributes:
        hits: Wanted and in a slot.
        misses: Wanted and fetched.
        prefetched: Brought on a guess.
        used_prefetches: Brought on a guess, and wanted while still there.
    """

    hits: int
    misses: int
    prefetched: int
    used_prefetches: int


class WorkList(NamedTuple):
    """Experts to compute or to copy; its length depends on shapes alone, never on data.

    Attributes:
        expert: (W,) int32. Demanded experts ascending; guessed ones likeliest first; then `ABSENT`.
        slot: (W,) int32, `ABSENT` where there is no expert, and where a miss has none: it is read
            from host memory, and not kept.
        is_hit: (W,) int32, 1 where the slot holds the expert already.
        order: (W,) int32, places in this list, misses before hits: the bus is the longest way.
    """

    expert: Tensor
    slot: Tensor
    is_hit: Tensor
    order: Tensor


@dataclass(frozen=True, slots=True)
class DeviceTables:
    """The slots of every layer; a layer's slots never hold another layer's experts.

    Attributes:
        num_slots: Slots of each layer.
        slot_of: (L, E) int32, the slot of an expert or `ABSENT`.
        expert_of: (L, S) int32, the expert in a slot or `ABSENT`; S is that of the layer with most.
        stamp: (L, S) int64, the visit that last wanted the slot's expert, -1 while empty.
        is_fresh: (L, S) int32, 1 where a guess brought the expert and nothing wanted it since.
        clock: (L,) int64, visits of each layer.
        counters: (L, 4) int64, see `Counters`.
        scratch: (L, 3, max(E, S)) int64 for the kernels.
    """

    num_slots: tuple[int, ...]
    slot_of: Tensor
    expert_of: Tensor
    stamp: Tensor
    is_fresh: Tensor
    clock: Tensor
    counters: Tensor
    scratch: Tensor

    @property
    def num_experts(self) -> int:
        """Give the experts per layer, E."""
        return self.slot_of.shape[1]

    def read_counters(self) -> list[Counters]:
        """Read the counters of every layer; waits for the device."""
        return [Counters(*row) for row in self.counters.tolist()]

    def check(self) -> None:
        """Check that experts and slots point at each other; waits for the device.

        Raises:
            ForeloadError: A slot leaked, is shared, or is one that its layer does not have.
        """
        for layer, num_slots in enumerate(self.num_slots):
            slots = self.slot_of[layer].tolist()
            experts = self.expert_of[layer].tolist()
            stamps = self.stamp[layer].tolist()
            there = [(expert, slot) for expert, slot in enumerate(slots) if slot != ABSENT]
            here = [(expert, slot) for slot, expert in enumerate(experts) if expert != ABSENT]
            if sorted(there) != sorted(here):
                raise ForeloadError(
                    f"layer {layer}: experts are in slots {there}, and slots hold {here}"
                )
            if any(slot >= num_slots for _, slot in here):
                raise ForeloadError(f"layer {layer} has {num_slots} slots, and uses {here}")
            clock = int(self.clock[layer])
            for slot, (expert, stamp) in enumerate(zip(experts, stamps, strict=True)):
                if (expert == ABSENT) != (stamp < 0) or stamp > clock:
                    raise ForeloadError(
                        f"layer {layer}, slot {slot}: expert {expert} is stamped {stamp} at {clock}"
                    )


def make_tables(
    num_slots: Sequence[int], num_experts: int, device: torch.device | str = "cpu"
) -> DeviceTables:
    """Make tables with every slot empty.

    Args:
        num_slots: Slots of each layer; they need not be equal.
        num_experts: Experts per layer, E.
        device: Where the tables live.

    Raises:
        ValueError: There is no layer, or one without slots.
    """
    if not num_slots or min(num_slots) < 1 or num_experts < 1:
        raise ValueError(f"{num_experts} experts in {list(num_slots)} slots per layer: too few")
    num_layers, most = len(num_slots), max(num_slots)

    def full(*shape: int, value: int = 0, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.full(shape, value, dtype=dtype, device=device)

    return DeviceTables(
        tuple(num_slots),
        slot_of=full(num_layers, num_experts, value=ABSENT),
        expert_of=full(num_layers, most, value=ABSENT),
        stamp=full(num_layers, most, value=-1, dtype=torch.int64),
        is_fresh=full(num_layers, most),
        clock=full(num_layers, dtype=torch.int64),
        counters=full(num_layers, len(Counters._fields), dtype=torch.int64),
        scratch=full(num_layers, 3, max(most, num_experts), dtype=torch.int64),
    )


def assign_slots(
    tables: DeviceTables, layer: int, top_k_index: Tensor, *, num_experts: int | None = None
) -> WorkList:
    """Give experts that are wanted now a slot as far as there are any, and count hits and misses.

    Missing experts take empty slots, then those whose experts were wanted longest ago, lower slots
    first; never a slot whose expert is wanted now. Where these run out, those that most tokens want
    have one, of these the likeliest, as in `assign_prefetch`; the others stay without. Their bytes
    are the caller's business.

    Args:
        tables: Changed in place.
        layer: MoE layer.
        top_k_index: (T, K) integers; `num_experts` and above stand for no expert.
        num_experts: Experts of this layer where it has fewer than the tables.

    Returns:
        W = min(T * K, E) places.
    """
    length = min(top_k_index.numel(), tables.num_experts)
    limit = tables.num_experts if num_experts is None else num_experts
    # In the order of the first who wants them, which sorting by their number keeps.
    times = Counter(id_ for id_ in top_k_index.t().flatten().tolist() if 0 <= id_ < limit)
    wanted = sorted(times)
    tables.clock[layer] += 1
    now = int(tables.clock[layer])
    slot_of = tables.slot_of[layer].tolist()
    hits = [expert for expert in wanted if slot_of[expert] != ABSENT]
    misses = [expert for expert, _ in times.most_common() if slot_of[expert] == ABSENT]
    taken = {slot_of[expert] for expert in hits}
    fresh = tables.is_fresh[layer].tolist()
    used = sum(fresh[slot] for slot in taken)
    tables.counters[layer] += tables.counters.new_tensor([len(hits), len(misses), 0, used])
    for expert, slot in zip(misses, _victims(tables, layer, taken), strict=False):
        _place(tables, layer, expert, slot)
        slot_of[expert] = slot
    for expert in wanted:
        if slot_of[expert] != ABSENT:
            tables.stamp[layer, slot_of[expert]] = now
            tables.is_fresh[layer, slot_of[expert]] = 0
    places = {expert: place for place, expert in enumerate(wanted)}
    return _work_list(
        tables,
        length,
        [(expert, slot_of[expert], int(expert in hits)) for expert in wanted],
        [places[expert] for expert in misses + hits],
    )


def assign_prefetch(
    tables: DeviceTables,
    layer: int,
    predicted_index: Tensor,
    *,
    max_fetches: int,
) -> WorkList:
    """Make room for experts that a coming visit of a layer is expected to want.

    Only as many are brought as there are slots whose experts are not guessed now; those wanted
    longest ago go first. What is brought counts as wanted in the last visit.

    Args:
        tables: Changed in place.
        layer: The MoE layer that is coming.
        predicted_index: (T, N) integers, likeliest first in each row; E and above, and negative
            ones, stand for no expert.
        max_fetches: Most experts to bring.

    Returns:
        W = `max_fetches` places, all misses.
    """
    now = int(tables.clock[layer])
    slot_of = tables.slot_of[layer].tolist()
    # Column by column: every token's likeliest expert before any token's second.
    guessed = dict.fromkeys(predicted_index.t().flatten().tolist())
    guesses = [expert for expert in guessed if 0 <= expert < tables.num_experts]
    taken = {slot_of[expert] for expert in guesses if slot_of[expert] != ABSENT}
    missing = [expert for expert in guesses if slot_of[expert] == ABSENT][:max_fetches]
    entries = []
    for expert, slot in zip(missing, _victims(tables, layer, taken), strict=False):
        _place(tables, layer, expert, slot)
        tables.stamp[layer, slot] = now
        tables.is_fresh[layer, slot] = 1
        entries.append((expert, slot, 0))
    tables.counters[layer, 2] += len(entries)
    return _work_list(tables, max_fetches, entries, list(range(len(entries))))


def _victims(tables: DeviceTables, layer: int, taken: set[int]) -> list[int]:
    """Give the slots that may be emptied, the stalest first: those that are not `taken`."""
    stamps = tables.stamp[layer, : tables.num_slots[layer]].tolist()
    return sorted(set(range(len(stamps))) - taken, key=lambda slot: (stamps[slot], slot))


def _place(tables: DeviceTables, layer: int, expert: int, slot: int) -> None:
    """Let a slot hold an expert instead of the one it held."""
    before = int(tables.expert_of[layer, slot])
    if before != ABSENT:
        tables.slot_of[layer, before] = ABSENT
    tables.slot_of[layer, expert] = slot
    tables.expert_of[layer, slot] = expert


def _work_list(
    tables: DeviceTables, length: int, entries: list[tuple[int, int, int]], order: list[int]
) -> WorkList:
    padding = length - len(entries)
    columns = zip(*entries, *[(ABSENT, ABSENT, 0)] * padding, strict=True)
    expert, slot, is_hit = columns if length else ((), (), ())
    places = (*order, *range(len(entries), length))
    device = tables.slot_of.device
    return WorkList(
        *(
            torch.tensor(column, dtype=torch.int32, device=device)
            for column in (expert, slot, is_hit, places)
        )
    )
