"""Plan how each expert gets from a checkpoint's files into memory.

`plan_experts` sends the names in a checkpoint through transformers' own conversion mapping to
find what every expert is made of, and turns that into byte ranges. It reads no tensor. Next to the
plans it sorts the remaining names into those the dense part of the model needs and those nobody
needs.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from foreload.errors import CheckpointError, UnsupportedModelError
from foreload.model.conversion import conversion_mapping
from foreload.model.recipes import ConvertExpert, Piece, Recipe, Source, derive_recipe, torch_dtype
from foreload.model.sites import MoeSite, expert_parameters
from foreload.types import ExpertPlan, ExpertTensor, Span

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from torch import nn

    from foreload.memory.checkpoint import CheckpointIndex, TensorEntry
    from foreload.model.architecture import Architecture
    from foreload.types import FileStamp

__all__ = ["CheckpointPlan", "plan_checkpoint", "plan_experts"]

logger = logging.getLogger(__name__)

_ALIGNMENT = 64
"""Bytes. torch's float32 products of one row round differently where the weight's address is not a
multiple of 16; a tensor that lies askew in its file is therefore copied into place. Products of
two-byte types do not depend on it (measured with torch 2.13, November 2026)."""


@dataclass(frozen=True, slots=True)
class CheckpointPlan:
    """What in a checkpoint belongs to which part of the model.

    Attributes:
        experts: Plans by MoE layer and expert.
        dense_names: Checkpoint names the rest of the model is loaded from.
        unused_names: Checkpoint names nothing in the model asks for.
        layout: `per-expert`, `packed`, or `mixed`.
    """

    experts: list[list[ExpertPlan]]
    dense_names: tuple[str, ...]
    unused_names: tuple[str, ...]
    layout: str

    @property
    def is_direct(self) -> bool:
        """Tell whether every expert is read straight into its slot."""
        return all(plan.convert is None for layer in self.experts for plan in layer)


@dataclass(slots=True)
class _Target:
    """One parameter of one experts module, and the checkpoint names it is made from."""

    full_name: str
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    num_experts: int
    names: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    converter: Any = None

    @property
    def is_packed(self) -> bool:
        return all(len(names) == 1 for names in self.names.values()) and self.num_experts > 1


@dataclass(frozen=True, slots=True)
class _Segment:
    path: str
    offset: int
    num_bytes: int
    stamp: FileStamp


def plan_experts(
    model: nn.Module,
    sites: Sequence[MoeSite],
    index: CheckpointIndex,
    *,
    quantizer: Any | None = None,
    dtype_plan: Mapping[str, torch.dtype] | None = None,
) -> CheckpointPlan:
    """Plan the reading of every expert of `model` from the checkpoint behind `index`.

    Args:
        model: The transformers model on the meta device, with its experts' parameters in the
            element type they shall have in memory.
        sites: Its MoE layers.
        index: The checkpoint.
        quantizer: transformers' quantizer where the checkpoint is quantised.
        dtype_plan: Name patterns of parameters that keep another element type.

    Returns:
        Plans by layer and expert, and what is left of the checkpoint.

    Raises:
        CheckpointError: An expert is missing, or its tensors do not have the model's shapes.

    Cost:
        One rename of each name in the checkpoint (about 30 µs) and one trace of each distinct
        shape of expert; no tensor is read.
    """
    targets, owners = _collect_targets(sites, dtype_plan or {})
    dense, unused = _match_names(model, index, targets, quantizer)
    for target in targets.values():
        _check_complete(target)
    recipes: dict[tuple[Any, ...], Recipe] = {}
    experts = []
    for layer_targets in owners:
        prepared = [_prepare(target, index, recipes, model) for target in layer_targets]
        num_experts = layer_targets[0].num_experts
        experts.append([_plan_expert(prepared, expert) for expert in range(num_experts)])
    layouts = {"packed" if target.is_packed else "per-expert" for target in targets.values()}
    return CheckpointPlan(
        experts, tuple(dense), tuple(unused), layouts.pop() if len(layouts) == 1 else "mixed"
    )


def plan_checkpoint(
    model: Any, sites: Sequence[MoeSite], index: CheckpointIndex, architecture: Architecture
) -> CheckpointPlan:
    """Plan the experts of a meta model built for `architecture`; see `plan_experts`."""
    return plan_experts(
        model,
        sites,
        index,
        quantizer=architecture.quantizer,
        dtype_plan=model._get_dtype_plan(architecture.dtype),
    )


def _collect_targets(
    sites: Sequence[MoeSite], dtype_plan: Mapping[str, torch.dtype]
) -> tuple[dict[str, _Target], list[list[_Target]]]:
    targets: dict[str, _Target] = {}
    owners: list[list[_Target]] = []
    for site in sites:
        layer = []
        for name, parameter in expert_parameters(site.experts).items():
            full_name = f"{site.name}.{name}"
            dtype = parameter.dtype
            for pattern, kept in dtype_plan.items():
                if re.search(pattern.replace("*", r".*"), full_name):
                    dtype = kept
            target = _Target(full_name, name, tuple(parameter.shape[1:]), dtype, parameter.shape[0])
            targets[full_name] = target
            layer.append(target)
        owners.append(layer)
    return targets, owners


def _match_names(
    model: Any, index: CheckpointIndex, targets: Mapping[str, _Target], quantizer: Any | None
) -> tuple[list[str], list[str]]:
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    mapping = conversion_mapping(model, quantizer)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {p: entry for entry in converters for p in entry.source_patterns}
    prefix, state = model.base_model_prefix, model.state_dict()
    dense, unused = [], []
    for name in sorted(index, key=dot_natural_key):
        new, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if new not in state and name in state:
            new, pattern = rename_source_key(name, [], [], prefix, state)
        target = targets.get(new)
        if target is not None:
            target.names[pattern or ""].append(name)
            if pattern is not None:
                target.converter = by_pattern[pattern]
        elif new in state:
            dense.append(name)
        else:
            unused.append(name)
    for target in targets.values():
        # a converter's result wins over a tensor that merely has the parameter's name
        if target.converter is not None:
            target.names.pop("", None)
    return dense, unused


def _check_complete(target: _Target) -> None:
    if target.converter is not None and len(target.converter.target_patterns) > 1:
        raise UnsupportedModelError(
            f"{target.full_name} is stored together with other parameters, which foreload cannot "
            "take apart by expert",
            hint="run this model with transformers itself",
        )
    if not target.names:
        raise CheckpointError(
            f"the checkpoint has no tensor for {target.full_name}",
            hint="download the checkpoint again, or check that config.json belongs to it",
        )
    for names in target.names.values():
        if len(names) in (1, target.num_experts):
            continue
        missing = _missing_names(names, target.num_experts)
        what = f"missing {', '.join(missing)}" if missing else f"they begin with {names[0]}"
        raise CheckpointError(
            f"{target.full_name} needs {target.num_experts} experts, the checkpoint has "
            f"{len(names)}: {what}",
            hint="download the missing shards, or check that config.json belongs to these weights",
        )
    if len({len(names) for names in target.names.values()}) != 1:
        raise CheckpointError(
            f"{target.full_name} is stored partly packed and partly by expert: "
            + ", ".join(f"{names[0]} ({len(names)})" for names in target.names.values())
        )


def _missing_names(names: list[str], num_experts: int) -> list[str]:
    parts = [name.split(".") for name in names]
    if len({len(part) for part in parts}) != 1:
        return []
    varying = [i for i, column in enumerate(zip(*parts, strict=True)) if len(set(column)) > 1]
    if len(varying) != 1:
        return []
    place = varying[0]
    present = {part[place] for part in parts}
    absent = [str(e) for e in range(num_experts) if str(e) not in present]
    first = parts[0]
    return [".".join([*first[:place], number, *first[place + 1 :]]) for number in absent[:3]]


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A target with its recipe, and the stored tensors of each of its sources."""

    tensor: ExpertTensor
    recipe: Recipe
    entries: tuple[tuple[TensorEntry, ...], ...]
    is_packed: bool

    def segments(self, expert: int) -> list[_Segment]:
        result = []
        for source, entries in zip(self.recipe.sources, self.entries, strict=True):
            if self.is_packed:
                entry = entries[0]
                offset, num_bytes = entry.offset + expert * source.num_bytes, source.num_bytes
            else:
                entry = entries[expert]
                offset, num_bytes = entry.offset, entry.num_bytes
            result.append(_Segment(entry.path, offset, num_bytes, entry.stamp))
        return result


