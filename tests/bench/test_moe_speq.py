"""The suite about drafts, end to end on the demo: every arm runs and is what it says."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from fakes import InstantBackend, make_plan
from foreload.bench import measure, suite
from foreload.bench.moe_speq import MOE_SPEQ, MOE_SPEQ_ARMS
from foreload.bench.suite import SuiteOptions, run_suite
from foreload.memory.arena import SlotArena
from foreload.types import ExpertKey

if TYPE_CHECKING:
    from foreload.bench.arm import Sample

ARMS = (
    "lru",
    "draft-0",
    "draft-2",
    "draft-7",
    "governor",
    "draft-4-no-prefetch",
    "draft-4-oracle",
    "draft-7-resident",
    "int4-alone",
)


def test_every_fixed_number_up_to_eight_has_an_arm() -> None:
    names = [arm.name for arm in MOE_SPEQ_ARMS]
    assert {f"draft-{number}" for number in range(9)} <= set(names)
    assert len(names) == len(set(names))
    assert [arm.name for arm in MOE_SPEQ_ARMS if arm.is_lossy] == ["int4-alone"]


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Sample]:
    folder = tmp_path_factory.mktemp("speq")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suite, "default_cache_dir", lambda: folder / "cache")
        options = SuiteOptions(
            arms=ARMS, budgets=(0.6,), num_trials=1, num_decode_tokens=24, output=folder / "out"
        )
        result = run_suite(options, suite=MOE_SPEQ)
    written = {path.name for path in (folder / "out").iterdir()}
    assert {"summary.md", "samples.jsonl", "tpot-60.png", "roofs-60-100.png"} <= written
    assert "Verification of eight positions" in result.summary
    (limits,) = result.limits
    assert 0 < limits.compute_share <= 1
    assert 0 < limits.copy_share <= 1
    assert (limits.compute_share, limits.copy_share) != (1, 1), "they disturb each other"
    return {sample.arm: sample for sample in result.samples}


def test_logits_agree_wherever_the_target_has_the_last_word(samples: dict[str, Sample]) -> None:
    assert set(ARMS) <= set(samples)
    assert all(sample.is_equal for sample in samples.values())


def test_fixed_numbers_draft_what_they_say(samples: dict[str, Sample]) -> None:
    assert set(samples["draft-0"].rounds) == {0}
    assert max(samples["draft-2"].rounds) == 2
    assert samples["draft-7"].accept_length > 2
    assert sum(n for n in samples["governor"].rounds.values()) > 1
    assert samples["lru"].rounds == {}


def test_without_prefetch_nothing_comes_before_it_is_demanded(samples: dict[str, Sample]) -> None:
    assert samples["draft-4-no-prefetch"].prefetch_bytes_per_token == 0
    assert samples["draft-7"].prefetch_bytes_per_token > 0


def test_a_draft_that_routes_perfectly_fetches_nothing_in_vain(samples: dict[str, Sample]) -> None:
    wasted = samples["draft-4-oracle"].wasted_bytes_per_token
    assert wasted <= samples["draft-7"].wasted_bytes_per_token + 1e6


def test_all_resident_waits_for_nothing(samples: dict[str, Sample]) -> None:
    resident = samples["draft-7-resident"]
    assert resident.bytes_per_token == 0
    assert all(absent == 0 for _, _, _, absent in resident.verifications)
    assert any(width == 8 for width, *_ in resident.verifications)


def test_the_quantised_model_alone_is_lossy_and_judged(samples: dict[str, Sample]) -> None:
    alone = samples["int4-alone"]
    assert alone.is_lossy
    assert alone.bytes_per_token == 0
    assert 0 < sum(alone.quality["kl"]) / len(alone.quality["kl"]) < 0.5


def test_a_throttled_link_is_as_slow_as_asked() -> None:
    assert measure.make_link(None) is None
    made = measure.make_link(1e6)
    assert made is not None
    copies = InstantBackend(SlotArena(1, 5 * 4096))
    link = made(copies)
    start = time.perf_counter()
    assert link.copy_piece(make_plan(ExpertKey(0, 0), 20_000), 0, 0) == 20_000
    assert time.perf_counter() - start >= 0.02
