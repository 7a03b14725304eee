"""A device that runs out of memory, or may not lock the host's, says so, and work goes on."""

from __future__ import annotations

import functools
import gc
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch

import zoo
from fakes import assert_settled, make_engine
from foreload import Engine
from foreload import engine as engine_module
from foreload.errors import CapacityError, ConfigError
from foreload.memory import cuda
from foreload.memory.host_arena import HostArena
from foreload.model import graph
from foreload.model import runtime as runtime_module
from foreload.model.kv_cache import pass_cache
from foreload.ops import device_experts
from foreload.ops.device_experts import TwinKernels
from pretend_cuda import FREE_BYTES, Runtime, pretend_cuda

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from pretend_cuda import Machine

PROMPT = [11, 16, 21, 5, 9]
SHORT = [7, 8, 9]
NUM_TOKENS = 6
SAID = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 4.00 GiB"
ASKED = 20 << 20


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small")
    zoo.save_small(path)
    return path


@pytest.fixture
def device() -> Iterator[Machine]:
    with pytest.MonkeyPatch.context() as patch, pretend_cuda(patch, is_quiet=True) as machine:
        yield machine


class Failing:
    """Runs a function, but for one call that has no memory."""

    def __init__(self, own: Callable[..., Any], after: int) -> None:
        self.own = own
        self.left = after

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.left -= 1
        if self.left == -1:
            raise torch.OutOfMemoryError(SAID)
        return self.own(*args, **kwargs)


def tokens_of(engine: Engine, prompt: list[int] = PROMPT) -> list[int]:
    return engine.generate(prompt, max_new_tokens=NUM_TOKENS).token_ids


def by_generate(engine: Engine) -> None:
    tokens_of(engine)


def by_stream(engine: Engine) -> None:
    for _ in engine.stream(PROMPT, max_new_tokens=NUM_TOKENS):
        pass


def by_model(engine: Engine) -> None:
    cache = engine.make_cache()
    for token in (*PROMPT, *PROMPT):
        engine.model(
            input_ids=torch.tensor([[token]]), **pass_cache(engine.model, cache), use_cache=True
        )


