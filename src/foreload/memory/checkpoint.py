"""Index the tensors of a safetensors checkpoint from its headers alone.

Everything a header claims is checked before anything is allocated or believed, so a damaged or
hostile file ends in a `CheckpointError` that names the file and the tensor. This module reads
headers and `config.json`, never a tensor, and must not import torch.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from foreload.errors import CheckpointError
from foreload.types import FileStamp

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["ITEM_BITS", "CheckpointIndex", "TensorEntry", "read_json", "read_stamp"]

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# the safetensors library refuses longer headers too
MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 32

ITEM_BITS: Mapping[str, int] = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
}

_REDOWNLOAD = "download the file again"
_CONVERT = (
    "foreload reads safetensors only: use the model's safetensors repository, or load it once "
    "with transformers and save it with save_pretrained"
)


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies: `offset` counts bytes from the start of the file at `path`.

    `stamp` is the file's from before its header was read.
    """

    path: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int
    stamp: FileStamp


@dataclass(frozen=True, slots=True)
class CheckpointIndex:
    """The tensors of a checkpoint by name, without their bytes.

    Attributes:
        directory: Folder of the checkpoint.
        entries: Every tensor of every shard.
        files: The safetensors files, sorted by name.
        identity: Hex digest of `config.json`, every header and every file size.
    """

    directory: Path
    entries: Mapping[str, TensorEntry]
    files: tuple[str, ...]
    identity: str

    @classmethod
    def open(cls, directory: str | Path) -> CheckpointIndex:
        """Read and check the headers of the checkpoint in `directory`.

        Args:
            directory: Folder with `config.json` and safetensors files.

        Returns:
            The index; no file stays open.

        Raises:
            CheckpointError: The folder holds no usable safetensors checkpoint, a header does not
                agree with its file, or `model.safetensors.index.json` does not agree with the
                shards.

        Cost:
            One read of each header and of `config.json`; no tensor is read.
        """
        folder = Path(directory)
        weight_map = _read_weight_map(folder)
        files = _find_files(folder, weight_map)
        digest = hashlib.sha256(_read_bytes(folder / "config.json"))
        entries: dict[str, TensorEntry] = {}
        for file in files:
            header, stamp, raw = _read_header(file)
            digest.update(file.name.encode())
            digest.update(struct.pack("<QQ", stamp.num_bytes, len(raw)))
            digest.update(raw)
            for name, entry in _read_entries(file, header, 8 + len(raw), stamp):
                if name in entries:
                    other = Path(entries[name].path).name
                    raise CheckpointError(
                        f"tensor {name!r} is stored twice: in {other} and in {file.name}",
                        hint="remove the shards that do not belong to this checkpoint",
                    )
                entries[name] = entry
        if weight_map is not None:
            _check_weight_map(folder, weight_map, entries)
        if not entries:
            raise CheckpointError(
                f"{folder}: the safetensors files hold no tensors", hint=_REDOWNLOAD
            )
        return cls(folder, entries, tuple(str(file) for file in files), digest.hexdigest())

    @property
    def total_bytes(self) -> int:
        """Give the bytes of all tensors."""
        return sum(entry.num_bytes for entry in self.entries.values())

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __getitem__(self, name: str) -> TensorEntry:
        try:
            return self.entries[name]
        except KeyError:
            raise CheckpointError(f"{self.directory} has no tensor {name!r}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def read_json(path: Path) -> dict[str, Any]:
    """Give the JSON object in `path`; raise CheckpointError where there is none."""
    try:
        value = json.loads(_read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})", hint=_REDOWNLOAD) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_stamp(descriptor: int) -> FileStamp:
    """Give the stamp of an open file, which a change in place changes and a replacement not."""
    status = os.fstat(descriptor)
    return FileStamp(status.st_size, status.st_mtime_ns)


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent} has no {path.name}",
            hint="give the folder that holds config.json and the safetensors files",
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error


def _read_weight_map(folder: Path) -> dict[str, str] | None:
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise CheckpointError(
            f"checkpoint {folder} {what}",
            hint="give a folder with config.json and safetensors files, or a Hub model name",
        )
    path = folder / INDEX_NAME
    if not path.exists():
        return None
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: has no weight_map", hint=_REDOWNLOAD)
    for name, file in weight_map.items():
        if not isinstance(file, str) or os.path.basename(file) != file or file in ("", ".", ".."):
            raise CheckpointError(f"{path}: tensor {name!r} points at {file!r}, not a file name")
    return weight_map


def _find_files(folder: Path, weight_map: dict[str, str] | None) -> list[Path]:
    if weight_map is not None:
        files = [folder / name for name in sorted(set(weight_map.values()))]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise CheckpointError(
                f"{folder}: {len(missing)} of {len(files)} shards are missing: {_some(missing)}",
                hint="download the missing shards; an interrupted download can be resumed",
            )
        return files
    if (folder / SINGLE_NAME).is_file():
        return [folder / SINGLE_NAME]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        _refuse_without_safetensors(folder)
    return files


