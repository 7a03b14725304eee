"""foreload's own trace files: JSON lines, version 1, compressed where the name ends in .gz.

    header   {"format": "foreload-trace", "version": 1, "model": ..., "num_layers": ..., ...}
    visits   {"step": 0, "layer": 0, "phase": "prefill", "experts": [[...], ...], ...}
    end      {"num_visits": ..., "bandwidth_bytes_s": ...}

The guide "Record and simulate" describes every field. Written and read line by line; a file
without its end is refused.
"""

from __future__ import annotations

import gzip
import json
import math
from dataclasses import replace
from typing import IO, TYPE_CHECKING, Any

from foreload.errors import TraceError
from foreload.trace.record import LayerVisit, RoutingTrace, TraceInfo, VisitTimes
from foreload.types import Prediction

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from foreload.trace.lines import TraceLines

__all__ = ["FORMAT", "VERSION", "TraceWriter", "read_own_format"]

FORMAT = "foreload-trace"
VERSION = 1

_PHASES = ("decode", "prefill")


class TraceWriter:
    """Writes a trace step by step; the file has its name only once `finish` was called.

    Args:
        path: The file; compressed where its name ends in .gz.
        info: What is known of the recording beforehand.
        num_layers: MoE layers.
        num_experts: Experts per layer.

    Raises:
        TraceError: Here or later: the file cannot be written.
    """

    def __init__(self, path: Path, info: TraceInfo, *, num_layers: int, num_experts: int) -> None:
        # Through links: what they lead to is written, and they stay.
        self._path = path = path.resolve()
        if path.exists() and not path.is_file():
            raise TraceError(f"cannot write {path}: it is no file", hint="choose another output")
        self._part = path.with_name(path.name + ".part")
        self._num_steps = 0
        self._num_visits = 0
        self._stream = self._open()
        sizes = info.expert_bytes
        self._write(
            {
                "format": FORMAT,
                "version": VERSION,
                "model": info.model,
                "identity": info.identity,
                "num_layers": num_layers,
                "num_experts": num_experts,
                "top_k": info.top_k,
                "expert_bytes": sizes[0] if len(set(sizes)) == 1 else list(sizes),
                "predictor": info.predictor,
            }
        )

    def write_step(self, visits: Sequence[LayerVisit]) -> None:
        """Write the layers of one forward; visits need their `routing`."""
        for layer, visit in enumerate(visits):
            self._write(_record(self._num_steps, layer, visit))
        self._num_steps += 1
        self._num_visits += len(visits)

    def finish(self, *, bandwidth_bytes_s: float | None = None) -> None:
        """Write the end and give the file its name.

        Args:
            bandwidth_bytes_s: What the copies of the recording were moved at.
        """
        self._write({"num_visits": self._num_visits, "bandwidth_bytes_s": bandwidth_bytes_s})
        try:
            self._stream.close()
            self._part.replace(self._path)
        except OSError as error:
            raise self._error(error) from error

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.close()
        self._part.unlink(missing_ok=True)

    def _open(self) -> IO[str]:
        try:
            if self._path.suffix == ".gz":
                return gzip.open(self._part, "wt", encoding="utf-8")
            return self._part.open("w", encoding="utf-8")
        except OSError as error:
            raise self._error(error) from error

    def _write(self, record: dict[str, Any]) -> None:
        try:
            self._stream.write(json.dumps(record, separators=(",", ":")) + "\n")
        except OSError as error:
            raise self._error(error) from error

    def _error(self, error: OSError) -> TraceError:
        return TraceError(f"cannot write {self._path}: {error}", hint="choose another output")


def read_own_format(lines: TraceLines, first: str) -> RoutingTrace:
    """Read a trace in foreload's own format.

    Args:
        lines: The file, of which the first line has been read.
        first: That line.

    Raises:
        TraceError: The first thing that is wrong, with its line.
    """
    return _Reader(lines, first).read()


