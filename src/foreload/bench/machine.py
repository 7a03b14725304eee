"""What a result was measured on: cores, memory, versions, settings that change times."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
import transformers

from foreload import __version__

if TYPE_CHECKING:
    from foreload.model.hf import LoadedModel

__all__ = ["describe_machine"]


def describe_machine(loaded: LoadedModel, model: str) -> dict[str, Any]:
    """Describe the machine and the model for a result's header, JSON-ready."""
    spec = loaded.spec
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "foreload": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "load_average": os.getloadavg()[0],
        "model": Path(model).name,
        "architecture": spec.architecture,
        "dtype": spec.dtype,
        "num_moe_layers": spec.num_moe_layers,
        "num_experts": spec.num_experts,
        "top_k": spec.top_k,
        "expert_bytes": spec.expert_bytes,
        "total_expert_bytes": spec.total_expert_bytes,
        "is_random": bool(getattr(loaded.model.config, "foreload_random_weights", False)),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )
