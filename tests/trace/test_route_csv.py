"""Published traces are read as the forwards they came from, and refused where they are broken."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from foreload.errors import TraceError
from foreload.trace.read import read_trace
from foreload.trace.record import LayerVisit, TraceInfo

if TYPE_CHECKING:
    from pathlib import Path

HEADER = """\
# route_trace v1
# model=/data/tiny.gguf arch=tiny n_layer=3 n_expert=8 n_expert_used=2
# layer=0 expert_bytes=0 dense_bytes=7
# layer=1 expert_bytes=100 dense_bytes=7
# layer=2 expert_bytes=300 dense_bytes=7
turn,phase,step,layer,slot,expert,weight,residency,expert_bytes
"""
# The first layer is dense; in the last one only the prompt's last token is computed.
ROWS = """\
0,0,0,1,0,5,0.75,0,100
0,0,0,1,1,1,0.25,0,100
0,0,1,1,0,1,0.5,1,0
0,0,1,1,1,3,0.5,0,100
0,0,1,2,0,7,0.5,0,300
0,0,1,2,1,0,0.5,0,300
0,1,2,1,0,4,0.5,0,100
0,1,2,1,1,2,0.5,0,100
0,1,2,2,0,6,0.5,0,300
0,1,2,2,1,7,0.5,1,0
"""


def read(tmp_path: Path, text: str) -> object:
    path = tmp_path / "route.csv"
    path.write_text(text)
    return read_trace(path)


def test_prompts_are_one_forward_and_decoded_tokens_one_each(tmp_path: Path) -> None:
    path = tmp_path / "route.csv"
    path.write_text(HEADER + ROWS)
    trace = read_trace(path)
    half = (0.5, 0.5)
    assert (trace.num_layers, trace.num_experts) == (2, 8)
    assert trace.steps == [
        [
            LayerVisit(
                (1, 3, 5), (2, 1, 1), 2, ((5, 1), (1, 3)), ((0.75, 0.25), half), is_prefill=True
            ),
            LayerVisit((0, 7), (1, 1), 1, ((7, 0),), (half,), is_prefill=True),
        ],
        [
            LayerVisit((2, 4), (1, 1), 1, ((4, 2),), (half,)),
            LayerVisit((6, 7), (1, 1), 1, ((6, 7),), (half,)),
        ],
    ]
    assert trace.info == TraceInfo(model="tiny.gguf", top_k=2, expert_bytes=(100, 300))
    assert trace.decode_part().steps == trace.steps[1:]


def test_a_second_turn_and_a_second_chunk_are_forwards_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "route.csv"
    chunk = "".join(line + "\n" for line in ROWS.splitlines()[:6])
    path.write_text(HEADER + chunk + ROWS + ROWS.replace("\n0,", "\n1,").replace("0,", "1,", 1))
    trace = read_trace(path)
    assert [trace.is_prefill(step) for step in range(5)] == [True, True, False, True, False]


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("route_trace v1", "route_trace v2", 1, "another version"),
        ("n_expert=8 ", "", 6, "lacks n_expert"),
        ("expert_bytes=300 ", "", 5, "without its expert_bytes"),
        ("# layer=2 expert_bytes=300 dense_bytes=7\n", "", 15, "expert_bytes of layer 2"),
        ("turn,phase", "turn,phrase", 6, "neither a comment nor the columns"),
        (",0.75,0,100", ",0.75,0", 7, "no row of the columns"),
        ("0,0,0,1,0,5", "0,0,0,1,0,five", 7, "no row of the columns"),
        ("0,0,0,1,0,5", "0,0,0,1,0,8", 7, "expert 8 of 8"),
        ("0,0,0,1,0,5", "0,2,0,1,0,5", 7, "phase 2"),
        ("0,1,2,2,0,6,0.5,0,300\n0,1,2,2,1,7,0.5,1,0\n", "", 14, "does not visit the layers"),
        (ROWS, "", 6, "the trace is empty"),
        (HEADER[HEADER.index("turn") :] + ROWS, "", 5, "never come"),
    ],
)
def test_damage_is_named_with_its_line(
    tmp_path: Path, old: str, new: str, line: int, message: str
) -> None:
    text = HEADER + ROWS
    assert text.count(old) == 1
    with pytest.raises(TraceError, match=message) as caught:
        read(tmp_path, text.replace(old, new))
    assert f"line {line}: " in str(caught.value) or f"line {line + 1}: " in str(caught.value)
    assert caught.value.hint
