"""What each stage does, and how much of it."""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    # The name of a stage's files, without what they end in.
    stem: str = ""
    # Seconds after which a stage begins no other run of an arm, and the clock's time when they end.
    limit_s: float = 540
    ends_at_s: float = math.inf

    def is_over(self) -> bool:
        """Tells whether the stage's time is up."""
        return time.perf_counter() > self.ends_at_s

    def to_dict(self) -> dict[str, Any]:
        """Gives the fields for a file."""
        told = dataclasses.asdict(self)
        del told["ends_at_s"]
        return {
            name: str(value) if isinstance(value, Path) else value for name, value in told.items()
        }
