"""The parts of the host's path are built together, share one memory, and go together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from fakes import make_engine
from foreload.errors import ConfigError, TransferError
from foreload.memory.arena import SlotArena
from foreload.memory.disk import DiskBackend
from foreload.memory.host_tier import HostTier
from foreload.model import host_path
from foreload.resolution import slot_size
from foreload.schedule.prefetch import most_prefetches

if TYPE_CHECKING:
    from pathlib import Path

    from foreload import Engine
    from foreload.model.host_path import HostPath


def path_of(engine: Engine) -> HostPath:
    assert engine._host is not None
    return engine._host


def test_a_draft_is_a_part_of_the_memory_until_it_is_dropped(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with make_engine(
        tiny_checkpoint, expert_memory="60%", draft="int4", cache_dir=tmp_path
    ) as engine:
        path = path_of(engine)
        assert path.drafter is engine.drafter is not None
        draft = path.drafter.draft
        assert draft is not None
        size = slot_size(engine._loaded.plans)
        slots = path.tiers.num_slots
        top_k = engine.spec.top_k
        assert path.runtime._prefetcher.max_prefetches == most_prefetches(slots, top_k)
        assert path.num_bytes == slots * size + draft.num_bytes <= engine.config.expert_memory
        before = engine.generate([3, 4, 5], max_new_tokens=6).token_ids
        for _ in range(2):
            assert path.drop_draft()
            assert path.drafter.draft is None
            more = path.tiers.num_slots
            assert more == engine.config.expert_memory // size > slots
            assert path.runtime._prefetcher.max_prefetches == most_prefetches(more, top_k)
        assert engine.generate([3, 4, 5], max_new_tokens=6).token_ids == before


def test_on_a_device_slots_are_given_once(tiny_checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="the triton extra is not installed")
    with make_engine(
        tiny_checkpoint,
        expert_memory="90%",
        draft="int4",
        cache_dir=tmp_path,
        host_tier=lambda size: HostTier(64 * size, size),
    ) as engine:
        with pytest.raises(ConfigError, match="cannot be given to experts"):
            path_of(engine).drop_draft()
        assert path_of(engine).host_bytes == 0
        for _ in range(2):
            engine.generate([3, 4, 5], max_new_tokens=4)
        assert engine.stats["host_bytes"] == path_of(engine).host_bytes > 0


def test_it_is_let_go_of_once(tiny_checkpoint: Path) -> None:
    with make_engine(tiny_checkpoint, expert_memory="50%") as engine:
        path = path_of(engine)
        engine.generate([3, 4, 5], max_new_tokens=2)
        path.release()
        path.release()
        assert path.tiers._arena._bytes.numel() == 0  # type: ignore[union-attr]


def test_what_was_made_goes_when_the_rest_cannot_be_made(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released: list[str] = []

    class Arena(SlotArena):
        def release(self) -> None:
            released.append("slots")
            super().release()

    class Tiers(host_path.ExpertTiers):
        def close(self) -> None:
            released.append("copies")
            super().close()

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise TransferError("no runtime")

    monkeypatch.setattr(host_path, "SlotArena", Arena)
    monkeypatch.setattr(host_path, "ExpertTiers", Tiers)
    monkeypatch.setattr(host_path, "ExpertRuntime", fail)
    with pytest.raises(TransferError, match="no runtime"):
        make_engine(tiny_checkpoint, expert_memory="50%", backend=DiskBackend)
    assert released == ["copies", "slots"]
