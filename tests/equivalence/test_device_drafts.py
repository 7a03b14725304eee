"""A draft on the device changes no greedy token, and a broken round nothing that comes later.

The device path runs its twins on the CPU, uncaptured, in float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

import zoo
from fakes import make_engine
from foreload.errors import CapacityError, ConfigError, UnsupportedModelError
from foreload.model import device_path
from foreload.model.device_self_draft import DeviceSelfDraft
from foreload.model.graph import forward_all
from foreload.model.kv_cache import make_static_cache, rewind_static
from foreload.model.source import resolve_model
from foreload.ops.device_experts import MAX_TOKENS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from foreload import Engine

FAMILIES = ["qwen3_moe", "gpt_oss"]
PROMPTS = [[11, 16, 21, 5, 9], list(range(20, 60))]
NUM_TOKENS = 18
# Numbers of tokens, and kinds: each number with each kind, on one family or the other.
CASES = [(number, kind) for number in (1, 3, 8, "auto") for kind in ("int4", "int8")]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        family: zoo.save_family(family, tmp_path_factory.mktemp(family), torch.float32).path
        for family in FAMILIES
    }


@pytest.fixture(scope="module")
def plain(checkpoints: dict[str, Path]) -> Callable[[str], list[list[int]]]:
    """What each family says without a draft."""
    known: dict[str, list[list[int]]] = {}

    def get(family: str) -> list[list[int]]:
        if family not in known:
            with open_device(checkpoints[family]) as engine:
                known[family] = say(engine)
        return known[family]

    return get


def open_device(directory: Path, **settings: Any) -> Engine:
    given = {"expert_memory": "200%", "dtype": "float32", "predictor": "lookahead", **settings}
    return make_engine(directory, device="cpu", orchestration="device", **given)


def say(engine: Engine, **sampling: Any) -> list[list[int]]:
    sampling = {"max_new_tokens": NUM_TOKENS, **sampling}
    return [engine.generate(prompt, **sampling).token_ids for prompt in PROMPTS]


def check(engine: Engine) -> None:
    path = engine._device
    assert path is not None
    path._experts.tables.check()
    assert not path.runtime._open, "a prefetch was not waited for"
    assert not path.runtime._drafting


def drafter_of(engine: Engine) -> DeviceSelfDraft:
    assert isinstance(engine.drafter, DeviceSelfDraft)
    return engine.drafter


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("number", "kind"), CASES)
def test_greedy_tokens_are_those_without_a_draft(
    checkpoints: dict[str, Path],
    plain: Callable[[str], list[list[int]]],
    family: str,
    number: int | str,
    kind: str,
) -> None:
    # Some have room for every expert, others hardly for any.
    memory = "200%" if kind == "int4" else "50%"
    with open_device(
        checkpoints[family], draft=kind, num_draft_tokens=number, expert_memory=memory
    ) as engine:
        assert say(engine) == plain(family)
        check(engine)
        assert engine.metrics.num_draft_tokens > 0
        assert engine.expert_memory_bytes == engine.config.expert_memory


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("number", [1, 3, MAX_TOKENS - 1, MAX_TOKENS])
def test_verifications_give_the_logits_of_the_hosts_loop(
    checkpoints: dict[str, Path], family: str, number: int
) -> None:
    """Behind drafts of any length, rounds that were wound back, and one that is no step."""
    path, prompt = checkpoints[family], torch.tensor([PROMPTS[1]])
    host = make_engine(path, dtype="float32", expert_memory="50%")
    with host, open_device(path, draft="int4", num_draft_tokens=number) as engine:
        assert engine._device is not None
        with engine._device.lend_step(128) as step:
            assert step is not None
            cache: Any = make_static_cache(host.model, step.num_positions)
            assert torch.equal(engine._prefill(prompt, step.cache), host.forward(prompt, cache))
            for num_accepted in (number, 0, 1):
                drafted: list[int] = []

                def choose(logits: torch.Tensor, drafted: list[int] = drafted) -> int:
                    drafted.append(int(logits.argmax()))
                    return drafted[-1]

                with drafter_of(engine).begin(step.cache, number) as this_round:
                    this_round.draft(7, choose)
                    found = this_round.verify([7, *drafted]).clone()
                    this_round.settle(num_accepted)
                wanted = forward_all(host.model, torch.tensor([[7, *drafted]]), cache)
                rewind_static(cache, number - num_accepted)
                assert len(drafted) == number
                assert torch.equal(found, wanted)
                check(engine)


@pytest.mark.parametrize("number", [4, "auto"])
def test_the_demo_says_the_same_with_a_draft(number: int | str) -> None:
    demo = resolve_model("demo")
    prompts = ("def fibonacci(n):\n", "class Queue:\n    ")
    with open_device(demo, expert_memory="50%") as engine:
        wanted = [engine.generate(prompt, max_new_tokens=20) for prompt in prompts]
    with open_device(demo, expert_memory="100%", draft="int4", num_draft_tokens=number) as engine:
        found = [engine.generate(prompt, max_new_tokens=20) for prompt in prompts]
        check(engine)
    assert [result.token_ids for result in found] == [result.token_ids for result in wanted]
    if number == 4:
        assert all((result.stats.acceptance_rate or 0) > 0.5 for result in found)
        assert all(result.stats.rounds_by_draft.get(4, 0) > 0 for result in found)


def test_a_draft_that_is_always_wrong_changes_no_token(
    checkpoints: dict[str, Path], plain: Callable[[str], list[list[int]]]
) -> None:
    with open_device(checkpoints["qwen3_moe"], draft="int4", num_draft_tokens=4) as engine:
        draft = drafter_of(engine).draft
        assert draft is not None
        noise = torch.Generator().manual_seed(0)

        def run(layer: int, experts: Any, hidden: Any, routing: Any) -> Any:
            return 10 * torch.randn(hidden.shape, generator=noise).to(hidden)

        draft.run = run  # type: ignore[method-assign]
        assert say(engine) == plain("qwen3_moe")
        assert (engine.metrics.acceptance_rate or 0) < 0.5
        check(engine)


def test_drawn_tokens_come_again_with_their_seed(checkpoints: dict[str, Path]) -> None:
    sampling = {"temperature": 0.8, "top_k": 20, "top_p": 0.95, "seed": 7}
    path = checkpoints["qwen3_moe"]
    with open_device(path) as engine:
        plain = say(engine, **sampling)
    with open_device(path, draft="int4", num_draft_tokens=0) as engine:
        assert say(engine, **sampling) == plain, "rounds without a draft draw what steps draw"
    with open_device(path, draft="int4", num_draft_tokens=3) as engine:
        first = say(engine, **sampling)
        assert say(engine, **sampling) == first
        assert 0 < (engine.metrics.acceptance_rate or 0) < 1, "both ways to a token were taken"
        check(engine)


def test_stop_texts_end_a_round(tiny_checkpoint: Path) -> None:
    prompt = list(range(40, 52))
    with open_device(tiny_checkpoint) as engine:
        text = engine.generate(prompt, max_new_tokens=NUM_TOKENS).text
        stop = text[len(text) // 2 :][:3]
        wanted = engine.generate(prompt, max_new_tokens=NUM_TOKENS, stop=stop)
    with open_device(tiny_checkpoint, draft="int8", num_draft_tokens=4) as engine:
        found = engine.generate(prompt, max_new_tokens=NUM_TOKENS, stop=stop)
        again = engine.generate(prompt, max_new_tokens=NUM_TOKENS)
    assert (found.text, found.token_ids) == (wanted.text, wanted.token_ids)
    assert found.finish_reason == wanted.finish_reason == "stop"
    assert again.text == text


@pytest.mark.parametrize("where", ["drafting", "verifying", "between", "abandoned"])
def test_after_a_broken_off_round_it_is_as_a_fresh_engine(
    checkpoints: dict[str, Path], plain: Callable[[str], list[list[int]]], where: str
) -> None:
    with open_device(checkpoints["qwen3_moe"], draft="int4", num_draft_tokens=4) as engine:
        drafter, path = drafter_of(engine), engine._device
        assert drafter.draft is not None
        assert path is not None
        if where in ("drafting", "verifying"):
            # Cancelled in the middle of a round's forward: no token comes after it.
            owner: Any = drafter.draft if where == "drafting" else path._experts
            real, calls = owner.run, iter(range(10**6))

            def run(*args: Any) -> Any:
                if next(calls) == 10:
                    engine.cancel()
                return real(*args)

            owner.run = run
            last = list(engine.stream(PROMPTS[1], max_new_tokens=30))[-1]
            assert last.finish_reason == "cancelled"
            owner.run = real
        else:
            stream = engine.stream(PROMPTS[1], max_new_tokens=30)
            for _ in range(4):
                next(stream)
            if where == "between":
                engine.cancel()
                assert list(stream)[-1].finish_reason == "cancelled"
            else:
                stream.close()
        check(engine)
        assert say(engine) == plain("qwen3_moe")
        check(engine)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("where", ["drafting", "verifying"])
@pytest.mark.parametrize("at", [0, 9])
def test_an_error_in_a_round_fails_one_request_only(
    checkpoints: dict[str, Path],
    plain: Callable[[str], list[list[int]]],
    error: type[BaseException],
    where: str,
    at: int,
) -> None:
    with open_device(checkpoints["qwen3_moe"], draft="int4", num_draft_tokens=4) as engine:
        path = engine._device
        assert path is not None
        owner: Any = drafter_of(engine).draft if where == "drafting" else path._experts
        real, calls = owner.run, iter(range(10**6))

        def run(*args: Any) -> Any:
            if next(calls) == at:
                raise error
            return real(*args)

        owner.run = run
        with pytest.raises(error):
            engine.generate([3, 4, 5], max_new_tokens=NUM_TOKENS)
        owner.run = real
        assert say(engine) == plain("qwen3_moe")
        check(engine)


def test_requests_in_turns_do_not_disturb_each_other(
    checkpoints: dict[str, Path], plain: Callable[[str], list[list[int]]]
) -> None:
    with open_device(checkpoints["gpt_oss"], draft="int4", num_draft_tokens=3) as engine:
        streams = dict(enumerate(engine.stream(p, max_new_tokens=NUM_TOKENS) for p in PROMPTS))
        found: list[list[int]] = [[] for _ in PROMPTS]
        while streams:
            for number, stream in list(streams.items()):
                chunk = next(stream, None)
                if chunk is None:
                    del streams[number]
                else:
                    found[number].extend(chunk.token_ids)
        assert found == plain("gpt_oss")
        check(engine)


def test_a_draft_is_a_part_of_the_expert_memory(checkpoints: dict[str, Path]) -> None:
    path = checkpoints["qwen3_moe"]
    with (
        open_device(path, expert_memory="100%") as alone,
        open_device(path, expert_memory="100%", draft="int4") as engine,
    ):
        draft = drafter_of(engine).draft
        assert draft is not None
        assert engine.expert_memory_bytes <= alone.expert_memory_bytes
        assert engine.expert_memory_bytes == engine.config.expert_memory
        assert engine.num_slots < alone.num_slots
        with pytest.raises(ConfigError, match="needs the host"):
            engine.drop_draft()
        assert drafter_of(engine).draft is draft


@pytest.mark.parametrize("family", FAMILIES)
def test_one_slot_per_layer_is_the_least_beside_a_draft(
    checkpoints: dict[str, Path], plain: Callable[[str], list[list[int]]], family: str
) -> None:
    path = checkpoints[family]
    with pytest.raises(CapacityError, match="beside the int4 draft") as caught:
        open_device(path, expert_memory="20%", draft="int4")
    assert caught.value.setting == "expert_memory"
    needed = caught.value.needed_bytes
    with open_device(path, expert_memory=needed, draft="int4", num_draft_tokens=8) as engine:
        assert engine.expert_memory_bytes == needed
        assert engine.num_slots == engine.spec.num_moe_layers
        assert say(engine) == plain(family)
        check(engine)
        drafter = drafter_of(engine)
        assert drafter.governor.rounds_by_draft[8] > 0
        # A verification's nine tokens are a step all the same.
        assert engine.metrics.num_prefetched_used > 0
        assert engine.metrics.num_hits < engine.metrics.num_misses


def test_a_model_without_a_static_cache_has_no_draft(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_path, "can_be_static", lambda model: False)
    with pytest.raises(UnsupportedModelError, match="keeps more than keys"):
        open_device(checkpoints["qwen3_moe"], draft="int4")
