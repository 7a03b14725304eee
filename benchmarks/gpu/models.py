"""The models that stages run, and engines on the device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from foreload import Engine
from foreload.model.hf import load_model
from gpu.settings import DEVICE

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from gpu.settings import Settings


def open_engine(model: str | Path, share: float, **settings: Any) -> Engine:
    """Opens a model on the device with a share of its experts resident."""
    # The host's loop must be asked for: falling back to it would be timed as what it is not.
    settings = {"orchestration": "device", **settings}
    return Engine.from_pretrained(model, device=DEVICE, expert_memory=f"{share}%", **settings)


def open_staged(model: str | Path, share: float, host_share: float, **settings: Any) -> Engine:
    """Opens a model whose experts come from disk by way of a host tier of some of them."""
    return open_engine(model, share, host_memory=f"{host_share}%", orchestration="host", **settings)


def load_resident(path: Path, dtype: torch.dtype) -> Any:
    """Loads transformers' model with all of its experts on the device."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, experts_implementation="eager")
    return model.to(DEVICE).eval().requires_grad_(False)


def shares_of(model: Path, shares: tuple[float, ...]) -> list[float]:
    """Gives the shares to run a model at; the least has room for one expert in each layer."""
    least = 100 / load_model(model).spec.num_experts + 1e-6
    return sorted({max(share, least) for share in shares})


def widened_demo(settings: Settings) -> Path:
    """Gives the demo model with 64 times the expert bytes, made on first use."""
    from foreload.bench.widen import widen_checkpoint
    from foreload.model.source import resolve_model

    model = settings.build / "demo-x8"
    if not model.is_dir():
        widen_checkpoint(resolve_model("demo"), model, 8)
    return model
