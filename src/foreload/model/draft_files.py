"""A draft kept as a folder in the cache directory: built in one pass, and mapped from there.

One expert at a time is in memory while it is built, and an unfinished folder is none. Of several
processes that want the same draft one builds it, and the others wait.
"""

from __future__ import annotations

import fcntl
import json
import logging
import mmap
import shutil
from contextlib import closing, contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from foreload.errors import CheckpointError
from foreload.memory.checkpoint import CheckpointIndex, read_json
from foreload.memory.expert_reader import read_experts
from foreload.memory.writer import SafetensorsStreamWriter, remove_unfinished
from foreload.model.draft import DraftExperts
from foreload.model.draft_layout import DraftLayout, draft_bytes, draft_layouts, quantise_expert

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from torch import Tensor

    from foreload.model.sites import MoeSite
    from foreload.ops.cpu import PackedMatrix
    from foreload.types import ExpertPlan

    Plans = Sequence[Sequence[ExpertPlan]]

__all__ = [
    "build_draft",
    "check_draft",
    "draft_folder",
    "has_draft",
    "read_draft",
    "read_or_build_draft",
]

logger = logging.getLogger(__name__)

_VERSION = 1
_WITNESSES = 64
_POPULATE_READ = 22
"""Linux' MADV_POPULATE_READ, which Python has no name for: reads a mapping in, in order."""
_REBUILD = "delete that folder; it is built again when it is next asked for"


def draft_folder(cache_dir: Path, identity: str, kind: str) -> Path:
    """Give where a checkpoint's draft lies; processors lay int4 out differently."""
    processor = torch.backends.cpu.get_cpu_capability().lower().replace(" ", "-")
    return cache_dir / "draft" / f"{identity[:32]}-{kind}-{processor}"


def has_draft(folder: Path) -> bool:
    """Tell whether a draft has been built there; `check_draft` tells whether it can be used."""
    return (folder / "config.json").is_file()


