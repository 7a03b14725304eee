"""Show what passes a model's MoE layers: residual streams and routers' logits.

What is shown is the model's own; nobody who sees it may change it.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

from foreload.model.sites import router_logits

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from foreload.model.sites import MoeSite

    See = Callable[[int, Tensor], None]

__all__ = ["watch_logits", "watch_residuals"]


def watch_residuals(sites: Sequence[MoeSite], see: See) -> list[Any]:
    """Show the residual stream (T, H) that enters each MoE block, in every forward.

    Args:
        sites: Where to look; those whose router reads none are left out.
        see: Told the MoE layer and the stream.

    Returns:
        torch's handles; `remove` each to stop.
    """
    return [
        module.register_forward_pre_hook(
            functools.partial(_see_residual, see, site.layer), with_kwargs=True
        )
        for site in sites
        if (module := site.residual_module) is not None
    ]


def watch_logits(sites: Sequence[MoeSite], see: See) -> list[Any]:
    """Show each router's logits (T, E), in every forward.

    Args:
        sites: Where to look; those without a router are left out.
        see: Told the MoE layer and the logits.

    Returns:
        torch's handles; `remove` each to stop.
    """
    return [
        site.router.register_forward_hook(functools.partial(_see_router, see, site))
        for site in sites
        if site.router is not None
    ]


def _see_residual(see: See, layer: int, module: Any, args: Any, kwargs: Any) -> None:
    """Show the first input of a module."""
    residual = args[0] if args else kwargs.get("hidden_states")
    if isinstance(residual, torch.Tensor):
        see(layer, residual.reshape(-1, residual.shape[-1]))


def _see_router(see: See, site: MoeSite, module: Any, args: Any, output: Any) -> None:
    """Show the logits in what a router gave."""
    logits = router_logits(site, output)
    if logits is not None:
        see(site.layer, logits)
