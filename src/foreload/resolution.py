"""Turns what was asked for into numbers, before anything is allocated.

Every "auto" that depends on the model or the machine ends here, and the draft that the settings
ask for is found, or built. Keeps nothing.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from foreload.config import EngineConfig, parse_size
from foreload.errors import (
    CapacityError,
    CheckpointError,
    ConfigError,
    MissingExtraError,
    UnsupportedModelError,
)
from foreload.memory import cuda
from foreload.memory.arena import slot_bytes
from foreload.memory.available import available_bytes
from foreload.model.device_plan import (
    block_bytes,
    device_layouts,
    kv_bytes_per_token,
    resident_draft_bytes,
    stream_blocks,
    workspace_bytes,
)
from foreload.model.draft_choice import draft_pays, measure_figures
from foreload.model.draft_files import (
    check_draft,
    draft_folder,
    has_draft,
    read_or_build_draft,
)
from foreload.model.draft_layout import DRAFT_BITS, draft_bytes
from foreload.model.kv_cache import can_rewind
from foreload.model.sites import silenced_experts
from foreload.model.slot_division import divide_slots

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from foreload.model.draft import DraftExperts
    from foreload.model.hf import LoadedModel
    from foreload.types import ExpertPlan

__all__ = [
    "default_cache_dir",
    "device_slots",
    "least_memory",
    "prepare_draft",
    "resolve",
    "slot_size",
]

logger = logging.getLogger(__name__)

_MARGIN_BYTES = 1 << 30
"""Left to the rest of the machine, beside the KV cache and workspaces."""

_CONTEXT_TOKENS = 8192
"""Tokens of a request on a CUDA device with context="auto", at most."""

_LOCKED_PERCENT = 75
"""Share of the free host memory that host_memory="auto" locks: it can no longer be swapped out."""


def default_cache_dir() -> Path:
    """Give where foreload keeps what it has measured, unless told otherwise."""
    return Path.home() / ".cache" / "foreload"


def prepare_draft(
    config: EngineConfig,
    loaded: LoadedModel,
    *,
    cache_dir: Path,
    progress: Callable[[int, int], None] | None = None,
) -> DraftExperts | None:
    """Give the draft that resolved settings ask for, built if it is not there yet.

    Args:
        config: Settings, resolved. For a device the engine makes the draft: None.
        loaded: The model.
        cache_dir: Where drafts are kept.
        progress: Called with (done, total) bytes while it is built.

    Raises:
        UnsupportedModelError: The model's KV cache cannot go back.
        CheckpointError: The draft's folder is damaged.
        CapacityError: The disk is full.
    """
    if config.draft == "none" or config.orchestration == "device":
        return None
    _require_rewind(loaded)
    if config.device.startswith("cuda"):
        return None
    identity = loaded.spec.identity
    folder = draft_folder(cache_dir, identity, config.draft)
    return read_or_build_draft(
        loaded.sites, loaded.plans, identity, folder, config.draft, progress=progress
    )


def resolve(
    config: EngineConfig, loaded: LoadedModel, *, cache_dir: Path | None = None
) -> EngineConfig:
    """Replace every "auto" that depends on the model or the machine.

    Warns of settings that come to nothing.

    Args:
        config: Settings as asked for.
        loaded: The model.
        cache_dir: Where draft="auto" looks for one; nowhere where None.

    Raises:
        ConfigError: There is no such CUDA device.
        MissingExtraError: A CUDA device is to decide for itself, and there is no triton.
        CapacityError: The expert memory is below what one layer and the draft need, or above the
            machine's; or the host memory is below what the experts of a device need.
        UnsupportedModelError: A device cannot manage these experts, and was asked to.
    """
    resolved = _resolve(config, loaded, cache_dir)
    _warn_of_no_effect(config, resolved, loaded)
    return resolved


def _resolve(config: EngineConfig, loaded: LoadedModel, cache_dir: Path | None) -> EngineConfig:
    """Decide where experts are, and who decides about them."""
    if config.orchestration == "device":
        return _resolve_device(config, loaded)
    if config.device.startswith("cuda"):
        return _resolve_cuda(config, loaded)
    if config.device == "auto" and config.orchestration == "auto" and cuda.has_device():
        if config.host_only is not None:
            logger.info("%s runs on the CPU only", config.host_only)
        else:
            try:
                return _resolve_cuda(config, loaded)
            except (CapacityError, MissingExtraError, UnsupportedModelError) as error:
                logger.warning("the CUDA device is left alone: %s", error)
    return _resolve_host(config, loaded, cache_dir)


def _warn_of_no_effect(config: EngineConfig, resolved: EngineConfig, loaded: LoadedModel) -> None:
    """Say which settings, other than their defaults, come to nothing here."""
    own, default = loaded.generation.max_positions, EngineConfig()
    if config.context != "auto" and own is not None and int(config.context) > own:
        logger.warning(
            "context=%s is more than the %d tokens the model was built for: these are the limit",
            config.context,
            own,
        )
    is_device = resolved.orchestration == "device"
    if config.host_memory != "auto" and resolved.device == "cpu" and not is_device:
        logger.warning(
            "host_memory=%r has no effect: experts come from disk straight into expert_memory",
            config.host_memory,
        )
    if config.lookahead_layers not in (1, default.lookahead_layers) and is_device:
        logger.warning(
            "lookahead_layers=%d has no effect: a device that decides for itself predicts one",
            config.lookahead_layers,
        )
    if config.confidence != default.confidence and config.policy != "speculate-when":
        logger.warning(
            "confidence=%s has no effect with policy=%r: it is for 'speculate-when'",
            config.confidence,
            config.policy,
        )


def _resolve_cuda(config: EngineConfig, loaded: LoadedModel) -> EngineConfig:
    """Resolve settings for a CUDA device: it decides for itself where it can."""
    if config.orchestration == "auto" and config.host_only is None:
        try:
            return _resolve_device(config, loaded)
        except (CapacityError, UnsupportedModelError) as error:
            logger.warning("the host decides about the CUDA device's experts: %s", error)
    elif config.host_only is not None:
        logger.info(
            "the host decides about the CUDA device's experts: %s wants it", config.host_only
        )
    return _resolve_staged(config, loaded)


def _resolve_host(
    config: EngineConfig, loaded: LoadedModel, cache_dir: Path | None
) -> EngineConfig:
    """Resolve settings for experts that come from disk as the host's loop decides."""
    _refuse_slot_plan(config)
    size = slot_size(loaded.plans)
    whole = size * sum(len(layer) for layer in loaded.plans)
    least = least_memory(loaded)
    available = available_bytes()
    draft = _choose_draft(config, loaded, cache_dir)
    drafted = 0 if draft == "none" else draft_bytes(loaded.sites, loaded.plans, draft)
    if config.expert_memory == "auto":
        budget = min(whole + drafted, available - _MARGIN_BYTES)
    else:
        asked = parse_size(config.expert_memory, whole_bytes=whole, setting="expert_memory")
        budget = min(whole + drafted, asked)
        if budget > available:
            raise CapacityError(
                "the machine has less free memory than expert_memory asks for",
                needed_bytes=budget,
                available_bytes=available,
                setting="expert_memory",
                hint=_at_most("expert_memory", available),
            )
    is_optional = config.draft == "auto" and draft != "none"
    if is_optional and not _draft_fits(config, loaded, draft, budget, drafted, least):
        draft, drafted = "none", 0
        budget = min(whole, budget)
    if budget < least + drafted:
        more = "" if draft == "none" else f", beside the {draft} draft"
        raise CapacityError(
            f"expert_memory is below one layer's needs ({loaded.spec.top_k} experts at work and "
            f"one on its way{more})",
            needed_bytes=least + drafted,
            available_bytes=max(budget, 0),
            setting="expert_memory",
        )
    return config.with_values(
        device="cpu",
        orchestration="host",
        dtype=loaded.spec.dtype,
        context=_context(config, loaded),
        expert_memory=(budget - drafted) // size * size + drafted,
        draft=draft,
        num_draft_tokens=config.num_draft_tokens if draft != "none" else "auto",
    )


