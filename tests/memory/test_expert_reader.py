"""Experts come one after the other with their own bytes, and an unreadable one is an error."""

from __future__ import annotations

import threading
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from foreload.errors import TransferError
from foreload.memory.arena import ALIGNMENT
from foreload.memory.expert_reader import read_experts
from foreload.types import ExpertPlan, ExpertTensor, Span

if TYPE_CHECKING:
    from pathlib import Path

# Sizes that do not divide each other: two slots must fit the largest, in whichever turn it comes.
SIZES = (700, 3 * ALIGNMENT + 11, 1, 2 * ALIGNMENT, 4999)


def write(folder: Path) -> tuple[list[ExpertPlan], list[bytes]]:
    contents = [bytes([number + 1]) * size for number, size in enumerate(SIZES)]
    file = folder / "experts.safetensors"
    file.write_bytes(b"".join(contents))
    starts = [sum(SIZES[:number]) for number in range(len(SIZES))]
    plans = [
        ExpertPlan(
            (Span(str(file), start, size),), (ExpertTensor("w", "uint8", (size,), size, span=0),)
        )
        for start, size in zip(starts, SIZES, strict=True)
    ]
    return plans, contents


def test_every_expert_comes_in_order_with_its_own_bytes(tmp_path: Path) -> None:
    plans, contents = write(tmp_path)
    with closing(read_experts(plans)) as read:
        found = [tensors["w"].numpy().tobytes() for tensors in read]
    assert found == contents


def test_an_expert_past_the_end_of_its_file_is_an_error_after_those_before_it(
    tmp_path: Path,
) -> None:
    plans, contents = write(tmp_path)
    (tmp_path / "experts.safetensors").write_bytes(b"".join(contents[:3]))
    with closing(read_experts(plans)) as read:
        for content in contents[:3]:
            assert next(read)["w"].numpy().tobytes() == content
        with pytest.raises(TransferError):
            next(read)


def test_leaving_off_in_the_middle_ends_the_reading_thread(tmp_path: Path) -> None:
    plans, _ = write(tmp_path)
    before = set(threading.enumerate())
    with closing(read_experts(plans)) as read:
        next(read)
        assert set(threading.enumerate()) - before
    assert not set(threading.enumerate()) - before
