"""Offer a checkpoint's dense tensors to transformers one by one, each read when it is asked for.

Nothing is mapped into memory, so what was loaded stays loaded when the page cache is needed for
experts.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from foreload.errors import CheckpointError
from foreload.model.recipes import torch_dtype

if TYPE_CHECKING:
    from foreload.memory.checkpoint import TensorEntry

__all__ = ["Progress", "lazy_tensors"]

Progress = Callable[[int, int], None]


def lazy_tensors(entries: Mapping[str, TensorEntry], progress: Progress | None) -> dict[str, Any]:
    """Give tensors that read themselves when indexed, from any thread.

    Args:
        entries: Where the tensors lie.
        progress: Called with bytes read and bytes to read, by one thread at a time.
    """
    reader = _Reader(list(entries.values()), progress)
    return {name: _LazyTensor(entry, reader) for name, entry in entries.items()}


class _Reader:
    """Reads dense tensors for transformers' loader threads and counts the bytes."""

    def __init__(self, entries: Sequence[TensorEntry], progress: Progress | None) -> None:
        self._total = sum(entry.num_bytes for entry in entries)
        self._done = 0
        self._progress = progress
        self._lock = threading.Lock()

    def read(self, entry: TensorEntry) -> Tensor:
        data = torch.empty(entry.num_bytes, dtype=torch.uint8)
        with open(entry.path, "rb", buffering=0) as stream:
            stream.seek(entry.offset)
            view, position = memoryview(cast("bytearray", data.numpy())), 0
            while position < entry.num_bytes:
                count = stream.readinto(view[position:])
                if not count:
                    raise CheckpointError(
                        f"{entry.path}: ends inside a tensor", hint="download the file again"
                    )
                position += count
        with self._lock:
            self._done += entry.num_bytes
            if self._progress is not None:
                self._progress(self._done, self._total)
        return data.view(torch_dtype(entry.dtype)).view(entry.shape)


class _LazyTensor:
    """A tensor transformers has not asked for yet; looks like safetensors' slices."""

    def __init__(self, entry: TensorEntry, reader: _Reader) -> None:
        self._entry = entry
        self._reader = reader
        self.dtype = torch_dtype(entry.dtype)

    def __getitem__(self, key: Any) -> Tensor:
        return self._reader.read(self._entry)[key]

    def get_shape(self) -> list[int]:
        return list(self._entry.shape)

    def get_dtype(self) -> str:
        return self._entry.dtype

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def numel(self) -> int:
        return math.prod(self._entry.shape)