def _context(config: EngineConfig, loaded: LoadedModel, *, most: int | None = None) -> str | int:
    """Give the tokens a request may have; "auto" where neither model nor setting tells.

    Args:
        config: The settings.
        loaded: The model.
        most: Most tokens of "auto".
    """
    limits = [loaded.generation.max_positions, most if config.context == "auto" else config.context]
    known = [int(limit) for limit in limits if limit is not None and limit != "auto"]
    return min(known) if known else "auto"


def _refuse_slot_plan(config: EngineConfig) -> None:
    if config.slot_plan != "equal":
        raise ConfigError(
            "slot_plan divides the slots of a device that decides for itself, and here the host "
            "decides: its slots are shared by all layers",
            hint="use orchestration='device', or slot_plan='equal'",
        )


def _resolve_staged(config: EngineConfig, loaded: LoadedModel) -> EngineConfig:
    """Resolve settings for a CUDA device whose experts come as the host's loop decides."""
    _refuse_slot_plan(config)
    spec = loaded.spec
    device = cuda.find_device("cuda" if config.device == "auto" else config.device)
    size = slot_size(loaded.plans)
    whole = size * sum(len(layer) for layer in loaded.plans)
    available = available_bytes()
    host = available * _LOCKED_PERCENT // 100
    if config.host_memory != "auto":
        host = parse_size(config.host_memory, whole_bytes=whole, setting="host_memory")
    host = min(whole, host)
    if not size <= host <= available:
        raise CapacityError(
            "host_memory has no room for one expert"
            if host < size
            else "the machine has less free memory than host_memory asks for",
            needed_bytes=max(host, size),
            available_bytes=min(host, available),
            setting="host_memory",
            hint=None if host < size else _at_most("host_memory", available),
        )
    # As where the device decides: drafts are made when an engine is opened.
    draft = "none" if config.draft == "auto" else config.draft
    if draft != "none" and device.type == "cuda" and find_spec("triton") is None:
        raise MissingExtraError("triton", "triton")
    drafted = resident_draft_bytes(loaded, draft)
    context = int(_context(config, loaded, most=_CONTEXT_TOKENS))
    room = _device_room(device, loaded, config, context)
    budget = _device_budget(config, whole, room, room, draft_bytes=drafted)
    least = least_memory(loaded) + drafted
    if budget < least:
        more = "" if draft == "none" else f", beside the {draft} draft"
        raise CapacityError(
            f"expert_memory is below one layer's needs ({spec.top_k} experts at work and one on "
            f"its way{more})",
            needed_bytes=least,
            available_bytes=max(budget, 0),
            setting="expert_memory",
        )
    return config.with_values(
        device=str(device),
        orchestration="host",
        dtype=spec.dtype,
        context=context,
        expert_memory=(budget - drafted) // size * size + drafted,
        host_memory=host // size * size,
        draft=draft,
        num_draft_tokens=config.num_draft_tokens if draft != "none" else "auto",
    )


