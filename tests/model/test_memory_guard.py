"""A lack of memory is told once, where work was begun, after what was under way has been left."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, NoReturn

import pytest
import torch

from foreload.errors import CapacityError
from foreload.memory.cuda import Turns
from foreload.model.memory_guard import MemoryGuard

if TYPE_CHECKING:
    from collections.abc import Generator

CPU = torch.device("cpu")


def run_out() -> NoReturn:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 KiB")


def test_it_is_told_where_work_was_begun() -> None:
    guard = MemoryGuard(CPU)
    for _ in range(2):
        with (
            pytest.raises(CapacityError, match="while outside: 2,048 bytes") as caught,
            guard.within("while outside", "do less"),
            guard.within("while inside"),
        ):
            run_out()
        assert caught.value.hint == "do less"


def test_other_errors_pass() -> None:
    guard = MemoryGuard(CPU)
    with pytest.raises(RuntimeError, match="shapes"), guard.within("while outside"):
        raise RuntimeError("shapes do not agree")


def test_a_watched_model_tells_and_is_given_back() -> None:
    model = SimpleNamespace(forward=run_out)
    guard = MemoryGuard(CPU)
    turns = Turns(CPU)
    guard.watch(model, turns)
    with pytest.raises(CapacityError, match="while the model ran"):
        model.forward()
    assert not turns._lock._is_owned()  # type: ignore[attr-defined]
    guard.unwatch(model)
    guard.unwatch(model)
    assert "forward" not in vars(model)


def test_a_stream_ends_as_it_would_and_is_closed_when_it_is_left() -> None:
    closed: list[bool] = []

    def count(most: int) -> Generator[int]:
        try:
            for number in range(most):
                if number == 3:
                    run_out()
                yield number
        finally:
            closed.append(True)

    guard = MemoryGuard(CPU)
    assert list(guard.each(count(3))) == [0, 1, 2]
    with pytest.raises(CapacityError, match="while text was generated"):
        list(guard.each(count(5)))
    left = guard.each(count(3))
    next(left)
    left.close()  # type: ignore[attr-defined]
    assert len(closed) == 3
