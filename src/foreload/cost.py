"""What a decoded token costs: bytes and FLOP in, seconds out.

The equations behind `foreload plan`, and those of the Amortization Roofline Model by which the
governor of speculative decoding chooses. Plain arithmetic on figures that are given: nothing here
measures, reads a file, or knows a cache. Torch-free.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from foreload.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "DecodeWork",
    "MachineRates",
    "accept_length",
    "amortised_intensity",
    "cached_s",
    "compute_roof",
    "copy_s",
    "dense_s",
    "expert_s",
    "io_roof",
    "overlap_s",
    "prefetched_s",
    "resident_s",
    "roofline_s",
    "round_s",
    "union_experts",
    "wire_limit_s",
    "wire_s",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeWork:
    """What one decoded token of a model reads and computes.

    Attributes:
        num_layers: L, MoE layers.
        num_experts: E, experts per layer.
        top_k: K, experts per token and layer.
        expert_bytes: Bytes of one expert in memory.
        stored_bytes: Bytes of one expert on disk.
        expert_flop: FLOP of one expert on one token.
        dense_bytes: Bytes a token reads of everything but the experts.
        dense_flop: FLOP of everything but the experts on one token.
    """

    num_layers: int
    num_experts: int
    top_k: int
    expert_bytes: int
    stored_bytes: int
    expert_flop: int
    dense_bytes: int
    dense_flop: int

    @property
    def token_bytes(self) -> int:
        """Give the bytes of memory a token reads: dense_bytes + L * K * expert_bytes."""
        return self.dense_bytes + self.num_layers * self.top_k * self.expert_bytes

    @property
    def token_flop(self) -> int:
        """Give the FLOP of a token: dense_flop + L * K * expert_flop."""
        return self.dense_flop + self.num_layers * self.top_k * self.expert_flop

    def share_that_fits(self, num_slots: int) -> float:
        """Give the share of all experts that so many slots hold, at most 1.

        It is the hit rate of any cache where routing is uniform and knows no past.
        """
        return min(1.0, num_slots / (self.num_layers * self.num_experts))


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineRates:
    """How fast a machine copies, reads and multiplies.

    Attributes:
        disk_bytes_s: What the copies deliver with their queue full and nothing computing.
        memory_bytes_s: What a product of a matrix and one vector reads.
        flop_s: What a product of matrices computes.
        layer_s: Seconds per MoE layer that are neither bytes nor FLOP: calls and bookkeeping.
        prediction_s: Seconds per MoE layer of guessing the coming ones.
        call_s: Seconds that each copy costs who computes: asking for it, waking up, booking it.
        compute_share: Share of its speed that computing keeps while copies run.
        copy_share: Share of their bandwidth that copies keep while the machine computes.
    """

    disk_bytes_s: float
    memory_bytes_s: float
    flop_s: float = math.inf
    layer_s: float = 0.0
    prediction_s: float = 0.0
    call_s: float = 0.0
    compute_share: float = 1.0
    copy_share: float = 1.0

    def __post_init__(self) -> None:
        for name in ("disk_bytes_s", "memory_bytes_s", "flop_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)!r} must be more than nothing")
        for name in ("layer_s", "prediction_s", "call_s"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name}={getattr(self, name)!r} must be 0 or more")
        for name in ("compute_share", "copy_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)!r} must be above 0, at most 1")


def roofline_s(num_bytes: float, flop: float, machine: MachineRates) -> float:
    """Give max(bytes / memory_bytes_s, flop / flop_s): whichever the machine takes longer for.

    Reference:
        Williams et al. 2009, "Roofline: an insightful visual performance model for multicore
        architectures".
    """
    return max(num_bytes / machine.memory_bytes_s, flop / machine.flop_s)


def expert_s(work: DecodeWork, machine: MachineRates) -> float:
    """Give the seconds of one expert on one token: its roofline."""
    return roofline_s(work.expert_bytes, work.expert_flop, machine)


def dense_s(work: DecodeWork, machine: MachineRates) -> float:
    """Give the seconds per MoE layer beside its experts.

    roofline(dense_bytes / L, dense_flop / L) + layer_s: what belongs to no layer, such as the
    output embedding, is spread evenly.
    """
    share = roofline_s(work.dense_bytes, work.dense_flop, machine) / work.num_layers
    return share + machine.layer_s


def resident_s(work: DecodeWork, machine: MachineRates) -> float:
    """Give the seconds per token with every expert in memory: L * (dense + K * expert)."""
    return work.num_layers * (dense_s(work, machine) + work.top_k * expert_s(work, machine))


def copy_s(work: DecodeWork, machine: MachineRates) -> float:
    """Give the seconds of copying one expert: stored_bytes / disk_bytes_s."""
    return work.stored_bytes / machine.disk_bytes_s


def wire_s(work: DecodeWork, machine: MachineRates, hit_rate: float) -> float:
    """Give the seconds per token of copying what misses: L * K * (1 - hit_rate) * copy."""
    return work.num_layers * work.top_k * (1 - hit_rate) * copy_s(work, machine)


def wire_limit_s(work: DecodeWork, machine: MachineRates, hit_rate: float) -> float:
    """Give max(resident, wire): copies and computation side by side, neither in the other's way."""
    return max(resident_s(work, machine), wire_s(work, machine, hit_rate))


def overlap_s(
    compute_s: float, copying_s: float, *, compute_share: float = 1.0, copy_share: float = 1.0
) -> float:
    """Give the seconds of computing and copying side by side.

    While both run, each keeps its share of its speed; what is left of the longer one runs alone.
    With shares of 1 this is the larger of the two, with shares that add up to 1 their sum.

    Args:
        compute_s: Seconds the computation takes alone.
        copying_s: Seconds the copies take alone.
        compute_share: Share of its speed that computing keeps while copies run.
        copy_share: Share of their bandwidth that copies keep while the machine computes.
    """
    both = min(compute_s / compute_share, copying_s / copy_share)
    return both + (compute_s - both * compute_share) + (copying_s - both * copy_share)