def _resolve_device(config: EngineConfig, loaded: LoadedModel) -> EngineConfig:
    """Resolve settings for experts that lie in host memory, and slots that the device manages."""
    wants_cuda = config.device == "auto" and cuda.has_device()
    device = cuda.find_device(
        "cuda" if wants_cuda else "cpu" if config.device == "auto" else config.device
    )
    if device.type == "cuda" and find_spec("triton") is None:
        raise MissingExtraError("triton", "triton")
    spec = loaded.spec
    size = block_bytes(device_layouts(loaded))
    # "auto" is a draft that was built already, and here drafts are made when an engine is opened.
    draft = "none" if config.draft == "auto" else config.draft
    drafted = resident_draft_bytes(loaded, draft)
    layer_slot = spec.num_moe_layers * size
    whole = spec.num_experts * layer_slot
    available = available_bytes()
    host = available - _MARGIN_BYTES
    if config.host_memory != "auto":
        asked = parse_size(config.host_memory, whole_bytes=whole, setting="host_memory")
        host = min(available, asked)
    if whole > host:
        raise CapacityError(
            "a device fetches experts from host memory, and they do not all fit there",
            needed_bytes=whole,
            available_bytes=max(host, 0),
            setting="host_memory",
            hint=None
            if whole <= available
            else "use orchestration='host': experts come from disk as well then",
        )
    # Two buffers that long inputs stream their experts through.
    streamed = 2 * stream_blocks(spec.num_experts, size) * size
    context = _context(config, loaded)
    if device.type == "cuda":
        context = int(_context(config, loaded, most=_CONTEXT_TOKENS))
        room = spare = _device_room(device, loaded, config, context, streamed)
    else:
        room = available - whole - streamed
        spare = room - _MARGIN_BYTES
    budget = _device_budget(config, whole, room, spare, draft_bytes=drafted)
    # What has no slot is read from host memory each time, so one slot per layer will do.
    least = layer_slot + drafted
    if budget < least:
        more = "" if draft == "none" else f" beside the {draft} draft"
        raise CapacityError(
            f"expert_memory is below one expert in each of {spec.num_moe_layers} layers{more}",
            needed_bytes=least,
            available_bytes=max(budget, 0),
            setting="expert_memory",
        )
    slots = divide_slots(config.slot_plan, (budget - drafted) // size, spec)
    return config.with_values(
        device=str(device),
        orchestration="device",
        dtype=spec.dtype,
        context=context,
        slot_plan="equal" if config.slot_plan == "equal" else slots,
        expert_memory=sum(slots) * size + drafted,
        host_memory=whole,
        draft=draft,
        num_draft_tokens=config.num_draft_tokens if draft != "none" else "auto",
        eviction="lru",
    )


def device_slots(config: EngineConfig, loaded: LoadedModel) -> tuple[int, ...]:
    """Give the slots of each MoE layer that resolved settings leave on a device, beside a draft."""
    left = int(config.expert_memory) - resident_draft_bytes(loaded, config.draft)
    return divide_slots(config.slot_plan, left // block_bytes(device_layouts(loaded)), loaded.spec)


def _device_room(
    device: torch.device,
    loaded: LoadedModel,
    config: EngineConfig,
    context: int,
    other_bytes: int = 0,
) -> int:
    """Give the bytes a CUDA device has for slots, beside all else that will lie there.

    Args:
        device: The device.
        loaded: The model.
        config: The settings.
        context: Most tokens of a request.
        other_bytes: What else of the experts is kept there.
    """
    return (
        cuda.free_bytes(device)
        # The dense weights are not there yet.
        - loaded.spec.dense_bytes
        - other_bytes
        - context * kv_bytes_per_token(loaded)
        - workspace_bytes(loaded, min(config.prefill_chunk, context), context)
        - _MARGIN_BYTES
    )


def _device_budget(
    config: EngineConfig, whole: int, room: int, spare: int, *, draft_bytes: int = 0
) -> int:
    """Give the bytes that experts may take of a device: what it can spare, or what was asked for.

    Args:
        config: The settings.
        whole: Bytes of all experts.
        room: Bytes the device has for them at most.
        spare: Bytes it can spare.
        draft_bytes: Bytes of a draft, taken from the same.
    """
    if config.expert_memory == "auto":
        return min(whole + draft_bytes, spare)
    asked = parse_size(config.expert_memory, whole_bytes=whole, setting="expert_memory")
    budget = min(whole + draft_bytes, asked)
    if budget > room:
        raise CapacityError(
            "the device has less free memory than expert_memory asks for",
            needed_bytes=budget,
            available_bytes=max(room, 0),
            setting="expert_memory",
            hint=_at_most("expert_memory", room),
        )
    return budget


def _at_most(setting: str, num_bytes: int) -> str:
    return f"set {setting} to 'auto', or to {max(num_bytes, 0):,} bytes at most"


def _draft_fits(
    config: EngineConfig,
    loaded: LoadedModel,
    draft: str,
    budget: int,
    drafted: int,
    least: int,
) -> bool:
    """Tell whether an optional draft fits into a budget, and is worth its memory there."""
    if budget < least + drafted:
        return False
    figures = measure_figures(
        loaded.sites, loaded.plans, loaded.spec, draft, num_workers=config.num_workers
    )
    size = slot_size(loaded.plans)
    return draft_pays(
        loaded.spec,
        figures,
        plain_slots=budget // size,
        slots_beside=(budget - drafted) // size,
    )


def least_memory(loaded: LoadedModel, draft: str = "none") -> int:
    """Give the bytes an expert memory must have: one layer's experts at work, one on its way.

    Args:
        loaded: The model.
        draft: Kind of the draft beside it.
    """
    size = slot_size(loaded.plans)
    whole = size * sum(len(layer) for layer in loaded.plans)
    drafted = 0 if draft == "none" else draft_bytes(loaded.sites, loaded.plans, draft)
    return min(whole, size * (loaded.spec.top_k + 1)) + drafted


def _choose_draft(config: EngineConfig, loaded: LoadedModel, cache_dir: Path | None) -> str:
    """Give the kind of draft to try: for "auto" one that has been built already."""
    if config.draft != "auto":
        return config.draft
    if cache_dir is None:
        return "none"
    identity = loaded.spec.identity
    for kind in DRAFT_BITS:
        folder = draft_folder(cache_dir, identity, kind)
        if not has_draft(folder):
            continue
        try:
            check_draft(loaded.sites, loaded.plans, identity, folder, kind)
        except CheckpointError as error:
            logger.warning("the %s draft is left alone: %s", kind, error)
            continue
        return kind
    return "none"


def _require_rewind(loaded: LoadedModel) -> None:
    with silenced_experts(loaded.sites):
        is_fine = can_rewind(loaded.model)
    if not is_fine:
        raise UnsupportedModelError(
            f"{loaded.spec.architecture} cannot verify a draft: its cache keeps states that cannot "
            "go back to an earlier token",
            hint="use draft='none'",
        )


def slot_size(plans: Sequence[Sequence[ExpertPlan]]) -> int:
    """Give the bytes of a slot that any of the experts fits into."""
    return max(slot_bytes(plan) for layer in plans for plan in layer)
