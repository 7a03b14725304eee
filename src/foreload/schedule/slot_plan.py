"""Divides slots over layers so that as few experts as can be are missed. Torch-free.

Where a device decides, each layer has slots of its own. Layers differ in how often they come back
to the same experts, so equal numbers of slots are seldom the best. What each layer would miss is
given (`trace.layer_slots` finds it); blocks of all layers are taken to be of one size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["plan_slots"]


def plan_slots(misses: NDArray[np.int64], num_slots: int, *, least: int) -> tuple[int, ...]:
    """Give each layer its slots: of all divisions one that misses least.

    Exact, whatever the shape of the curves. Among divisions that miss the same, the one nearest to
    equal slots: what a curve does not show is the same for every layer.

    Args:
        misses: (L, E + 1), what each layer misses with 0 to E slots.
        num_slots: Slots to give, over all layers; beyond L * E there is nobody to give them to.
        least: Fewest slots of a layer, at most E.

    Returns:
        Slots of each layer, `min(num_slots, L * E)` in all.

    Raises:
        ValueError: There are too few slots for the fewest of every layer.

    Cost:
        L * E * num_slots additions.
    """
    num_layers, most = misses.shape[0], misses.shape[1] - 1
    total = min(num_slots, num_layers * most)
    if total < num_layers * least:
        raise ValueError(f"{num_slots} slots for {num_layers} layers of at least {least}")
    # Too small, over all layers, to be worth a single miss.
    uneven = np.arange(most + 1) ** 2 / (2.0 * num_layers * most**2 + 1)
    best = np.full(total + 1, np.inf)
    best[0] = 0.0
    choices = []
    for layer in misses + uneven:
        reached = np.full_like(best, np.inf)
        choice = np.zeros(total + 1, dtype=np.int32)
        for slots in range(least, min(most, total) + 1):
            candidate = best[: total + 1 - slots] + layer[slots]
            is_better = candidate < reached[slots:]
            reached[slots:][is_better] = candidate[is_better]
            choice[slots:][is_better] = slots
        best = reached
        choices.append(choice)
    plan: list[int] = []
    for choice in reversed(choices):
        plan.append(int(choice[total]))
        total -= plan[-1]
    return tuple(reversed(plan))
