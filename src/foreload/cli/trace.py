"""`foreload trace`: record what a text demands, for `foreload simulate`."""

from pathlib import Path
from typing import Annotated

import typer

from foreload.cli.generate import read_text
from foreload.cli.options import (
    DEFAULT_MODEL,
    PLAIN_ENGINE,
    CacheDirOption,
    ModelArgument,
    expand_home,
)
from foreload.cli.statistics import config_line
from foreload.cli.streaming import open_engine
from foreload.cli.terminal import Terminal
from foreload.cli.verb import verb
from foreload.config import EngineConfig, format_bytes
from foreload.model.source import DEMO_NAME, resolve_model

__all__ = ["trace"]

_SHIPPED_TEXT = "held_out.txt"

OutputOption = Annotated[
    Path,
    typer.Option(
        help="The trace; compressed where the name ends in .gz.",
        dir_okay=False,
        callback=expand_home,
    ),
]
TextOption = Annotated[
    Path | None,
    typer.Option(help="Text to decode.", show_default="the demo's", exists=True, dir_okay=False),
]
PromptTokensOption = Annotated[
    int, typer.Option(help="Tokens of the text that are read as prompt.", min=1)
]
MaxTokensOption = Annotated[int, typer.Option(help="Most tokens of the text to use.", min=2)]


@verb(PLAIN_ENGINE)
def trace(
    terminal: Terminal,
    settings: EngineConfig,
    output: OutputOption,
    model: ModelArgument = DEFAULT_MODEL,
    text: TextOption = None,
    num_prompt_tokens: PromptTokensOption = 128,
    max_tokens: MaxTokensOption = 512,
    cache_dir: CacheDirOption = None,
) -> None:
    """Record the routing, the predictions and the times of a text as a trace.

    The text is forced: a prompt, then one token per forward, whatever the model would have said.
    """
    # Sixteen characters per token are more than any text has on average.
    sample = read_text(text or resolve_model(DEMO_NAME) / _SHIPPED_TEXT, 16 * max_tokens)
    with open_engine(
        terminal, settings.with_values(model=model), cache_dir, needs_host=True
    ) as engine:
        terminal.note(config_line(engine))
        from foreload.recording import record_trace

        with terminal.progress() as report:
            recorded = record_trace(
                engine,
                sample,
                output,
                num_prompt_tokens=num_prompt_tokens,
                max_tokens=max_tokens,
                progress=report,
            )
        config = engine.config.to_dict()
    terminal.print_json({**recorded.to_dict(), "config": config})
    bandwidth = recorded.bandwidth_bytes_s
    moved = "" if bandwidth is None else f", copies at {format_bytes(bandwidth)}/s"
    terminal.write(
        f"{recorded.num_decode_tokens} decoded tokens at {recorded.tpot_s * 1e3:.1f} ms{moved}, "
        f"saved to {recorded.path}\n"
    )