def _prepare(
    target: _Target, index: CheckpointIndex, recipes: dict[tuple[Any, ...], Recipe], model: Any
) -> _Prepared:
    sources, columns = [], []
    for pattern, names in target.names.items():
        entries = tuple(index[name] for name in names)
        sources.append(Source(pattern, *_expert_part(target, names, entries)))
        columns.append(entries)
    key = (
        tuple(sources),
        id(target.converter),
        target.name,
        target.shape,
        target.dtype,
    )
    recipe = recipes.get(key)
    if recipe is None:
        recipe = recipes[key] = derive_recipe(
            target.full_name,
            tuple(sources),
            target.converter,
            shape=target.shape,
            dtype=target.dtype,
            config=model.config,
        )
        logger.debug("%s: %s pieces", target.full_name, recipe.pieces and len(recipe.pieces))
    num_bytes = target.dtype.itemsize
    for size in target.shape:
        num_bytes *= size
    dtype_name = str(target.dtype).removeprefix("torch.")
    tensor = ExpertTensor(target.name, dtype_name, target.shape, num_bytes)
    return _Prepared(tensor, recipe, tuple(columns), target.is_packed)


def _expert_part(
    target: _Target, names: list[str], entries: tuple[TensorEntry, ...]
) -> tuple[torch.dtype, tuple[int, ...]]:
    first = entries[0]
    for name, entry in zip(names, entries, strict=True):
        if (entry.dtype, entry.shape) != (first.dtype, first.shape):
            raise CheckpointError(
                f"experts of {target.full_name} differ: {names[0]} is {first.dtype} "
                f"{list(first.shape)}, {name} is {entry.dtype} {list(entry.shape)}"
            )
    if not target.is_packed:
        return torch_dtype(first.dtype), first.shape
    if not first.shape or first.shape[0] != target.num_experts:
        raise CheckpointError(
            f"{names[0]} has shape {list(first.shape)}, but {target.full_name} needs "
            f"{target.num_experts} experts in its first dimension",
            hint="check that config.json belongs to these weights",
        )
    return torch_dtype(first.dtype), (1, *first.shape[1:])


