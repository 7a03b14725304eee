"""Open an engine for a verb, and stream an answer that Ctrl-C can end."""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from foreload.decode.chunks import join_chunks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from foreload.cli.terminal import Terminal
    from foreload.config import EngineConfig, SamplingConfig
    from foreload.decode.chunks import Chunk, GenerationResult
    from foreload.engine import Engine

__all__ = ["cancelling", "open_engine", "stream_answer"]


@contextmanager
def open_engine(
    terminal: Terminal,
    settings: EngineConfig,
    cache_dir: Path | None,
    *,
    needs_host: bool = False,
) -> Iterator[Engine]:
    """Open the engine that `settings` describe, and close it after the block.

    Args:
        terminal: Where progress is shown.
        settings: The settings.
        cache_dir: Where calibrations, estimators and drafts are kept.
        needs_host: Whether the verb watches routing, which only the host's loop shows: "auto"
            is that one then.
    """
    if needs_host and settings.orchestration == "auto":
        settings = settings.with_values(orchestration="host")
    with terminal.status("Starting"):
        from foreload.engine import Engine

    if terminal.is_quiet:
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
    with terminal.progress(is_bytes=True) as report:
        engine = Engine.from_pretrained(
            progress=lambda done, total: report("Loading all but the experts", done, total),
            draft_progress=lambda done, total: report("Building the draft", done, total),
            host_progress=lambda done, total: report("Reading the experts", done, total),
            cache_dir=cache_dir,
            **settings.to_dict(),
        )
    with engine:
        yield engine


def stream_answer(
    engine: Engine, prompt: Any, sampling: SamplingConfig, show: Callable[[str], None]
) -> GenerationResult:
    """Generate, and show the text as it comes.

    The first Ctrl-C ends the answer after its current token, the second raises KeyboardInterrupt.
    Without a tokenizer the token ids are shown.
    """
    chunks = engine.stream(prompt, **asdict(sampling))

    def showing() -> Iterator[Chunk]:
        for chunk in chunks:
            if engine.tokenizer is None:
                show("".join(f"{token} " for token in chunk.token_ids))
            else:
                show(chunk.text)
            yield chunk

    with cancelling(engine.cancel):
        return join_chunks(showing())


@contextmanager
def cancelling(cancel: Callable[[], None]) -> Iterator[None]:
    """Let the first Ctrl-C inside the block call `cancel`, and the second raise."""
    before = signal.getsignal(signal.SIGINT)
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or before is signal.SIG_IGN:
        yield
        return

    def on_interrupt(number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        cancel()

    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
