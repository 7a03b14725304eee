"""Experts in the form their checkpoint stores them in, where a device can compute with that form.

Then what lies in host memory and travels is what is stored: half the bytes of bfloat16 for
block-FP8, a quarter for MXFP4. Where codes and scales are is known from the recipes that
dequantise them, which gave transformers' own numbers bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from foreload.errors import UnsupportedModelError
from foreload.model.recipes import ConvertExpert
from foreload.ops.device_layout import expert_layout, stored_parts
from foreload.types import ExpertPlan, ExpertTensor

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from foreload.ops.device_layout import ExpertLayout

__all__ = ["stored_layout", "stored_plan"]


@dataclass(frozen=True, slots=True, repr=False)
class _ReadStored:
    """The `convert` of a plan that leaves an expert as it is stored.

    Attributes:
        convert: The `convert` of the plan that dequantises it.
    """

    convert: ConvertExpert

    def __call__(self, spans: list[Any]) -> Mapping[str, Tensor]:
        """Give codes, scales and biases; they may be views of `spans`."""
        found = {}
        with torch.no_grad():
            for tensor, recipe, parts in self.convert.stored(spans):
                if recipe.shortcut is None:
                    found[tensor.name] = recipe.build(parts)
                else:
                    codes, scales = recipe.shortcut.codes(parts)
                    found[tensor.name], found[f"{tensor.name}_scales"] = codes, scales
        return found


def stored_layout(experts: Any, plans: Sequence[ExpertPlan]) -> ExpertLayout | None:
    """Lay a layer's experts out as they are stored; None where reading dequantises them.

    Args:
        experts: transformers' experts module: layout flags, no weights.
        plans: How to read each of them.
    """
    plan = plans[0]
    if not isinstance(plan.convert, ConvertExpert) or not _have_one_recipe(plans):
        return None
    forms = {
        (recipe.shortcut.stored, recipe.shortcut.scale_block, recipe.shortcut.is_transposed)
        if recipe.shortcut is not None
        else None
        for tensor, recipe in zip(plan.convert.tensors, plan.convert.recipes, strict=True)
        if len(tensor.shape) == 2
    }
    form = forms.pop()
    if forms or form is None or form[2] != experts.is_transposed:
        return None
    (dtype,) = {tensor.dtype for tensor in plan.tensors if len(tensor.shape) == 2}
    shapes = {tensor.name: tensor.shape for tensor in plan.tensors}
    try:
        layout = expert_layout(
            experts, shapes, form[0], dtype=getattr(torch, dtype), scale_block=form[1]
        )
    except UnsupportedModelError:
        return None
    # Gate and up that share scales where they meet have fewer of them than the layout.
    spans = [torch.empty(s.num_bytes, dtype=torch.uint8, device="meta") for s in plan.spans]
    read = _ReadStored(plan.convert)(spans)
    return layout if _describe(read) == _describe(_parts(layout)) else None


def stored_plan(layout: ExpertLayout, plan: ExpertPlan) -> ExpertPlan:
    """Plan to read an expert as its layout, one of `stored_layout`, wants it.

    Args:
        layout: How it lies.
        plan: How to read it dequantised.

    Raises:
        TypeError: The plan is of an expert that `stored_layout` has no layout for.
    """
    if not isinstance(plan.convert, ConvertExpert):
        raise TypeError("the expert is not converted while it is read")
    tensors = tuple(
        ExpertTensor(name, str(part.dtype).removeprefix("torch."), tuple(part.shape), part.nbytes)
        for name, part in _parts(layout).items()
    )
    return ExpertPlan(plan.spans, tensors, _ReadStored(plan.convert))


def _have_one_recipe(plans: Sequence[ExpertPlan]) -> bool:
    """Tell whether all experts are made alike; recipes are shared, so it is quick to tell."""
    recipes = {
        tuple(id(recipe) for recipe in plan.convert.recipes)
        if isinstance(plan.convert, ConvertExpert)
        else None
        for plan in plans
    }
    return len(recipes) == 1


def _parts(layout: ExpertLayout) -> dict[str, Tensor]:
    return stored_parts(layout, torch.empty(layout.num_bytes, dtype=torch.uint8, device="meta"))


def _describe(parts: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, torch.Size]]:
    return {name: (part.dtype, part.shape) for name, part in parts.items()}