def cached_s(work: DecodeWork, machine: MachineRates, hit_rate: float) -> float:
    """Give the seconds per token of a cache without prefetch; hit rate 0 is loading on demand.

    A layer's copies begin when its router has spoken. All its experts but the last to arrive are
    computed beside them:

        dense + misses * call + overlap((K - 1) * expert, misses * copy) + expert

    with K * (1 - hit_rate) misses; where that is no whole number, between its neighbours'.
    """
    return work.num_layers * _layer_s(work, machine, work.top_k * (1 - hit_rate))


def prefetched_s(
    work: DecodeWork, machine: MachineRates, hit_rate: float, recall: float = 1.0
) -> float:
    """Give the seconds per token of a cache with prefetch.

    Of what misses, the share `recall` was named a layer earlier and is copied beside everything;
    the rest as without prefetch. The larger of the two decides:

        max(overlap(resident + calls, wire), cached with the unnamed misses only) + L * prediction

    where calls are those of all misses.

    Args:
        work: The model's.
        machine: The machine's.
        hit_rate: Of the cache without prefetch.
        recall: Share of the misses that is predicted; wrong guesses are not charged for.
    """
    misses = work.top_k * (1 - hit_rate)
    compute_s = resident_s(work, machine) + work.num_layers * misses * machine.call_s
    beside = _beside_s(compute_s, wire_s(work, machine, hit_rate), machine)
    unnamed = _layer_s(work, machine, misses * (1 - recall))
    return max(beside, work.num_layers * unnamed) + work.num_layers * machine.prediction_s


def _beside_s(compute_s: float, copying_s: float, machine: MachineRates) -> float:
    return overlap_s(
        compute_s,
        copying_s,
        compute_share=machine.compute_share,
        copy_share=machine.copy_share,
    )


def _layer_s(work: DecodeWork, machine: MachineRates, misses: float) -> float:
    """Give the seconds of a layer that demands `misses` copies, between whole numbers of them."""
    few = math.floor(misses)
    below, above = (_whole_layer_s(work, machine, count) for count in (few, few + 1))
    return below + (misses - few) * (above - below)


def _whole_layer_s(work: DecodeWork, machine: MachineRates, misses: int) -> float:
    expert = expert_s(work, machine)
    if misses == 0:
        return dense_s(work, machine) + work.top_k * expert
    beside = _beside_s((work.top_k - 1) * expert, misses * copy_s(work, machine), machine)
    return dense_s(work, machine) + misses * machine.call_s + beside + expert


def accept_length(acceptance: Sequence[float]) -> float:
    """Give the tokens a round is expected to bring: 1 + sum_i prod_{j <= i} p_j.

    The paper's k_accept counts the accepted draft tokens only. The target's own token, corrected or
    bonus, comes with every round and is the 1.

    Args:
        acceptance: p_j, the probability that the j-th draft token is accepted if all before it are.

    Reference:
        Wang et al. 2025, "MoE-SpeQ", arXiv:2511.14102, k_accept(k).
    """
    length, reached = 1.0, 1.0
    for chance in acceptance:
        reached *= chance
        length += reached
    return length


def union_experts(num_tokens: float, num_experts: int, top_k: int, growth: float = 1.0) -> float:
    """Give the distinct experts that the tokens of one forward want in a layer.

    E * (1 - (1 - K / E) ** (n ** g)).

    Args:
        num_tokens: n, tokens in the forward.
        num_experts: E.
        top_k: K.
        growth: g; 1 for tokens routed independently of each other, less where neighbours share
            experts.
    """
    return float(num_experts * (1 - (1 - top_k / num_experts) ** (num_tokens**growth)))


def round_s(draft_s: float, verify_s: float, copy_s: float, overlap: float = 1.0) -> float:
    """Give the seconds of a round: T_cycle of the Amortization Roofline Model.

    The paper adds the time of new copies to drafting and verifying. Copies run beside both, so the
    longer of the two counts, and of the shorter one what could not be hidden:

        max(T_draft + T_verify, T_io) + (1 - overlap) * min(T_draft + T_verify, T_io)

    Args:
        draft_s: Seconds of drafting; nothing there waits for copies.
        verify_s: Seconds of verifying with every expert in memory.
        copy_s: Seconds of the round's copies, alone on the link.
        overlap: Share of the shorter one that is hidden behind the longer one.

    Reference:
        arXiv:2511.14102, T_cycle(k).
    """
    compute_s = draft_s + verify_s
    return max(compute_s, copy_s) + (1 - overlap) * min(compute_s, copy_s)


def amortised_intensity(num_tokens: float, copied_bytes: float) -> float:
    """Give tokens per byte that a round copies: I_amort; infinite where it copies nothing.

    Reference:
        arXiv:2511.14102, I_amort(k), per byte instead of per expert.
    """
    return num_tokens / copied_bytes if copied_bytes > 0 else math.inf


def io_roof(intensity: float, link_bytes_s: float) -> float:
    """Give the tokens per second that the link allows: B_link * I_amort; infinite as that is."""
    return link_bytes_s * intensity if intensity < math.inf else math.inf


def compute_roof(num_tokens: float, draft_s: float, verify_s: float) -> float:
    """Give the tokens per second that computing allows: k_accept / (T_draft + T_verify)."""
    return num_tokens / (draft_s + verify_s)
