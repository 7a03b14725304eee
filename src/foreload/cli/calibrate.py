"""`foreload calibrate`: default vectors and recall per layer, from a text file."""

from pathlib import Path
from typing import Annotated, Any

import typer

from foreload.cli.generate import read_text
from foreload.cli.narrow_table import narrow_table
from foreload.cli.options import DEFAULT_MODEL, HOST_ENGINE, CacheDirOption, ModelArgument
from foreload.cli.streaming import open_engine
from foreload.cli.terminal import Terminal
from foreload.cli.verb import verb
from foreload.config import EngineConfig
from foreload.model.source import DEMO_NAME, resolve_model

__all__ = ["SHIPPED_TEXT", "calibrate", "find_shipped_text", "recall_table"]

SHIPPED_TEXT = "calibration.txt"
_MAX_TOKENS = 16384
_MAX_HELD_OUT_TOKENS = 512

TextOption = Annotated[
    Path | None,
    typer.Option(
        help="Text like the text to be generated; demo brings its own.",
        exists=True,
        dir_okay=False,
    ),
]
MaxTokensOption = Annotated[int, typer.Option(help="Most tokens of the text to use.", min=32)]
HeldOutOption = Annotated[
    int, typer.Option(help="Most tokens, of the last fifth, to measure the recall on.", min=2)
]


@verb(HOST_ENGINE.without("predictor", "lookahead_layers", "policy", "confidence"))
def calibrate(
    terminal: Terminal,
    settings: EngineConfig,
    model: ModelArgument = DEFAULT_MODEL,
    text: TextOption = None,
    max_tokens: MaxTokensOption = _MAX_TOKENS,
    max_held_out_tokens: HeldOutOption = _MAX_HELD_OUT_TOKENS,
    cache_dir: CacheDirOption = None,
) -> None:
    """Measure default vectors on a text, and how well each predictor does on its last fifth.

    The result is kept for this checkpoint, and the predictors auto and default-vectors use it
    from then on. An earlier one is replaced only by a complete new one.
    """
    file = text or find_shipped_text(model, SHIPPED_TEXT)
    # Sixteen characters per token are more than any text has on average.
    sample = read_text(file, 16 * max_tokens)
    settings = settings.with_values(model=model, predictor="lookahead", lookahead_layers=1)
    with open_engine(terminal, settings, cache_dir, needs_host=True) as engine:
        from foreload import calibrate as calibration

        with terminal.progress() as report:
            result = calibration.calibrate(
                engine,
                sample,
                max_tokens=max_tokens,
                max_held_out_tokens=max_held_out_tokens,
                progress=report,
            )
        config = engine.config.to_dict()
    terminal.print_json({**result.to_dict(), "text": str(file), "config": config})
    terminal.show(recall_table(result))
    terminal.note(
        f"default vectors of {result.coverage * 100:.1f} % of the experts, from "
        f"{result.num_tokens} tokens, saved to {result.path}"
    )


def find_shipped_text(model: str, name: str) -> Path:
    """Find a text that lies beside a model's weights.

    Raises:
        BadParameter: The model brings none.
    """
    is_local = model == DEMO_NAME or Path(model).expanduser().is_dir()
    if is_local and (path := resolve_model(model) / name).is_file():
        return path
    raise typer.BadParameter(f"give a text with --text: {model} brings no {name}")


def recall_table(result: Any) -> Any:
    """Lay out the recall of a report, a row per layer and a column per predictor."""
    depths = result.depths
    table = narrow_table(
        f"Recall at n = {', '.join(map(str, depths))} (top_k is {result.top_k}), percent, "
        f"on {result.num_held_out_tokens} held-out tokens",
        gap=1,
    )
    table.add_column("layer", justify="right")
    for name in result.recall_at_n:
        table.add_column(name, justify="right", no_wrap=True)
    for layer in range(result.num_layers):
        cells = [_cell(recall.get(layer), depths) for recall in result.recall_at_n.values()]
        table.add_row(str(layer), *cells)
    table.add_section()
    table.add_row("mean", *(_cell(result.mean_recall(name), depths) for name in result.recall_at_n))
    return table


def _cell(recall: dict[int, float] | None, depths: tuple[int, ...]) -> str:
    if not recall:
        return "-"
    return " ".join(f"{recall[depth] * 100:5.1f}" for depth in depths)
