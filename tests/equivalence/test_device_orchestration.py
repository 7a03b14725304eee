"""Whoever decides about slots, host or device: the same logits bit for bit, and the same text.

The device path runs its twins on the CPU, uncaptured: all of it but the capture and the kernels.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest
import torch

import zoo
from fake_cuda import FakeCuda
from fakes import make_engine
from foreload.errors import ForeloadError
from foreload.model import device_plan
from foreload.model.device_plan import block_bytes, device_layouts
from foreload.model.kv_cache import make_static_cache, pass_cache
from foreload.model.source import resolve_model

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from foreload import Engine
    from foreload.types import RoutingEvent

FAMILIES = ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "phimoe"]
NUM_DECODED = 32
DEMO = "demo"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, zoo.TinyCheckpoint]:
    return {
        family: zoo.save_family(family, tmp_path_factory.mktemp(family), torch.float32)
        for family in FAMILIES
    }


@pytest.fixture(scope="module")
def checkpoints(saved: dict[str, zoo.TinyCheckpoint]) -> dict[str, Path]:
    return {family: tiny.path for family, tiny in saved.items()}


def open_pair(
    directory: Path, budget: str, *, dtype: str = "float32", **settings: Any
) -> tuple[Engine, Engine]:
    host = make_engine(directory, dtype=dtype, expert_memory="50%", **settings)
    top_k = host.spec.top_k
    slots = {"one": 1, "short": max(top_k - 1, 1), "tight": top_k}
    memory = slots_bytes(host, slots[budget]) if budget in slots else budget
    settings = {"predictor": "lookahead", **settings, "expert_memory": memory}
    device = make_engine(directory, dtype=dtype, device="cpu", orchestration="device", **settings)
    return host, device


def slots_bytes(engine: Engine, number: int) -> int:
    """Give the bytes of so many slots in every layer."""
    layouts = device_layouts(engine._loaded)
    return number * engine.spec.num_moe_layers * block_bytes(layouts)


def decoded_tokens() -> list[int]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, zoo.VOCABULARY, (NUM_DECODED,), generator=generator).tolist()


def logits_of(engine: Engine, prompt: list[int], cache: Any) -> Iterator[torch.Tensor]:
    """Yield the logits of a prompt and of fixed tokens behind it."""
    for ids in (prompt, *([token] for token in decoded_tokens())):
        # Never across a yield: two that take turns would leave the mode switched on.
        with torch.inference_mode():
            output = engine.model(
                input_ids=torch.tensor([ids]), **pass_cache(engine.model, cache), use_cache=True
            )
        yield output.logits


def check(engine: Engine) -> None:
    path = engine._device
    assert path is not None
    path._experts.tables.check()
    assert not path.runtime._open, "a prefetch was not waited for"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("budget", ["tight", "short", "one"])
@pytest.mark.parametrize("is_static", [False, True])
def test_logits_are_those_of_the_hosts_loop(
    checkpoints: dict[str, Path], family: str, budget: str, is_static: bool
) -> None:
    host, device = open_pair(checkpoints[family], budget)
    prompt = list(range(3, 22))
    with host, device:
        room = len(prompt) + NUM_DECODED
        caches = [
            make_static_cache(engine.model, room) if is_static else engine.make_cache()
            for engine in (host, device)
        ]
        steps = zip(
            logits_of(host, prompt, caches[0]), logits_of(device, prompt, caches[1]), strict=True
        )
        for number, (wanted, found) in enumerate(steps):
            assert torch.equal(wanted, found), f"step {number}"
            check(device)
        stats = device.stats
        assert stats["num_steps"] == NUM_DECODED + 1
        assert stats["hit_rate"] is not None
        assert stats["prefetch_precision"] > 0, "guesses are brought however few slots there are"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("budget", ["50%", "one"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_half_precision_logits_are_those_of_transformers(
    saved: dict[str, zoo.TinyCheckpoint], family: str, budget: str, dtype: str
) -> None:
    """A prompt, which is streamed past the slots, and steps of one, three and five tokens."""
    reference = saved[family].load_reference(getattr(torch, dtype))
    host, device = open_pair(saved[family].path, budget, dtype=dtype)
    tokens = zoo.prompt(64)
    with host, device:
        models = [reference, host.model, device.model]
        caches = [make_static_cache(model, tokens.shape[1]) for model in models]
        for number, ids in enumerate(tokens.split([19, 1, 3, 1, 5, 1, 34], dim=1)):
            with torch.inference_mode():
                wanted, *found = (
                    model(input_ids=ids, **pass_cache(model, cache), use_cache=True).logits
                    for model, cache in zip(models, caches, strict=True)
                )
            for logits in found:
                assert logits.dtype == wanted.dtype == getattr(torch, dtype)
                assert torch.equal(logits, wanted), f"input {number}, of {ids.shape[1]} tokens"
            check(device)
        assert device.stats["hit_rate"] is not None


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("is_captured", [False, True])
def test_steps_at_fixed_addresses_give_the_logits_of_the_hosts_loop(
    checkpoints: dict[str, Path], family: str, is_captured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, device = open_pair(checkpoints[family], "tight")
    prompt = list(range(3, 22))
    with host, device, device._device.lend_step(len(prompt) + NUM_DECODED) as step:  # type: ignore[union-attr]
        assert step is not None
        cache = make_static_cache(host.model, step.num_positions)
        _, *wanted = logits_of(host, prompt, cache)
        device._prefill(torch.tensor([prompt]), step.cache)
        cuda = FakeCuda()
        if is_captured:
            cuda.install(monkeypatch)
            step.wants_capture = True
        for number, (token, logits) in enumerate(zip(decoded_tokens(), wanted, strict=True)):
            found, likeliest = step.run([token])
            assert torch.equal(found, logits[0]), f"step {number}"
            assert torch.equal(likeliest, logits[0].argmax(-1)), f"step {number}"
            check(device)
        assert step.is_captured == is_captured
        assert cuda.log.count("replay") == (NUM_DECODED if is_captured else 0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("budget", ["100%", "one"])
def test_texts_are_those_of_the_hosts_loop(
    checkpoints: dict[str, Path], family: str, budget: str
) -> None:
    host, device = open_pair(checkpoints[family], budget)
    with host, device:
        for sampling in ({}, {"temperature": 0.8, "top_k": 20, "seed": 7}):
            wanted = host.generate(list(range(3, 15)), max_new_tokens=NUM_DECODED, **sampling)
            found = device.generate(list(range(3, 15)), max_new_tokens=NUM_DECODED, **sampling)
            assert found.token_ids == wanted.token_ids
            assert found.finish_reason == wanted.finish_reason
        check(device)


@pytest.mark.parametrize("predictor", ["none", "lookahead", "default-vectors"])
def test_the_demo_model_writes_the_same(predictor: str, tmp_path: Path) -> None:
    host, device = open_pair(resolve_model(DEMO), "tight", predictor=predictor, cache_dir=tmp_path)
    with host, device:
        assert device.config.predictor == predictor
        for prompt in ("def fibonacci(n):\n", "class Queue:\n    "):
            wanted = host.generate(prompt, max_new_tokens=NUM_DECODED)
            found = device.generate(prompt, max_new_tokens=NUM_DECODED)
            assert found.token_ids == wanted.token_ids
            assert found.text == wanted.text
        check(device)


@pytest.mark.parametrize(
    ("family", "predictor"),
    [
        *itertools.product(["qwen3_moe", "mixtral", "gpt_oss"], ["lookahead", "default-vectors"]),
        ("qwen3_moe", "estimator"),
    ],
)
def test_speculation_executes_what_the_hosts_loop_executes(
    checkpoints: dict[str, Path], family: str, predictor: str, tmp_path: Path
) -> None:
    host, device = open_pair(
        checkpoints[family], "tight", policy="speculate", predictor=predictor, cache_dir=tmp_path
    )
    other, exact = open_pair(checkpoints[family], "50%")
    other.close()
    prompt = list(range(3, 15))
    with host, device, exact:
        wanted = list(logits_of(host, prompt, host.make_cache()))
        found = list(logits_of(device, prompt, device.make_cache()))
        true = list(logits_of(exact, prompt, exact.make_cache()))
        assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))
        assert torch.equal(found[0], true[0]), "prompts are exact"
        assert not all(torch.equal(*pair) for pair in zip(found, true, strict=True))
        for name in ("num_executed", "num_speculated"):
            device._count()
            assert getattr(device.metrics, name) == getattr(host.metrics, name) > 0
        # A prompt of one token, and one whose last chunk is one token, are prompts.
        for ids in ([9], list(range(3, 20))):
            wanted_text = host.generate(ids, max_new_tokens=NUM_DECODED)
            found_text = device.generate(ids, max_new_tokens=NUM_DECODED)
            assert found_text.token_ids == wanted_text.token_ids
            assert found_text.stats.speculated_fraction == wanted_text.stats.speculated_fraction
        check(device)
        assert not device._device.policy._guessed  # type: ignore[union-attr]


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
def test_estimators_guess_what_they_guess_on_the_host(
    checkpoints: dict[str, Path], family: str, tmp_path: Path
) -> None:
    host, device = open_pair(checkpoints[family], "100%", predictor="estimator", cache_dir=tmp_path)
    guessed: list[tuple[int, ...]] = []
    found: list[tuple[int, ...]] = []
    with host, device:
        assert host.runtime.predictor is not None
        host.runtime._switch = None
        host.runtime.predictor.predict = watch_predict(host.runtime.predictor, guessed)  # type: ignore[method-assign]
        predictor = device._device.runtime._predictor  # type: ignore[union-attr]
        assert predictor is not None
        predictor.route_next = watch_route_next(predictor, found)  # type: ignore[method-assign]
        for engine in (host, device):
            for _ in logits_of(engine, list(range(3, 22)), engine.make_cache()):
                pass
        assert found == guessed
        assert len(found) == NUM_DECODED * (host.spec.num_moe_layers - 1)


def watch_predict(predictor: Any, guessed: list[tuple[int, ...]]) -> Any:
    own = predictor.predict

    def predict(event: RoutingEvent) -> Any:
        guesses = own(event)
        if len(event.top_k_index) == 1 and guesses:
            guessed.append(tuple(guesses[0].routing.top_k_index[0].tolist()))
        return guesses

    return predict


def watch_route_next(predictor: Any, found: list[tuple[int, ...]]) -> Any:
    own = predictor.route_next

    def route_next(event: RoutingEvent) -> Any:
        output = own(event)
        if output is not None:
            found.append(tuple(output.top_k_index[0].tolist()))
        return output

    return route_next


@pytest.mark.parametrize(
    ("family", "confidence"), list(zip(FAMILIES, [0.0, 0.6, 0.3, 0.6, 0.0], strict=True))
)
def test_with_the_same_experts_in_memory_the_same_are_done_without(
    checkpoints: dict[str, Path], family: str, confidence: float
) -> None:
    """The host is told step by step, layer by layer, that it has what the device has."""
    how = {"policy": "speculate-when", "confidence": confidence}
    host, device = open_pair(checkpoints[family], "30%", **how)
    prompt = list(range(3, 22))
    with host, device:
        here = watch_slots(host, device)
        steps = zip(
            logits_of(device, prompt, device.make_cache()),
            logits_of(host, prompt, host.make_cache()),
            strict=True,
        )
        for number, (found, wanted) in enumerate(steps):
            assert torch.equal(found, wanted), f"step {number}"
            check(device)
        assert not here, "the host has asked about every layer"
        for name in ("num_executed", "num_speculated"):
            device._count()
            assert getattr(device.metrics, name) == getattr(host.metrics, name) > 0


def watch_slots(host: Engine, device: Engine) -> list[set[int]]:
    """Let the host believe that its memory holds what the device's slots held in the same visit.

    Returns:
        Per visit that the host has still to make, whom the slots held.
    """
    path = device._device
    assert path is not None
    here: list[set[int]] = []
    decide = path.policy._choose_present
    choose = host.runtime._choose_present

    def note(policy: Any, layer: int, *given: Any) -> Any:
        here.append({e for e, slot in enumerate(path._experts.tables.slot_of[layer]) if slot >= 0})
        return decide(policy, layer, *given)

    def follow(*given: Any) -> Any:
        held = here.pop(0)
        own = host.tiers.is_arriving, host.tiers.is_ready
        host.tiers.is_arriving = host.tiers.is_ready = lambda key: key.expert in held  # type: ignore[method-assign]
        try:
            return choose(*given)
        finally:
            host.tiers.is_arriving, host.tiers.is_ready = own  # type: ignore[method-assign]

    path.policy._choose_present = note  # type: ignore[method-assign]
    host.runtime._choose_present = follow  # type: ignore[method-assign]
    return here


def test_with_everything_in_the_slots_nothing_is_done_without(
    checkpoints: dict[str, Path],
) -> None:
    how = {"policy": "speculate-when", "confidence": 0.0}
    host, device = open_pair(checkpoints["qwen3_moe"], "100%", **how)
    exact, other = open_pair(checkpoints["qwen3_moe"], "100%")
    host.close()
    other.close()
    with device, exact:
        for layer in range(device.spec.num_moe_layers):
            for expert in range(device.spec.num_experts):
                device._device._experts.prefetch(layer, torch.tensor([[expert]]))  # type: ignore[union-attr]
        wanted = exact.generate(list(range(3, 15)), max_new_tokens=NUM_DECODED)
        found = device.generate(list(range(3, 15)), max_new_tokens=NUM_DECODED)
        assert found.token_ids == wanted.token_ids
        assert found.stats.speculated_fraction == 0


@pytest.mark.parametrize("streamed", ["one by one", "whole layers"])
def test_long_prompts_in_chunks(
    checkpoints: dict[str, Path], streamed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of every kind: such as are steps, and such as are streamed past the slots."""
    if streamed == "one by one":
        monkeypatch.setattr(device_plan, "_CHUNK_BYTES", 1)
    prompt = [3 + (7 * place) % 150 for place in range(70)]
    for chunk in (1, 2, 16, 17, 64) if streamed == "whole layers" else (17, 64):
        budget = "one" if chunk == 16 else "50%"
        host, device = open_pair(checkpoints["qwen3_moe"], budget, prefill_chunk=chunk)
        with host, device:
            wanted = host.generate(prompt, max_new_tokens=8)
            found = device.generate(prompt, max_new_tokens=8)
            assert found.token_ids == wanted.token_ids, f"chunks of {chunk}"
            check(device)


def test_interleaved_requests_do_not_disturb_each_other(checkpoints: dict[str, Path]) -> None:
    host, device = open_pair(checkpoints["mixtral"], "tight")
    prompts = [list(range(3, 12)), list(range(40, 60)), [9, 8, 7]]
    with host, device:
        wanted = [host.generate(p, max_new_tokens=12).token_ids for p in prompts]
        streams = dict(enumerate(device.stream(p, max_new_tokens=12) for p in prompts))
        found: list[list[int]] = [[] for _ in prompts]
        while streams:
            for number, stream in list(streams.items()):
                chunk = next(stream, None)
                if chunk is None:
                    del streams[number]
                else:
                    found[number].extend(chunk.token_ids)
        assert found == wanted
        check(device)


@pytest.mark.parametrize("how", ["cancelled", "abandoned"])
def test_after_a_broken_off_request_it_is_as_a_fresh_engine(
    checkpoints: dict[str, Path], how: str
) -> None:
    host, device = open_pair(checkpoints["deepseek_v3"], "50%")
    with host, device:
        wanted = host.generate(list(range(5, 30)), max_new_tokens=16).token_ids
        stream = device.stream(list(range(60, 80)), max_new_tokens=30)
        for _ in range(5):
            next(stream)
        if how == "cancelled":
            device.cancel()
            last = list(stream)[-1]
            assert last.finish_reason == "cancelled"
        else:
            stream.close()
        assert device.generate(list(range(5, 30)), max_new_tokens=16).token_ids == wanted
        check(device)


def test_a_closed_engine_runs_no_step(checkpoints: dict[str, Path]) -> None:
    host, device = open_pair(checkpoints["mixtral"], "50%")
    host.close()
    stream = device.stream([3, 4, 5], max_new_tokens=20)
    next(stream)
    device.close()
    device.close()
    with pytest.raises(ForeloadError, match="closed"):
        list(stream)
