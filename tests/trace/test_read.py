"""The first line tells which format a file is in."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from foreload.errors import TraceError
from foreload.trace.read import read_trace

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("text", ["", "dear diary\n", "[1, 2]\n", '{"format": "elf"}\n', "\n\n"])
def test_other_files_are_no_traces(tmp_path: Path, text: str) -> None:
    path = tmp_path / "file"
    path.write_text(text)
    with pytest.raises(TraceError, match="line 1") as caught:
        read_trace(str(path))
    assert "foreload trace" in str(caught.value.hint) or "record" in str(caught.value.hint)
