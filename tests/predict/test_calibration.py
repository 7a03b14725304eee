"""Default vectors are the experts' mean outputs, and are only read for their own checkpoint."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

import pytest
import torch

from foreload.errors import CheckpointError
from foreload.predict import calibration
from foreload.predict.calibration import (
    DefaultVectorRecorder,
    calibration_path,
    read_default_vectors,
)

if TYPE_CHECKING:
    from pathlib import Path

SHAPE = (2, 3, 4)


def recorded() -> DefaultVectorRecorder:
    recorder = DefaultVectorRecorder(*SHAPE)
    recorder.add(0, 1, torch.tensor([[1.0, 2, 3, 4], [3, 4, 5, 6]]))
    recorder.add(0, 1, torch.tensor([[5.0, 6, 7, 8]]))
    recorder.add(1, 2, torch.full((1, 4), 0.5, dtype=torch.bfloat16))
    return recorder


def test_the_mean_is_over_tokens_not_over_calls() -> None:
    vectors = recorded().vectors()
    assert vectors.shape == SHAPE
    assert vectors.dtype == torch.float32
    assert vectors[0, 1].tolist() == [3.0, 4.0, 5.0, 6.0]
    assert vectors[1, 2].tolist() == [0.5] * 4


def test_experts_never_seen_are_zero_and_lower_the_coverage() -> None:
    recorder = recorded()
    assert recorder.vectors()[0, 0].tolist() == [0.0] * 4
    assert recorder.coverage == pytest.approx(2 / 6)
    assert DefaultVectorRecorder(*SHAPE).coverage == 0.0


def test_long_sums_do_not_lose_small_outputs() -> None:
    recorder = DefaultVectorRecorder(1, 1, 1)
    for _ in range(100):
        recorder.add(0, 0, torch.full((50, 1), 0.1, dtype=torch.bfloat16))
    assert recorder.vectors().item() == pytest.approx(0.1001, rel=1e-3)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = calibration_path(tmp_path / "new" / "folder", "abc")
    recorded().write(path, "abc")
    assert torch.equal(read_default_vectors(path, "abc", SHAPE), recorded().vectors())
    assert list(path.parent.iterdir()) == [path], "a part of the writing was left behind"


def test_writing_again_replaces(tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    recorded().write(path, "abc")
    DefaultVectorRecorder(*SHAPE).write(path, "abc")
    assert not read_default_vectors(path, "abc", SHAPE).any()


@pytest.mark.parametrize(
    ("identity", "shape"), [("other", SHAPE), ("abc", (2, 3, 5)), ("abc", (3, 3, 4))]
)
def test_another_checkpoints_vectors_are_refused(
    tmp_path: Path, identity: str, shape: tuple[int, int, int]
) -> None:
    path = tmp_path / "v.safetensors"
    recorded().write(path, "abc")
    with pytest.raises(CheckpointError, match="another checkpoint") as caught:
        read_default_vectors(path, identity, shape)
    assert "calibrate" in str(caught.value.hint)


@pytest.mark.parametrize("content", [None, b"", b"not safetensors at all", b"\x00" * 100])
def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "v.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot read the calibration"):
        read_default_vectors(path, "abc", SHAPE)


def test_vectors_outlive_their_file(tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    recorded().write(path, "abc")
    vectors = read_default_vectors(path, "abc", SHAPE)
    path.write_bytes(b"x" * path.stat().st_size)
    assert torch.equal(vectors, recorded().vectors())


def test_a_file_without_vectors_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "v.safetensors"
    save_file({"something": torch.zeros(1)}, path, metadata={"identity": "abc"})
    with pytest.raises(CheckpointError):
        read_default_vectors(path, "abc", SHAPE)


def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "v.safetensors"
    recorded().write(path, "abc")

    def fill_the_disk(tensors: Any, part: Path, **settings: Any) -> None:
        part.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(calibration, "save_file", fill_the_disk)
    with pytest.raises(CheckpointError, match="cannot write"):
        DefaultVectorRecorder(*SHAPE).write(path, "abc")
    assert torch.equal(read_default_vectors(path, "abc", SHAPE), recorded().vectors())
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_a_checkpoint_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="cannot write the calibration") as caught:
        recorded().write(tmp_path / "file" / "v.safetensors", "abc")
    assert "cache_dir" in str(caught.value.hint)


def test_each_checkpoint_has_its_own_path(tmp_path: Path) -> None:
    assert calibration_path(tmp_path, "a" * 64) != calibration_path(tmp_path, "b" * 64)
    assert calibration_path(tmp_path, "a" * 64).is_relative_to(tmp_path)
