"""What is said about CUDA devices, mostly where there is none."""

from __future__ import annotations

import functools
import gc
import os
import threading
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import torch

from foreload.errors import CapacityError, ConfigError
from foreload.memory import cuda

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def test_the_cpu_is_always_there() -> None:
    assert cuda.find_device("cpu") == torch.device("cpu")
    assert cuda.cpus_near(torch.device("cpu")) is None


def test_a_device_that_is_not_there_is_a_config_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not cuda.has_device()
    with pytest.raises(ConfigError, match="no CUDA device"):
        cuda.find_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert cuda.find_device("cuda") == torch.device("cuda", 0)
    assert cuda.find_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match="there are 2 CUDA devices"):
        cuda.find_device("cuda:2")


def test_what_the_driver_answers_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {1: 0, 2: 712}
    runtime = SimpleNamespace(
        cudaHostRegister=lambda address, size, flags: answers[address],
        cudaHostUnregister=lambda address: answers[address],
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    blamed: list[torch.device] = []

    asked: list[torch.device] = []

    @contextmanager
    def current(device: torch.device) -> Iterator[None]:
        asked.append(device)
        yield

    monkeypatch.setattr(torch.cuda, "device", current)
    second = torch.device("cuda", 1)

    def launch(size: int, *, device: torch.device) -> None:
        blamed.append(device)
        raise RuntimeError("CUDA error: 712")

    monkeypatch.setattr(torch, "zeros", launch)
    cuda.page_lock(1, 4096, second)
    cuda.page_unlock(1, second)
    assert not blamed
    with pytest.raises(CapacityError, match="712") as caught:
        cuda.page_lock(2, 4096, second)
    assert "ulimit" in str(caught.value.hint)
    # CUDA blames a refusal on whatever is launched next: that is nothing that matters.
    assert blamed == [second]
    cuda.page_unlock(2, second)
    assert blamed == [second, second]
    assert asked == [second] * 4, "another device is not woken up"


def test_free_memory_includes_torchs_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 4000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    assert cuda.free_bytes(torch.device("cuda", 0)) == 1200


def test_processors_near_a_device_are_read_from_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    properties = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x17, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    device = torch.device("cuda", 0)
    assert cuda.cpus_near(device, root=tmp_path) is None
    node = tmp_path / "bus/pci/devices/0000:17:00.0/numa_node"
    node.parent.mkdir(parents=True)
    node.write_text("1\n")
    cpus = tmp_path / "devices/system/node/node1/cpulist"
    cpus.parent.mkdir(parents=True)
    cpus.write_text("2-3,8-9\n")
    assert cuda.cpus_near(device, root=tmp_path) == {2, 3}
    node.write_text("-1\n")
    assert cuda.cpus_near(device, root=tmp_path) is None
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace())
    assert cuda.cpus_near(device, root=tmp_path) is None


class TestSideStream:
    def test_on_the_cpu_there_is_no_beside(self) -> None:
        side = cuda.SideStream(torch.device("cpu"))
        done = []
        with side.forked():
            done.append("inside")
        side.join(side.mark())
        assert done == ["inside"]
        with cuda.on_device(torch.device("cpu")):
            pass

    def test_side_work_waits_for_what_was_asked_before_and_is_waited_for(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        log: list[tuple[str, object]] = []
        device = torch.device("cuda", 0)
        main = SimpleNamespace(wait_event=lambda event: log.append(("main waits", event)))
        side = SimpleNamespace(
            device=device,
            wait_stream=lambda other: log.append(("side waits", other)),
            record_event=lambda: "event",
        )

        @contextmanager
        def on_stream(stream: object) -> Iterator[None]:
            log.append(("on", stream))
            yield
            log.append(("off", stream))

        monkeypatch.setattr(torch.cuda, "Stream", lambda device: side)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
        monkeypatch.setattr(torch.cuda, "stream", on_stream)
        stream = cuda.SideStream(device)
        with stream.forked():
            log.append(("work", None))
        stream.join(stream.mark())
        assert log == [
            ("side waits", main),
            ("on", side),
            ("work", None),
            ("off", side),
            ("main waits", "event"),
        ]


class TestCopyStreams:
    def test_on_the_cpu_a_copy_is_a_copy(self) -> None:
        cpu = torch.device("cpu")
        streams = cuda.CopyStreams(cpu)
        target = torch.zeros(4, dtype=torch.uint8)
        streams.order_reads()
        streams.copy(target, torch.arange(4, dtype=torch.uint8), streams.mark_reads())
        assert target.tolist() == [0, 1, 2, 3]
        cuda.wait_idle(cpu)

    def test_copies_wait_for_marked_reads_of_any_stream(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        log: list[tuple[object, ...]] = []

        class Stream:
            def __init__(self, name: str) -> None:
                self.name = name

            def wait_stream(self, other: Stream) -> None:
                log.append((self.name, "waits for all of", other.name))

            def wait_event(self, event: Event) -> None:
                log.append((self.name, "waits for", event.marked))

            def record_event(self, event: Event) -> None:
                event.marked = f"{self.name} at {len(log)}"

        class Event:
            marked = ""

            def __init__(self, *, blocking: bool = False) -> None:
                self.blocking = blocking

            def synchronize(self) -> None:
                log.append(("host waits for", self.marked, self.blocking))

        class Target:
            def copy_(self, source: object, *, non_blocking: bool) -> None:
                log.append(("copy", source, non_blocking))

        @contextmanager
        def on_stream(stream: Stream) -> Iterator[None]:
            log.append(("on", stream.name))
            yield
            log.append(("off", stream.name))

        made: list[Stream] = []

        def make_stream(device: torch.device) -> Stream:
            made.append(Stream(f"side {len(made)}"))
            return made[-1]

        current = {"stream": Stream("main")}
        other = Stream("other")
        monkeypatch.setattr(torch.cuda, "Stream", make_stream)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current["stream"])
        monkeypatch.setattr(torch.cuda, "stream", on_stream)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append(("idle", device)))
        device = torch.device("cuda", 0)
        streams = cuda.CopyStreams(device)
        streams.order_reads()
        streams.order_reads()
        assert log == [], "one stream orders itself"
        current["stream"] = other
        mark = streams.mark_reads()
        assert log == [("other", "waits for all of", "main")]
        log.clear()
        target: torch.Tensor = Target()  # type: ignore[assignment]
        streams.copy(target, "piece", mark)  # type: ignore[arg-type]
        assert log == [
            ("side 0", "waits for", "other at 1"),
            ("on", "side 0"),
            ("copy", "piece", True),
            ("off", "side 0"),
            ("host waits for", "side 0 at 4", True),
        ]
        log.clear()
        streams.copy(target, "piece", None)  # type: ignore[arg-type]
        assert log[0] == ("on", "side 0"), "a thread keeps its stream"
        thread = threading.Thread(target=streams.copy, args=(target, "piece", None))
        thread.start()
        thread.join()
        assert [stream.name for stream in made] == ["side 0", "side 1"]
        log.clear()
        cuda.wait_idle(device)
        assert log == [("idle", device)]


