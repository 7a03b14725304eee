"""`foreload bench`: the arms of a suite, interleaved, with reference rows."""

from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from foreload.cli.options import DEFAULT_MODEL, ModelArgument
from foreload.cli.terminal import Terminal
from foreload.cli.verb import verb

__all__ = ["bench"]

SuiteOption = Annotated[str, typer.Option(help="Which suite to run.")]
ArmsOption = Annotated[
    str | None, typer.Option(help="Arms of the suite, such as a,b.", show_default="all")
]
BudgetsOption = Annotated[str, typer.Option(help="Expert memories, in percent of all experts.")]
TrialsOption = Annotated[int, typer.Option(help="Runs of each arm and budget.", min=1)]
OutputOption = Annotated[
    Path | None,
    typer.Option(help="Folder for samples, table and figures.", file_okay=False),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(help="Threads that compute.", show_default="torch's choice", min=1),
]


@verb()
def bench(
    terminal: Terminal,
    model: ModelArgument = DEFAULT_MODEL,
    suite: SuiteOption = "engine",
    arms: ArmsOption = None,
    budgets: BudgetsOption = "10,25,50,75",
    trials: TrialsOption = 5,
    output: OutputOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Measure the arms of a suite on this machine, interleaved, beside reference rows."""
    shares = _parse_budgets(budgets)
    names = None if arms is None else tuple(_split(arms))
    with terminal.status("Starting"):
        module = import_module("foreload.bench.suite")
    options = module.SuiteOptions(
        suite=suite,
        model=model,
        arms=names,
        budgets=shares,
        trials=trials,
        output=output,
        threads=threads,
    )
    result: Any = module.run_suite(options, terminal.err)
    if terminal.is_json:
        terminal.print_json(result.to_dict())


def _split(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _parse_budgets(text: str) -> tuple[float, ...]:
    try:
        shares = tuple(float(word.removesuffix("%")) for word in _split(text))
    except ValueError as error:
        raise typer.BadParameter(f"--budgets: {error}") from error
    if not shares or not all(0 < share <= 100 for share in shares):
        raise typer.BadParameter(f"--budgets {text!r}: give percentages above 0, such as 10,25")
    return shares