RUNS: list[Callable[[Engine], None]] = [by_generate, by_stream, by_model]


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("after", [0, 3, 11])
@pytest.mark.parametrize("settings", [{}, {"draft": "int8", "num_draft_tokens": 2}], ids=str)
def test_what_was_to_be_fetched_is_not_taken_for_there(
    small: Path,
    run: Callable[[Engine], None],
    after: int,
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An expert has its slot before it is read, and what computes it needs memory in between."""
    given = {"device": "cpu", "orchestration": "device", "predictor": "lookahead", **settings}
    with make_engine(small, dtype="float32", expert_memory="150%", **given) as engine:
        wanted, short = tokens_of(engine), tokens_of(engine, SHORT)
    with make_engine(small, dtype="float32", expert_memory="150%", **given) as engine:
        failing = Failing(TwinKernels.forward, after)
        monkeypatch.setattr(
            TwinKernels, "forward", lambda *args, **kwargs: failing(*args, **kwargs)
        )
        with pytest.raises(CapacityError, match="ran out of memory") as caught:
            run(engine)
        doing = "the model ran" if run is by_model else "text was generated"
        assert f"while {doing}" in str(caught.value), "it is told where it was begun"
        assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
        assert "prefill_chunk or expert_memory" in str(caught.value.hint)
        path = engine._device
        assert path is not None
        path._experts.tables.check()
        assert not path.runtime._open
        assert (tokens_of(engine), tokens_of(engine, SHORT)) == (wanted, short)
        engine.replan_slots("equal")
        assert tokens_of(engine) == wanted


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("draft", ["none", "int8"])
def test_where_the_host_decides_too(
    small: Path,
    tmp_path: Path,
    run: Callable[[Engine], None],
    draft: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = {"draft": draft, "dtype": "float32", "expert_memory": "150%", "cache_dir": tmp_path}
    with make_engine(small, device="cpu", orchestration="host", **given) as engine:
        wanted = tokens_of(engine)
        failing = Failing(runtime_module.expert_forward, 5)
        monkeypatch.setattr(runtime_module, "expert_forward", failing)
        with pytest.raises(CapacityError, match="ran out of memory"):
            run(engine)
        assert_settled(engine.tiers)
        assert tokens_of(engine) == wanted


def test_a_stream_goes_on_where_another_call_ran_out_of_memory(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with make_engine(
        small, device="cpu", orchestration="device", dtype="float32", expert_memory="50%"
    ) as engine:
        wanted = tokens_of(engine)
        found: list[int] = []
        failing = Failing(TwinKernels.forward, 10**6)
        monkeypatch.setattr(
            TwinKernels, "forward", lambda *args, **kwargs: failing(*args, **kwargs)
        )
        for chunk in engine.stream(PROMPT, max_new_tokens=NUM_TOKENS):
            found.extend(chunk.token_ids)
            failing.left = 1
            with pytest.raises(CapacityError, match="while the model ran"):
                by_model(engine)
        assert found == wanted


def test_other_errors_are_what_they_were(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no such kernel")

    with make_engine(small, device="cpu", orchestration="device") as engine:
        monkeypatch.setattr(TwinKernels, "forward", refuse)
        for run in RUNS:
            with pytest.raises(RuntimeError, match="no such kernel"):
                run(engine)


def test_the_error_keeps_nothing_of_the_forward(small: Path) -> None:
    made: list[weakref.ref[torch.Tensor]] = []

    def lack(*args: Any) -> None:
        held = torch.zeros(3)
        made.append(weakref.ref(held))
        raise torch.OutOfMemoryError(SAID)

    with make_engine(small, device="cpu", orchestration="device") as engine:
        handle = engine.model.lm_head.register_forward_pre_hook(lack)
        path = engine._device
        assert path is not None
        gc.disable()
        try:
            with pytest.raises(CapacityError) as caught:
                engine.generate(PROMPT, max_new_tokens=2)
            assert caught.value.__cause__ is not None
            assert [tensor() for tensor in made] == [None]
            assert path._steps is not None
            assert not path._steps._lent
            assert not path._steps._idle, "the KV cache may be what was too much"
            assert path._num_requests == 0
        finally:
            gc.enable()
        handle.remove()
        assert engine.generate(PROMPT, max_new_tokens=2).token_ids


def test_a_closed_engine_leaves_the_model_as_it_was(small: Path) -> None:
    engine = make_engine(small, device="cpu")
    assert "forward" in vars(engine.model)
    engine.close()
    assert "forward" not in vars(engine.model)


def test_slots_that_cannot_be_divided_anew_stay_as_they_were(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with make_engine(
        small, device="cpu", orchestration="device", dtype="float32", expert_memory="50%"
    ) as engine:
        wanted, slots = tokens_of(engine), engine.slots_per_layer
        other = (slots[0] - 1, *slots[1:])
        monkeypatch.setattr(device_experts, "make_tables", Failing(device_experts.make_tables, 0))
        with pytest.raises(CapacityError, match="while slots were divided") as caught:
            engine.replan_slots(other)
        assert caught.value.hint == "set expert_memory to less"
        assert engine.slots_per_layer == slots
        assert tokens_of(engine) == wanted
        engine.replan_slots(other)
        assert engine.slots_per_layer == other
        assert tokens_of(engine) == wanted


class TestFigures:
    def test_they_are_what_torch_says_and_the_driver_has(self, device: Machine) -> None:
        there = torch.device("cuda", 0)
        error = torch.OutOfMemoryError(SAID)
        assert cuda.measure_shortage(error, there) == (ASKED, FREE_BYTES)
        error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 512 bytes.")
        assert cuda.measure_shortage(error, there) == (512, FREE_BYTES)
        needed, free = cuda.measure_shortage(error, torch.device("cpu"))
        assert (needed, free > 1 << 20) == (512, True)

    def test_who_names_no_number_wanted_more_than_there_is(self, device: Machine) -> None:
        found = cuda.measure_shortage(RuntimeError("out of memory"), torch.device("cuda", 0))
        assert found == (FREE_BYTES + 1, FREE_BYTES)

    @pytest.mark.parametrize(
        ("error", "is_told"),
        [
            (torch.OutOfMemoryError("no more"), True),
            (RuntimeError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAlloc"), True),
            (RuntimeError("Triton Error [CUDA]: out of memory"), True),
            (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), True),
            (RuntimeError("operation not permitted when stream is capturing"), False),
            (ValueError("out of memory"), False),
        ],
        ids=str,
    )
    def test_several_say_that_memory_ran_out(self, error: Exception, is_told: bool) -> None:
        assert cuda.is_out_of_memory(error) == is_told


class TestCaptures:
    GIVEN = {"device": "cuda", "dtype": "float32", "orchestration": "device"}  # noqa: RUF012

    def test_a_model_that_cannot_be_captured_is_told_once_per_engine(
        self,
        tmp_path: Path,
        device: Machine,
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(graph, "_LEAST_POSITIONS", 8)
        path = zoo.save_family("phimoe", tmp_path / "model", torch.float32).path
        how = {**self.GIVEN, "draft": "int8", "num_draft_tokens": 2}
        with make_engine(path, expert_memory="200%", **how) as engine:
            # The second wants a larger KV cache.
            for num_tokens in (3, 12):
                engine.generate(PROMPT, max_new_tokens=num_tokens)
            engine.replan_slots("equal")
            engine.generate(PROMPT, max_new_tokens=3)
        assert (device.num_captures, device.num_replays) == (1, 0)
        assert caplog.text.count("cannot be captured") == 1

    def test_memory_that_ran_out_in_a_capture_says_nothing_about_the_model(
        self,
        small: Path,
        device: Machine,
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        with make_engine(small, expert_memory="60%", **self.GIVEN) as engine:

            def lack(*args: Any) -> None:
                if device.tape is not None:
                    raise torch.OutOfMemoryError(SAID)

            handle = engine.model.lm_head.register_forward_pre_hook(lack)
            with pytest.raises(CapacityError, match="while text was generated") as caught:
                engine.generate(PROMPT, max_new_tokens=NUM_TOKENS)
            found = caught.value
            assert (found.needed_bytes, found.available_bytes) == (ASKED, FREE_BYTES)
            handle.remove()
            engine.generate(PROMPT, max_new_tokens=NUM_TOKENS)
        assert (device.num_captures, device.num_replays) == (2, NUM_TOKENS - 1)
        assert not caplog.text


class TestPageLocks:
    @pytest.fixture
    def most(self, device: Machine, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
        """Lets the driver lock so many bytes and no more."""
        own = Runtime.cudaHostRegister

        def limit(most: int) -> None:
            def register(self: Runtime, address: int, num_bytes: int, flags: int) -> int:
                if sum(device.locked.values()) + num_bytes > most:
                    return 2
                return own(self, address, num_bytes, flags)

            monkeypatch.setattr(Runtime, "cudaHostRegister", register)

        return limit

    @pytest.fixture
    def sizes(self, small: Path, device: Machine) -> tuple[int, int]:
        """Bytes of the experts of one layer and of all, as a device wants them."""
        with Engine.from_pretrained(small, device="cuda", orchestration="device") as engine:
            sizes = list(device.locked.values())
            assert engine.config.host_memory == sum(sizes)
        return sizes[0], sum(sizes)

    def test_the_figures_are_those_of_all_experts(
        self, small: Path, sizes: tuple[int, int], most: Callable[[int], None], device: Machine
    ) -> None:
        layer, whole = sizes
        most(layer + 1)
        with pytest.raises(CapacityError, match=r"refused.*\(error 2\): ") as caught:
            Engine.from_pretrained(small, device="cuda", orchestration="device")
        assert (caught.value.needed_bytes, caught.value.available_bytes) == (whole, layer)
        assert str(caught.value).count("bytes needed") == 1
        assert "ulimit" in str(caught.value.hint)
        assert not device.locked

    @pytest.mark.parametrize(
        "settings",
        [{"device": "cuda"}, {"device": "auto"}, {"device": "cuda", "draft": "int8"}],
        ids=str,
    )
    def test_the_host_decides_instead_where_nobody_asked_for_the_device(
        self,
        small: Path,
        sizes: tuple[int, int],
        most: Callable[[int], None],
        device: Machine,
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
        settings: dict[str, Any],
    ) -> None:
        layer, whole = sizes
        most(layer + 1)
        arenas: list[weakref.ref[Any]] = []
        own_init, own_resolve = HostArena.__init__, engine_module.resolve

        @functools.wraps(own_init)
        def init(self: HostArena, *args: Any, **kwargs: Any) -> None:
            own_init(self, *args, **kwargs)
            arenas.extend((weakref.ref(self), weakref.ref(self._map)))

        seen: list[str] = []

        def resolve(config: Any, loaded: Any, **kwargs: Any) -> Any:
            if config.orchestration == "host":
                assert not any(each() for each in arenas), "the experts are gone"
                assert not device.locked
            seen.append(f"{config.orchestration} {loaded.model.device.type}")
            return own_resolve(config, loaded, **kwargs)

        monkeypatch.setattr(HostArena, "__init__", init)
        monkeypatch.setattr(engine_module, "resolve", resolve)
        gc.disable()
        try:
            engine = Engine.from_pretrained(small, orchestration="auto", **settings)
        finally:
            gc.enable()
        with engine:
            assert seen == ["auto cpu", "host cpu"]
            assert (engine.config.orchestration, engine.config.device) == ("host", "cuda:0")
            assert 0 < sum(device.locked.values()) <= layer
            assert (engine.drafter is not None) == ("draft" in settings)
            assert engine.generate(PROMPT, max_new_tokens=2).token_ids
        assert not device.locked
        (record,) = [r for r in caplog.records if r.levelname == "WARNING"]
        said = record.getMessage()
        assert "refused" in said
        assert f"{whole:,} bytes needed, {layer:,} available" in said

    def test_what_the_host_cannot_do_is_refused_as_ever(
        self, small: Path, most: Callable[[int], None], device: Machine
    ) -> None:
        most(0)
        slots = [2] * 2
        with pytest.raises(ConfigError, match="slot_plan"):
            Engine.from_pretrained(small, device="cuda", slot_plan=slots)
        with pytest.raises(CapacityError, match="refused"):
            Engine.from_pretrained(small, device="cuda")
        assert not device.locked
