"""`foreload inspect`: what a checkpoint is, from its headers alone."""

from typing import Any

from foreload.cli.options import DEFAULT_MODEL, ENGINE, ModelArgument
from foreload.cli.terminal import Terminal
from foreload.cli.verb import verb
from foreload.config import EngineConfig, format_bytes

__all__ = ["inspect"]

_ONLY_DTYPE = ENGINE.without(*(p.name for p in ENGINE.parameters if p.name != "dtype"))


@verb(_ONLY_DTYPE)
def inspect(
    terminal: Terminal, settings: EngineConfig, model: ModelArgument = DEFAULT_MODEL
) -> None:
    """Tell what a checkpoint is, what its experts cost, and whether foreload can run it.

    Reads headers and config.json, no weights. A model that cannot run is an answer too: the exit
    status stays 0.
    """
    with terminal.status("Reading the headers"):
        from foreload.model.describe import describe
        from foreload.model.source import open_headers

        with open_headers(model) as folder:
            report = describe(folder, dtype=settings.dtype)
    values = report.to_dict()
    terminal.print_json({"model": model, "directory": str(folder), **values})
    terminal.show(_table(model, values))


def _table(model: str, values: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(title=model, show_header=False, title_justify="left")
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in values.items():
        if value is None or value == "":
            continue
        table.add_row(name.replace("_", " "), _written(name, value))
    return table


def _written(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name.endswith("_bytes"):
        return f"{format_bytes(value)} ({value:,} bytes)"
    return str(value)
