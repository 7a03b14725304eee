"""Run Mixture-of-Experts language models larger than the memory they get.

    from foreload import Engine
    with Engine.from_pretrained("demo", expert_memory="25%") as engine:
        print(engine.generate("def fibonacci(n):", max_new_tokens=64).text)

Importing foreload loads neither torch nor transformers; the engine does, when first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from foreload.errors import (
    CapacityError,
    CheckpointError,
    ConfigError,
    ForeloadError,
    MissingExtraError,
    OfflineError,
    ShapeError,
    TraceError,
    TransferError,
    UnsupportedModelError,
)

if TYPE_CHECKING:
    from foreload.config import EngineConfig
    from foreload.decode.chunks import Chunk, GenerationResult
    from foreload.engine import Engine
    from foreload.metrics import RequestStats

__all__ = [
    "CapacityError",
    "CheckpointError",
    "Chunk",
    "ConfigError",
    "Engine",
    "EngineConfig",
    "ForeloadError",
    "GenerationResult",
    "MissingExtraError",
    "OfflineError",
    "RequestStats",
    "ShapeError",
    "TraceError",
    "TransferError",
    "UnsupportedModelError",
    "__version__",
]

__version__ = "0.1.0"

_LAZY = {
    "Chunk": "foreload.decode.chunks",
    "Engine": "foreload.engine",
    "EngineConfig": "foreload.config",
    "GenerationResult": "foreload.decode.chunks",
    "RequestStats": "foreload.metrics",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
