"""Whatever memory, predictor and eviction: the logits are those of transformers, bit for bit.

The reference holds all experts and runs them eagerly. There is no tolerance: equal is
`torch.equal`. Not every combination of family, dtype, predictor, eviction and budget is run, but
every pair of them is.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch

import zoo
from fakes import NoisePredictor, assert_settled, make_engine
from foreload.model.kv_cache import pass_cache
from foreload.predict.oracle import Oracle

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

    from foreload.types import RoutingEvent

BUDGETS = ["minimum", "25%", "50%", "100%"]
PREDICTORS = ["none", "lookahead", "default-vectors", "oracle", "noise"]
EVICTIONS = ["history", "next-use", "lru", "lfu", "least-stale", "none"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DECODED = [11, 16, 21]


def combinations() -> list[tuple[str, str, str, str, str]]:
    """Give combinations that together hold every pair of settings."""
    chosen = []
    for turn, (family, dtype) in enumerate(itertools.product(zoo.SEVEN_FAMILIES, DTYPES)):
        for place, predictor in enumerate(PREDICTORS):
            eviction = EVICTIONS[(place + turn) % 6]
            budget = BUDGETS[(place + turn // 2) % 4]
            chosen.append((family, dtype, predictor, eviction, budget))
    return chosen


@dataclass
class Reference:
    """What transformers computes, and whom it routes to."""

    checkpoint: zoo.TinyCheckpoint
    logits: list[torch.Tensor]
    demands: list[list[tuple[int, ...]]]


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Reference]:
    """Keep what was computed for one family and dtype for the combinations after it."""
    return {}


def reference(
    kept: dict[tuple[str, str], Reference],
    tmp_path_factory: pytest.TempPathFactory,
    family: str,
    dtype: str,
) -> Reference:
    if (family, dtype) not in kept:
        folder = tmp_path_factory.mktemp(f"{family}-{dtype}")
        checkpoint = zoo.save_family(family, folder, DTYPES[dtype])
        model = checkpoint.load_reference(DTYPES[dtype])
        demands = watch_routing(model)
        kept[family, dtype] = Reference(checkpoint, list(run(model, checkpoint)), demands)
    return kept[family, dtype]


def watch_routing(model: PreTrainedModel) -> list[list[tuple[int, ...]]]:
    """Write down each layer's distinct experts, [step][layer]."""
    demands: list[list[tuple[int, ...]]] = []
    experts = [module for module in model.modules() if zoo.is_experts(module)]

    def see(layer: int, args: Any) -> None:
        if layer == 0:
            demands.append([])
        demands[-1].append(tuple(args[1].unique().tolist()))

    for layer, module in enumerate(experts):
        module.register_forward_pre_hook(lambda _, args, layer=layer: see(layer, args))
    return demands


def run(
    model: PreTrainedModel, checkpoint: zoo.TinyCheckpoint, cache: Any = None
) -> Iterator[torch.Tensor]:
    """Yield the logits of the prompt and of each token after it; the tokens are fixed."""
    with torch.no_grad():
        output = model(input_ids=checkpoint.input_ids, **pass_cache(model, cache), use_cache=True)
        yield output.logits
        for token in DECODED:
            output = model(
                input_ids=torch.tensor([[token]]),
                **pass_cache(model, output.past_key_values),
                use_cache=True,
            )
            yield output.logits


