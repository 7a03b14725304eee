"""`foreload train-estimator`: a trained predictor, with its recall per layer before and after."""

from pathlib import Path
from typing import Annotated

import typer

from foreload.cli.calibrate import SHIPPED_TEXT, find_shipped_text, recall_table
from foreload.cli.generate import read_text
from foreload.cli.options import DEFAULT_MODEL, HOST_ENGINE, CacheDirOption, ModelArgument
from foreload.cli.streaming import open_engine
from foreload.cli.terminal import Terminal
from foreload.cli.verb import verb
from foreload.config import EngineConfig, parse_size
from foreload.errors import ConfigError

__all__ = ["train_estimator"]

_MAX_TOKENS = 1_000_000

TextOption = Annotated[
    list[Path],
    typer.Option(
        help="Text like the text to be generated; may be given several times. "
        "demo brings its own, a short one.",
        exists=True,
        dir_okay=False,
        show_default="the model's calibration.txt",
    ),
]
HeldOutOption = Annotated[
    Path | None,
    typer.Option(
        help="Text to measure the recall on.",
        exists=True,
        dir_okay=False,
        show_default="half of the text's last tenth",
    ),
]
MaxTokensOption = Annotated[int, typer.Option(help="Most tokens of the text to use.", min=64)]
PassesOption = Annotated[int, typer.Option(help="How often each token is trained on.", min=1)]
WidthOption = Annotated[
    int | None,
    typer.Option(
        help="Hidden units of each layer's network.",
        show_default="128, or what 1 % of the model's parameters allows",
        min=1,
    ),
]
BufferOption = Annotated[
    str, typer.Option(help='Most memory for what is collected, such as "500MB".', metavar="SIZE")
]
SeedOption = Annotated[int, typer.Option(help="Seed of first weights and order.", min=0)]


# It is trained on the processor, wherever it is used.
@verb(
    HOST_ENGINE.without(
        "device", "host_memory", "predictor", "lookahead_layers", "policy", "confidence"
    )
)
def train_estimator(
    terminal: Terminal,
    settings: EngineConfig,
    model: ModelArgument = DEFAULT_MODEL,
    text: TextOption = [],  # noqa: B006
    held_out: HeldOutOption = None,
    max_tokens: MaxTokensOption = _MAX_TOKENS,
    passes: PassesOption = 4,
    width: WidthOption = None,
    buffer: BufferOption = "1GiB",
    seed: SeedOption = 0,
    cache_dir: CacheDirOption = None,
) -> None:
    """Train an estimator on a text, and measure it on the text's last tenth.

    The result is kept for this checkpoint, and the predictors auto and estimator use it from then
    on. Interrupted, the same command goes on after the last finished pass. An earlier estimator is
    replaced only by a complete new one.
    """
    try:
        buffer_bytes = parse_size(buffer, whole_bytes=1 << 30, setting="buffer")
    except ConfigError as error:
        raise typer.BadParameter(f"--buffer: {error}") from error
    files = text or [find_shipped_text(model, SHIPPED_TEXT)]
    sample = "\n".join(read_text(file, 16 * max_tokens) for file in files)
    settings = settings.with_values(
        model=model, device="cpu", predictor="lookahead", lookahead_layers=1
    )
    with open_engine(terminal, settings, cache_dir, needs_host=True) as engine:
        from foreload import train_estimator as training

        with terminal.progress() as report:
            result = training.train_estimator(
                engine,
                sample,
                held_out=None if held_out is None else read_text(held_out),
                max_tokens=max_tokens,
                num_passes=passes,
                width=width,
                buffer_bytes=buffer_bytes,
                seed=seed,
                progress=report,
                note=terminal.note,
            )
        config = engine.config.to_dict()
    names = [str(file) for file in files]
    terminal.print_json({**result.to_dict(), "text": names, "config": config})
    terminal.show(recall_table(result))
    with_networks, without = (1e6 * seconds for seconds in result.seconds_per_token)
    speakers = ", ".join(f"{at} {name}" for at, name in enumerate(result.choices) if at)
    terminal.note(f"best by layer: {speakers}")
    terminal.note(
        f"{result.num_parameters} parameters, {result.parameter_share * 100:.2f} % of the model's; "
        f"per token {result.flop_per_token / 1e6:.2f} MFLOP, and {with_networks:.0f} µs to ask all "
        f"routers instead of {without:.0f}"
    )
    if result.on_policy_recall:
        mean = sum(result.on_policy_recall.values()) / len(result.on_policy_recall)
        terminal.note(f"recall where predictions are executed: {mean * 100:.1f} %")
    terminal.note(f"trained on {result.num_tokens} tokens, saved to {result.path}")
