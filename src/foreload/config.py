"""Settings: frozen, validated, each with a unit or a type that needs none.

`EngineConfig` is what a user asks for; `engine.resolve` replaces every "auto" by what it came to.
Sizes are written as users write them ("2GiB", "25%"). Knows no model and no machine.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar

from foreload.errors import ConfigError

__all__ = ["EngineConfig", "SamplingConfig", "format_bytes", "parse_size"]

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
    "k": 2**10,
    "m": 2**20,
    "g": 2**30,
    "t": 2**40,
}
_SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*")
_DEVICE = re.compile(r"auto|cpu|cuda(:[0-9]{1,2})?")
_PERCENT = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*%\s*")


def parse_size(text: str | int, *, whole_bytes: int, setting: str) -> int:
    """Turn "2GiB", "25%" or a number of bytes into bytes.

    Args:
        text: The size as written.
        whole_bytes: What 100 % stands for.
        setting: The setting's name, for the message.

    Raises:
        ConfigError: Not a size, or not positive.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        value = text
    elif isinstance(text, str) and (match := _PERCENT.fullmatch(text)):
        value = int(float(match[1]) / 100 * whole_bytes)
    elif isinstance(text, str) and (match := _SIZE.fullmatch(text)) and match[2].lower() in _UNITS:
        value = int(float(match[1]) * _UNITS[match[2].lower()])
    else:
        raise ConfigError(
            f"{setting}={text!r} is not a size", hint='write it as "2GiB", "500MB" or "25%"'
        )
    if value <= 0:
        raise ConfigError(f"{setting}={text!r} must be more than nothing")
    return value


