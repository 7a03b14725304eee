"""What is said about CUDA devices, mostly where there is none."""

from __future__ import annotations

import os
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
    cuda.page_lock(1, 4096)
    cuda.page_unlock(1)
    with pytest.raises(CapacityError, match="712"):
        cuda.page_lock(2, 4096)
    cuda.page_unlock(2)


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
