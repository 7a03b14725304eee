"""Shows what slots planned from a trace gain, for the verbs that replay one."""

from collections.abc import Sequence
from typing import Any

__all__ = ["slot_table"]


def slot_table(gains: Sequence[dict[str, Any]], num_experts: int) -> Any:
    """Make the table of slots of each layer's own.

    Args:
        gains: Of `trace.layer_slots.SlotPlanGain`, as values.
        num_experts: Experts of the model.
    """
    from rich.table import Table

    table = Table(
        title="A device's slots per layer: misses per token",
        title_justify="left",
        caption="unseen: the second half, planned from the first",
        caption_justify="left",
    )
    for name in ("slots", "equal", "planned", "unseen, equal", "unseen, planned"):
        table.add_column(name, justify="right")
    for gain in gains:
        share = gain["num_slots"] / num_experts
        names = ("equal", "planned", "unseen_equal", "unseen_planned")
        values = [f"{gain[f'{name}_misses']:.2f}" for name in names]
        table.add_row(f"{gain['num_slots']} ({share:.0%})", *values)
    return table