def format_bytes(num_bytes: float) -> str:
    """Write a number of bytes for people: 1.5 GiB, 640 KiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What an engine is asked to be.

    Attributes:
        model: Local directory, Hub name, or "demo".
        device: Where the model computes: "auto", "cpu", "cuda" or "cuda:1". "auto" is a CUDA device
            where there is one that these settings run on.
        dtype: "auto" (as stored), "bfloat16", "float16" or "float32".
        context: Most tokens of a request, prompt and text together: a number, or "auto", what the
            model was built for, on a CUDA device 8,192 at most. There memory is kept free for the
            keys and values of so many.
        expert_memory: Hard ceiling of the device tier for experts: "auto", a size, or a percentage
            of all experts' bytes.
        host_memory: Ceiling of the host tier, through which experts get to a device: "auto", what
            the machine has to spare, a size, or a percentage of all experts' bytes.
        orchestration: Who decides which experts are in the device tier: "host", a loop that brings
            experts from disk, on a CUDA device by way of the host tier; "device", tables on the
            device itself, all experts being in the host tier; or "auto": on a CUDA device "device"
            where that can be, else "host".
        slot_plan: For orchestration="device", how the slots are divided over the MoE layers:
            "equal"; the path of a trace of this model, whose decoded tokens shall miss least; or
            the slots of each layer.
        predictor: "none", "lookahead", "default-vectors", "estimator", or "auto": the best of
            these by recall, measured as text is generated. Prefetching switches itself off while it
            loses. With orchestration="device" nothing is measured: "auto" is the last of these that
            there is everything for.
        lookahead_layers: How many MoE layers ahead to predict; with orchestration="device" one.
        eviction: "history", "next-use", "lru", "lfu", "least-stale", or "none" (experts leave after
            use).
        num_workers: Copies in flight at once.
        prefill_chunk: Most prompt tokens per forward; each needed expert is read once per chunk.
        policy: Who decides what is executed: "exact", the true router; "speculate", in decoding the
            predictor; "speculate-when", the true router among what is in memory.
        confidence: For "speculate-when": share of the routing weight that is waited for.
        draft: Speculative decoding with the model's own experts, quantised, as the draft: "none",
            "int4", "int8" (built on first use; on a CUDA device whenever an engine is opened), or
            "auto": one that was built already, while it pays. Its memory is part of
            `expert_memory`.
        num_draft_tokens: Tokens drafted per round: "auto", chosen by measured costs, or a number;
            0 drafts nothing.
    """

    model: str = "demo"
    device: str = "auto"
    dtype: str = "auto"
    context: str | int = "auto"
    expert_memory: str | int = "auto"
    host_memory: str | int = "auto"
    orchestration: str = "auto"
    slot_plan: str | tuple[int, ...] = "equal"
    predictor: str = "auto"
    lookahead_layers: int = 2
    eviction: str = "history"
    num_workers: int = 2
    prefill_chunk: int = 1024
    policy: str = "exact"
    confidence: float = 0.9
    draft: str = "none"
    num_draft_tokens: str | int = "auto"

    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {
        "dtype": ("auto", "bfloat16", "float16", "float32"),
        "predictor": ("auto", "none", "lookahead", "default-vectors", "estimator"),
        "policy": ("exact", "speculate", "speculate-when"),
        "orchestration": ("auto", "host", "device"),
        "eviction": ("history", "next-use", "lru", "lfu", "least-stale", "none"),
        "draft": ("none", "auto", "int4", "int8"),
    }
    MOST_DRAFT_TOKENS: ClassVar[int] = 32

    def __post_init__(self) -> None:
        for name, choices in self.CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ConfigError(f"{name}={value!r} is unknown", hint=f"use {', '.join(choices)}")
        if not isinstance(self.device, str) or not _DEVICE.fullmatch(self.device):
            raise ConfigError(
                f"device={self.device!r} is unknown", hint="use auto, cpu, cuda, or cuda:1"
            )
        for name in ("lookahead_layers", "num_workers", "prefill_chunk"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name}={value!r} must be a whole number of at least 1")
        object.__setattr__(self, "context", _whole_number(self.context))
        if self.context != "auto" and not (_is_whole(self.context) and int(self.context) >= 2):
            raise ConfigError(
                f"context={self.context!r} must be 'auto' or a whole number of at least 2"
            )
        confidence = self.confidence
        is_number = isinstance(confidence, int | float) and not isinstance(confidence, bool)
        if not is_number or not 0 <= confidence <= 1:
            raise ConfigError(f"confidence={confidence!r} must be a number from 0 to 1")
        if self.policy == "speculate" and self.predictor == "none":
            raise ConfigError(
                "policy='speculate' executes predictions, and predictor='none' makes none",
                hint="use predictor='auto'",
            )
        self._check_draft()
        self._check_slot_plan()
        self._check_orchestration()
        for name in ("expert_memory", "host_memory"):
            if getattr(self, name) != "auto":
                parse_size(getattr(self, name), whole_bytes=1 << 40, setting=name)

    def _check_draft(self) -> None:
        tokens = _whole_number(self.num_draft_tokens)
        object.__setattr__(self, "num_draft_tokens", tokens)
        if tokens != "auto" and not (
            _is_whole(tokens) and 0 <= int(tokens) <= self.MOST_DRAFT_TOKENS
        ):
            raise ConfigError(
                f"num_draft_tokens={tokens!r} must be 'auto' or a whole number from 0 to "
                f"{self.MOST_DRAFT_TOKENS}"
            )
        if self.draft == "none" and tokens != "auto":
            raise ConfigError(
                "num_draft_tokens says how far a draft goes, and draft='none' has none",
                hint="set draft='int4'",
            )
        if self.draft != "none" and self.policy != "exact":
            raise ConfigError(
                f"a draft is verified by the exact model, and policy={self.policy!r} is not exact",
                hint="use policy='exact', or draft='none'",
            )

    def _check_slot_plan(self) -> None:
        plan = self.slot_plan
        if isinstance(plan, list):
            object.__setattr__(self, "slot_plan", tuple(plan))
        numbers = plan if isinstance(plan, list | tuple) else ()
        is_whole = all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in numbers)
        if not plan or not isinstance(plan, str | list | tuple) or not is_whole:
            raise ConfigError(
                f"slot_plan={plan!r} is unknown",
                hint="use 'equal', the path of a trace, or the slots of each MoE layer",
            )

    def _check_orchestration(self) -> None:
        obstacle = self.host_only
        if self.orchestration == "device" and obstacle is not None:
            raise ConfigError(
                f"{obstacle} needs the host to decide about experts",
                hint="use orchestration='host', or leave it out",
            )
        is_hosts = self.orchestration == "host" or obstacle is not None
        if is_hosts and self.slot_plan != "equal":
            raise ConfigError(
                "slot_plan divides the slots of a device that decides for itself; the host's are "
                "shared by all layers",
                hint="use orchestration='device', or slot_plan='equal'",
            )

    @property
    def host_only(self) -> str | None:
        """Name a setting that only orchestration="host" can run; None where there is none."""
        # The default stands for no wish: the tables on the device know one rule.
        if self.eviction not in ("history", "lru"):
            return f"eviction={self.eviction!r}"
        return None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> EngineConfig:
        """Make a configuration from names and values.

        Raises:
            ConfigError: An unknown name or a bad value.
        """
        _refuse_unknown(values, cls)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Give names and values, JSON-ready."""
        return asdict(self)

    def with_values(self, **values: Any) -> EngineConfig:
        """Copy with some values replaced."""
        return replace(self, **values)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingConfig:
    """How tokens are chosen and when to stop.

    Attributes:
        max_new_tokens: Most tokens to generate.
        temperature: 0 chooses the likeliest token; otherwise logits are divided by it.
        top_p: Sample among the likeliest tokens that together reach this probability.
        top_k: Sample among this many likeliest tokens; 0 for all.
        seed: Seed of the sampling; None takes one from the system.
        stop: Texts that end the generation; they are not part of the result.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        elif not isinstance(self.stop, tuple):
            object.__setattr__(self, "stop", tuple(self.stop))
        whole = {"max_new_tokens": int, "top_k": int, "temperature": (int, float)}
        for name, kind in {**whole, "top_p": (int, float), "seed": (int, type(None))}.items():
            value = getattr(self, name)
            if not isinstance(value, kind) or isinstance(value, bool):  # type: ignore[arg-type]
                raise ConfigError(f"{name}={value!r} is not a number of the right kind")
        checks = [
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("stop", all(isinstance(s, str) and s for s in self.stop), "non-empty texts"),
        ]
        for name, is_fine, wanted in checks:
            if not is_fine:
                raise ConfigError(f"{name}={getattr(self, name)!r} must be {wanted}")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SamplingConfig:
        """Make a configuration from names and values.

        Raises:
            ConfigError: An unknown name or a bad value.
        """
        _refuse_unknown(values, cls)
        return cls(**values)


def _whole_number(value: str | int) -> str | int:
    """Give the number that a text of digits is; anything else as it is."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _refuse_unknown(values: dict[str, Any], cls: type) -> None:
    known = {f.name for f in fields(cls)}
    for name in values:
        if name not in known:
            raise ConfigError(
                f"unknown setting {name!r}", hint=f"known are {', '.join(sorted(known))}"
            )
