"""The draft: the same model with quantised experts, all of them in memory.

Everything but the routed experts is the target's own: attention, routers, embeddings, KV cache. The
quantised experts are made from the checkpoint in one pass, one expert in memory at a time, kept as
a folder in the cache directory, and mapped from there. This module decides nothing about how far
to draft, and verifies nothing.
"""

from __future__ import annotations

import json
import math
import mmap
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from foreload.errors import CheckpointError, ForeloadError
from foreload.memory.arena import SlotArena, slot_bytes
from foreload.memory.checkpoint import CheckpointIndex, read_json
from foreload.memory.disk import DiskBackend
from foreload.memory.writer import SafetensorsStreamWriter
from foreload.ops.cpu import (
    LayerDraft,
    MatrixFormat,
    PackedMatrix,
    UnpackedMatrix,
    draft_forward,
    matrix_format,
    nibble_places,
    pack,
    unpack,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from foreload.model.sites import MoeSite
    from foreload.types import ExpertPlan, ExpertTensor

    Plans = Sequence[Sequence[ExpertPlan]]

__all__ = [
    "DRAFT_BITS",
    "DraftExperts",
    "build_draft",
    "check_draft",
    "draft_bytes",
    "draft_folder",
    "has_draft",
    "pack_expert",
    "read_draft",
    "read_experts",
]

DRAFT_BITS: Mapping[str, int] = {"int4": 4, "int8": 8}
"""Bits per weight of each kind of draft."""

_VERSION = 1
_WITNESSES = 64
_ALIGNMENT = 64
_POPULATE_READ = 22
"""Linux' MADV_POPULATE_READ, which Python has no name for: reads a mapping in, in order."""


class DraftExperts:
    """The quantised experts of every MoE layer.

    Args:
        layers: By MoE layer.
        kind: "int4" or "int8".
        num_bytes: Memory they take.
    """

    def __init__(self, layers: Sequence[LayerDraft], kind: str, num_bytes: int) -> None:
        self.kind = kind
        self.num_bytes = num_bytes
        self._layers = list(layers)

    def run_layer(
        self,
        layer: int,
        experts: Any,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
    ) -> Tensor:
        """Compute one MoE layer on the quantised experts; arguments as transformers gives them."""
        if not self._layers:
            raise ForeloadError("the draft is gone: its engine is closed", hint="open a new one")
        return draft_forward(
            self._layers[layer], experts, hidden_states, top_k_index, top_k_weights
        )

    def without_kernels(self) -> DraftExperts:
        """Copy with plain codes, dequantised at every use: what packed kernels save."""
        known: dict[MatrixFormat, Tensor] = {}

        def bare(matrices: Sequence[PackedMatrix | UnpackedMatrix]) -> list[UnpackedMatrix]:
            found = []
            for matrix in matrices:
                if isinstance(matrix, PackedMatrix):
                    shape = matrix.format
                    if shape.bits == 4 and shape not in known:
                        known[shape] = nibble_places(shape)
                    found.append(unpack(matrix, known.get(shape)))
            return found

        layers = [
            layer._replace(first=bare(layer.first), down=bare(layer.down)) for layer in self._layers
        ]
        return DraftExperts(layers, self.kind, self.num_bytes)

    def release(self) -> None:
        """Let go of the memory; it cannot run afterwards."""
        self._layers = []
        self.num_bytes = 0


class _Part(NamedTuple):
    """A tensor inside the bytes of one expert."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    position: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class _LayerFormat:
    """How the experts of one layer lie in the draft.

    Attributes:
        first: Format of gate and up projections.
        down: Format of down projections.
        parts: The tensors of one expert, in order.
        num_bytes: Bytes of one expert.
    """

    first: MatrixFormat
    down: MatrixFormat
    parts: tuple[_Part, ...]
    num_bytes: int

    def views(self, raw: Tensor) -> dict[str, Tensor]:
        """View the bytes of one expert as its tensors."""
        views = {}
        for part in self.parts:
            piece = raw[part.position : part.position + part.num_bytes]
            views[part.name] = piece.view(part.dtype).view(part.shape)
        return views


def draft_folder(cache_dir: Path, identity: str, kind: str) -> Path:
    """Give where a checkpoint's draft lies; processors lay int4 out differently."""
    processor = torch.backends.cpu.get_cpu_capability().lower().replace(" ", "-")
    return cache_dir / "draft" / f"{identity[:32]}-{kind}-{processor}"


def has_draft(folder: Path) -> bool:
    """Tell whether a draft has been built there; `check_draft` tells whether it can be used."""
    return (folder / "config.json").is_file()


def draft_bytes(sites: Sequence[MoeSite], plans: Plans, kind: str) -> int:
    """Give the memory a draft will take, from shapes alone."""
    formats = _formats(sites, plans, kind)
    return sum(f.num_bytes * len(layer) for f, layer in zip(formats, plans, strict=True))


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
    formats = _formats(sites, plans, kind)
    names = {
        _name(layer, expert): (layer, expert)
        for layer, row in enumerate(plans)
        for expert in range(len(row))
    }
    if folder.exists():
        shutil.rmtree(folder)
    with SafetensorsStreamWriter(folder) as writer:
        for name, (layer, _) in names.items():
            writer.declare(name, torch.uint8, (formats[layer].num_bytes,))
        witness: list[float] = []
        order = [names[name] for name in writer.names]
        total = sum(plans[layer][expert].read_bytes for layer, expert in order)
        done = 0
        read = read_experts([plans[layer][expert] for layer, expert in order])
        with closing(read):
            for (layer, expert), tensors in zip(order, read, strict=True):
                layout, experts = formats[layer], sites[layer].experts
                packed = {
                    name: pack(
                        _matrix(tensors, experts, name),
                        shape,
                        importance=importance(layer, name),
                        search=search,
                    )
                    for name, shape in (("first", layout.first), ("down", layout.down))
                }
                witness = witness or _testify(packed["first"])
                writer.write(_name(layer, expert), _lay_out(layout, packed, tensors, experts))
                done += plans[layer][expert].read_bytes
                if progress is not None:
                    progress(done, total)
        (writer.directory / "config.json").write_text(
            json.dumps({**_describe(identity, kind, formats), "witness": witness}) + "\n"
        )


def pack_expert(
    experts: Any, plan: ExpertPlan, tensors: Mapping[str, Tensor], bits: int
) -> LayerDraft:
    """Quantise one expert, as a layer of one: to see what it takes."""
    layout = _layer_format(experts, plan, bits)
    packed = {
        "first": pack(_matrix(tensors, experts, "first"), layout.first, search=False),
        "down": pack(_matrix(tensors, experts, "down"), layout.down, search=False),
    }
    return _assemble(layout, [layout.views(_lay_out(layout, packed, tensors, experts))])


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
    formats = _formats(sites, plans, kind)
    try:
        found = read_json(folder / "config.json")
        index = CheckpointIndex.open(folder)
    except CheckpointError as error:
        raise CheckpointError(f"cannot read the draft: {error}", hint=_REBUILD) from error
    witness = found.pop("witness", None)
    if found != json.loads(json.dumps(_describe(identity, kind, formats))):
        raise CheckpointError(
            f"{folder} was made from another checkpoint, or by another version", hint=_REBUILD
        )
    for layer, (layout, row) in enumerate(zip(formats, plans, strict=True)):
        for expert in range(len(row)):
            if index[_name(layer, expert)].num_bytes != layout.num_bytes:
                raise CheckpointError(f"{folder}: experts of another size", hint=_REBUILD)
    entry = index[_name(0, 0)]
    with open(entry.path, "rb") as stream:
        stream.seek(entry.offset)
        raw = torch.frombuffer(bytearray(stream.read(entry.num_bytes)), dtype=torch.uint8)
    views = formats[0].views(raw)
    first = PackedMatrix(formats[0].first, views["first.weight"], views["first.scales"])
    if _testify(first) != witness:
        raise CheckpointError(
            f"{folder} is damaged, or laid out for another version of torch", hint=_REBUILD
        )
    return index


def read_draft(
    sites: Sequence[MoeSite], plans: Plans, identity: str, folder: Path, kind: str
) -> DraftExperts:
    """Map a draft that `build_draft` made; arguments and errors are those of `check_draft`."""
    index = check_draft(sites, plans, identity, folder, kind)
    formats = _formats(sites, plans, kind)
    files = {path: _map_file(path) for path in index.files}
    layers = []
    for layer, (layout, row) in enumerate(zip(formats, plans, strict=True)):
        views = []
        for expert in range(len(row)):
            entry = index[_name(layer, expert)]
            raw = files[entry.path][entry.offset : entry.offset + entry.num_bytes]
            views.append(layout.views(raw))
        layers.append(_assemble(layout, views))
    num_bytes = sum(f.num_bytes * len(row) for f, row in zip(formats, plans, strict=True))
    return DraftExperts(layers, kind, num_bytes)


_REBUILD = "delete that folder; it is built again when it is next asked for"


def _name(layer: int, expert: int) -> str:
    return f"layers.{layer}.experts.{expert}.draft"


def _describe(identity: str, kind: str, formats: Sequence[_LayerFormat]) -> dict[str, Any]:
    return {
        "version": _VERSION,
        "identity": identity,
        "kind": kind,
        "formats": [[f.first, f.down, f.num_bytes] for f in formats],
    }


def _formats(sites: Sequence[MoeSite], plans: Plans, kind: str) -> list[_LayerFormat]:
    bits = DRAFT_BITS[kind]
    return [
        _layer_format(site.experts, layer[0], bits)
        for site, layer in zip(sites, plans, strict=True)
    ]


def _layer_format(experts: Any, plan: ExpertPlan, bits: int) -> _LayerFormat:
    tensors = {tensor.name: tensor for tensor in plan.tensors}
    first = _shape_of(tensors[_first_name(experts)], experts, bits)
    down = _shape_of(tensors["down_proj"], experts, bits)
    wanted: list[tuple[str, tuple[int, ...], torch.dtype]] = []
    for name, shape in (("first", first), ("down", down)):
        kind = torch.uint8 if bits == 4 else torch.int8
        wanted.append((f"{name}.weight", shape.weight_shape, kind))
        wanted.append((f"{name}.scales", shape.scale_shape, torch.bfloat16))
        bias = tensors.get(_bias_name(experts, name)) if experts.has_bias else None
        if bias is not None:
            wanted.append((f"{name}.bias", bias.shape, torch.bfloat16))
    parts, at = [], 0
    for part_name, part_shape, dtype in wanted:
        part = _Part(part_name, tuple(part_shape), dtype, at)
        parts.append(part)
        at += math.ceil(part.num_bytes / _ALIGNMENT) * _ALIGNMENT
    return _LayerFormat(first, down, tuple(parts), at)


def _first_name(experts: Any) -> str:
    return "gate_up_proj" if experts.has_gate else "up_proj"


def _bias_name(experts: Any, matrix: str) -> str:
    return f"{_first_name(experts) if matrix == 'first' else 'down_proj'}_bias"


def _shape_of(tensor: ExpertTensor, experts: Any, bits: int) -> MatrixFormat:
    num_rows, num_columns = tensor.shape
    if experts.is_transposed:
        num_rows, num_columns = num_columns, num_rows
    return matrix_format(num_rows, num_columns, bits)


def _matrix(tensors: Mapping[str, Tensor], experts: Any, matrix: str) -> Tensor:
    """Give a projection as (N, K), whichever way the model multiplies with it."""
    weight = tensors[_first_name(experts) if matrix == "first" else "down_proj"]
    return weight.t() if experts.is_transposed else weight


def read_experts(
    plans: Sequence[ExpertPlan],
) -> Generator[dict[str, Tensor], None, None]:
    """Read experts one after the other, the next one while this one is worked on.

    Args:
        plans: How to read each of them.

    Yields:
        An expert's parameters by name, valid until the next one is asked for.

    Raises:
        TransferError: One cannot be read.

    Cost:
        Memory for two experts.
    """
    arena = SlotArena(2, max(slot_bytes(plan) for plan in plans))
    backend = DiskBackend(arena)

    def read(number: int) -> None:
        for piece in range(backend.num_pieces(plans[number])):
            backend.copy_piece(plans[number], number % 2, piece)

    with ThreadPoolExecutor(1, thread_name_prefix="foreload-draft") as pool:
        try:
            coming = pool.submit(read, 0)
            for number, plan in enumerate(plans):
                coming.result()
                if number + 1 < len(plans):
                    coming = pool.submit(read, number + 1)
                yield arena.tensors(number % 2, plan)
        finally:
            coming.cancel()
            pool.shutdown()
            backend.close()
            arena.release()


def _lay_out(
    layout: _LayerFormat,
    packed: Mapping[str, PackedMatrix],
    tensors: Mapping[str, Tensor],
    experts: Any,
) -> Tensor:
    """Give the bytes of one expert."""
    raw = torch.zeros(layout.num_bytes, dtype=torch.uint8)
    for name, view in layout.views(raw).items():
        matrix, _, what = name.partition(".")
        if what == "bias":
            view.copy_(tensors[_bias_name(experts, matrix)])
        else:
            view.copy_(getattr(packed[matrix], what))
    return raw


def _assemble(layout: _LayerFormat, views: Sequence[Mapping[str, Tensor]]) -> LayerDraft:
    def matrices(name: str, shape: MatrixFormat) -> list[PackedMatrix]:
        return [PackedMatrix(shape, v[f"{name}.weight"], v[f"{name}.scales"]) for v in views]

    def biases(name: str) -> Tensor | None:
        if f"{name}.bias" not in views[0]:
            return None
        return torch.stack([v[f"{name}.bias"] for v in views])

    return LayerDraft(
        matrices("first", layout.first),
        matrices("down", layout.down),
        biases("first"),
        biases("down"),
    )


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
