"""Lines are counted, whatever is wrong with the file is an error that names one."""

from __future__ import annotations

import gzip
from typing import TYPE_CHECKING

import pytest

from foreload.errors import TraceError
from foreload.trace.lines import TraceLines

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("is_gzip", [False, True])
def test_lines_come_without_their_ends(tmp_path: Path, is_gzip: bool) -> None:
    path = tmp_path / "trace"
    content = b"one\ntwo\n\nfour"
    path.write_bytes(gzip.compress(content) if is_gzip else content)
    with TraceLines(path) as lines:
        assert next(lines) == "one"
        assert lines.number == 1
        assert list(lines) == ["two", "", "four"]


def test_an_error_names_file_line_and_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text("one\ntwo\n")
    with TraceLines(path) as lines:
        next(lines)
        next(lines)
        error = lines.error("it is bad", hint="mend it")
    assert str(error) == f"{path}, line 2: it is bad"
    assert error.hint == "mend it"


def test_what_is_not_there_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="cannot read"):
        TraceLines(tmp_path / "nothing")
    path = tmp_path / "image"
    path.write_bytes(b"\xff\xd8\xff\xe0")
    with TraceLines(path) as lines, pytest.raises(TraceError, match="line 1: not a text"):
        next(lines)


@pytest.mark.parametrize("damage", [slice(0, -12), slice(0, 40)])
def test_compressed_data_that_end_early_are_an_error(tmp_path: Path, damage: slice) -> None:
    path = tmp_path / "trace.gz"
    whole = gzip.compress("".join(f"line {n * n}\n" for n in range(2000)).encode())
    path.write_bytes(whole[damage])
    with TraceLines(path) as lines, pytest.raises(TraceError, match="damaged or cut off"):
        list(lines)
