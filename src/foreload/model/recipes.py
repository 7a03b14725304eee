"""Learn how one expert's parameter is made from the bytes a checkpoint stores.

transformers describes a checkpoint's layout as a chain of operations on whole tensors. A recipe is
that chain restricted to one expert: a list of byte ranges to copy where the chain only moves
elements around in large runs, and the chain itself where it does more (dequantise, transpose).
Which of the two it is gets measured, by sending element numbers through the chain once; no
architecture or operation is known by name here.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from dataclasses import dataclass, field, replace
from types import MappingProxyType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foreload.errors import CheckpointError, UnsupportedModelError
from foreload.model.dequantise import guess_dequantiser

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from foreload.model.dequantise import Dequantiser
    from foreload.types import ExpertTensor

__all__ = ["ConvertExpert", "Piece", "Recipe", "Source", "derive_recipe", "torch_dtype"]

# above this many copies per parameter the operations themselves are faster than slicing
MAX_PIECES = 64

_TORCH_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "BOOL": torch.bool,
        "U8": torch.uint8,
        "I8": torch.int8,
        "U16": torch.uint16,
        "I16": torch.int16,
        "U32": torch.uint32,
        "I32": torch.int32,
        "U64": torch.uint64,
        "I64": torch.int64,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F32": torch.float32,
        "F64": torch.float64,
        "C64": torch.complex64,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "F8_E8M0": torch.float8_e8m0fnu,
        "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
        "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    }
)


def torch_dtype(name: str) -> torch.dtype:
    """Give torch's element type for the one safetensors calls `name`."""
    try:
        return _TORCH_DTYPES[name]
    except KeyError:
        raise UnsupportedModelError(
            f"the checkpoint stores elements of type {name}, which foreload cannot run",
            hint="use a bfloat16, block-FP8 or MXFP4 release of the model",
        ) from None


@dataclass(frozen=True, slots=True)
class Source:
    """One stored tensor, restricted to one expert, that a parameter is made from.

    Attributes:
        pattern: The converter's name for it, which its operations look up.
        dtype: Element type as stored.
        shape: Shape of the expert's part, with a leading 1 where the file packs all experts.
    """

    pattern: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Give the bytes of the expert's part."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of bytes of source number `source`, taken over unchanged."""

    source: int
    start: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the sources of one parameter become that parameter.

    Attributes:
        sources: What is read, in the order `build` wants it.
        dtype: Element type of the parameter in memory.
        shape: Shape of the parameter, without the experts dimension.
        pieces: Byte ranges whose concatenation is the parameter in the stored element type, or
            None where `operations` must run.
        operations: transformers' own chain.
        context: What the operations are called with.
        shortcut: Gives what the operations give, faster.
    """

    sources: tuple[Source, ...]
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...] | None
    operations: tuple[Any, ...] = ()
    context: Mapping[str, Any] = field(default_factory=dict, repr=False)
    shortcut: Dequantiser | None = None

    @property
    def is_copy(self) -> bool:
        """Tell whether the stored bytes are the parameter's bytes."""
        return self.pieces is not None and self.sources[0].dtype == self.dtype

    def build(self, parts: Sequence[Tensor]) -> Tensor:
        """Make the parameter from `parts`, one 1-D uint8 tensor per source.

        Returns:
            A contiguous tensor of `shape` and `dtype`; it may be a view of a part.
        """
        if self.shortcut is not None:
            return self.shortcut(parts)
        if self.pieces is None:
            tensors = [
                _reinterpret(part, source.dtype, source.shape)
                for part, source in zip(parts, self.sources, strict=True)
            ]
            value = _run_operations(self.operations, self.context, self.sources, tensors)
            return value.reshape(self.shape).to(self.dtype).contiguous()
        runs = [parts[p.source][p.start : p.start + p.num_bytes] for p in self.pieces]
        joined = runs[0] if len(runs) == 1 else torch.cat(runs)
        return _reinterpret(joined, self.sources[0].dtype, self.shape).to(self.dtype)


