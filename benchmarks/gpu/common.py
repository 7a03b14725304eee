"""What all stages share: their sizes, engines on the device, and rows that survive what breaks."""

from __future__ import annotations

import json
import os
import platform
import traceback
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from foreload import Engine
from foreload.model.hf import load_model

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    Row = dict[str, Any]

ROOT = Path(__file__).resolve().parents[2]
DEVICE = "cuda:0"
PROMPT = "def fibonacci(n):\n"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the command gives, and how much each stage does; tests do little.

    Shares are of all experts, in percent.
    """

    output: Path
    trace: Path | None = None
    layers: int = 6
    build: Path = ROOT / "build"
    shares: tuple[float, ...] = (15, 30, 45, 70, 100)
    num_warm: int = 16
    # Checks, on small models in float32.
    families: tuple[str, ...] = ("qwen3_moe", "mixtral", "gpt_oss")
    num_tokens: int = 512
    num_draws: int = 1000
    # Three tiers: shares on the device and in the host tier below it.
    staged: tuple[tuple[float, float], ...] = ((30, 5), (30, 50), (70, 30))
    num_staged_tokens: int = 256
    share_with_draft: float = 60
    host_shares: tuple[float, ...] = (10, 60)
    num_staged_runs: int = 5
    num_timed: int = 64
    # Times: windows of text that is forced.
    num_trials: int = 5
    num_prompt_tokens: int = 100
    num_decode_tokens: int = 128
    num_slow_tokens: int = 16
    num_recorded_tokens: int = 640
    speculation_shares: tuple[float, ...] = (15, 30)
    draft_shares: tuple[float, ...] = (45, 70)
    # Of the suites' own arms: a few by default, these by name, or "all".
    arms: tuple[str, ...] = ()
    contexts: tuple[int, ...] = ()
    num_training_tokens: int = 18_000
    plan_share: float = 30
    link_bytes: int = 1 << 28


def describe_run() -> Row:
    """Gives what a result was measured with; the commit as the environment's COMMIT has it."""
    packages = ("torch", "transformers", "triton", "accelerate")
    return {
        "device": torch.cuda.get_device_name(),
        "cores": os.cpu_count(),
        "commit": os.environ.get("COMMIT"),
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
        "cuda": torch.version.cuda,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def open_engine(model: str | Path, share: float, **settings: Any) -> Engine:
    """Opens a model on the device with a share of its experts resident."""
    # The host's loop must be asked for: falling back to it would be timed as what it is not.
    settings = {"orchestration": "device", **settings}
    return Engine.from_pretrained(model, device=DEVICE, expert_memory=f"{share}%", **settings)


def open_staged(model: str | Path, share: float, host_share: float, **settings: Any) -> Engine:
    """Opens a model whose experts come from disk by way of a host tier of some of them."""
    return open_engine(model, share, host_memory=f"{host_share}%", orchestration="host", **settings)


def attempt(row: Row, measure: Callable[[], Row]) -> Row:
    """Gives a row with what was measured, or with what broke: the next rows are worth having."""
    try:
        return {**row, **measure()}
    except Exception as error:
        return broken(row, error)


def broken(row: Row, error: Exception) -> Row:
    """Gives a row with what broke."""
    return failed(row, note(error))


def note(error: Exception) -> str:
    """Prints an error and gives its text: it would keep what every frame it came through held."""
    traceback.print_exception(error)
    return repr(error)


def failed(row: Row, error: str) -> Row:
    """Gives a row with the text of what broke."""
    return {**row, "error": error, "is_fine": False}


def show(row: Row) -> Row:
    """Prints a row as it comes."""
    print(json.dumps(row), flush=True)
    return row


def shares_of(model: Path, shares: tuple[float, ...]) -> list[float]:
    """Gives the shares to run a model at; the least has room for one expert in each layer."""
    least = 100 / load_model(model).spec.num_experts + 1e-6
    return sorted({max(share, least) for share in shares})


def load_resident(path: Path, dtype: torch.dtype) -> Any:
    """Loads transformers' model with all of its experts on the device."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, experts_implementation="eager")
    return model.to(DEVICE).eval().requires_grad_(False)


def compare(found: Tensor, wanted: Tensor, *, tolerance: float = 1e-3) -> Row:
    """Compares logits (T, V) with those wanted, in deviations of these.

    Other orders of sums, through every layer: in float32 a mean gap of a thousandth is too much, in
    bfloat16 one of 15. Right arms have less than 7 there, and a layer of random weights whose
    experts are all wrong gives 50.
    """
    found, wanted = found.float(), wanted[: len(found)].float()
    gap, scale = (found - wanted).abs(), float(wanted.std())
    return {
        "largest_gap": float(gap.max()) / scale,
        "mean_gap": float(gap.mean()) / scale,
        "other_likeliest": int((found.argmax(-1) != wanted.argmax(-1)).sum()),
        "is_fine": bool(gap.mean() < tolerance * scale),
    }


def widened_demo(settings: Settings) -> Path:
    """Gives the demo model with 64 times the expert bytes, made on first use."""
    from foreload.bench.widen import widen_checkpoint
    from foreload.model.source import resolve_model

    model = settings.build / "demo-x8"
    if not model.is_dir():
        widen_checkpoint(resolve_model("demo"), model, 8)
    return model
