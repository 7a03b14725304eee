"""Write a safetensors checkpoint larger than memory, one tensor at a time.

safetensors' own `save_file` wants every tensor at once. Here all shapes are declared first, so that
the headers are known, and the bytes follow in the planned order. The checkpoint appears under its
name only when it is complete: until then it grows in a directory beside it, which any failure
removes. This module must not know what the tensors mean.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import uuid
from dataclasses import dataclass, field
from itertools import groupby
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Self

import torch
from torch import Tensor

from foreload.errors import CapacityError, ConfigError, ShapeError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import TracebackType

__all__ = ["SafetensorsStreamWriter", "find_unfinished", "remove_unfinished"]

# Direct reads want whole pages: data that starts on a page lets tensors of whole pages do so too.
DATA_ALIGNMENT = 4096

DTYPE_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
}

_EXPERT = re.compile(r".*\.experts\.\d+\.")

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True, slots=True)
class _Entry:
    """One declared tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Give the tensor's size in the file."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(slots=True, eq=False)
class _Shard:
    """One file: its tensors in file order, and their bytes."""

    entries: list[_Entry] = field(default_factory=list)
    num_bytes: int = 0

    def header(self) -> bytes:
        """Give the length, the JSON and the padding that come before the data."""
        table: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for entry in self.entries:
            end = offset + entry.num_bytes
            table[entry.name] = {
                "dtype": DTYPE_CODES[entry.dtype],
                "shape": list(entry.shape),
                "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(table, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % DATA_ALIGNMENT)
        return len(text).to_bytes(8, "little") + text


class SafetensorsStreamWriter:
    """Stream a checkpoint to disk, all of it or nothing.

    Use it as a context manager: declare every tensor, then write each of `names` in that order,
    which is the names' own with numbers sorted by value. An expert's tensors stay in one file.
    Other files of the checkpoint go into `directory` in the meantime. Leaving the block without an
    exception syncs everything and renames `directory` to `output_dir`; with one, all is removed.
    As `save_pretrained` does, one shard is called `model.safetensors` and several get an index.

    Args:
        output_dir: Where the checkpoint appears. Must not exist, or be empty.
        shard_bytes: Data of one file at most. Only a larger tensor or expert exceeds it.

    Raises:
        ConfigError: `output_dir` exists and holds something.
    """

    def __init__(self, output_dir: str | Path, *, shard_bytes: int = 4_000_000_000) -> None:
        if shard_bytes < 1:
            raise ConfigError(f"shard_bytes must be positive, not {shard_bytes}")
        self._output_dir = Path(output_dir).resolve()
        self._shard_bytes = shard_bytes
        self._refuse_existing()
        tag = uuid.uuid4().hex[:8]
        self.directory = self._output_dir.with_name(f".{self._output_dir.name}.{tag}.partial")
        self._entries: dict[str, _Entry] = {}
        self._shards: list[_Shard] = []
        self._order: list[_Entry] = []
        self._starts: dict[int, _Shard] = {}
        self._num_written = 0
        self._bytes_written = 0
        self._file: BinaryIO | None = None

    def __enter__(self) -> Self:
        self._output_dir.parent.mkdir(parents=True, exist_ok=True)
        self.directory.mkdir()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                with self._disk_errors():
                    self._finish()
        finally:
            if self._file is not None:
                # What is still buffered may not fit; the file is going away.
                with contextlib.suppress(OSError):
                    self._file.close()
            shutil.rmtree(self.directory, ignore_errors=True)

    @property
    def names(self) -> tuple[str, ...]:
        """Give the order in which the tensors must be written; ends the declarations."""
        self._plan()
        return tuple(entry.name for entry in self._order)

    @property
    def total_bytes(self) -> int:
        """Give the bytes of all declared tensors."""
        return sum(entry.num_bytes for entry in self._entries.values())

    @property
    def bytes_written(self) -> int:
        """Give the bytes of tensors written so far."""
        return self._bytes_written

    def declare(self, name: str, dtype: torch.dtype, shape: Iterable[int]) -> None:
        """Announce a tensor.

        Args:
            name: Its name in the checkpoint.
            dtype: Its element type.
            shape: Its shape.

        Raises:
            ConfigError: The name is taken, the type has no place in safetensors, or writing began.
        """
        if self._shards:
            raise ConfigError(f"{name!r} was declared after the file order was fixed")
        if name in self._entries or name == "__metadata__":
            raise ConfigError(f"{name!r} was declared twice or is reserved")
        if dtype not in DTYPE_CODES:
            raise ConfigError(f"{name!r} has the type {dtype}, which this writer does not know")
        self._entries[name] = _Entry(name, dtype, tuple(shape))

    def write(self, name: str, data: Tensor | Iterable[Tensor]) -> None:
        """Write the next tensor.

        Args:
            name: The next of `names`.
            data: The tensor, or consecutive pieces of it in row-major order, of any shape. Only
                one piece is held at a time.

        Raises:
            ConfigError: It is another tensor's turn.
            ShapeError: The data are not what was declared.
            CapacityError: The disk is full.
        """
        self._plan()
        if self._num_written == len(self._order) or self._order[self._num_written].name != name:
            turn = [entry.name for entry in self._order[self._num_written :][:1]]
            raise ConfigError(f"{name!r} was written out of turn; next is {turn or 'nothing'}")
        entry = self._order[self._num_written]
        if isinstance(data, Tensor) and tuple(data.shape) != entry.shape:
            raise ShapeError(f"{name!r} has shape {tuple(data.shape)}, declared was {entry.shape}")
        with self._disk_errors():
            if self._num_written in self._starts:
                self._close_shard()
                self._open_shard(self._starts[self._num_written])
            left = entry.num_bytes
            for piece in (data,) if isinstance(data, Tensor) else data:
                left -= piece.numel() * piece.element_size()
                if piece.dtype != entry.dtype or left < 0:
                    raise ShapeError(
                        f"{name!r} was declared as {entry.shape} of {entry.dtype}, "
                        f"the data are more or are of {piece.dtype}"
                    )
                self._append(piece)
            if left:
                raise ShapeError(f"{name!r} lacks {left:,} of {entry.num_bytes:,} bytes")
            self._num_written += 1

    def _append(self, piece: Tensor) -> None:
        if self._file is not None and piece.numel():
            raw = piece.detach().contiguous().reshape(-1).view(torch.uint8)
            self._file.write(raw.numpy().data)
            self._bytes_written += raw.numel()

    def _plan(self) -> None:
        """Distribute the tensors over shards, and check that the disk can take them."""
        if self._shards:
            return
        if not self._entries:
            raise ConfigError("a checkpoint without tensors cannot be written")
        shard = _Shard()
        ordered = sorted(self._entries.values(), key=lambda entry: _natural(entry.name))
        for _, entries in groupby(ordered, key=lambda entry: _expert(entry.name)):
            group = list(entries)
            size = sum(entry.num_bytes for entry in group)
            if shard.entries and shard.num_bytes + size > self._shard_bytes:
                self._shards.append(shard)
                shard = _Shard()
            shard.entries += group
            shard.num_bytes += size
        self._shards.append(shard)
        for shard in self._shards:
            # Wider types first, as safetensors does: every tensor lies on a multiple of its type.
            shard.entries.sort(key=lambda entry: -entry.dtype.itemsize)
            self._starts[len(self._order)] = shard
            self._order += shard.entries
        needed = self.total_bytes + sum(len(shard.header()) for shard in self._shards)
        free = shutil.disk_usage(self.directory).free
        if needed > free:
            raise self._disk_full(needed, free)

    def _file_name(self, shard: _Shard) -> str:
        if len(self._shards) == 1:
            return "model.safetensors"
        number = self._shards.index(shard) + 1
        return f"model-{number:05d}-of-{len(self._shards):05d}.safetensors"

    def _open_shard(self, shard: _Shard) -> None:
        # Stays open across calls; `_close_shard` or `__exit__` closes it.
        self._file = open(self.directory / self._file_name(shard), "wb")  # noqa: SIM115
        self._file.write(shard.header())

    def _close_shard(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def _finish(self) -> None:
        """Check that nothing is missing, write the index, sync, and give the directory its name."""
        self._plan()
        if self._num_written < len(self._order):
            raise ConfigError(
                f"{len(self._order) - self._num_written} declared tensors were never written, "
                f"first {self._order[self._num_written].name!r}"
            )
        self._close_shard()
        if len(self._shards) > 1:
            files = {
                entry.name: name
                for shard in self._shards
                for name in (self._file_name(shard),)
                for entry in shard.entries
            }
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": files}
            path = self.directory / "model.safetensors.index.json"
            path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        for path in self.directory.iterdir():
            _sync(path)
        _sync(self.directory)
        self._refuse_existing()
        if self._output_dir.exists():
            self._output_dir.rmdir()
        self.directory.rename(self._output_dir)
        _sync(self._output_dir.parent)

    def _refuse_existing(self) -> None:
        path = self._output_dir
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise ConfigError(
                f"{path} exists and is not an empty directory",
                hint="choose another output directory, or remove this one",
            )

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """Turn the system's word for a full disk into ours."""
        try:
            yield
        except OSError as error:
            if error.errno not in _DISK_FULL:
                raise
            free = shutil.disk_usage(self.directory).free
            raise self._disk_full(self.total_bytes - self._bytes_written, free) from error

    def _disk_full(self, needed: int, free: int) -> CapacityError:
        return CapacityError(
            f"the disk is too full to write {self._output_dir}",
            needed_bytes=needed,
            available_bytes=free,
            setting=f"the free space at {self._output_dir.parent}",
        )


def find_unfinished(output_dir: Path) -> list[Path]:
    """Find the folders of writers of `output_dir` that are at work, or were killed."""
    return sorted(output_dir.parent.glob(f".{output_dir.name}.*.partial"))


def remove_unfinished(output_dir: Path) -> None:
    """Remove what writers of `output_dir` left that were killed; no other may be at work."""
    for left in find_unfinished(output_dir):
        shutil.rmtree(left, ignore_errors=True)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort numbers by value: experts 0, 1, ... 10, each with its parts side by side."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def _expert(name: str) -> str:
    """Give what the tensors of one expert share; for any other tensor, its name."""
    found = _EXPERT.match(name)
    return found.group() if found else name


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
