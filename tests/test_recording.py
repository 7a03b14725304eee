"""A recorded trace says what the engine did, adds up in time, and leaves the engine as it was."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from fakes import make_engine
from foreload import ConfigError, Engine
from foreload.metrics import TimeSpan
from foreload.recording import _times_of, record_trace
from foreload.trace.read import read_trace
from foreload.trace.record import VisitTimes

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TEXT = list(range(5, 45))


def test_a_recording_is_the_engines_own_run(
    open_engine: Callable[..., Engine], tmp_path: Path
) -> None:
    engine = open_engine(predictor="lookahead")
    path = tmp_path / "trace.jsonl.gz"
    report = record_trace(engine, TEXT, str(path), num_prompt_tokens=8)
    trace = read_trace(path)

    assert report.to_dict()["path"] == str(path)
    assert (report.num_prompt_tokens, report.num_decode_tokens) == (8, 32)
    assert report.num_steps == len(trace.steps) == 33
    assert [trace.is_prefill(step) for step in range(33)] == [True] + [False] * 32
    assert (trace.num_layers, trace.num_experts) == (4, 16)
    lookups = sum(len(visit.experts) for visits in trace.steps for visit in visits)
    assert lookups == engine.metrics.num_lookups
    for visits in trace.steps:
        for visit in visits:
            assert [len(row) for row in visit.weights] == [4] * visit.num_tokens
            assert sum(visit.counts) == 4 * visit.num_tokens

    info = trace.info
    assert info is not None
    assert (info.identity, info.predictor, info.top_k) == (engine.spec.identity, "lookahead", 4)
    assert info.expert_bytes == engine.expert_bytes == engine.tiers.expert_bytes
    assert info.expert_bytes[0] == engine._loaded.plans[0][0].read_bytes
    assert info.bandwidth_bytes_s == report.bandwidth_bytes_s
    assert report.bandwidth_bytes_s is not None
    assert report.bandwidth_bytes_s > 0


@pytest.mark.parametrize("policy", ["exact", "speculate"])
def test_a_device_that_decides_is_recorded_as_the_host_is(
    open_engine: Callable[..., Engine], tiny_checkpoint: Path, tmp_path: Path, policy: str
) -> None:
    host = open_engine(predictor="none")
    record_trace(host, TEXT, tmp_path / "host", num_prompt_tokens=8)
    settings = {"predictor": "lookahead", "policy": policy, "expert_memory": "60%"}
    engine = make_engine(tiny_checkpoint, device="cpu", orchestration="device", **settings)
    with engine:
        report = record_trace(engine, TEXT, tmp_path / "device", num_prompt_tokens=8)
        assert engine.stats["num_steps"] == report.num_steps == 33
        assert 0 < (report.hit_rate or 0) < 1
        assert not engine.device_runtime._seeing
    wanted, found = (read_trace(tmp_path / name) for name in ("host", "device"))
    if policy == "exact":
        assert found.demands() == wanted.demands()
        assert found.steps[5][0].weights == wanted.steps[5][0].weights
    assert report.bandwidth_bytes_s is None
    assert all(visit.times is None for visits in found.steps for visit in visits)
    assert found.info is not None
    assert (found.info.predictor, found.info.expert_bytes) == ("none", host.expert_bytes)


def test_predictions_are_recorded_also_while_prefetching_is_off(
    open_engine: Callable[..., Engine], tmp_path: Path
) -> None:
    engine: Any = open_engine(predictor="lookahead")
    engine.runtime._switch.is_on = False
    engine.runtime._switch.record = lambda step_s: None
    record_trace(engine, TEXT, tmp_path / "trace", num_prompt_tokens=8)
    trace = read_trace(tmp_path / "trace")
    assert engine.metrics.num_prefetched == 0
    for visits in trace.steps:
        assert [[p.layer for p in visit.predictions] for visit in visits] == [
            [1, 2],
            [2, 3],
            [3],
            [],
        ]


def test_the_times_of_the_layers_add_up_to_the_forward(
    open_engine: Callable[..., Engine], tmp_path: Path
) -> None:
    engine = open_engine(predictor="none")
    report = record_trace(engine, TEXT, tmp_path / "trace", num_prompt_tokens=8)
    decoded = read_trace(tmp_path / "trace").decode_part()
    times = [visit.times for visits in decoded.steps for visit in visits]
    total_s = sum(sum(one) for one in times if one is not None)
    assert total_s == pytest.approx(report.tpot_s * 32, rel=1e-2)
    assert all(one is not None and one.compute_s > 0 for one in times)
    assert decoded.info is not None
    assert decoded.info.dense_s is not None
    assert decoded.info.expert_s is not None
    assert 0 < decoded.info.dense_s + 4 * decoded.info.expert_s < report.tpot_s


def test_a_forwards_time_is_shared_out_by_layer() -> None:
    spans = [
        TimeSpan("compute", "0.1", 1.5, 2.0),
        TimeSpan("stall", "stall", 2.0, 2.25),
        TimeSpan("compute", "0.2", 2.25, 2.5),
        TimeSpan("disk", "0.2", 1.5, 2.25),
        TimeSpan("compute", "1.0", 3.0, 4.0),
    ]
    assert _times_of([0.0, 2.75, 5.0], spans) == [
        VisitTimes(1.75, 0.75, 0.25),
        VisitTimes(1.25, 1.0, 0.0),
    ]


def test_a_long_text_takes_several_turns(
    open_engine: Callable[..., Engine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine: Any = open_engine(predictor="none", prefill_chunk=5)
    monkeypatch.setattr(type(engine), "max_positions", 16)
    seen: list[tuple[str, int, int]] = []
    report = record_trace(
        engine,
        TEXT,
        tmp_path / "trace",
        num_prompt_tokens=8,
        progress=lambda *what: seen.append(what),
    )
    trace = read_trace(tmp_path / "trace")
    # Forty tokens are two and a half contexts; the last has no token beyond its prompt.
    assert (report.num_prompt_tokens, report.num_decode_tokens) == (16, 16)
    turn = [True, True] + [False] * 8
    assert [trace.is_prefill(step) for step in range(20)] == turn * 2
    assert [trace.steps[step][0].num_tokens for step in range(3)] == [5, 3, 1]
    assert seen[-1] == ("Tokens", 32, 32)


def test_an_interruption_leaves_no_file_and_no_hooks(
    open_engine: Callable[..., Engine], tmp_path: Path
) -> None:
    engine = open_engine(predictor="lookahead")
    path = tmp_path / "trace"
    path.write_text("earlier")

    def interrupt(stage: str, done: int, total: int) -> None:
        if done > 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record_trace(engine, TEXT, path, num_prompt_tokens=8, progress=interrupt)
    assert path.read_text() == "earlier"
    assert [file.name for file in tmp_path.iterdir()] == ["trace"]
    assert engine.runtime.on_routing is None
    assert engine.runtime.on_predictions is None
    assert not engine.timeline.is_on
    assert engine.timeline.spans == []


def test_what_cannot_be_recorded_is_refused(
    open_engine: Callable[..., Engine], tmp_path: Path
) -> None:
    engine: Any = open_engine(predictor="none")
    with pytest.raises(ConfigError, match="40 tokens, and the prompt takes 40"):
        record_trace(engine, TEXT, tmp_path / "trace", num_prompt_tokens=40)
    for settings, message in (
        ({"num_prompt_tokens": 600}, "nothing to decode in a context of 512"),
        ({"num_prompt_tokens": -1}, "num_prompt_tokens=-1 must be"),
        ({"max_tokens": 0}, "max_tokens=0 must be"),
    ):
        with pytest.raises(ConfigError, match=message):
            record_trace(engine, TEXT * 40, tmp_path / "trace", **settings)
    with pytest.raises(ConfigError, match="token 999 of the text is outside the vocabulary"):
        record_trace(engine, [5, 999], tmp_path / "trace", num_prompt_tokens=1)
    assert engine.metrics.num_steps == 0
    engine.tokenizer = None
    with pytest.raises(ConfigError, match="no tokenizer"):
        record_trace(engine, "text", tmp_path / "trace")
    assert list(tmp_path.iterdir()) == []
