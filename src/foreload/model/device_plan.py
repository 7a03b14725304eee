"""What the device path asks of a model before anything is allocated: layouts and bytes.

Reads plans and runs dense layers on a few tokens; no expert is read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from foreload.errors import UnsupportedModelError
from foreload.model.kv_cache import make_kv_cache, pass_cache
from foreload.model.sites import silenced_experts
from foreload.model.stored import stored_layout, stored_plan
from foreload.ops.device_layout import StoredFormat, expert_layout

if TYPE_CHECKING:
    from foreload.model.hf import LoadedModel
    from foreload.model.sites import MoeSite
    from foreload.ops.device_layout import ExpertLayout
    from foreload.types import ExpertPlan

__all__ = [
    "block_bytes",
    "block_plans",
    "device_layouts",
    "draft_layouts",
    "kv_bytes_per_token",
    "resident_draft_bytes",
    "stream_blocks",
    "workspace_bytes",
]

_FINE_GROUP = 16
"""Columns that share a draft's scale where not even 32 divide a matrix."""

_CHUNK_BYTES = 64 << 20
"""Copied at a time for long inputs, so that what each copy costs once does not count."""


def device_layouts(loaded: LoadedModel) -> list[ExpertLayout]:
    """Lay out the experts of every MoE layer: block-FP8 and MXFP4 ones as they are stored.

    Raises:
        UnsupportedModelError: A layer's experts are not alike, or cannot be laid out.
    """
    return [_layout(site, plans) for site, plans in zip(loaded.sites, loaded.plans, strict=True)]


def block_plans(loaded: LoadedModel, layouts: list[ExpertLayout]) -> list[list[ExpertPlan]]:
    """Plan to read every expert as its layout, one of `device_layouts`, wants it."""
    return [
        plans if layout.first.stored.is_plain else [stored_plan(layout, plan) for plan in plans]
        for plans, layout in zip(loaded.plans, layouts, strict=True)
    ]


def draft_layouts(
    loaded: LoadedModel, layouts: list[ExpertLayout], kind: str
) -> list[ExpertLayout]:
    """Lay out the experts of a draft, quantised.

    Args:
        loaded: The model.
        layouts: How the target's experts lie.
        kind: "int4" or "int8".

    Raises:
        UnsupportedModelError: A matrix cannot be cut into groups that share a scale.
    """
    found = []
    for site, plans, layout in zip(loaded.sites, loaded.plans, layouts, strict=True):
        shapes = {tensor.name: tensor.shape for tensor in plans[0].tensors}
        columns = layout.first.num_columns, layout.down.num_columns
        group = _FINE_GROUP if any(number % (2 * _FINE_GROUP) for number in columns) else None
        try:
            found.append(
                expert_layout(
                    site.experts, shapes, StoredFormat(kind), dtype=layout.dtype, group=group
                )
            )
        except UnsupportedModelError as error:
            raise UnsupportedModelError(
                f"{site.name} has no {kind} draft on a device: {error}",
                hint="use draft='none'",
            ) from error
    return found


def resident_draft_bytes(loaded: LoadedModel, kind: str) -> int:
    """Give the device memory a draft will take, from shapes alone; 0 for "none".

    Raises:
        UnsupportedModelError: These experts cannot be laid out quantised.
    """
    if kind == "none":
        return 0
    size = block_bytes(draft_layouts(loaded, device_layouts(loaded), kind))
    return loaded.spec.num_moe_layers * loaded.spec.num_experts * size


def block_bytes(layouts: list[ExpertLayout]) -> int:
    """Give the bytes of a block that any expert fits into."""
    return max(layout.num_bytes for layout in layouts)


def stream_blocks(num_experts: int, size: int) -> int:
    """Give the blocks of each of the two buffers through which long inputs stream their experts.

    As many as 64 MiB hold, but one at least, and no more than a layer has.

    Args:
        num_experts: Experts per layer.
        size: Bytes of a block.
    """
    return min(max(_CHUNK_BYTES // size, 1), num_experts)


def kv_bytes_per_token(loaded: LoadedModel) -> int:
    """Give what one more token takes in a KV cache whose layers all keep every token.

    Cost:
        A forward of one token without experts.
    """
    model = loaded.model
    cache = make_kv_cache(model)
    token = torch.ones((1, 1), dtype=torch.int64, device=model.device)
    with silenced_experts(loaded.sites), torch.inference_mode():
        model(input_ids=token, use_cache=True, **pass_cache(model, cache))
    kept = [
        value
        for layer in getattr(cache, "layers", ())
        for value in (getattr(layer, "keys", None), getattr(layer, "values", None))
        if isinstance(value, torch.Tensor)
    ]
    return sum(value.numel() * value.element_size() for value in kept)


def workspace_bytes(loaded: LoadedModel, num_tokens: int, context: int) -> int:
    """Give what a forward takes while it runs, beside weights and KV cache; an upper estimate.

    Logits and hidden states in the model's element type and once more in float32, the inputs and
    outputs of the experts, and where attention is computed eagerly its scores over the context.
    Keys and values that several heads share are copied for each of them, over the whole room of a
    static cache: once in a forward and once in what captured steps keep to themselves.

    Args:
        loaded: The model.
        num_tokens: Tokens of the forward, T.
        context: Tokens in the KV cache.
    """
    config = loaded.model.config.get_text_config()
    spec = loaded.spec
    size = int(loaded.model.dtype.itemsize) + 4
    width = max(max(t.shape) for layer in loaded.plans for t in layer[0].tensors)
    per_token = int(config.vocab_size) + 4 * spec.hidden_size
    per_token += spec.top_k * (spec.hidden_size + 2 * width)
    if config._attn_implementation == "eager":
        per_token += int(config.num_attention_heads) * context
    heads, dtype_size = int(config.num_attention_heads), int(loaded.model.dtype.itemsize)
    shared = 0
    if getattr(config, "num_key_value_heads", heads) not in (heads, None):
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        keys_and_values = 2 * heads * int(head_dim) * context * dtype_size
        mask = num_tokens * context * (1 + dtype_size)
        shared = 2 * keys_and_values + mask
    return num_tokens * per_token * size + shared


def _layout(site: MoeSite, plans: list[ExpertPlan]) -> ExpertLayout:
    alike = {tuple((t.name, t.dtype, t.shape) for t in plan.tensors) for plan in plans}
    matrices = {t.dtype for plan in plans for t in plan.tensors if len(t.shape) == 2}
    if len(alike) != 1 or len(matrices) != 1:
        raise UnsupportedModelError(
            f"the experts of {site.name} are not alike: a device cannot manage their slots",
            hint="use orchestration='host'",
        )
    layout = stored_layout(site.experts, plans)
    if layout is not None:
        return layout
    (dtype,) = matrices
    try:
        stored = StoredFormat(dtype)
    except ValueError:
        raise UnsupportedModelError(
            f"the experts of {site.name} are {dtype}, which a device cannot compute with",
            hint="use dtype='bfloat16'",
        ) from None
    shapes = {tensor.name: tensor.shape for tensor in plans[0].tensors}
    return expert_layout(site.experts, shapes, stored, dtype=stored.code_dtype)
