"""Lays out tables of many columns, so that they fit into the 80 columns of a terminal."""

from typing import Any

__all__ = ["narrow_table"]


def narrow_table(title: str, *, gap: int) -> Any:
    """Make a table without lines but the one below its head.

    Args:
        title: What stands above it.
        gap: Spaces between columns, one at least.
    """
    from rich import box
    from rich.table import Table

    return Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, gap - 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )
