"""`foreload bench`: the arms of a suite, interleaved, with reference rows."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from foreload.cli.options import DEFAULT_MODEL, ModelArgument, parse_budgets, parse_bytes
from foreload.cli.terminal import Terminal
from foreload.cli.verb import verb

__all__ = ["bench"]

_SUITES = ("engine", "speculating-experts", "moe-speq")

SuiteOption = Annotated[str, typer.Option(help=f"Which suite to run: {', '.join(_SUITES)}.")]
ArmsOption = Annotated[
    str | None, typer.Option(help="Arms of the suite, such as lru,auto.", show_default="all")
]
BudgetsOption = Annotated[
    str | None,
    typer.Option(help="Expert memories, in percent of all experts.", show_default="the suite's"),
]
ContextsOption = Annotated[
    str | None,
    typer.Option(help="Prompt lengths, such as 100,900.", show_default="the suite's"),
]
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
DecodeTokensOption = Annotated[
    int, typer.Option(help="Tokens to decode in each run, behind the prompt.", min=2)
]
OutputOption = Annotated[
    Path | None,
    typer.Option(help="Folder for samples, table and figures.", file_okay=False),
]
LinkOption = Annotated[
    str | None,
    typer.Option(
        help="Throttle copies to so many bytes per second, to rehearse a slower link.",
        metavar="SIZE",
        show_default="what there is",
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(help="Threads that compute.", show_default="torch's choice", min=1, max=1024),
]


@verb()
def bench(
    terminal: Terminal,
    model: ModelArgument = DEFAULT_MODEL,
    suite: SuiteOption = _SUITES[0],
    arms: ArmsOption = None,
    budgets: BudgetsOption = None,
    contexts: ContextsOption = None,
    decode_tokens: DecodeTokensOption = 64,
    trials: TrialsOption = 5,
    text: TextOption = None,
    stock: StockOption = True,
    output: OutputOption = None,
    link_bandwidth: LinkOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Measure the arms of a suite on this machine, interleaved, beside reference rows."""
    if suite not in _SUITES:
        raise typer.BadParameter(f"--suite {suite!r} is unknown: use {', '.join(_SUITES)}")
    shares = None if budgets is None else parse_budgets(budgets)
    lengths = None if contexts is None else _parse_contexts(contexts)
    link = None if link_bandwidth is None else parse_bytes("--link-bandwidth", link_bandwidth)
    names = None if arms is None else tuple(_split(arms))
    with terminal.status("Starting"):
        import torch

        from foreload.bench.moe_speq import MOE_SPEQ
        from foreload.bench.speculating_experts import SPECULATING_EXPERTS
        from foreload.bench.suite import ENGINE_SUITE, SuiteOptions, run_suite
        from foreload.model.architecture import quiet_transformers
    if threads is not None:
        torch.set_num_threads(threads)
    options = SuiteOptions(
        model=model,
        text=text,
        arms=names,
        budgets=shares,
        contexts=lengths,
        num_trials=trials,
        num_decode_tokens=decode_tokens,
        with_stock=stock,
        output=output,
        link_bytes_s=link,
    )
    with quiet_transformers(), terminal.progress() as report:

        def tell(what: str, done: int, total: int) -> None:
            terminal.note(what)
            report("Arms", done, total)

        chosen = {made.name: made for made in (ENGINE_SUITE, SPECULATING_EXPERTS, MOE_SPEQ)}[suite]
        result = run_suite(options, tell, suite=chosen)
    terminal.print_json(
        {
            "machine": result.machine,
            "left_out": result.left_out,
            "samples": [sample.to_dict() for sample in result.samples],
            "limits": [asdict(limits) for limits in result.limits],
            "summary": result.summary,
        }
    )
    terminal.write(result.summary)


def _split(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _parse_contexts(text: str) -> tuple[int, ...]:
    """Read prompt lengths."""
    words = _split(text)
    if not words or not all(word.isdecimal() and int(word) > 0 for word in words):
        raise typer.BadParameter(f"--contexts {text!r}: give lengths above 0, such as 100,900")
    return tuple(int(word) for word in words)