class _Reader:
    def __init__(self, lines: TraceLines, first: str) -> None:
        self._lines = lines
        self._trace = self._begin(_parse(lines, first))

    def read(self) -> RoutingTrace:
        """Read all visits up to the end."""
        for num_visits, line in enumerate(self._lines):
            record = _parse(self._lines, line)
            if "num_visits" in record:
                self._end(record, num_visits)
                return self._trace
            try:
                self._add(record)
            except KeyError as error:
                raise self._lines.error(f"{error.args[0]!r} is missing") from error
            except (TypeError, ValueError) as error:
                raise self._lines.error(str(error)) from error
        raise self._lines.error(
            "the trace ends without its end",
            hint="the file was cut off: record or download it again",
        )

    def _begin(self, header: dict[str, Any]) -> RoutingTrace:
        if header.get("format") != FORMAT:
            raise self._lines.error(
                f'no trace: the first line does not say "format": "{FORMAT}"',
                hint="give a file made by `foreload trace`, or a route_trace CSV",
            )
        if header.get("version") != VERSION:
            raise self._lines.error(
                f"version {header.get('version')!r} of the format; this foreload reads {VERSION}",
                hint="use the foreload that recorded it",
            )
        try:
            num_layers = _whole(header, "num_layers")
            sizes = header["expert_bytes"]
            if not isinstance(sizes, list):
                sizes = [sizes] * num_layers
            if len(sizes) != num_layers or not all(_is_whole(size) for size in sizes):
                raise ValueError("'expert_bytes' is neither a number nor one per layer")
            info = TraceInfo(
                model=str(header["model"]),
                identity=str(header.get("identity", "")),
                top_k=_whole(header, "top_k"),
                expert_bytes=tuple(sizes),
                predictor=str(header.get("predictor", "none")),
            )
            return RoutingTrace(num_layers, _whole(header, "num_experts"), info=info)
        except KeyError as error:
            raise self._lines.error(f"{error.args[0]!r} is missing") from error
        except ValueError as error:
            raise self._lines.error(str(error)) from error

    def _add(self, record: dict[str, Any]) -> None:
        """Append one visit."""
        trace = self._trace
        step, layer = record["step"], record["layer"]
        is_new = not trace.steps or len(trace.steps[-1]) == trace.num_layers
        due = (len(trace.steps), 0) if is_new else (len(trace.steps) - 1, len(trace.steps[-1]))
        if (step, layer) != due:
            raise ValueError(
                f"step {step}, layer {layer} where step {due[0]}, layer {due[1]} is due"
            )
        if record["phase"] not in _PHASES:
            raise ValueError(f"'phase' is {record['phase']!r}, not one of {', '.join(_PHASES)}")
        routing = [self._experts(row) for row in record["experts"]]
        weights = tuple(_numbers(row, "weights") for row in record.get("weights", ()))
        if not routing or (weights and [*map(len, weights)] != [*map(len, routing)]):
            raise ValueError("'experts' is empty, or 'weights' do not fit them")
        visit = LayerVisit.from_routing(
            routing,
            trace.num_experts,
            weights=weights,
            predictions=tuple(
                self._prediction(layer, guess) for guess in record.get("predictions", ())
            ),
            is_prefill=record["phase"] == "prefill",
            times=_times(record),
        )
        if is_new:
            trace.steps.append([])
        trace.steps[-1].append(visit)

    def _experts(self, row: Any) -> tuple[int, ...]:
        """Check one token's experts; `num_experts` itself stands for no expert."""
        for expert in row:
            if not _is_whole(expert, at_least=0) or expert > self._trace.num_experts:
                raise ValueError(f"expert {expert!r} of {self._trace.num_experts}")
        return tuple(row)

    def _prediction(self, layer: int, guess: dict[str, Any]) -> Prediction:
        experts = self._experts(guess["experts"])
        sure = tuple(math.inf if value is None else value for value in guess["confidence"])
        if len(_numbers(sure, "confidence")) != len(experts):
            raise ValueError("'confidence' does not fit the predicted 'experts'")
        distance = _whole(guess, "distance")
        coming = (layer + distance) % self._trace.num_layers
        return Prediction(coming, distance, experts, sure, _whole(guess, "num_expected"))

    def _end(self, record: dict[str, Any], num_visits: int) -> None:
        trace = self._trace
        if not trace.steps or trace.info is None:
            raise self._lines.error("the trace is empty", hint="record it again")
        if record["num_visits"] != num_visits:
            raise self._lines.error(
                f"the trace has {num_visits} visits and should have {record['num_visits']}"
            )
        if len(trace.steps[-1]) != trace.num_layers:
            raise self._lines.error("the last step lacks layers")
        bandwidth = record.get("bandwidth_bytes_s")
        if bandwidth is not None and not (_is_number(bandwidth) and bandwidth > 0):
            raise self._lines.error(f"'bandwidth_bytes_s' is {bandwidth!r}")
        dense_s, expert_s = _mean_times(trace)
        trace.info = replace(
            trace.info, dense_s=dense_s, expert_s=expert_s, bandwidth_bytes_s=bandwidth
        )


def _record(step: int, layer: int, visit: LayerVisit) -> dict[str, Any]:
    """Turn a visit into what its line says."""
    record: dict[str, Any] = {
        "step": step,
        "layer": layer,
        "phase": "prefill" if visit.is_prefill else "decode",
        "experts": visit.routing,
    }
    if visit.weights:
        record["weights"] = [[_short(weight) for weight in row] for row in visit.weights]
    if visit.predictions:
        record["predictions"] = [
            {
                "distance": guess.distance,
                "experts": guess.experts,
                "confidence": [_short(sure) for sure in guess.confidence],
                "num_expected": guess.num_expected,
            }
            for guess in visit.predictions
        ]
    if visit.times is not None:
        record |= {name: _short(value) for name, value in visit.times._asdict().items()}
    return record


def _short(value: float) -> float | None:
    """Round to four digits; JSON has no infinity."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


def _parse(lines: TraceLines, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        hint = "give a file made by `foreload trace`, or a route_trace CSV"
        if lines.number > 1:
            hint = "the file is damaged or cut off: record or download it again"
        raise lines.error(f"no JSON ({error})", hint=hint) from error
    if not isinstance(record, dict):
        raise lines.error("no JSON object")
    return record


def _is_whole(value: Any, *, at_least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= at_least


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole(record: dict[str, Any], name: str) -> int:
    value = record[name]
    if not _is_whole(value):
        raise ValueError(f"{name!r} is {value!r}, not a whole number above 0")
    return int(value)


def _numbers(row: Any, name: str) -> tuple[float, ...]:
    if not all(_is_number(value) for value in row):
        raise ValueError(f"{name!r} has something that is no number")
    return tuple(row)


def _times(record: dict[str, Any]) -> VisitTimes | None:
    if VisitTimes._fields[0] not in record:
        return None
    return VisitTimes(*_numbers([record[name] for name in VisitTimes._fields], "times"))


def _mean_times(trace: RoutingTrace) -> tuple[float | None, float | None]:
    """Give the seconds of a layer and of an expert, means over the decoded tokens."""
    decoded = [
        (visit.times, len(visit.experts))
        for visits in trace.steps
        for visit in visits
        if visit.times is not None and not visit.is_prefill
    ]
    num_experts = sum(count for _, count in decoded)
    if not num_experts:
        return None, None
    dense_s = sum(times.dense_s for times, _ in decoded) / len(decoded)
    return dense_s, sum(times.compute_s for times, _ in decoded) / num_experts
