"""`foreload bench`: the arms of a suite, interleaved, with reference rows."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from foreload.cli.options import DEFAULT_MODEL, ModelArgument
from foreload.cli.terminal import Terminal
from foreload.cli.verb import verb

__all__ = ["bench"]

_SUITES = ("engine",)

SuiteOption = Annotated[str, typer.Option(help=f"Which suite to run: {', '.join(_SUITES)}.")]
ArmsOption = Annotated[
    str | None, typer.Option(help="Arms of the suite, such as lru,auto.", show_default="all")
]
BudgetsOption = Annotated[str, typer.Option(help="Expert memories, in percent of all experts.")]
TrialsOption = Annotated[int, typer.Option(help="Runs of each arm and budget.", min=1)]
TextOption = Annotated[
    Path | None,
    typer.Option(help="Text to decode.", show_default="the demo's", exists=True, dir_okay=False),
]
StockOption = Annotated[
    bool,
    typer.Option(
        "--stock/--no-stock",
        help="Run transformers itself as well; needs memory for all experts.",
    ),
]
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
    suite: SuiteOption = _SUITES[0],
    arms: ArmsOption = None,
    budgets: BudgetsOption = "10,25,50,75",
    trials: TrialsOption = 5,
    text: TextOption = None,
    stock: StockOption = True,
    output: OutputOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Measure the arms of a suite on this machine, interleaved, beside reference rows."""
    if suite not in _SUITES:
        raise typer.BadParameter(f"--suite {suite!r} is unknown: use {', '.join(_SUITES)}")
    shares = _parse_budgets(budgets)
    names = None if arms is None else tuple(_split(arms))
    with terminal.status("Starting"):
        import torch

        from foreload.bench.suite import SuiteOptions, run_suite
        from foreload.model.architecture import quiet_transformers
    if threads is not None:
        torch.set_num_threads(threads)
    options = SuiteOptions(
        model=model,
        text=text,
        arms=names,
        budgets=shares,
        num_trials=trials,
        with_stock=stock,
        output=output,
    )
    with quiet_transformers(), terminal.progress() as report:

        def tell(what: str, done: int, total: int) -> None:
            terminal.note(what)
            report("Arms", done, total)

        result = run_suite(options, tell)
    terminal.print_json(
        {
            "machine": result.machine,
            "samples": [sample.to_dict() for sample in result.samples],
            "limits": [asdict(limits) for limits in result.limits],
            "summary": result.summary,
        }
    )
    terminal.write(result.summary)


def _split(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _parse_budgets(text: str) -> tuple[float, ...]:
    """Turn percentages into shares."""
    try:
        shares = tuple(float(word.removesuffix("%")) / 100 for word in _split(text))
    except ValueError as error:
        raise typer.BadParameter(f"--budgets: {error}") from error
    if not shares or not all(0 < share <= 1 for share in shares):
        raise typer.BadParameter(f"--budgets {text!r}: give percentages above 0, such as 10,25")
    return shares
