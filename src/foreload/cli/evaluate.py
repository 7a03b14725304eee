"""`foreload evaluate`: what any settings cost in quality, beside how long they wait."""

from pathlib import Path
from typing import Annotated, Any

import typer

from foreload.cli.calibrate import find_shipped_text
from foreload.cli.generate import read_text
from foreload.cli.options import DEFAULT_MODEL, HOST_ENGINE, CacheDirOption, ModelArgument
from foreload.cli.statistics import config_line
from foreload.cli.streaming import open_engine
from foreload.cli.terminal import Terminal
from foreload.cli.verb import verb
from foreload.config import EngineConfig

__all__ = ["evaluate"]

_SHIPPED_TEXT = "held_out.txt"
_MAX_TOKENS = 4096
_NUM_PROMPT_TOKENS = 64

TextOption = Annotated[
    Path | None,
    typer.Option(
        help="Text the model has not been trained or calibrated on; demo brings its own.",
        exists=True,
        dir_okay=False,
    ),
]
MaxTokensOption = Annotated[int, typer.Option(help="Most tokens of the text to use.", min=16)]
PromptTokensOption = Annotated[
    int,
    typer.Option(
        help="Tokens at the start of each window that are prefilled and not scored.",
        min=1,
    ),
]


@verb(HOST_ENGINE)
def evaluate(
    terminal: Terminal,
    settings: EngineConfig,
    model: ModelArgument = DEFAULT_MODEL,
    text: TextOption = None,
    max_tokens: MaxTokensOption = _MAX_TOKENS,
    num_prompt_tokens: PromptTokensOption = _NUM_PROMPT_TOKENS,
    cache_dir: CacheDirOption = None,
) -> None:
    """Compare settings with the exact model on a text: perplexity, KL, agreement, waiting.

    The text is decoded twice in windows, token by token: as the settings say, and exactly.
    Intervals are 95 %, bootstrapped.
    """
    file = text or find_shipped_text(model, _SHIPPED_TEXT)
    # Sixteen characters per token are more than any text has on average.
    sample = read_text(file, 16 * max_tokens)
    with open_engine(
        terminal, settings.with_values(model=model), cache_dir, needs_host=True
    ) as engine:
        from foreload import evaluate as evaluation

        terminal.note(config_line(engine))
        with terminal.progress() as report:
            result = evaluation.evaluate(
                engine,
                sample,
                max_tokens=max_tokens,
                num_prompt_tokens=num_prompt_tokens,
                progress=report,
            )
        config = engine.config.to_dict()
    terminal.print_json({**result.to_dict(), "text": str(file), "config": config})
    terminal.show(_table(result, config["policy"]))


def _table(result: Any, policy: str) -> Any:
    from rich.table import Table

    table = Table(
        title=f"policy {policy}, {result.num_tokens} tokens decoded in {result.num_windows} windows"
    )
    table.add_column("")
    for name in ("measured", "from", "to"):
        table.add_column(name, justify="right")
    for name, interval, scale, digits in (
        ("perplexity", result.perplexity, 1, 3),
        ("perplexity of the exact model", result.exact_perplexity, 1, 3),
        ("perplexity / exact", result.perplexity_ratio, 1, 4),
        ("KL to the exact model, nats per token", result.kl_vs_exact, 1, 5),
        ("top-1 agreement, %", result.top1_agreement, 100, 2),
        ("speculated, %", result.speculated_fraction, 100, 2),
        ("hit rate, %", result.hit_rate, 100, 1),
        ("stall per token, ms", result.stall_s_per_token, 1e3, 2),
    ):
        numbers = (interval.value, interval.low, interval.high)
        table.add_row(name, *(f"{number * scale:.{digits}f}" for number in numbers))
    return table
