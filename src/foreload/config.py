"""Settings: frozen, validated, each with a unit or a type that needs none.

`EngineConfig` is what a user asks for; `engine.resolve` replaces every "auto" by what it came to.
Sizes are written as users write them ("2GiB", "25%"). Knows no model and no machine.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from numbers import Integral
from pathlib import Path
from typing import Any, ClassVar, TypeGuard

from foreload.errors import ConfigError

__all__ = [
    "EngineConfig",
    "SamplingConfig",
    "check_whole",
    "format_bytes",
    "parse_size",
    "read_slots",
]

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
_SIZE_HINT = 'write it as "2GiB", "500MB" or "25%"'
_MOST_BYTES = 2**63 - 1
_LEAST_BARE_BYTES = 1024
"""A number below this and without a unit is not meant as bytes."""

_LEAST_TEMPERATURE, _MOST_TEMPERATURE = 2.0**-126, 2.0**127
"""Logits are divided in float32, which has no room for the others."""


def parse_size(text: str | int, *, whole_bytes: int, setting: str) -> int:
    """Turn "2GiB", "25%" or a number of bytes into bytes.

    Args:
        text: The size as written.
        whole_bytes: What 100 % stands for.
        setting: The setting's name, for the message.

    Raises:
        ConfigError: Not a size, not positive, or more than any machine has.
    """
    value: float
    if _is_whole(text):
        value = text
    elif isinstance(text, str) and (match := _PERCENT.fullmatch(text)):
        value = float(match[1]) / 100 * whole_bytes
    elif isinstance(text, str) and (match := _SIZE.fullmatch(text)) and match[2].lower() in _UNITS:
        value = float(match[1]) * _UNITS[match[2].lower()]
    else:
        raise ConfigError(f"{setting}={text!r} is not a size", hint=_SIZE_HINT)
    if value < 1:
        raise ConfigError(f"{setting}={text!r} must be more than nothing", hint=_SIZE_HINT)
    if value > _MOST_BYTES:
        raise ConfigError(f"{setting}={text!r} is more than any machine has", hint=_SIZE_HINT)
    return int(value)


def check_whole(name: str, value: object, *, least: int, most: int | None = None) -> None:
    """Refuse what is no whole number within bounds.

    Args:
        name: What it is called, for the message.
        value: The number.
        least: The least that will do.
        most: The most that will do; None for any.

    Raises:
        ConfigError: It is none.
    """
    if _is_whole(value) and least <= value and (most is None or value <= most):
        return
    bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
    raise ConfigError(f"{name}={value!r} must be a whole number {bounds}")


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
    MOST_WORKERS: ClassVar[int] = 1024

    def __post_init__(self) -> None:
        for name, choices in self.CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ConfigError(f"{name}={value!r} is unknown", hint=f"use {', '.join(choices)}")
        if not isinstance(self.device, str) or not _DEVICE.fullmatch(self.device):
            raise ConfigError(
                f"device={self.device!r} is unknown", hint="use auto, cpu, cuda, or cuda:1"
            )
        check_whole("lookahead_layers", self.lookahead_layers, least=1)
        check_whole("num_workers", self.num_workers, least=1, most=self.MOST_WORKERS)
        check_whole("prefill_chunk", self.prefill_chunk, least=1)
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
                _check_size(getattr(self, name), setting=name)

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
        is_path = isinstance(plan, str | Path) and bool(str(plan))
        slots = str(plan) if is_path else read_slots(plan)
        if not isinstance(slots, str) and min(slots) < 1:
            raise _no_slot_plan(plan)
        object.__setattr__(self, "slot_plan", slots)

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
        elif isinstance(self.stop, Iterable):
            object.__setattr__(self, "stop", tuple(self.stop))
        else:
            raise ConfigError(
                f"stop={self.stop!r} must be a text or several", hint="leave it out for none"
            )
        whole = {"max_new_tokens": int, "top_k": int, "temperature": (int, float)}
        for name, kind in {**whole, "top_p": (int, float), "seed": (int, type(None))}.items():
            value = getattr(self, name)
            if not isinstance(value, kind) or isinstance(value, bool):  # type: ignore[arg-type]
                raise ConfigError(f"{name}={value!r} is not a number of the right kind")
        warmth = self.temperature
        can_divide = _LEAST_TEMPERATURE <= warmth <= _MOST_TEMPERATURE
        checks = [
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", warmth == 0 or can_divide, "0, or from 1.2e-38 to 1.7e38"),
            ("seed", -(2**63) <= (self.seed or 0) < 2**64, "a number of 64 bits"),
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


def _check_size(size: str | int, *, setting: str) -> None:
    """Refuse what is no size, or a number that was meant in other units."""
    num_bytes = parse_size(size, whole_bytes=1 << 40, setting=setting)
    if str(size).strip().isdecimal() and num_bytes < _LEAST_BARE_BYTES:
        raise ConfigError(
            f"{setting}={size!r} stands for {num_bytes} bytes, because it has no unit",
            hint=f'write "{num_bytes}%" for a share of all experts, or a unit: "{num_bytes}GiB"',
        )


def read_slots(plan: Any) -> tuple[int, ...]:
    """Give the slots of each MoE layer, from numbers in a sequence, an array or a tensor.

    Raises:
        ConfigError: They are no whole numbers, or none.
    """
    values = plan.tolist() if hasattr(plan, "tolist") else plan
    is_row = isinstance(values, list | tuple) and len(values) > 0
    if not is_row or any(
        not isinstance(number, Integral) or isinstance(number, bool) for number in values
    ):
        raise _no_slot_plan(plan)
    return tuple(int(number) for number in values)


def _no_slot_plan(plan: Any) -> ConfigError:
    return ConfigError(
        f"slot_plan={plan!r} is unknown",
        hint="use 'equal', the path of a trace, or the slots of each MoE layer",
    )


def _whole_number(value: str | int) -> str | int:
    """Give the number that a text of digits is; anything else as it is."""
    # Python refuses to read numbers of thousands of digits.
    is_digits = isinstance(value, str) and value.isdecimal() and len(value) < 100
    return int(value) if is_digits else value


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _refuse_unknown(values: dict[str, Any], cls: type) -> None:
    known = {f.name for f in fields(cls)}
    for name in values:
        if name not in known:
            raise ConfigError(
                f"unknown setting {name!r}", hint=f"known are {', '.join(sorted(known))}"
            )