def read_or_build_draft(
    sites: Sequence[MoeSite],
    plans: Plans,
    identity: str,
    folder: Path,
    kind: str,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> DraftExperts:
    """Map a draft, built first where there is none; waits for another process that builds it.

    Arguments and errors are those of `build_draft` and `read_draft`.
    """
    if not has_draft(folder):
        with _wait_turn(folder):
            # Whoever had the turn before may have built it.
            if not has_draft(folder):
                logger.info("building the draft in %s", folder)
                build_draft(sites, plans, identity, folder, kind, progress=progress)
    return read_draft(sites, plans, identity, folder, kind)


def build_draft(
    sites: Sequence[MoeSite],
    plans: Plans,
    identity: str,
    folder: Path,
    kind: str,
    *,
    importance: Callable[[int, str], Tensor | None] = lambda layer, name: None,
    search: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Quantise every expert of a checkpoint into `folder`, all of it or nothing.

    Args:
        sites: The model's MoE layers.
        plans: How to read each expert.
        identity: The checkpoint's identity.
        folder: Where the draft appears; an earlier one is replaced.
        kind: "int4" or "int8".
        importance: Gives, by layer and matrix ("first" or "down"), how much errors in each input
            column count; None counts all alike.
        search: Whether to search for the best scales.
        progress: Called with (done, total) bytes of experts.

    Raises:
        CapacityError: The disk is full.
        TransferError: An expert cannot be read.

    Cost:
        Reads every expert once; memory for two experts and what quantising one takes.
    """
    layouts = draft_layouts(sites, plans, kind)
    names = {
        _name(layer, expert): (layer, expert)
        for layer, row in enumerate(plans)
        for expert in range(len(row))
    }
    if folder.exists():
        shutil.rmtree(folder)
    with SafetensorsStreamWriter(folder) as writer:
        for name, (layer, _) in names.items():
            writer.declare(name, torch.uint8, (layouts[layer].num_bytes,))
        witness: list[float] = []
        order = [names[name] for name in writer.names]
        total = sum(plans[layer][expert].read_bytes for layer, expert in order)
        done = 0
        read = read_experts([plans[layer][expert] for layer, expert in order])
        with closing(read):
            for (layer, expert), tensors in zip(order, read, strict=True):
                layout, experts = layouts[layer], sites[layer].experts
                raw = quantise_expert(
                    layout, experts, tensors, importance=partial(importance, layer), search=search
                )
                witness = witness or _testify(layout.matrix(raw, "first"))
                writer.write(_name(layer, expert), raw)
                done += plans[layer][expert].read_bytes
                if progress is not None:
                    progress(done, total)
        (writer.directory / "config.json").write_text(
            json.dumps({**_describe(identity, kind, layouts), "witness": witness}) + "\n"
        )


def check_draft(
    sites: Sequence[MoeSite], plans: Plans, identity: str, folder: Path, kind: str
) -> CheckpointIndex:
    """Make sure that a draft can be used, by its headers and one of its experts.

    Args:
        sites: The model's MoE layers.
        plans: How to read each expert.
        identity: The checkpoint's identity.
        folder: Where the draft lies.
        kind: "int4" or "int8".

    Returns:
        Where its experts lie.

    Raises:
        CheckpointError: It is missing, damaged, another checkpoint's, or laid out for another
            processor or version of torch.
    """
    layouts = draft_layouts(sites, plans, kind)
    try:
        found = read_json(folder / "config.json")
        index = CheckpointIndex.open(folder)
    except CheckpointError as error:
        raise CheckpointError(f"cannot read the draft: {error}", hint=_REBUILD) from error
    witness = found.pop("witness", None)
    if found != json.loads(json.dumps(_describe(identity, kind, layouts))):
        raise CheckpointError(
            f"{folder} was made from another checkpoint, or by another version", hint=_REBUILD
        )
    for layer, (layout, row) in enumerate(zip(layouts, plans, strict=True)):
        for expert in range(len(row)):
            if index[_name(layer, expert)].num_bytes != layout.num_bytes:
                raise CheckpointError(f"{folder}: experts of another size", hint=_REBUILD)
    entry = index[_name(0, 0)]
    with open(entry.path, "rb") as stream:
        stream.seek(entry.offset)
        raw = torch.frombuffer(bytearray(stream.read(entry.num_bytes)), dtype=torch.uint8)
    if _testify(layouts[0].matrix(raw, "first")) != witness:
        raise CheckpointError(
            f"{folder} is damaged, or laid out for another version of torch", hint=_REBUILD
        )
    return index


def read_draft(
    sites: Sequence[MoeSite], plans: Plans, identity: str, folder: Path, kind: str
) -> DraftExperts:
    """Map a draft that `build_draft` made; arguments and errors are those of `check_draft`."""
    index = check_draft(sites, plans, identity, folder, kind)
    layouts = draft_layouts(sites, plans, kind)
    files = {path: _map_file(path) for path in index.files}
    layers = []
    for layer, (layout, row) in enumerate(zip(layouts, plans, strict=True)):
        entries = [index[_name(layer, expert)] for expert in range(len(row))]
        layers.append(
            layout.layer([files[e.path][e.offset : e.offset + e.num_bytes] for e in entries])
        )
    return DraftExperts(layers, kind, draft_bytes(sites, plans, kind))


@contextmanager
def _wait_turn(folder: Path) -> Iterator[None]:
    """Be the only process that builds in `folder`; the system ends the turn of one that dies."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # The file stays: removed, it would be locked by one process and made anew by the next.
        file = open(folder.with_name(f".{folder.name}.lock"), "ab")  # noqa: SIM115
    except OSError as error:
        raise CheckpointError(
            f"cannot build a draft in {folder.parent}: {error}",
            hint="choose another cache_dir, one that can be written to",
        ) from error
    with file as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.warning("waiting for another process that builds the draft in %s", folder)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            # Some network filesystems have no locks. Still nobody sees a draft that is not whole.
            logger.info("nothing can be locked in %s: %s", folder.parent, error.strerror)
            yield
            return
        remove_unfinished(folder)
        yield


def _name(layer: int, expert: int) -> str:
    return f"layers.{layer}.experts.{expert}.draft"


def _describe(identity: str, kind: str, layouts: Sequence[DraftLayout]) -> dict[str, Any]:
    return {
        "version": _VERSION,
        "identity": identity,
        "kind": kind,
        "formats": [[f.first, f.down, f.num_bytes] for f in layouts],
    }


def _testify(matrix: PackedMatrix) -> list[float]:
    """Give a few outputs of a matrix, by which a layout of another time is recognised."""
    columns = matrix.format.num_columns
    row = torch.linspace(-1, 1, columns).to(torch.bfloat16)[None]
    values: list[float] = matrix(row)[0, :_WITNESSES].float().tolist()
    return values


def _map_file(path: str) -> Tensor:
    """Map a file's bytes, read in as far as the system allows; never written back."""
    with open(path, "rb") as stream:
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    with suppress(OSError, ValueError):
        mapped.madvise(_POPULATE_READ)
    return torch.frombuffer(mapped, dtype=torch.uint8)
