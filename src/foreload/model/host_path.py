"""The parts of a model whose experts come as the host decides, built and taken down together.

    disk -> (host tier ->) slots -> tiers -> runtime at every MoE layer -> rounds of a draft

The counterpart of `model.device_path`. Decides nothing at run time.
"""

from __future__ import annotations

import functools
import logging
from contextlib import ExitStack
from typing import TYPE_CHECKING

from foreload.errors import ConfigError
from foreload.memory.arena import SlotArena, slot_bytes
from foreload.memory.device_slots import DeviceSlots
from foreload.memory.disk import DiskBackend
from foreload.memory.eviction import make_eviction
from foreload.memory.host_tier import HostTier
from foreload.memory.staged import StagedBackend
from foreload.memory.tiers import ExpertTiers
from foreload.memory.transfer import TransferEngine
from foreload.model.resident_draft import make_resident_draft
from foreload.model.runtime import ExpertRuntime
from foreload.model.self_draft import SelfDraft
from foreload.schedule.governor import Governor
from foreload.schedule.prefetch import most_prefetches

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from foreload.config import EngineConfig
    from foreload.memory.transfer import CopyBackend
    from foreload.metrics import Metrics, Timeline
    from foreload.model.draft import DraftExperts
    from foreload.model.graph import ForwardAll
    from foreload.model.hf import LoadedModel
    from foreload.model.resident_draft import ResidentDraft
    from foreload.ops.reference import SumRule
    from foreload.schedule.prefetch import PrefetchSwitch
    from foreload.types import Predictor

__all__ = ["HostPath"]

logger = logging.getLogger(__name__)


class HostPath:
    """Tiers, the runtime that uses them, and the rounds of a draft.

    Args:
        loaded: The model, on `device`.
        config: Settings, resolved.
        device: Where it computes.
        sum_rules: Per MoE layer, the element type its experts are summed in.
        forward: From token ids (1, T) and a KV cache to logits (T, V).
        metrics: Where lookups, copies and rounds are counted.
        timeline: Where spans are kept.
        predictor: Guesses the coming experts; None guesses nothing.
        switch: Turns guessing off while it loses; None never does.
        draft: Quantised experts, mapped; None without, and on a device, which makes its own.
        backend: Makes what copies from disk to slots, where there is no host tier.
        host_tier: Makes the host tier over blocks of so many bytes; by default there is one for a
            CUDA device.
        link: Wraps what copies into slots.
        draft_progress: Called with (done, total) bytes while experts are quantised for a device.

    Attributes:
        tiers: Where experts are, and how they get there.
        runtime: What happens at each MoE layer.
        drafter: Makes the rounds of speculative decoding; None without a draft.
        held: Lets go of threads and memory when it is closed; does not keep the model.

    Raises:
        TransferError: The checkpoint could not be read.
        MissingExtraError: A draft on a CUDA device, and no triton.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        config: EngineConfig,
        device: torch.device,
        *,
        sum_rules: Sequence[SumRule],
        forward: ForwardAll,
        metrics: Metrics,
        timeline: Timeline,
        predictor: Predictor | None = None,
        switch: PrefetchSwitch | None = None,
        draft: DraftExperts | ResidentDraft | None = None,
        backend: Callable[[SlotArena], CopyBackend] = DiskBackend,
        host_tier: Callable[[int], HostTier] | None = None,
        link: Callable[[CopyBackend], CopyBackend] | None = None,
        draft_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        spec = loaded.spec
        size = max(slot_bytes(plan) for layer in loaded.plans for plan in layer)
        self._slot_bytes = size
        self._num_layers = spec.num_moe_layers
        self._top_k = spec.top_k
        self._metrics = metrics
        self._most_bytes = int(config.expert_memory)
        self._staged: StagedBackend | None = None
        if device.type == "cuda" and host_tier is None:
            host_tier = functools.partial(HostTier, int(config.host_memory), device=device)
        if host_tier is not None and config.draft != "none":
            # Before the slots: quantising needs room that they would take.
            draft = make_resident_draft(
                loaded, config.draft, device, sum_rules=sum_rules, progress=draft_progress
            )
        num_slots = (self._most_bytes - (0 if draft is None else draft.num_bytes)) // size
        with ExitStack() as held:
            arena: SlotArena | DeviceSlots
            copies: CopyBackend
            if host_tier is None:
                # Slots beyond those in use cost nothing: the draft's heirs if it is let go of.
                arena = SlotArena(self._most_bytes // size, size)
                held.callback(arena.release)
                copies = backend(arena)
            else:
                arena = DeviceSlots(num_slots, size, device)
                held.callback(arena.release)
                copies = self._staged = StagedBackend(arena, host_tier(size))
                held.callback(self._staged.close)
            self.tiers = ExpertTiers(
                arena,
                loaded.plans,
                TransferEngine(
                    copies if link is None else link(copies), num_workers=config.num_workers
                ),
                make_eviction(config.eviction, spec.num_moe_layers, spec.num_experts),
                metrics,
                timeline,
                keep=config.eviction != "none",
                num_slots=num_slots,
            )
            held.callback(self.tiers.close)
            self.runtime = ExpertRuntime(
                self.tiers,
                metrics,
                timeline,
                sum_rules=sum_rules,
                predictor=predictor,
                max_prefetches=most_prefetches(self.tiers.num_slots, spec.top_k),
                switch=switch,
            )
            self.drafter = None if draft is None else self._make_drafter(draft, config, forward)
            # From here on `release` lets go, copies first.
            self.held = held.pop_all()

    @property
    def num_bytes(self) -> int:
        """Give the bytes of the device tier, a draft included."""
        draft = None if self.drafter is None else self.drafter.draft
        return self.tiers.num_slots * self._slot_bytes + (0 if draft is None else draft.num_bytes)

    @property
    def host_bytes(self) -> int:
        """Give the bytes that copies have found in the host tier; 0 where there is none."""
        return 0 if self._staged is None else self._staged.host_bytes

    def drop_draft(self) -> bool:
        """Let go of the draft, and keep experts in its memory instead.

        Returns:
            Whether it is gone; not while a round of another thread drafts.

        Raises:
            ConfigError: The experts lie on a device: its slots are given once.
        """
        if self.drafter is None or self.drafter.draft is None:
            return True
        if self._staged is not None:
            raise ConfigError(
                "the draft's memory on a device cannot be given to experts",
                hint="open another engine, with draft='none'",
            )
        with self.runtime.lock:
            if self.drafter.num_drafting:
                return False
            self.drafter.release()
            self.tiers.grow(self._most_bytes // self._slot_bytes - self.tiers.num_slots)
            self.runtime.limit_prefetches(most_prefetches(self.tiers.num_slots, self._top_k))
        logger.info("the draft was let go of: its memory holds experts now")
        return True

    def release(self) -> None:
        """Stop the copies and let go of the experts' memory; may be called twice."""
        self.held.close()

    def _make_drafter(
        self, draft: DraftExperts | ResidentDraft, config: EngineConfig, forward: ForwardAll
    ) -> SelfDraft:
        tokens = config.num_draft_tokens
        return SelfDraft(
            self.runtime,
            self.tiers,
            self._metrics,
            Governor(pinned=None if isinstance(tokens, str) else tokens),
            draft,
            forward,
            num_layers=self._num_layers,
        )
