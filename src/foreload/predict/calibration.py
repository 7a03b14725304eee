"""Default vectors: measured while text runs through the model, saved under its identity."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from foreload.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

__all__ = ["DefaultVectorRecorder", "calibration_path", "read_default_vectors"]


class DefaultVectorRecorder:
    """Averages each expert's unweighted output over the tokens routed to it.

    Args:
        num_layers: MoE layers.
        num_experts: Experts per layer.
        hidden_size: H.

    Reference:
        arXiv:2603.19289, d_{l,e}.
    """

    def __init__(self, num_layers: int, num_experts: int, hidden_size: int) -> None:
        self._sum = torch.zeros(num_layers, num_experts, hidden_size)
        self._count = torch.zeros(num_layers, num_experts)

    def add(self, layer: int, expert: int, output: Tensor) -> None:
        """Add an expert's outputs, (n, H), before the routing weights."""
        self._sum[layer, expert] += output.float().sum(0).cpu()
        self._count[layer, expert] += output.shape[0]

    @property
    def coverage(self) -> float:
        """Give the share of experts that were seen at all."""
        return float((self._count > 0).float().mean())

    def vectors(self) -> Tensor:
        """Give the means, (L, E, H) float32; unseen experts are zero."""
        return self._sum / self._count.clamp(min=1)[..., None]

    def write(self, path: Path, identity: str) -> None:
        """Save the means, whole or not at all.

        Raises:
            CheckpointError: The file cannot be written.
        """
        part = path.with_suffix(f".{os.getpid()}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({"default_vectors": self.vectors()}, part, metadata={"identity": identity})
            part.replace(path)
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                part.unlink()
            raise CheckpointError(
                f"cannot write the calibration to {path}: {error}",
                hint="free some space there, or choose another cache_dir",
            ) from error


def calibration_path(cache_dir: Path, identity: str) -> Path:
    """Give where a checkpoint's calibration lies."""
    return cache_dir / "calibration" / f"{identity[:32]}.safetensors"


def read_default_vectors(path: Path, identity: str, shape: tuple[int, int, int]) -> Tensor:
    """Read default vectors, (L, E, H) float32.

    Raises:
        CheckpointError: The file is damaged or belongs to another checkpoint.
    """
    try:
        with safe_open(path, "pt") as file:
            owner = (file.metadata() or {}).get("identity")
            # A copy: what safetensors gives is the mapped file, and dies with it.
            vectors: Tensor = file.get_tensor("default_vectors").clone()
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot read the calibration {path}: {error}",
            hint="run `foreload calibrate` again",
        ) from error
    if owner != identity or tuple(vectors.shape) != shape:
        raise CheckpointError(
            f"{path} was measured on another checkpoint",
            hint="run `foreload calibrate` again",
        )
    return vectors
