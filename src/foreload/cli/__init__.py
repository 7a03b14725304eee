"""The `foreload` command: one verb per question, one module per verb.

Verbs load torch and transformers when they run, so that `--help` and wrong usage answer at once.
Nothing here computes; everything a verb does is available from Python as well.
"""

from __future__ import annotations

import os
import sys
import warnings
from typing import Annotated

import typer

from foreload import __version__
from foreload.cli import make_model
from foreload.cli.bench import bench
from foreload.cli.calibrate import calibrate
from foreload.cli.chat import chat
from foreload.cli.evaluate import evaluate
from foreload.cli.generate import generate
from foreload.cli.inspect import inspect
from foreload.cli.plan import plan
from foreload.cli.simulate import simulate
from foreload.cli.trace import trace
from foreload.cli.train_estimator import train_estimator

__all__ = ["app", "main"]

app = typer.Typer(
    name="foreload",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)
for _verb in (
    generate,
    chat,
    inspect,
    plan,
    calibrate,
    train_estimator,
    evaluate,
    trace,
    simulate,
    bench,
):
    app.command(_verb.__name__.replace("_", "-"))(_verb)
app.add_typer(make_model.app, name="make-model")


def _show_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"foreload {__version__}")
        raise typer.Exit


@app.callback()
def _foreload(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", is_eager=True, callback=_show_version),
    ] = False,
) -> None:
    """Run Mixture-of-Experts language models larger than memory."""


def main() -> None:
    """Run the command; what `foreload` on the command line calls."""
    # Readers share the cores with compute threads: OpenMP threads that spin would starve them.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    if hasattr(sys.stdin, "reconfigure"):
        # Some locales would take any byte for half of a character.
        sys.stdin.reconfigure(errors="strict")
    try:
        app()
    except OSError as error:
        # Help, or what is wrong with an option, that cannot be written.
        sys.exit(f"error: {error}")
