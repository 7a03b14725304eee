"""The arms of `foreload bench`'s suites on a CUDA device, each where its settings can be had.

The device decides, unless an arm is about what only the host's loop has: another eviction, or a
layer that waits for all of its experts.
"""

from __future__ import annotations

import functools
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from foreload.bench.suite import choose_arms, find_missing
from foreload.model.hf import load_model
from foreload.resolution import default_cache_dir
from gpu.arms import Told, device_arm, host_arm, record_routing
from gpu.rows import show
from gpu.trials import Contender

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from foreload.bench.arm import Arm
    from foreload.bench.workload import Workload
    from gpu.arms import RunText
    from gpu.rows import Row
    from gpu.settings import Settings


def pick_arms(settings: Settings, arms: Sequence[Arm], usual: Sequence[str]) -> list[Arm]:
    """Gives those of a suite's arms that were asked for: the usual ones, others by name, or all."""
    names: Sequence[str] | None = settings.arms or usual
    return choose_arms(arms, None if names == ("all",) else names)


def tell_left_out(model: Path, arms: Sequence[Arm]) -> Iterator[Row]:
    """Tells which arms cannot run, and why."""
    for arm in arms:
        reason = _obstacle(model, arm)
        if reason is not None:
            yield show({"arm": arm.name, "left_out": reason})


def contenders(
    model: Path, arms: Sequence[Arm], share: float, windows: Sequence[Workload]
) -> list[Contender]:
    """Gives the arms that can run at a share of all experts, in percent."""
    runnable = [arm for arm in arms if _obstacle(model, arm) is None]
    return [_contend(model, arm, share, windows) for arm in runnable]


def _contend(model: Path, arm: Arm, share: float, windows: Sequence[Workload]) -> Contender:
    settings: dict[str, Any] = dict(arm.settings or {})
    if arm.is_layerwise or "eviction" in settings:
        opened = functools.partial(
            host_arm,
            model,
            share,
            is_layerwise=arm.is_layerwise,
            is_pure=arm.is_pure,
            **settings,
        )
        return Contender(arm.name, opened, is_lossy=arm.is_lossy)
    if arm.is_resident:
        # A draft comes on top of all experts.
        share = 200
    if arm.is_oracle:
        opened = functools.partial(_oracle_arm, model, share, windows, settings)
    else:
        opened = functools.partial(device_arm, model, share, **settings)
    return Contender(arm.name, opened, is_lossy=arm.is_lossy)


@contextmanager
def _oracle_arm(
    model: Path, share: float, windows: Sequence[Workload], settings: dict[str, Any]
) -> Iterator[RunText]:
    """Opens an arm that is told where each text goes, one layer ahead."""
    traces = list(zip(windows, record_routing(model, windows), strict=True))
    told = Told(traces, load_model(model).spec.top_k)
    # What is told takes a predictor's place.
    with device_arm(model, share, told=told, **{**settings, "predictor": "lookahead"}) as run:
        yield run


def _obstacle(model: Path, arm: Arm) -> str | None:
    """Tells why an arm cannot run here, if so."""
    if not arm.is_asynchronous or arm.is_draft_alone:
        return "a step of a draft that fetches for the target is one graph"
    if not arm.has_kernel:
        return "it is about a kernel of the processor"
    if arm.is_oracle and arm.has_draft:
        return "what a draft's step fetches is what it routes to"
    missing = find_missing(arm, load_model(model).spec.identity, default_cache_dir())
    return None if missing is None else f"it needs {missing[0]}: run the stage predictors first"
