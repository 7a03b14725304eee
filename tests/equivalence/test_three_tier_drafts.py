"""Drafts with three tiers: quantised experts on the device, the target's own from the disk.

No greedy token changes, and a broken round changes nothing that comes later. The device is the
CPU, from the resolution of the settings on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

import zoo
from fakes import assert_settled, make_engine
from foreload.errors import CapacityError, ConfigError
from foreload.memory import cuda
from foreload.memory.device_slots import DeviceSlots
from foreload.memory.host_tier import HostTier
from foreload.model.resident_draft import ResidentDraft
from foreload.model.self_draft import SelfDraft

if TYPE_CHECKING:
    from pathlib import Path

    from foreload import Engine

FAMILIES = ["qwen3_moe", "gpt_oss"]
NUM_DECODED = 18
PROMPTS = ([11, 16, 21, 5, 9], list(range(20, 60)))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        family: zoo.save_family(family, tmp_path_factory.mktemp(family), torch.float32).path
        for family in FAMILIES
    }


def open_with_draft(directory: Path, blocks: int | str = 3, **settings: Any) -> Engine:
    """Open as on a CUDA device: the CPU stands in for it from the resolution on."""
    given = {"expert_memory": "150%", "draft": "int4", "predictor": "lookahead", **settings}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "find_device", lambda name: torch.device("cpu"))
        patch.setattr(cuda, "free_bytes", lambda device: 1 << 33)
        return make_engine(
            directory,
            device="cuda",
            orchestration="host",
            dtype="float32",
            host_tier=lambda size: HostTier(
                (10_000 if blocks == "all" else int(blocks)) * size, size
            ),
            **given,
        )


def say(engine: Engine, **sampling: Any) -> list[list[int]]:
    sampling = {"max_new_tokens": NUM_DECODED, **sampling}
    return [engine.generate(prompt, **sampling).token_ids for prompt in PROMPTS]


@pytest.fixture(scope="module")
def plain(checkpoints: dict[str, Path]) -> dict[str, list[list[int]]]:
    """What each family says without a draft."""
    said = {}
    for family in FAMILIES:
        with make_engine(checkpoints[family], dtype="float32", expert_memory="50%") as engine:
            said[family] = say(engine)
    return said


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("number", "kind"), [(1, "int8"), (4, "int4"), ("auto", "int4")])
@pytest.mark.parametrize("blocks", [2, "all"])
def test_greedy_tokens_are_those_without(
    checkpoints: dict[str, Path],
    plain: dict[str, list[list[int]]],
    family: str,
    number: int | str,
    kind: str,
    blocks: int | str,
) -> None:
    with open_with_draft(
        checkpoints[family], blocks, draft=kind, num_draft_tokens=number
    ) as engine:
        assert isinstance(engine.tiers._arena, DeviceSlots)
        assert engine.drafter is not None
        assert isinstance(engine.drafter.draft, ResidentDraft)
        assert say(engine) == plain[family]
        assert_settled(engine.tiers)
        assert engine.metrics.num_draft_tokens > 0
        assert engine.expert_memory_bytes == engine.config.expert_memory
        assert engine.num_slots == engine.tiers._arena.num_slots, (
            "what the draft takes is no slot's"
        )


def test_what_drafting_names_is_copied_meanwhile(checkpoints: dict[str, Path]) -> None:
    prefetched = []
    for is_prefetching in (False, True):
        # A fixed number of tokens, and no other reason for a prefetch.
        with open_with_draft(
            checkpoints["qwen3_moe"], num_draft_tokens=4, predictor="none"
        ) as engine:
            drafter = engine.drafter
            assert isinstance(drafter, SelfDraft)
            drafter.is_prefetching = is_prefetching
            say(engine)
            prefetched.append(engine.metrics.num_prefetched)
    assert prefetched[0] == 0
    assert prefetched[1] > 0


def test_memory_is_counted_and_too_little_is_refused(checkpoints: dict[str, Path]) -> None:
    path = checkpoints["qwen3_moe"]
    with pytest.raises(CapacityError, match="beside the int4 draft") as caught:
        open_with_draft(path, expert_memory=1 << 14)
    assert caught.value.setting == "expert_memory"
    needed = caught.value.needed_bytes
    with open_with_draft(path, expert_memory=needed) as engine:
        assert engine.expert_memory_bytes == needed
        with pytest.raises(ConfigError, match="cannot be given to experts"):
            engine.drop_draft()
        say(engine, max_new_tokens=4)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("where", ["drafting", "verifying"])
def test_an_error_in_a_round_fails_one_request_only(
    checkpoints: dict[str, Path],
    plain: dict[str, list[list[int]]],
    error: type[BaseException],
    where: str,
) -> None:
    with open_with_draft(checkpoints["qwen3_moe"], num_draft_tokens=4) as engine:
        drafter = engine.drafter
        assert drafter is not None
        draft: Any = drafter.draft
        real, calls = draft.run_layer, iter(range(10**6))

        def run(*args: Any) -> Any:
            if next(calls) == 6:
                raise error
            return real(*args)

        def interrupt(layer: int, expert: int, output: Any) -> None:
            if engine.metrics.num_rounds > 0:
                raise error

        if where == "drafting":
            draft.run_layer = run
        else:
            engine.runtime.on_output = interrupt
        with pytest.raises(error):
            engine.generate([3, 4, 5], max_new_tokens=NUM_DECODED)
        draft.run_layer, engine.runtime.on_output = real, None
        assert_settled(engine.tiers)
        assert say(engine) == plain["qwen3_moe"]
        assert_settled(engine.tiers)


def test_cancelling_inside_a_round_ends_behind_the_last_token_shown(
    checkpoints: dict[str, Path], plain: dict[str, list[list[int]]]
) -> None:
    with open_with_draft(checkpoints["gpt_oss"], num_draft_tokens=4) as engine:
        assert engine.drafter is not None
        draft: Any = engine.drafter.draft
        real, calls = draft.run_layer, iter(range(10**6))

        def run(*args: Any) -> Any:
            if next(calls) == 12:
                engine.cancel()
            return real(*args)

        draft.run_layer = run
        found = engine.generate(PROMPTS[0], max_new_tokens=NUM_DECODED)
        draft.run_layer = real
        assert found.finish_reason == "cancelled"
        assert len(found.token_ids) < NUM_DECODED
        assert found.token_ids == plain["gpt_oss"][0][: len(found.token_ids)]
        assert_settled(engine.tiers)
        assert say(engine) == plain["gpt_oss"]


def test_drawn_tokens_come_again_with_their_seed(checkpoints: dict[str, Path]) -> None:
    sampling = {"temperature": 0.8, "top_k": 20, "top_p": 0.95, "seed": 7}
    with open_with_draft(checkpoints["qwen3_moe"], num_draft_tokens=3) as engine:
        first = say(engine, **sampling)
        assert say(engine, **sampling) == first
        assert 0 < (engine.metrics.acceptance_rate or 0) < 1, "both ways to a token were taken"