def _plan_expert(prepared: Sequence[_Prepared], expert: int) -> ExpertPlan:
    segments = [entry.segments(expert) for entry in prepared]
    spans, places = _merge({segment for group in segments for segment in group})
    direct = [
        _place_directly(entry, group, places)
        for entry, group in zip(prepared, segments, strict=True)
    ]
    placed = [tensor for tensor in direct if tensor is not None]
    if len(placed) == len(prepared):
        return ExpertPlan(spans, tuple(placed))
    tensors = tuple(entry.tensor for entry in prepared)
    convert = ConvertExpert(
        tensors,
        tuple(entry.recipe for entry in prepared),
        tuple(tuple(places[segment] for segment in group) for group in segments),
    )
    return ExpertPlan(spans, tensors, convert)


def _merge(
    segments: set[_Segment],
) -> tuple[tuple[Span, ...], dict[_Segment, tuple[int, int]]]:
    """Join segments adjacent in a file; also give span and start of each segment."""
    spans: list[Span] = []
    places: dict[_Segment, tuple[int, int]] = {}
    for segment in sorted(segments, key=lambda s: (s.path, s.offset, s.num_bytes)):
        last = spans[-1] if spans else None
        if last and last.path == segment.path and segment.offset == last.offset + last.num_bytes:
            places[segment] = (len(spans) - 1, last.num_bytes)
            spans[-1] = replace(last, num_bytes=last.num_bytes + segment.num_bytes)
        else:
            places[segment] = (len(spans), 0)
            spans.append(Span(segment.path, segment.offset, segment.num_bytes, segment.stamp))
    return tuple(spans), places


def _address(piece: Piece, segments: list[_Segment]) -> int:
    """Give a piece's offset in its file, which is its slot's offset too, in whole pages."""
    return segments[piece.source].offset + piece.start


def _place_directly(
    entry: _Prepared, segments: list[_Segment], places: Mapping[_Segment, tuple[int, int]]
) -> ExpertTensor | None:
    """Give the tensor's place in a span, or None where its bytes do not lie there as they are."""
    recipe, tensor = entry.recipe, entry.tensor
    if not recipe.is_copy or recipe.pieces is None:
        return None
    first_span, first_start, expected = -1, 0, None
    for piece in recipe.pieces:
        span, start = places[segments[piece.source]]
        begin = (span, start + piece.start)
        if expected is None:
            first_span, first_start = begin
        elif begin != expected:
            return None
        expected = (span, begin[1] + piece.num_bytes)
    alignment = _ALIGNMENT if recipe.dtype.itemsize > 2 else recipe.dtype.itemsize
    if _address(recipe.pieces[0], segments) % alignment:
        return None
    return ExpertTensor(
        tensor.name, tensor.dtype, tensor.shape, tensor.num_bytes, first_span, first_start
    )