def is_free(turns: cuda.Turns) -> bool:
    """Tell whether another thread would get a turn."""
    found: list[bool] = []

    def ask() -> None:
        found.append(turns._lock.acquire(blocking=False))
        if found[0]:
            turns._lock.release()

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    return found[0]


class TestTurns:
    def test_a_thread_may_enter_again_and_others_wait(self) -> None:
        ended: list[str] = []
        turns = cuda.Turns(torch.device("cpu"), tidy=lambda: ended.append("ended"))
        order: list[str] = []

        def other() -> None:
            with turns.taken():
                order.append("other")

        with turns.taken():
            thread = threading.Thread(target=other)
            thread.start()
            with turns.taken():
                order.append("inside")
            assert ended == ["ended"]
            order.append("outside")
        thread.join()
        assert order == ["inside", "outside", "other"]
        assert ended == ["ended"] * 4, "when a turn begins, and when it ends"

    def test_a_turn_that_breaks_off_ends_too(self) -> None:
        ended: list[str] = []
        turns = cuda.Turns(torch.device("cpu"), tidy=lambda: ended.append("ended"))
        with pytest.raises(KeyboardInterrupt), turns.taken(), turns.taken():
            raise KeyboardInterrupt
        assert ended == ["ended"] * 2
        with turns.taken():
            pass

    def test_an_end_that_breaks_off_is_made_up_for_before_the_next_turn(self) -> None:
        log: list[str] = []

        def tidy() -> None:
            log.append("tidy")
            if len(log) == 2:
                raise KeyboardInterrupt

        turns = cuda.Turns(torch.device("cpu"), tidy=tidy)
        with pytest.raises(KeyboardInterrupt), turns.taken():
            pass
        with turns.taken():
            log.append("next")
        assert log == ["tidy", "tidy", "tidy", "next", "tidy"]

    @pytest.mark.parametrize("number", [1, 2])
    def test_what_breaks_off_where_a_turn_begins_or_ends_leaves_no_lock(self, number: int) -> None:
        called = []

        def tidy() -> None:
            called.append(None)
            if len(called) == number:
                raise KeyboardInterrupt

        turns = cuda.Turns(torch.device("cpu"), tidy=tidy)
        with pytest.raises(KeyboardInterrupt), turns.taken():
            pass
        assert is_free(turns)

    def test_a_turn_that_nobody_ends_lets_go_of_the_lock(self) -> None:
        """As where an interruption falls between its beginning and the block's."""
        turns = cuda.Turns(torch.device("cpu"))
        turn = turns.taken()
        turn.__enter__()
        assert not is_free(turns)
        del turn
        gc.collect()
        assert is_free(turns)

    def test_on_another_stream_a_turn_is_behind_the_last(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        log: list[tuple[str, str]] = []

        class Stream:
            def __init__(self, name: str) -> None:
                self.name = name

            def wait_stream(self, other: Stream) -> None:
                log.append((self.name, other.name))

        one, two = Stream("one"), Stream("two")
        turns = cuda.Turns(torch.device("cuda", 0))
        for stream in (one, one, two, two, one):
            monkeypatch.setattr(torch.cuda, "current_stream", lambda device, now=stream: now)
            with turns.taken(), turns.taken():
                pass
        assert log == [("two", "one"), ("one", "two")]


class TestLeavingACapture:
    def test_what_torch_still_records_is_ended_and_let_go_of(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        called: list[tuple[str, int, object]] = []

        def note(name: str, device: int, pool: object) -> None:
            called.append((name, device, pool))

        for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            monkeypatch.setattr(torch._C, name, functools.partial(note, name), raising=False)
        cuda.leave_capture(torch.device("cuda", 1), (0, 7))
        assert called == [
            ("_cuda_endAllocateToPool", 1, (0, 7)),
            ("_cuda_releasePool", 1, (0, 7)),
        ]

    def test_a_pool_that_is_not_recorded_to_is_not_let_go_of_twice(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        called: list[str] = []

        def refuse(device: int, pool: object) -> None:
            raise RuntimeError("not recording to this pool")

        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", refuse, raising=False)
        release = lambda device, pool: called.append("released")  # noqa: E731
        monkeypatch.setattr(torch._C, "_cuda_releasePool", release, raising=False)
        cuda.leave_capture(torch.device("cuda", 0), (0, 7))
        assert not called
