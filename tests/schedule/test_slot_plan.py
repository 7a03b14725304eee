"""Planned slots miss least of all divisions, and are equal where nothing speaks against it."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from foreload.schedule.slot_plan import plan_slots


def draw_curves(seed: int) -> tuple[np.ndarray, int, int]:
    """Draw curves that fall in steps, not convex, with a number of slots and the least."""
    draw = random.Random(seed)
    layers, experts = draw.randint(1, 4), draw.randint(1, 5)
    rows = [sorted(draw.choices(range(9), k=experts + 1), reverse=True) for _ in range(layers)]
    least = draw.randint(1, experts)
    return np.array(rows), draw.randint(layers * least, layers * experts + 2), least


@pytest.mark.parametrize("seed", range(60))
def test_no_other_division_misses_less(seed: int) -> None:
    curves, num_slots, least = draw_curves(seed)
    most = curves.shape[1] - 1
    plan = plan_slots(curves, num_slots, least=least)
    assert sum(plan) == min(num_slots, len(curves) * most)
    assert all(least <= slots <= most for slots in plan)
    divisions = [
        slots
        for slots in itertools.product(range(least, most + 1), repeat=len(curves))
        if sum(slots) == sum(plan)
    ]

    def cost(slots: tuple[int, ...]) -> tuple[int, int]:
        misses = sum(int(row[number]) for row, number in zip(curves, slots, strict=True))
        return misses, sum(number**2 for number in slots)

    assert cost(plan) == min(map(cost, divisions))


def test_a_step_at_the_end_of_a_plateau_is_seen() -> None:
    """Taking the best next slot again and again would stay with the first layer."""
    curves = np.array([[10, 9, 8, 7, 7], [10, 10, 10, 10, 0]])
    assert plan_slots(curves, 5, least=1) == (1, 4)


def test_layers_that_are_alike_get_the_same() -> None:
    curves = np.tile([20, 12, 7, 3, 1, 0, 0], (4, 1))
    assert plan_slots(curves, 12, least=1) == (3, 3, 3, 3)
    assert plan_slots(np.zeros((3, 9), dtype=np.int64), 12, least=2) == (4, 4, 4)


def test_too_few_slots_are_an_error() -> None:
    with pytest.raises(ValueError, match="5 slots for 2 layers of at least 3"):
        plan_slots(np.zeros((2, 5), dtype=np.int64), 5, least=3)
