"""The probe measures with the engine's own parts, and where no weights are, a scratch file."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest

from foreload.bench import probe
from foreload.bench.probe import has_weights, probe_experts, probe_layers
from foreload.errors import ConfigError, TransferError
from foreload.model.headers import read_headers

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_PHASE_S", 0.02)
    monkeypatch.setattr(probe, "_MATMUL_FLOP", 1e6)
    monkeypatch.setattr(probe, "_NUM_STEPS", 2)


def test_every_figure_is_a_rate(tiny_checkpoint: Path, tmp_path: Path) -> None:
    found = probe_experts(read_headers(tiny_checkpoint), folder=tmp_path)
    assert 0 < found.expert_s < 1
    assert 0 < found.flop_s < math.inf
    assert found.disk_bytes_s is not None
    assert 0 < found.disk_bytes_s < math.inf
    assert 0 < found.compute_share <= 1
    assert 0 < found.copy_share <= 1
    assert list(tmp_path.iterdir()) == [], "the checkpoint itself was read"


def test_without_a_folder_nothing_is_copied(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe._Probe, "fill", pytest.fail)
    found = probe_experts(read_headers(tiny_checkpoint))
    assert found.disk_bytes_s is None
    assert (found.compute_share, found.copy_share) == (1.0, 1.0)


def test_holes_are_told_from_weights(tiny_checkpoint: Path, hollow_checkpoint: Path) -> None:
    assert has_weights(read_headers(tiny_checkpoint).plans)
    assert not has_weights(read_headers(hollow_checkpoint).plans)


def test_where_no_weights_are_a_scratch_file_is_copied(
    hollow_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    seen: list[str] = []
    fill = probe._Probe.fill

    def see(self: probe._Probe) -> float:
        seen.extend(str(path) for path in disk.iterdir())
        assert {plan.spans[0].path for plan in self.plans} == set(seen)
        return fill(self)

    monkeypatch.setattr(probe._Probe, "fill", see)
    found = probe_experts(read_headers(hollow_checkpoint), folder=disk)
    assert found.disk_bytes_s is not None
    assert found.disk_bytes_s > 0
    assert len(seen) == 1
    assert list(disk.iterdir()) == [], "the scratch file is gone"


def test_a_scratch_file_that_cannot_be_written_is_a_clear_error(
    hollow_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="scratch file") as caught:
        probe_experts(read_headers(hollow_checkpoint), folder=tmp_path / "nowhere")
    assert "--disk-bandwidth" in str(caught.value.hint)


def test_a_disk_that_fails_is_no_measurement(checkpoint_copy: Path, tmp_path: Path) -> None:
    headers = read_headers(checkpoint_copy)
    for file in checkpoint_copy.glob("*.safetensors"):
        length = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(TransferError):
        probe_experts(headers, folder=tmp_path)


def test_scratch_numbers_are_ordinary_in_every_type() -> None:
    assert {byte >> 4 for byte in probe._numbers()} == {3}


def test_layers_cost_something_beside_bytes(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "resolve_model", lambda name: tiny_checkpoint)
    found = probe_layers(math.inf)
    assert 0 < found.layer_s < 1
    assert 0 <= found.prediction_s < 1
    assert 0 <= found.call_s < 1
    # A memory that takes all the time leaves nothing for calls.
    assert probe_layers(1.0).layer_s == 0