@pytest.mark.parametrize(("family", "dtype", "predictor", "eviction", "budget"), combinations())
def test_logits_are_those_of_transformers(
    references: dict[tuple[str, str], Reference],
    tmp_path_factory: pytest.TempPathFactory,
    family: str,
    dtype: str,
    predictor: str,
    eviction: str,
    budget: str,
) -> None:
    wanted = reference(references, tmp_path_factory, family, dtype)
    made: Any = {
        "oracle": lambda spec: Oracle(wanted.demands, max_distance=3),
        "noise": lambda spec: NoisePredictor(spec.num_moe_layers, spec.num_experts, seed=1),
    }.get(predictor, predictor)
    engine = make_engine(
        wanted.checkpoint.path,
        dtype=dtype,
        predictor=made,
        eviction=eviction,
        expert_memory=budget,
        cache_dir=wanted.checkpoint.path / "cache",
    )
    with engine:
        demands: list[list[int]] = []
        engine.runtime.on_routing = lambda event, experts: note(demands, event, experts)
        logits = run(engine.model, wanted.checkpoint, engine.make_cache())
        for step, (own, other) in enumerate(zip(logits, wanted.logits, strict=True)):
            assert own.dtype == other.dtype
            assert torch.equal(own, other), f"step {step}: {(own - other).abs().max()} apart"
            engine.tiers.cache.check()
        assert_settled(engine.tiers)
        flat = [list(experts) for step in wanted.demands for experts in step]
        assert demands == flat, "the true router decides"
        assert_the_parts_took_part(engine, predictor, eviction, budget)


def note(demands: list[list[int]], event: RoutingEvent, experts: list[int]) -> None:
    demands.append(experts)


def assert_the_parts_took_part(engine: Any, predictor: str, eviction: str, budget: str) -> None:
    """Check that the combination was really run, and not something tamer."""
    metrics = engine.metrics
    if predictor == "none":
        assert metrics.num_predicted == {}
        assert metrics.num_prefetched == 0
    else:
        assert metrics.num_predicted
    if predictor == "oracle":
        assert all(share == 1.0 for row in metrics.recall_at_n.values() for share in row.values())
    if eviction == "none" and predictor == "none":
        assert metrics.num_hits == 0
        assert engine.tiers.cache.keys() == []
    if budget == "minimum":
        assert engine.tiers.num_slots == engine.spec.top_k + 1
        assert metrics.num_misses > engine.tiers.num_slots
    if budget == "100%" and eviction != "none":
        assert metrics.wasted_bytes == 0 or predictor != "none"
        assert len(engine.tiers.cache.keys()) <= engine.tiers.num_slots


def test_every_pair_of_settings_is_among_the_combinations() -> None:
    taken = combinations()
    settings = [list(zoo.SEVEN_FAMILIES), list(DTYPES), PREDICTORS, EVICTIONS, BUDGETS]
    for one, other in itertools.combinations(range(5), 2):
        found = {(row[one], row[other]) for row in taken}
        assert found == set(itertools.product(settings[one], settings[other]))


@pytest.mark.parametrize("budget", ["minimum", "50%"])
def test_prefill_in_chunks_routes_and_counts_as_in_one(
    tmp_path_factory: pytest.TempPathFactory, budget: str
) -> None:
    """Chunks change the shapes of the forwards; every chunk is exact by itself."""
    checkpoint = zoo.save_family("olmoe", tmp_path_factory.mktemp("olmoe"))
    model = checkpoint.load_reference()
    with make_engine(checkpoint.path, expert_memory=budget) as engine:
        ours, theirs = engine.make_cache(), None
        for chunk in checkpoint.input_ids.split(5, dim=1):
            with torch.no_grad():
                own = engine.model(
                    input_ids=chunk, **pass_cache(engine.model, ours), use_cache=True
                )
                other = model(input_ids=chunk, **pass_cache(model, theirs), use_cache=True)
            theirs = other.past_key_values
            assert torch.equal(own.logits, other.logits)
        assert engine.metrics.num_steps == 5


def test_batches_are_exact_too(tmp_path_factory: pytest.TempPathFactory) -> None:
    checkpoint = zoo.save_family("gpt_oss", tmp_path_factory.mktemp("gpt_oss"), torch.bfloat16)
    model = checkpoint.load_reference(torch.bfloat16)
    batch = torch.cat([checkpoint.input_ids, checkpoint.input_ids + 1])
    with make_engine(checkpoint.path, expert_memory="minimum") as engine, torch.no_grad():
        assert torch.equal(engine.model(input_ids=batch).logits, model(input_ids=batch).logits)
