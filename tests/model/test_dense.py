"""Dense tensors read themselves when asked, and count what they read."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file

from foreload.errors import CheckpointError
from foreload.memory.checkpoint import CheckpointIndex
from foreload.model.dense import lazy_tensors

if TYPE_CHECKING:
    from pathlib import Path

TENSORS = {
    "matrix": torch.randn(5, 7).to(torch.bfloat16),
    "scalar": torch.tensor(3.5),
    "empty": torch.zeros(0, 4),
    "bytes": torch.arange(9, dtype=torch.uint8),
}


@pytest.fixture
def index(tmp_path: Path) -> CheckpointIndex:
    (tmp_path / "config.json").write_text("{}")
    save_file(TENSORS, tmp_path / "model.safetensors")
    return CheckpointIndex.open(tmp_path)


def test_tensors_are_what_was_saved(index: CheckpointIndex) -> None:
    seen: list[tuple[int, int]] = []
    lazy = lazy_tensors(index.entries, lambda done, total: seen.append((done, total)))
    for name, wanted in TENSORS.items():
        assert lazy[name].get_shape() == list(wanted.shape)
        assert lazy[name].numel() == wanted.numel()
        assert lazy[name].is_floating_point() == wanted.is_floating_point()
        assert lazy[name].get_dtype() == index[name].dtype
        found = lazy[name][...]
        assert found.dtype is wanted.dtype
        assert torch.equal(found, wanted)
    assert seen[-1] == (index.total_bytes, index.total_bytes)
    assert len(seen) == len(TENSORS)


def test_threads_may_read_at_once(index: CheckpointIndex) -> None:
    seen: list[int] = []
    lazy = lazy_tensors(index.entries, lambda done, total: seen.append(done))
    threads = [threading.Thread(target=lazy["matrix"].__getitem__, args=(...,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [70 * count for count in range(1, 9)]


def test_a_file_that_ends_early_is_an_error(index: CheckpointIndex) -> None:
    entry = index["matrix"]
    with open(entry.path, "r+b") as file:
        file.truncate(entry.offset + 3)
    with pytest.raises(CheckpointError, match="ends inside a tensor"):
        lazy_tensors({"matrix": entry}, None)["matrix"][...]
