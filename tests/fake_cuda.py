"""Stands in for torch.cuda where steps are captured and replayed: memory of a pool included.

A capture runs the step, undoes what a real one would not have executed, and remembers what was
left in the pool. A replay runs it again, and spoils what every other graph left there.
"""

from __future__ import annotations

import itertools
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from foreload.model.graph import StepGraph
from foreload.model.kv_cache import rewind_static

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pytest
    from torch import Tensor


class FakeGraph:
    """A graph that replays the step it saw, into the tensors that step gave away."""

    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda
        self.handle: object = None
        self.step: StepGraph | None = None
        self.left: tuple[Tensor, ...] = ()

    def pool(self) -> object:
        return self.handle

    def replay(self) -> None:
        step = self.step
        assert step is not None
        assert step._outputs is not None
        self._cuda.log.append("replay")
        for other in self._cuda.graphs:
            if other is not self and other.handle is self.handle:
                for value in other.left:
                    value.fill_(torch.nan if value.is_floating_point() else -1)
        found = self._cuda.own_step(step)
        for kept, value in zip((*self.left, *step._outputs), (*found, *found), strict=True):
            kept.copy_(value)


class FakeCuda:
    """What `model.graph` asks of torch.cuda.

    Args:
        fails: Whether nothing can be captured.

    Attributes:
        log: What was done.
        phase: "warm up" or "capture" while one is going on.
        graphs: Those that were captured.
        home: The stream that work is on outside of warming up and capturing.
        current: The stream that work is on.
    """

    def __init__(self, *, fails: bool = False) -> None:
        self.fails = fails
        self.log: list[str] = []
        self.phase = ""
        self.graphs: list[FakeGraph] = []
        self.own_step = StepGraph._step
        self.home, self.side = (
            SimpleNamespace(wait_stream=lambda other: self.log.append("wait")) for _ in range(2)
        )
        self.current = self.home

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.current)
        monkeypatch.setattr(torch.cuda, "Stream", lambda: self.side)
        monkeypatch.setattr(torch.cuda, "stream", self.on_stream)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: FakeGraph(self))
        monkeypatch.setattr(torch.cuda, "graph", self.graph)
        handles = itertools.count()
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, next(handles)))
        # transformers asks for it.
        is_capturing = lambda: self.phase == "capture"  # noqa: E731
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", is_capturing)
        monkeypatch.setattr(StepGraph, "_step", lambda step: self.run(step))

    @contextmanager
    def on_stream(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            with self.doing("warm up") if stream is self.side else nullcontext():
                yield
        finally:
            self.current = before

    @contextmanager
    def graph(
        self, graph: FakeGraph, *, pool: object, stream: Any, capture_error_mode: str
    ) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        graph.handle = pool
        self.graphs.append(graph)
        before, self.current = self.current, stream
        with self.doing("capture"):
            yield
        # As torch's own: one that breaks stays on the stream it was captured on.
        self.current = before

    @contextmanager
    def doing(self, phase: str) -> Iterator[None]:
        self.log.append(phase)
        self.phase = phase
        try:
            yield
        finally:
            self.phase = ""

    def run(self, step: StepGraph) -> tuple[Tensor, Tensor]:
        outputs = self.own_step(step)
        if self.phase == "capture":
            rewind_static(step.cache, step._token_ids.shape[1])
            if self.fails:
                raise RuntimeError("operation not permitted when stream is capturing")
            self.graphs[-1].step, self.graphs[-1].left = step, outputs
        return outputs
