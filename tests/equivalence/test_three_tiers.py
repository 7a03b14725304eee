"""Disk, host tier, slots on a device: the same logits bit for bit as without the tier between.

The device is the CPU: all of the path but streams and page locking.
"""

from __future__ import annotations

import functools
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch

import zoo
from fakes import assert_settled, make_engine
from foreload.bench.measure import measure_bandwidth
from foreload.errors import ConfigError
from foreload.memory.device_slots import DeviceSlots
from foreload.memory.host_tier import HostTier
from foreload.memory.throttle import ThrottledBackend
from foreload.model.kv_cache import pass_cache
from foreload.resolution import slot_size

if TYPE_CHECKING:
    from pathlib import Path

    from foreload import Engine

# The second one's experts are converted on their way.
FAMILIES = ["qwen3_moe", "gpt_oss"]
NUM_DECODED = 24


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        family: zoo.save_family(family, tmp_path_factory.mktemp(family), torch.float32).path
        for family in FAMILIES
    }


def open_staged(directory: Path, blocks: int | str, **settings: Any) -> Engine:
    """Open with a host tier of so many blocks, or of one for each expert."""

    def make(block_bytes: int) -> HostTier:
        return HostTier((10_000 if blocks == "all" else int(blocks)) * block_bytes, block_bytes)

    return make_engine(directory, dtype="float32", host_tier=make, **settings)


def logits_of(engine: Engine) -> list[torch.Tensor]:
    """Give the logits of a prompt and of fixed tokens behind it."""
    generator = torch.Generator().manual_seed(0)
    more = torch.randint(3, zoo.VOCABULARY, (NUM_DECODED,), generator=generator).tolist()
    cache = engine.make_cache()
    found = []
    with torch.inference_mode():
        for ids in (list(range(3, 22)), *([token] for token in more)):
            output = engine.model(
                input_ids=torch.tensor([ids]), **pass_cache(engine.model, cache), use_cache=True
            )
            found.append(output.logits)
            engine.tiers.cache.check()
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("budget", "predictor"), [("minimum", "lookahead"), ("50%", "default-vectors")]
)
@pytest.mark.parametrize("blocks", [1, 3, "all"])
def test_logits_and_texts_are_those_of_the_disk_path(
    checkpoints: dict[str, Path],
    tmp_path: Path,
    family: str,
    budget: str,
    predictor: str,
    blocks: int | str,
) -> None:
    settings = {
        "expert_memory": budget,
        "predictor": predictor,
        "cache_dir": tmp_path,
    }
    disk = make_engine(checkpoints[family], dtype="float32", **settings)
    staged = open_staged(checkpoints[family], blocks, num_workers=3, **settings)
    with disk, staged:
        assert isinstance(staged.tiers._arena, DeviceSlots)
        for number, (wanted, found) in enumerate(
            zip(logits_of(disk), logits_of(staged), strict=True)
        ):
            assert torch.equal(wanted, found), f"step {number}"
        for sampling in ({}, {"temperature": 0.8, "top_k": 20, "seed": 7}):
            texts = [
                engine.generate(list(range(3, 15)), max_new_tokens=NUM_DECODED, **sampling)
                for engine in (disk, staged)
            ]
            assert texts[0].token_ids == texts[1].token_ids
        assert_settled(staged.tiers)
        stats = staged.stats
        assert staged.metrics.num_predicted
        assert staged.metrics.num_prefetched > 0
        assert disk.stats["host_bytes"] == 0
        host = staged._host._staged._host
        assert host.disk_bytes + stats["host_bytes"] == stats["bytes_moved"]
        if blocks == "all":
            num_experts = sum(len(layer) for layer in staged._loaded.plans)
            assert host.disk_bytes <= num_experts * slot_size(staged._loaded.plans)
            assert stats["host_bytes"] > 0
    assert host._is_closed


@pytest.mark.parametrize(
    "settings",
    [
        {"policy": "speculate", "predictor": "lookahead"},
        {"policy": "speculate-when", "confidence": 1.0},
        {"eviction": "none"},
        {"eviction": "next-use"},
    ],
    ids=str,
)
def test_policies_and_evictions_run_there_too(
    checkpoints: dict[str, Path], settings: dict[str, Any]
) -> None:
    with open_staged(checkpoints["qwen3_moe"], 4, expert_memory="50%", **settings) as staged:
        result = staged.generate(list(range(3, 15)), max_new_tokens=NUM_DECODED)
        assert result.stats.num_output_tokens > 0
        assert_settled(staged.tiers)


def test_it_may_be_opened_in_inference_mode(checkpoints: dict[str, Path]) -> None:
    prompt = list(range(3, 15))
    with make_engine(checkpoints["gpt_oss"], dtype="float32", expert_memory="50%") as disk:
        wanted = disk.generate(prompt, max_new_tokens=4).token_ids
    with torch.inference_mode():
        staged = open_staged(checkpoints["gpt_oss"], 2, expert_memory="50%")
    with staged:
        assert staged.generate(prompt, max_new_tokens=4).token_ids == wanted


def test_a_link_is_that_to_the_slots(checkpoints: dict[str, Path]) -> None:
    """Throttled, every byte that reaches a slot pays, wherever it came from."""
    given: dict[str, Any] = {"expert_memory": "minimum", "predictor": "none"}
    link_bytes_s = 2e8
    with open_staged(
        checkpoints["qwen3_moe"],
        "all",
        link=functools.partial(ThrottledBackend, link_bytes_s=link_bytes_s),
        **given,
    ) as engine:
        start = time.perf_counter()
        for _ in range(2):
            engine.generate(list(range(3, 15)), max_new_tokens=6)
        took_s = time.perf_counter() - start
        metrics = engine.metrics
        assert engine.stats["host_bytes"] > 0, "the host tier had some of it"
        assert took_s >= metrics.bytes_moved / link_bytes_s
        measured = metrics.bytes_moved / metrics.link_s
        assert measured <= 1.05 * link_bytes_s
        assert measure_bandwidth(engine) <= 1.05 * link_bytes_s
    assert engine._host is not None
    assert engine._host._staged is not None
    assert engine._host._staged._host._is_closed


def test_a_link_that_cannot_be_slowed_down_is_refused(checkpoints: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="copies them itself"):
        make_engine(
            checkpoints["qwen3_moe"],
            device="cpu",
            orchestration="device",
            expert_memory="50%",
            link=functools.partial(ThrottledBackend, link_bytes_s=1e9),
        )
