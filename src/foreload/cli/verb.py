"""What every verb has in common: output flags, shared options, and how errors end it.

Exit status: 0 success, 1 an error, 2 bad usage, 130 interrupted, 141 the reader of stdout is gone.
"""

from __future__ import annotations

import inspect
import logging
import os
import sys
import traceback
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any, get_type_hints

import typer

from foreload.cli.options import OUTPUT
from foreload.cli.terminal import Terminal
from foreload.errors import ConfigError, ForeloadError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from foreload.cli.options import OptionGroup

__all__ = ["BROKEN_PIPE", "ERROR", "INTERRUPTED", "verb"]

ERROR = 1
INTERRUPTED = 130
BROKEN_PIPE = 141

_LEVELS = ("debug", "info", "warning", "error", "critical")


def verb(*groups: OptionGroup) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Turn a function into a verb, for `typer.Typer.command`.

    The function's first parameter receives a `Terminal`; each group's object arrives under the
    group's name. Typer sees the function's other parameters, the groups' and the output flags.

    Args:
        *groups: Options that the verb shares with others.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        given = {"terminal", *(group.name for group in groups)}
        hints = get_type_hints(function, include_extras=True)
        own = [
            parameter.replace(annotation=hints[name])
            for name, parameter in inspect.signature(function).parameters.items()
            if name not in given
        ]
        shared = [parameter for group in groups for parameter in group.parameters]

        @wraps(function)
        def run(**values: Any) -> None:
            objects = {group.name: group.collect(values) for group in groups}
            flags = {parameter.name: values.pop(parameter.name) for parameter in OUTPUT}
            terminal = Terminal(**flags)
            with _guarded(terminal), _logging(terminal):
                terminal.require_stdout()
                function(terminal, **objects, **values)

        parameters = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for parameter in (*own, *shared, *OUTPUT)
        ]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


@contextmanager
def _guarded(terminal: Terminal) -> Iterator[None]:
    """Turn what goes wrong inside the block into a line and an exit status."""
    try:
        yield
    except (typer.Exit, typer.Abort, typer.BadParameter):
        raise
    except KeyboardInterrupt:
        terminal.err.print("\ninterrupted", style="dim")
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:
        raise typer.Exit(BROKEN_PIPE) from None
    except Exception as error:
        if terminal.is_debug:
            terminal.err.print(traceback.format_exc(), markup=False, soft_wrap=True)
        if isinstance(error, ForeloadError):
            terminal.error(str(error), error.hint)
        else:
            terminal.error(
                f"{type(error).__name__}: {error}",
                "foreload did not expect this; --debug shows where it happened",
            )
        raise typer.Exit(ERROR) from None


@contextmanager
def _logging(terminal: Terminal) -> Iterator[None]:
    """Send foreload's log to stderr during the block, from the level in FORELOAD_LOG on."""
    level = os.environ.get("FORELOAD_LOG", "").lower()
    if level and level not in _LEVELS:
        raise ConfigError(
            f"FORELOAD_LOG={level!r} is no level", hint=f"use one of {', '.join(_LEVELS)}"
        )
    logger = logging.getLogger("foreload")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    before = logger.level
    logger.setLevel((level or ("error" if terminal.is_quiet else "warning")).upper())
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