@dataclass(frozen=True, slots=True, repr=False)
class ConvertExpert:
    """The `convert` of an `ExpertPlan`: spans as read to parameters by name.

    Holds no tensors, so any number of threads may call it at once.

    Attributes:
        tensors: The expert's parameters.
        recipes: One recipe per parameter.
        places: For each parameter, span and first byte of each of its sources.
    """

    tensors: tuple[ExpertTensor, ...]
    recipes: tuple[Recipe, ...]
    places: tuple[tuple[tuple[int, int], ...], ...]

    def __call__(self, spans: list[Any]) -> Mapping[str, Any]:
        """Make the parameters; they may be views of `spans`."""
        with torch.no_grad():
            return {
                tensor.name: recipe.build(parts) for tensor, recipe, parts in self.stored(spans)
            }

    def stored(self, spans: list[Any]) -> Iterator[tuple[ExpertTensor, Recipe, list[Any]]]:
        """Give each parameter with its recipe and the bytes its sources have in `spans`."""
        for tensor, recipe, places in zip(self.tensors, self.recipes, self.places, strict=True):
            parts = [
                spans[span][start : start + source.num_bytes]
                for (span, start), source in zip(places, recipe.sources, strict=True)
            ]
            yield tensor, recipe, parts


def derive_recipe(
    full_name: str,
    sources: tuple[Source, ...],
    converter: Any | None,
    *,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    config: Any,
) -> Recipe:
    """Learn how `sources` become the parameter `full_name` of one expert.

    Args:
        full_name: The parameter's name in the model.
        sources: Its stored tensors, restricted to one expert.
        converter: transformers' `WeightConverter`, or None where the tensor is only renamed.
        shape: Shape of the parameter without the experts dimension.
        dtype: Element type it shall have in memory.
        config: The model's configuration, which operations may read.

    Returns:
        A recipe that holds for every expert whose sources have these shapes and types.

    Raises:
        CheckpointError: The sources do not make a tensor of that shape.

    Cost:
        Some 20 bytes of scratch per element of the parameter, once.
    """
    if converter is None:
        if len(sources) != 1:
            raise CheckpointError(
                f"{full_name} has {len(sources)} sources in the checkpoint and no rule to join them"
            )
        _check_size(full_name, sources[0].shape, shape)
        return Recipe(sources, dtype, shape, (Piece(0, 0, sources[0].num_bytes),))
    operations = tuple(converter.operations)
    context = {
        "source_patterns": tuple(converter.source_patterns),
        "target_patterns": tuple(converter.target_patterns),
        "full_layer_name": full_name,
        "model": _OneExpertModel(config, shape, dtype),
        "config": config,
        "missing_keys": None,
    }
    pieces = _trace_pieces(full_name, sources, operations, context, shape)
    slow = Recipe(sources, dtype, shape, None, operations, context)
    if pieces is not None:
        recipe = Recipe(sources, dtype, shape, pieces, operations, context)
        return recipe if _agree(recipe, slow) else slow
    _check_operations(full_name, sources, operations, context, shape)
    shortcut = guess_dequantiser(sources, context["source_patterns"], shape, dtype)
    if shortcut is not None:
        recipe = replace(slow, shortcut=shortcut)
        return recipe if _agree(recipe, slow) else slow
    return slow


