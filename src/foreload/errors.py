"""Every error foreload raises on purpose.

    ForeloadError
    ├── ConfigError            a setting that makes no sense, or does not fit another
    ├── CheckpointError        a checkpoint that is damaged, incomplete or lying about itself
    │   └── OfflineError       a Hub name that is not cached and cannot be downloaded
    ├── TraceError             a trace that is damaged, cut off, or none at all
    ├── UnsupportedModelError  an architecture or quantisation foreload cannot run
    ├── CapacityError          a memory budget too small for what must fit in it
    ├── TransferError          a copy between tiers that failed
    ├── ShapeError             tensors whose shapes do not agree
    └── MissingExtraError      an optional dependency that is not installed

Each error carries a `hint`: what to do about it. This module imports nothing.
"""

from __future__ import annotations

__all__ = [
    "CapacityError",
    "CheckpointError",
    "ConfigError",
    "ForeloadError",
    "MissingExtraError",
    "OfflineError",
    "ShapeError",
    "TraceError",
    "TransferError",
    "UnsupportedModelError",
]


class ForeloadError(Exception):
    """Base of every error foreload raises on purpose.

    Args:
        message: What was wrong, and where.
        hint: What to do about it; shown below the message.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint
        if hint:
            self.add_note(f"hint: {hint}")


class ConfigError(ForeloadError):
    """Report a setting that makes no sense, or does not fit another."""


class CheckpointError(ForeloadError):
    """Report a checkpoint that is damaged, incomplete or lying about itself."""


class OfflineError(CheckpointError):
    """Report a Hub name that is not cached and cannot be downloaded."""


class TraceError(ForeloadError):
    """Report a trace that is damaged, cut off, or none at all."""


class UnsupportedModelError(ForeloadError):
    """Report an architecture or quantisation that foreload cannot run."""


class CapacityError(ForeloadError):
    """Report a memory too small for what must fit in it.

    Args:
        message: What did not fit.
        needed_bytes: The least that would do.
        available_bytes: What was given.
        setting: The setting to change.
        hint: What to do; by default to raise the setting to what is needed.
    """

    def __init__(
        self,
        message: str,
        *,
        needed_bytes: int,
        available_bytes: int,
        setting: str,
        hint: str | None = None,
    ) -> None:
        super().__init__(
            f"{message}: {needed_bytes:,} bytes needed, {available_bytes:,} available",
            hint=hint or f"set {setting} to at least {needed_bytes:,} bytes",
        )
        self.needed_bytes = needed_bytes
        self.available_bytes = available_bytes
        self.setting = setting


class TransferError(ForeloadError):
    """Report a copy between tiers that failed; the engine stays usable."""


class ShapeError(ForeloadError):
    """Report tensors whose shapes do not agree."""


class MissingExtraError(ForeloadError):
    """Report an optional dependency that is not installed.

    Args:
        package: The missing package.
        extra: The extra of foreload that brings it.
    """

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"this needs {package!r}, which is not installed",
            hint=f"pip install 'foreload[{extra}]'",
        )
