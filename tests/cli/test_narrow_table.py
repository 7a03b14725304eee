"""Tables of many columns fit into 80 columns."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from foreload.cli.narrow_table import narrow_table


@pytest.mark.parametrize("gap", [1, 2])
def test_nothing_is_cut_in_eighty_columns(gap: int) -> None:
    table = narrow_table("A title", gap=gap)
    names = ["default-vectors", "previous-token", "estimator", "lookahead", "hybrid"]
    for name in names:
        table.add_column(name, justify="right")
    cells = ["98.2 99.0"] * len(names)
    table.add_row(*cells)
    file = io.StringIO()
    Console(file=file, width=80).print(table)
    title, head, rule, row = (line.rstrip() for line in file.getvalue().rstrip().splitlines())
    assert title == "A title"
    assert head.split() == names
    assert set(rule.replace(" ", "")) == {"─"}
    assert row.count(cells[0]) == len(names)
    between = head.index("previous-token") - head.index("default-vectors")
    assert between == len("default-vectors") + gap
