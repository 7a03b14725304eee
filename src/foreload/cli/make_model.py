"""`foreload make-model`: checkpoints to benchmark with, made instead of downloaded."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from foreload.cli.options import choice, expand_home
from foreload.cli.terminal import Terminal
from foreload.cli.verb import verb
from foreload.config import EngineConfig, format_bytes
from foreload.errors import ConfigError
from foreload.model.source import resolve_model

__all__ = ["app"]

app = typer.Typer(
    help="Make a checkpoint for benchmarks: widen a small one, or fill a large one's shape.",
    no_args_is_help=True,
)

Dtype: Any = choice("dtype", [name for name in EngineConfig.CHOICES["dtype"] if name != "auto"])

_BFLOAT16: Any = Dtype("bfloat16")

SourceArgument = Annotated[str, typer.Argument(help="Local directory, Hub name, or demo.")]
DirectoryArgument = Annotated[
    Path,
    typer.Argument(
        help="Folder to make; must not exist, or be empty.", file_okay=False, callback=expand_home
    ),
]
ShapeArgument = Annotated[
    str, typer.Argument(help="Whose shape, such as qwen3-30b-a3b; a wrong name lists all.")
]
FactorOption = Annotated[
    int, typer.Option(help="A power of two; each expert grows by its square.", min=2)
]
LayersOption = Annotated[
    int | None, typer.Option(help="Keep this many layers.", show_default="all", min=1)
]
DtypeOption = Annotated[Dtype, typer.Option(help="Element type.")]
SeedOption = Annotated[int, typer.Option(help="The same seed gives the same bytes.")]


@app.command("widen")
@verb()
def widen(
    terminal: Terminal,
    source: SourceArgument,
    directory: DirectoryArgument,
    factor: FactorOption = 8,
) -> None:
    """Widen a checkpoint: the same text and routing, from many times the bytes."""
    with terminal.status("Starting"):
        from foreload.bench.widen import widen_checkpoint
    folder = resolve_model(source)
    with _writing(directory), terminal.progress(is_bytes=True) as report:
        widen_checkpoint(
            folder,
            directory,
            factor,
            progress=lambda done, total: report("Widening", done, total),
        )
    _finish(terminal, directory, {"source": source, "factor": factor})


@app.command("random")
@verb()
def random(
    terminal: Terminal,
    shape: ShapeArgument,
    directory: DirectoryArgument,
    layers: LayersOption = None,
    dtype: DtypeOption = _BFLOAT16,
    seed: SeedOption = 0,
) -> None:
    """Write random weights in the shape of a well-known model, to time moving its bytes.

    It has no tokenizer: give prompts to generate as --prompt-ids.
    """
    with terminal.status("Starting"):
        from foreload.bench.random_models import make_random_checkpoint
    with _writing(directory), terminal.progress(is_bytes=True) as report:
        make_random_checkpoint(
            shape,
            directory,
            num_layers=layers,
            dtype=dtype.value,
            seed=seed,
            progress=lambda done, total: report("Writing", done, total),
        )
    made = {"shape": shape, "layers": layers, "dtype": dtype.value, "seed": seed}
    _finish(terminal, directory, made)


@contextmanager
def _writing(directory: Path) -> Iterator[None]:
    """Say which folder cannot be made.

    Raises:
        ConfigError: It cannot.
    """
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"cannot make {directory}: {error}", hint="give a folder that can be written to"
        ) from error


def _finish(terminal: Terminal, directory: Path, made: dict[str, Any]) -> None:
    num_bytes = sum(path.stat().st_size for path in directory.iterdir())
    terminal.print_json({"directory": str(directory), "num_bytes": num_bytes, **made})
    if not terminal.is_json:
        terminal.write(f"{directory}\n")
    terminal.note(f"{format_bytes(num_bytes)}; see it with `foreload inspect {directory}`")
    from foreload.memory.writer import find_unfinished

    for left in find_unfinished(directory):
        terminal.note(f"{left} is of a run that was killed, or is still writing: remove it if none")
