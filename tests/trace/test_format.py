"""What is written is read again, and what is not whole is refused with its line."""

from __future__ import annotations

import gzip
import json
import math
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from foreload.errors import TraceError
from foreload.trace.format import TraceWriter
from foreload.trace.read import read_trace
from foreload.trace.record import LayerVisit, RoutingTrace, TraceInfo, VisitTimes
from foreload.types import Prediction

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

INFO = TraceInfo(
    model="tiny", identity="abc", top_k=2, expert_bytes=(100, 100), predictor="lookahead"
)


def make_trace() -> RoutingTrace:
    """Two layers of eight experts: a prompt of three tokens, then two decoded ones."""

    def decode(*experts: int, dense_s: float, **more: Any) -> LayerVisit:
        times = VisitTimes(dense_s, 0.002, 0.5)
        weights = ((0.75, 0.25),)
        return LayerVisit.from_routing([experts], 8, weights=weights, times=times, **more)

    def prefill(*routing: tuple[int, ...]) -> LayerVisit:
        weights = ((0.5, 0.5),) * len(routing)
        return LayerVisit.from_routing(routing, 8, weights=weights, is_prefill=True)

    guess = Prediction(1, 1, (4, 2, 6), (1.25, math.inf, -0.5), 2)
    return RoutingTrace(
        2,
        8,
        [
            [prefill((5, 1), (1, 3), (7, 8)), prefill((0, 1), (2, 3), (4, 5))],
            [decode(3, 1, dense_s=0.01, predictions=(guess,)), decode(7, 2, dense_s=0.03)],
            [decode(5, 0, dense_s=0.01), decode(2, 4, dense_s=0.05)],
        ],
        replace(INFO, dense_s=0.025, expert_s=0.001, bandwidth_bytes_s=2e9),
    )


def write(path: Path, trace: RoutingTrace, bandwidth_bytes_s: float | None = 2e9) -> Path:
    size = {"num_layers": trace.num_layers, "num_experts": trace.num_experts}
    with TraceWriter(path, trace.info or INFO, **size) as writer:
        for visits in trace.steps:
            writer.write_step(visits)
        writer.finish(bandwidth_bytes_s=bandwidth_bytes_s)
    return path


@pytest.mark.parametrize("name", ["trace.jsonl", "trace.jsonl.gz"])
def test_a_trace_comes_back_as_it_was(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, make_trace())
    assert (path.read_bytes()[:2] == b"\x1f\x8b") is name.endswith(".gz")
    assert read_trace(path) == make_trace()
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_layers_may_have_experts_of_different_sizes(tmp_path: Path) -> None:
    trace = make_trace()
    trace.info = replace(INFO, expert_bytes=(100, 300))
    read = read_trace(write(tmp_path / "trace.jsonl", trace))
    assert read.info is not None
    assert read.info.expert_bytes == (100, 300)


def test_without_times_and_copies_none_are_read(tmp_path: Path) -> None:
    trace = make_trace()
    trace.steps = [[replace(visit, times=None) for visit in step] for step in trace.steps]
    read = read_trace(write(tmp_path / "trace.jsonl", trace, bandwidth_bytes_s=None))
    assert read.steps == trace.steps
    assert read.info == INFO


def test_every_line_is_json_that_other_programs_read(tmp_path: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    lines = write(tmp_path / "trace.jsonl", make_trace()).read_text().splitlines()
    records = [json.loads(line, parse_constant=refuse) for line in lines]
    assert records[0]["format"] == "foreload-trace"
    assert [(r["step"], r["layer"]) for r in records[1:-1]] == [
        (step, layer) for step in range(3) for layer in range(2)
    ]
    assert records[1]["experts"] == [[5, 1], [1, 3], [7, 8]]
    assert records[-1]["num_visits"] == 6


def test_an_abandoned_recording_leaves_an_earlier_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text("earlier")

    def record() -> None:
        with TraceWriter(path, INFO, num_layers=2, num_experts=8) as writer:
            writer.write_step(make_trace().steps[0])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record()
    assert path.read_text() == "earlier"
    assert [file.name for file in tmp_path.iterdir()] == ["trace.jsonl"]


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="cannot write"):
        TraceWriter(tmp_path / "no" / "trace.jsonl", INFO, num_layers=2, num_experts=8)