class _OneExpertModel:
    """What operations ask of the model, answered for a single expert."""

    def __init__(self, config: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.config = config
        self._parameter = torch.empty((1, *shape), dtype=dtype, device="meta")

    def get_parameter(self, name: str) -> Tensor:
        return self._parameter

    def get_submodule(self, name: str) -> SimpleNamespace:
        return _AnyParameter(self._parameter)


class _AnyParameter(SimpleNamespace):
    def __init__(self, parameter: Tensor) -> None:
        super().__init__()
        self._parameter = parameter

    def __getattr__(self, name: str) -> Tensor:
        if name.startswith("_"):
            raise AttributeError(name)
        return self._parameter


def _run_operations(
    operations: tuple[Any, ...],
    context: Mapping[str, Any],
    sources: tuple[Source, ...],
    tensors: Sequence[Tensor],
) -> Tensor:
    collected: dict[str, Any] = {}
    for source, tensor in zip(sources, tensors, strict=True):
        collected.setdefault(source.pattern, []).append(tensor)
    arguments = dict(context)
    for name in ("source_patterns", "target_patterns"):
        arguments[name] = list(arguments[name])
    for operation in operations:
        collected = operation.convert(collected, **arguments)
    full_name = context["full_layer_name"]
    named = [value for key, value in collected.items() if key in full_name]
    value = (named or list(collected.values()))[0]
    result = value[0] if isinstance(value, list) else value
    if not isinstance(result, Tensor):
        raise TypeError(f"the conversion of {full_name} made a {type(result).__name__}")
    return result


def _trace_pieces(
    full_name: str,
    sources: tuple[Source, ...],
    operations: tuple[Any, ...],
    context: Mapping[str, Any],
    shape: tuple[int, ...],
) -> tuple[Piece, ...] | None:
    """Follow every element through the operations; None where they do more than move them."""
    if len({source.dtype for source in sources}) != 1:
        return None
    bases, tensors, next_number = [], [], 0
    for source in sources:
        count = math.prod(source.shape)
        bases.append(next_number)
        numbers = torch.arange(next_number, next_number + count, dtype=torch.int32)
        tensors.append(numbers.view(source.shape))
        # the gap keeps the end of one source from looking like the start of the next
        next_number += count + 1
    if next_number >= 2**31:
        return None
    try:
        moved = _run_operations(operations, context, sources, tensors)
    except Exception:
        # an operation that cannot take element numbers does more than move elements
        return None
    if moved.dtype != torch.int32 or moved.numel() != math.prod(shape):
        return None
    del tensors
    return _runs_to_pieces(moved.reshape(-1), bases, sources)


def _runs_to_pieces(
    moved: Tensor, bases: list[int], sources: tuple[Source, ...]
) -> tuple[Piece, ...] | None:
    breaks = (moved.diff() != 1).nonzero().flatten() + 1
    if breaks.numel() >= MAX_PIECES or moved.numel() == 0:
        return None
    edges = [0, *breaks.tolist(), moved.numel()]
    item = sources[0].dtype.itemsize
    pieces = []
    for begin, end in itertools.pairwise(edges):
        first = int(moved[begin])
        source = bisect_right(bases, first) - 1
        start, count = first - bases[source], end - begin
        if source < 0 or start + count > math.prod(sources[source].shape):
            return None
        pieces.append(Piece(source, start * item, count * item))
    return tuple(pieces)


def _agree(recipe: Recipe, slow: Recipe) -> bool:
    """Compare two recipes bit by bit on noise.

    This also catches copies that are none: arithmetic such as adding one escapes a trace of
    element numbers.
    """
    generator = torch.Generator().manual_seed(0)
    noise = [
        torch.randint(0, 256, (source.num_bytes,), dtype=torch.uint8, generator=generator)
        for source in recipe.sources
    ]
    with torch.no_grad():
        fast, wanted = recipe.build(noise), slow.build(noise)
    same = _bits(fast) == _bits(wanted)
    # noise holds many NaN, and no one minds which
    return bool((same | (fast.isnan() & wanted.isnan())).all())


def _bits(tensor: Tensor) -> Tensor:
    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(sizes[tensor.element_size()])


def _check_operations(
    full_name: str,
    sources: tuple[Source, ...],
    operations: tuple[Any, ...],
    context: Mapping[str, Any],
    shape: tuple[int, ...],
) -> None:
    tensors = [torch.zeros(source.shape, dtype=source.dtype) for source in sources]
    try:
        value = _run_operations(operations, context, sources, tensors)
    except Exception as error:
        stored = ", ".join(f"{source.dtype} {list(source.shape)}" for source in sources)
        raise CheckpointError(
            f"{full_name}: the stored tensors ({stored}) cannot be converted: {error}",
            hint="check that config.json belongs to these weights",
        ) from error
    _check_size(full_name, tuple(value.shape), shape)


def _check_size(full_name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    core = found[1:] if len(found) == len(wanted) + 1 and found[0] == 1 else found
    if tuple(core) != wanted:
        raise CheckpointError(
            f"{full_name}: the checkpoint makes shape {list(core)} per expert, the model needs "
            f"{list(wanted)}",
            hint="check that config.json belongs to these weights",
        )


def _reinterpret(part: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    # torch refuses to see bytes as wider elements from an odd offset
    if part.storage_offset() % dtype.itemsize:
        part = part.clone()
    return part.view(dtype).view(shape)
