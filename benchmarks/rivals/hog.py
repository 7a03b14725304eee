"""Hold memory, so that only a given number of bytes stay for an engine and the page cache.

Without swap, touched anonymous memory cannot be taken back, so what is left is all there is: the
same limit for an engine that keeps its own buffers and for one that relies on the page cache.
Run as a program, it grows or shrinks for every line on its standard input, and ends, releasing
everything, when that input closes: it cannot outlive the program that started it.
"""

from __future__ import annotations

import mmap
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from types import TracebackType

CHUNK_BYTES = 64 * 2**20
PAGE_BYTES = mmap.PAGESIZE


def read_available_bytes() -> int:
    """Read how much memory a new program could have, page cache included."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo does not give MemAvailable")


def make_touched_chunk() -> mmap.mmap:
    """Map anonymous memory and write to each of its pages."""
    chunk = mmap.mmap(-1, CHUNK_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    chunk[::PAGE_BYTES] = b"\x01" * (CHUNK_BYTES // PAGE_BYTES)
    return chunk


def balance(chunks: list[mmap.mmap], left_bytes: int) -> None:
    """Grow or shrink until `left_bytes` are available, to within one chunk."""
    while (spare := read_available_bytes() - left_bytes) >= CHUNK_BYTES:
        # Touch in bursts: reading /proc/meminfo costs as much as touching a few megabytes.
        for _ in range(max(1, min(8, spare // CHUNK_BYTES // 2))):
            chunks.append(make_touched_chunk())
    while chunks and read_available_bytes() < left_bytes:
        chunks.pop().close()


class MemoryHog:
    """The hog as a child process, for a `with` statement.

    Args:
        left_bytes: What stays for everybody else.
    """

    def __init__(self, left_bytes: int) -> None:
        self.left_bytes = left_bytes
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(self.left_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._process is not None:
            with self._process as process:
                process.kill()

    @property
    def is_alive(self) -> bool:
        """Whether it still holds its memory."""
        return self._process is not None and self._process.poll() is None

    def balance(self) -> int:
        """Make `left_bytes` available again; returns the bytes that are."""
        if self._process is None or self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("the hog was not started")
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        if not self._process.stdout.readline():
            raise RuntimeError("the hog died: out of memory?")
        return read_available_bytes()


def main() -> None:
    """Serve one balancing request per line of standard input."""
    left_bytes, chunks = int(sys.argv[1]), list[mmap.mmap]()
    for _ in sys.stdin:
        balance(chunks, left_bytes)
        print(len(chunks) * CHUNK_BYTES, flush=True)


if __name__ == "__main__":
    main()
