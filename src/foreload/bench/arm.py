"""One way to run a model in a benchmark, and what one run of it measured."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Arm", "Sample"]


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to run the model.

    Attributes:
        name: As tables and figures show it.
        settings: Engine settings beside the memory; None for transformers itself.
        implementation: For transformers itself: its experts implementation.
        is_resident: Whether it gets the memory of all experts, whatever the budget.
        is_oracle: Whether predictions are replayed from the workload's own trace.
        is_pure: Whether its estimator speaks for every layer, even where another predictor was
            measured to be better.
        is_layerwise: Whether a layer is computed when all its experts have arrived, instead of each
            expert as it arrives.
    """

    name: str
    settings: dict[str, Any] | None = None
    implementation: str | None = None
    is_resident: bool = False
    is_oracle: bool = False
    is_pure: bool = False
    is_layerwise: bool = False
    is_draft_alone: bool = False
    has_kernel: bool = True
    is_asynchronous: bool = True

    @property
    def is_lossy(self) -> bool:
        """Tell whether it may execute other experts than the true router's, or quantised ones."""
        policy: str = (self.settings or {}).get("policy", "exact")
        return policy != "exact" or self.is_draft_alone

    @property
    def has_draft(self) -> bool:
        """Tell whether quantised experts take a part of its memory."""
        draft: str = (self.settings or {}).get("draft", "none")
        return draft != "none"


@dataclass(slots=True, kw_only=True)
class Sample:
    """One arm, one context, one budget, one trial. Times in seconds, bytes per decoded token.

    Attributes:
        context: Tokens of the prompt.
        is_equal: Whether the logits are the reference's bit for bit; of a lossy arm, those of the
            prompt, which no policy changes; of an arm that verifies drafts, within a tolerance,
            since forwards of several tokens round differently.
        is_lossy: Whether the arm may execute other experts than the true router's.
        is_layerwise: Whether it computes whole layers, see `Arm`.
        eviction: Eviction policy; empty for transformers itself.
        num_other: Of an arm that verifies drafts, steps whose likeliest token is not the
            reference's; `widest_tie` is the largest gap there between both in the reference.
        acceptance_rate: Drafted tokens that were accepted.
        accept_length: Tokens per round.
        draft_s_per_token: Seconds of drafting per decoded token.
        rounds: How many rounds drafted how many tokens.
        verifications: Of each round, what `self_draft.Verification` has.
        roofs: The governor's choices under both roofs, see `governor.RoofPoint`.
        quality: Of a lossy arm, for each decoded token that another follows, what
            `evaluate.TokenQuality` has.
    """

    arm: str
    budget: float
    trial: int
    tpot_s: float
    prefill_s: float
    step_s: list[float]
    is_equal: bool
    context: int = 0
    is_resident: bool = False
    is_lossy: bool = False
    is_layerwise: bool = False
    eviction: str = ""
    hit_rate: float | None = None
    late_rate: float | None = None
    bytes_per_token: float = 0.0
    prefetch_bytes_per_token: float = 0.0
    wasted_bytes_per_token: float = 0.0
    stall_s_per_token: float = 0.0
    prefetch_precision: float | None = None
    num_slots: int = 0
    recall_at_n: dict[int, dict[int, float]] = field(default_factory=dict)
    speculated_fraction: float = 0.0
    num_other: int = 0
    widest_tie: float = 0.0
    acceptance_rate: float | None = None
    accept_length: float | None = None
    draft_s_per_token: float = 0.0
    rounds: dict[int, int] = field(default_factory=dict)
    verifications: list[list[float]] = field(default_factory=list)
    roofs: list[dict[str, Any]] = field(default_factory=list)
    quality: dict[str, list[float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Give the sample as JSON-ready values."""
        return asdict(self)