def change(line: int, **values: Any) -> Callable[[list[str]], None]:
    """Make the damage that replaces values of one line."""

    def damage(lines: list[str]) -> None:
        record = json.loads(lines[line - 1]) | values
        kept = {name: value for name, value in record.items() if value is not ...}
        lines[line - 1] = json.dumps(kept)

    return damage


@pytest.mark.parametrize(
    ("damage", "line", "message"),
    [
        (change(1, format="other"), 1, "no trace"),
        (change(1, version=2), 1, "version 2"),
        (change(1, num_layers=0), 1, "'num_layers' is 0"),
        (change(1, num_experts=...), 1, "'num_experts' is missing"),
        (change(1, expert_bytes=[100]), 1, "one per layer"),
        (change(3, step=1), 3, "step 1, layer 1 where step 0, layer 1 is due"),
        (change(4, layer=1), 4, "step 1, layer 1 where step 1, layer 0 is due"),
        (change(4, experts=...), 4, "'experts' is missing"),
        (change(4, experts=[[9, 1]]), 4, "expert 9 of 8"),
        (change(4, experts=[[-1, 1]]), 4, "expert -1 of 8"),
        (change(4, experts=[["1"]]), 4, "expert '1' of 8"),
        (change(4, experts=7), 4, "not iterable"),
        (change(4, experts=[]), 4, "'experts' is empty"),
        (change(4, weights=[[0.5]]), 4, "'weights' do not fit"),
        (change(4, weights=[["a", "b"]]), 4, "'weights' has something that is no number"),
        (change(4, phase="pause"), 4, "'phase' is 'pause'"),
        (change(4, predictions=[{"experts": [1]}]), 4, "'confidence' is missing"),
        (
            change(4, predictions=[{"experts": [1], "confidence": [], "distance": 1}]),
            4,
            "'confidence' does not fit",
        ),
        (change(4, compute_s="long"), 4, "'times' has something that is no number"),
        (change(8, num_visits=5), 8, "has 6 visits and should have 5"),
        (change(8, bandwidth_bytes_s=-1), 8, "'bandwidth_bytes_s' is -1"),
        (lambda lines: lines.pop(), 8, "ends without its end"),
        (lambda lines: lines.__delitem__(slice(5, None)), 6, "ends without its end"),
        (lambda lines: lines.__setitem__(4, lines[4][:20]), 5, "no JSON"),
        (lambda lines: lines.__setitem__(4, "[]"), 5, "no JSON object"),
        (lambda lines: lines.__delitem__(slice(1, 7)), 2, "the trace is empty"),
        (lambda lines: lines.__delitem__(6), 7, "has 5 visits and should have 6"),
    ],
)
def test_damage_is_named_with_its_line(
    tmp_path: Path, damage: Callable[[list[str]], None], line: int, message: str
) -> None:
    path = write(tmp_path / "trace.jsonl", make_trace())
    lines = path.read_text().splitlines()
    damage(lines)
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(TraceError) as caught:
        read_trace(path)
    assert f"line {line}: " in str(caught.value)
    assert message in str(caught.value)
    assert caught.value.hint


def test_a_step_that_lacks_layers_at_the_end_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "trace.jsonl", make_trace())
    lines = path.read_text().splitlines()
    del lines[6]
    lines[-1] = json.dumps({"num_visits": 5})
    path.write_text("\n".join(lines))
    with pytest.raises(TraceError, match="the last step lacks layers"):
        read_trace(path)


def test_a_cut_off_compressed_trace_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "trace.jsonl.gz", make_trace())
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(TraceError, match="cut off"):
        read_trace(path)
    whole = write(tmp_path / "trace.jsonl", make_trace()).read_bytes()
    path.write_bytes(gzip.compress(whole[:-60]))
    with pytest.raises(TraceError, match=r"no JSON|without its end"):
        read_trace(path)


def test_a_link_stays_and_what_it_leads_to_is_written(tmp_path: Path) -> None:
    link = tmp_path / "link.jsonl"
    link.symlink_to(tmp_path / "real.jsonl")
    write(link, make_trace())
    assert link.is_symlink()
    assert (tmp_path / "real.jsonl").stat().st_size > 0


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(TraceError, match="is no file"):
        TraceWriter(pipe, INFO, num_layers=2, num_experts=8)
    assert pipe.is_fifo()
