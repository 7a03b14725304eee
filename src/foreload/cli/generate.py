"""`foreload generate`: a prompt to streamed text, then a line of statistics."""

import secrets
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from foreload.cli.options import DEFAULT_MODEL, ENGINE, SAMPLING, CacheDirOption, ModelArgument
from foreload.cli.statistics import comparison_table, config_line, ratios, statistics_line
from foreload.cli.streaming import open_engine, stream_answer
from foreload.cli.terminal import Terminal
from foreload.cli.verb import ERROR, INTERRUPTED, verb
from foreload.config import EngineConfig, SamplingConfig
from foreload.errors import ConfigError

__all__ = ["generate", "read_text"]

PromptOption = Annotated[str | None, typer.Option("--prompt", "-p", help="The prompt.")]
PromptFileOption = Annotated[
    Path | None,
    typer.Option(help="File that holds the prompt.", exists=True, dir_okay=False),
]
PromptIdsOption = Annotated[
    str | None,
    typer.Option(help="The prompt as token ids, for checkpoints without a tokenizer: 1,2,3."),
]
CompareOption = Annotated[
    bool,
    typer.Option("--compare", help="Run again on demand, and set both runs side by side."),
]


@verb(ENGINE, SAMPLING)
def generate(
    terminal: Terminal,
    settings: EngineConfig,
    sampling: SamplingConfig,
    model: ModelArgument = DEFAULT_MODEL,
    prompt: PromptOption = None,
    prompt_file: PromptFileOption = None,
    prompt_ids: PromptIdsOption = None,
    compare: CompareOption = False,
    cache_dir: CacheDirOption = None,
) -> None:
    """Complete a prompt from -p, --prompt-file or stdin.

    Ctrl-C ends the text after the current token; a second one aborts.
    """
    given = _read_prompt(prompt, prompt_file, prompt_ids)
    if not given:
        raise ConfigError("the prompt is empty", hint="give at least one token")
    if compare and sampling.seed is None:
        sampling = replace(sampling, seed=secrets.randbits(31))
    asked = settings.with_values(model=model)
    with open_engine(terminal, asked, cache_dir) as engine:
        terminal.note(config_line(engine))
        if compare:
            _warm_up(engine, given)
        result = stream_answer(engine, given, sampling, terminal.write)
        settings, context = engine.config, engine.max_positions
    terminal.write("\n")
    terminal.note(statistics_line(result.stats, result.finish_reason, settings.policy))
    if result.finish_reason == "context":
        terminal.note(
            f"the text ends here because the context of {context} tokens is full, prompt included"
        )
    answer = {
        "text": result.text,
        "token_ids": result.token_ids,
        "finish_reason": result.finish_reason,
        "stats": result.stats.to_dict(),
        "config": settings.to_dict() | {"sampling": asdict(sampling)},
    }
    status = INTERRUPTED if result.finish_reason == "cancelled" else 0
    if compare and not status:
        on_demand = _on_demand(settings, asked.slot_plan)
        with open_engine(terminal, on_demand, cache_dir) as engine:
            with terminal.status("Running again on demand"):
                _warm_up(engine, given)
                again = stream_answer(engine, given, sampling, lambda text: None)
            on_demand = engine.config
        if again.finish_reason == "cancelled":
            status = INTERRUPTED
        else:
            is_same = again.token_ids == result.token_ids
            answer["comparison"] = {
                "stats": again.stats.to_dict(),
                "config": on_demand.to_dict(),
                "ratio": ratios(result.stats, again.stats),
                "is_same_text": is_same,
            }
            terminal.err.print(comparison_table(result.stats, again.stats, settings))
            if not is_same and settings.policy != "exact":
                terminal.note(f"the two runs gave different texts: {settings.policy} is not exact")
            elif not is_same and settings.draft != "none":
                terminal.note(
                    "the two runs gave different texts: verifying several tokens at once rounds "
                    "differently, and a tie fell the other way; --dtype float32 makes that rare"
                )
            elif not is_same:
                terminal.error("the two runs gave different texts", "this is a bug: report it")
                status = ERROR
    terminal.print_json(answer)
    if status:
        raise typer.Exit(status)


def _on_demand(settings: EngineConfig, slot_plan: str | tuple[int, ...]) -> EngineConfig:
    """Give the settings of the same run without anything that foreload adds.

    Args:
        settings: Resolved ones of the first run; the memory and who decides stay as they are.
        slot_plan: As it was asked for: without a draft there are more slots to divide.
    """
    default = EngineConfig()
    is_device = settings.orchestration == "device"
    return settings.with_values(
        policy="exact",
        confidence=default.confidence,
        predictor="none",
        lookahead_layers=default.lookahead_layers,
        # A device's tables know one rule, and keep what they have fetched.
        eviction=settings.eviction if is_device else "none",
        slot_plan=slot_plan,
        draft="none",
        num_draft_tokens="auto",
    )


def _warm_up(engine: Any, prompt: str | Sequence[int]) -> None:
    """Let both runs find torch warm, and the expert memory empty.

    Where the device decides, its slots are left as they are, alike for both runs: emptying them
    would end the captured steps, and capture is what the device is warmed up for.
    """
    engine.generate(prompt, max_new_tokens=2)
    if engine.config.orchestration == "host":
        engine.tiers.flush()


def read_text(path: Path, max_chars: int = -1) -> str:
    """Read a text file.

    Raises:
        ConfigError: It cannot be read, or is not UTF-8.
    """
    try:
        with path.open(encoding="utf-8") as stream:
            return stream.read(max_chars)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}", hint="give a UTF-8 text file") from error


def _read_prompt(text: str | None, file: Path | None, ids: str | None) -> str | Sequence[int]:
    if sum(given is not None for given in (text, file, ids)) > 1:
        raise typer.BadParameter("give one of -p, --prompt-file and --prompt-ids")
    if text is not None:
        return text
    if ids is not None:
        return _parse_ids(ids)
    if file is not None:
        return _strip_newline(read_text(file))
    if sys.stdin is None or sys.stdin.isatty():
        raise typer.BadParameter("give a prompt with -p, --prompt-file, or on stdin")
    try:
        return _strip_newline(sys.stdin.read())
    except UnicodeDecodeError as error:
        raise ConfigError(f"stdin is not UTF-8 text: {error}") from error


def _strip_newline(text: str) -> str:
    """Drop the newline that echo and editors end a file with; it changes what follows."""
    return text.removesuffix("\n").removesuffix("\r")


def _parse_ids(text: str) -> list[Any]:
    try:
        return [int(word) for word in text.replace(",", " ").split()]
    except ValueError as error:
        raise typer.BadParameter(f"--prompt-ids: {error}") from error