def _refuse_without_safetensors(folder: Path) -> None:
    names = sorted(path.name for path in folder.iterdir())
    for suffixes, kind in (
        ((".gguf",), "GGUF"),
        ((".bin", ".pt", ".pth", ".ckpt"), "pickle"),
        ((".h5", ".msgpack"), "TensorFlow or Flax"),
    ):
        found = [name for name in names if name.endswith(suffixes)]
        if found:
            raise CheckpointError(
                f"{folder} holds a {kind} checkpoint ({_some(found)}), no safetensors files",
                hint=_CONVERT,
            )
    what = f"holds no safetensors files ({_some(names)})" if names else "is empty"
    raise CheckpointError(
        f"checkpoint {folder} {what}",
        hint="give the folder that holds config.json and the safetensors files",
    )


def _read_header(file: Path) -> tuple[dict[str, Any], FileStamp, bytes]:
    try:
        with file.open("rb") as stream:
            stamp = read_stamp(stream.fileno())
            size = stamp.num_bytes
            prefix = stream.read(8)
            if len(prefix) < 8:
                raise CheckpointError(
                    f"{file}: truncated, {size} bytes are no safetensors file", hint=_REDOWNLOAD
                )
            (length,) = struct.unpack("<Q", prefix)
            if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(
                    f"{file}: the header claims {length:,} bytes in a file of {size:,}; this is "
                    "no safetensors file, or it is damaged or truncated",
                    hint=_REDOWNLOAD,
                )
            raw = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error})") from error
    if len(raw) != length:
        raise CheckpointError(f"{file}: the header ends early", hint=_REDOWNLOAD)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique_pairs)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file}: the header is not valid JSON ({error})", hint=_REDOWNLOAD
        ) from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: the header is not a JSON object", hint=_REDOWNLOAD)
    return header, stamp, raw


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {key!r} stands twice")
        result[key] = value
    return result


def _read_entries(
    file: Path, header: dict[str, Any], data_start: int, stamp: FileStamp
) -> list[tuple[str, TensorEntry]]:
    result = []
    for name, record in header.items():
        if name != "__metadata__":
            result.append((name, _read_entry(file, name, record, data_start, stamp)))
    end, previous = data_start, ""
    for name, entry in sorted(result, key=lambda pair: (pair[1].offset, pair[1].num_bytes)):
        if entry.num_bytes and entry.offset < end:
            raise CheckpointError(
                f"{file}: tensors {previous!r} and {name!r} overlap", hint=_REDOWNLOAD
            )
        if entry.num_bytes:
            end, previous = entry.offset + entry.num_bytes, name
    return result


def _read_entry(
    file: Path, name: str, record: object, data_start: int, stamp: FileStamp
) -> TensorEntry:
    def fail(what: str) -> CheckpointError:
        return CheckpointError(f"{file}: tensor {name!r} {what}", hint=_REDOWNLOAD)

    if not isinstance(record, dict):
        raise fail("is not described by a JSON object")
    dtype, shape, offsets = record.get("dtype"), record.get("shape"), record.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in ITEM_BITS:
        raise fail(f"has the unknown element type {_brief(dtype)}")
    if not _are_counts(shape) or len(shape) > MAX_DIMENSIONS:
        raise fail(f"has the impossible shape {_brief(shape)}")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise fail(f"has the impossible data_offsets {_brief(offsets)}")
    begin, end = offsets
    if begin > end or data_start + end > stamp.num_bytes:
        raise fail(
            f"claims bytes {begin:,} to {end:,}, but the file holds "
            f"{stamp.num_bytes - data_start:,} bytes of data: it is damaged or truncated"
        )
    bits = math.prod(shape) * ITEM_BITS[dtype]
    if bits != 8 * (end - begin):
        raise fail(f"takes {end - begin:,} bytes, which is not shape {shape} of {dtype}")
    return TensorEntry(str(file), dtype, tuple(shape), data_start + begin, end - begin, stamp)


def _are_counts(value: object) -> TypeGuard[list[int]]:
    # bool is an int to Python and would pass as a dimension
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_weight_map(
    folder: Path, weight_map: dict[str, str], entries: Mapping[str, TensorEntry]
) -> None:
    for name, file in weight_map.items():
        entry = entries.get(name)
        if entry is None:
            raise CheckpointError(
                f"{folder / INDEX_NAME} places tensor {name!r} in {file}, which does not hold it",
                hint=_REDOWNLOAD,
            )
        if os.path.basename(entry.path) != file:
            raise CheckpointError(
                f"{folder / INDEX_NAME} places tensor {name!r} in {file}, but "
                f"{Path(entry.path).name} holds it",
                hint=_REDOWNLOAD,
            )
    unlisted = [name for name in entries if name not in weight_map]
    if unlisted:
        raise CheckpointError(
            f"{folder / INDEX_NAME} does not list {len(unlisted)} tensors of its shards: "
            f"{_some(unlisted)}",
            hint="the index and the shards come from different checkpoints: download both again",
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
