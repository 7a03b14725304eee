"""Where a verb's words go: results to stdout, everything else to stderr.

With `--json` stdout carries one JSON object and nothing else. Bars and spinners appear only where
stderr is a terminal. Nothing here knows what the verbs do.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.console import Console

from foreload.errors import ForeloadError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from rich.console import RenderableType
    from rich.progress import TaskID

    Report = Callable[[str, int, int], None]

__all__ = ["Terminal"]

_NO_TERMINAL_COLUMNS = 1000
"""A file has no edge at which tables would have to be cut or folded."""


class _Results(Console):
    """Prints results; tells whoever prints them that nobody reads them any more."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


class _Notes(Console):
    """Prints what stands beside results, as long as it can be written."""

    def on_broken_pipe(self) -> None:
        self.quiet = True

    def print(self, *objects: Any, **settings: Any) -> None:
        """Print as ever; results are worth more than what a full disk keeps from standing here."""
        try:
            super().print(*objects, **settings)
        except OSError:
            self.quiet = True


def _console(kind: type[Console], **settings: Any) -> Console:
    console = kind(highlight=False, **settings)
    if not console.is_terminal:
        console.width = _NO_TERMINAL_COLUMNS
    return console


@dataclass(frozen=True, slots=True)
class Terminal:
    """The two streams of a verb, and how much of them is wanted.

    Attributes:
        is_json: Whether stdout is reserved for one JSON object.
        is_quiet: Whether settings, statistics and bars are left out.
        is_debug: Whether errors come with tracebacks.
        out: Results.
        err: Everything else.
    """

    is_json: bool = False
    is_quiet: bool = False
    is_debug: bool = False
    out: Console = field(default_factory=lambda: _console(_Results))
    err: Console = field(default_factory=lambda: _console(_Notes, stderr=True))

    def write(self, text: str) -> None:
        """Write a piece of generated text to stdout at once, unless stdout is for JSON."""
        if not self.is_json:
            with _to_stdout():
                sys.stdout.write(text)

    def show(self, result: RenderableType) -> None:
        """Print a result for people to stdout, unless stdout is for JSON."""
        if not self.is_json:
            with _to_stdout():
                self.out.print(result, markup=False)

    def print_json(self, values: dict[str, Any]) -> None:
        """Print the JSON object to stdout, if it was asked for."""
        if self.is_json:
            with _to_stdout():
                sys.stdout.write(json.dumps(values, allow_nan=False) + "\n")

    def require_stdout(self) -> None:
        """Check that results can go somewhere.

        Raises:
            ForeloadError: stdout is closed.
        """
        if sys.stdout is None:
            raise ForeloadError(
                "stdout is closed: there is nowhere to print results",
                hint="send it to /dev/null if you do not want them",
            )

    def note(self, text: str) -> None:
        """Print a line beside the result to stderr, unless quiet."""
        if not self.is_quiet:
            self.err.print(text, style="dim", markup=False, soft_wrap=True)

    def error(self, message: str, hint: str | None = None) -> None:
        """Print what went wrong in one line, and below it what to do."""
        self.err.print(f"error: {message}", style="red", markup=False, soft_wrap=True)
        if hint:
            self.err.print(f"hint: {hint}", markup=False, soft_wrap=True)

    @property
    def has_bars(self) -> bool:
        """Tell whether progress may be drawn."""
        return self.err.is_interactive and not self.is_quiet

    def status(self, text: str) -> AbstractContextManager[Any]:
        """Spin beside `text` while the block runs."""
        return self.err.status(text) if self.has_bars else nullcontext()

    @contextmanager
    def progress(self, *, is_bytes: bool = False) -> Iterator[Report]:
        """Draw one bar per stage; give the function that takes (stage, done, total).

        The bars start with the first report: before it, others may draw theirs.
        """
        from rich import progress

        amount = progress.DownloadColumn(True) if is_bytes else progress.MofNCompleteColumn()
        columns = (
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            amount,
            progress.TimeRemainingColumn(),
        )
        bars = progress.Progress(*columns, console=self.err, transient=True)
        tasks: dict[str, TaskID] = {}

        def report(stage: str, done: int, total: int) -> None:
            if not self.has_bars:
                return
            if stage not in tasks:
                bars.start()
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        try:
            yield report
        finally:
            if tasks:
                bars.stop()


@contextmanager
def _to_stdout() -> Iterator[None]:
    """Let what the block prints reach stdout, or say why it does not.

    Raises:
        BrokenPipeError: The reader of stdout is gone.
        ForeloadError: The disk is full, or the like.
    """
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        # Whatever is still buffered must not fail again when the interpreter ends.
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise
        raise ForeloadError(
            f"cannot write to stdout: {error}", hint="see where it leads, and whether there is room"
        ) from error
