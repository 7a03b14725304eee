"""The lines of a trace file, counted, so that what is wrong can be found.

Reads text, plain or gzip, and knows nothing of what the lines say.
"""

from __future__ import annotations

import gzip
import io
import zlib
from typing import TYPE_CHECKING

from foreload.errors import TraceError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["TraceLines"]

_GZIP_MAGIC = b"\x1f\x8b"


class TraceLines:
    """Iterates over a file's lines, without their ends.

    Attributes:
        path: The file.
        number: Lines read so far.

    Raises:
        TraceError: The file cannot be read, is no text, or its compressed data end early.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.number = 0
        try:
            self._file = path.open("rb")
            is_gzip = self._file.read(2) == _GZIP_MAGIC
            self._file.seek(0)
            raw = gzip.GzipFile(fileobj=self._file) if is_gzip else self._file
            self._stream = io.TextIOWrapper(raw, encoding="utf-8")
        except OSError as error:
            raise TraceError(f"cannot read {path}: {error}", hint="give a trace file") from error

    def __enter__(self) -> TraceLines:
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.close()
        self._file.close()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        self.number += 1
        try:
            line = self._stream.readline()
        except UnicodeDecodeError as error:
            raise self.error("not a text", hint="give a trace file") from error
        except (EOFError, OSError, zlib.error) as error:
            raise self.error(f"the compressed data are damaged or cut off ({error})") from error
        if not line:
            raise StopIteration
        return line.rstrip("\n")

    def error(
        self, problem: str, *, hint: str = "the file is damaged: record or download it again"
    ) -> TraceError:
        """Make the error that says what is wrong with the line read last."""
        return TraceError(f"{self.path}, line {self.number}: {problem}", hint=hint)
