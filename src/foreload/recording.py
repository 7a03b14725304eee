"""Record a text as a trace: its routing, what was predicted, and how long everything took.

The text is forced: real text is fed token by token, whatever the model would have chosen. Writes
as it goes, and changes nothing about the engine it is given.
"""

from __future__ import annotations

import bisect
import itertools
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from foreload.config import check_whole
from foreload.decode.prompt import encode_text
from foreload.errors import ConfigError
from foreload.metrics import Metrics
from foreload.trace.format import TraceWriter
from foreload.trace.record import RoutingRecorder, TraceInfo, VisitTimes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from foreload.engine import Engine
    from foreload.metrics import TimeSpan
    from foreload.trace.record import LayerVisit
    from foreload.types import RoutingEvent

    Progress = Callable[[str, int, int], None]

__all__ = ["RecordingReport", "record_trace"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordingReport:
    """What a recording came to.

    Attributes:
        path: The trace.
        num_steps: Forwards recorded.
        num_prompt_tokens: Tokens read as prompts.
        num_decode_tokens: Tokens decoded one at a time.
        tpot_s: Mean seconds per decoded token, recording left out.
        hit_rate: Hit rate of the decoded tokens.
        bandwidth_bytes_s: What the copies were moved at; None where nothing was copied.
    """

    path: str
    num_steps: int
    num_prompt_tokens: int
    num_decode_tokens: int
    tpot_s: float
    hit_rate: float | None
    bandwidth_bytes_s: float | None

    def to_dict(self) -> dict[str, Any]:
        """Give the report as JSON-ready values."""
        return asdict(self)


def record_trace(
    engine: Engine,
    text: str | Sequence[int],
    path: str | Path,
    *,
    num_prompt_tokens: int = 128,
    max_tokens: int = 512,
    progress: Progress | None = None,
) -> RecordingReport:
    """Record a forced decode of a text.

    The first tokens are read as a prompt, the others decoded one at a time. A text longer than the
    model's context is recorded in several turns, each with a prompt. The file has its name only
    once the trace is complete. Where the device decides, routing alone is recorded: what it guesses
    and how long its parts take the host does not see.

    Args:
        engine: What runs the text; its predictor's guesses are recorded.
        text: The text, or its token ids.
        path: Where the trace goes; compressed where the name ends in .gz.
        num_prompt_tokens: Tokens read as prompt, in forwards of at most `prefill_chunk`.
        max_tokens: Most tokens of the text to use, prompts included.
        progress: Called with what is done, tokens done, and tokens in all.

    Raises:
        ConfigError: The text or the context is not longer than the prompt, the text is none, a
            number makes no sense, or there is no tokenizer.
        TraceError: The file cannot be written.
    """
    check_whole("max_tokens", max_tokens, least=1)
    check_whole("num_prompt_tokens", num_prompt_tokens, least=0)
    token_ids = encode_text(text, engine.tokenizer, engine.vocab_size, max_tokens=max_tokens)
    context = engine.max_positions
    if context is not None and num_prompt_tokens >= context:
        raise ConfigError(
            f"prompts of {num_prompt_tokens} tokens leave nothing to decode in a context of "
            f"{context}",
            hint=f"set num_prompt_tokens to {context - 1} at most",
        )
    turns = list(_turns(engine, token_ids, num_prompt_tokens))
    if not turns:
        raise ConfigError(
            f"the text has {len(token_ids)} tokens, and the prompt takes {num_prompt_tokens}",
            hint="give a longer text, more max_tokens or fewer num_prompt_tokens",
        )
    is_device = engine.config.orchestration == "device"
    spec, predictor = engine.spec, None if is_device else engine.runtime.predictor
    info = TraceInfo(
        model=engine.config.model,
        identity=spec.identity,
        top_k=spec.top_k,
        expert_bytes=engine.expert_bytes,
        predictor="none" if predictor is None else predictor.name,
    )
    size = {"num_layers": spec.num_moe_layers, "num_experts": spec.num_experts}
    watching = _DeviceWatch(engine) if is_device else _Watch(engine)
    with TraceWriter(Path(path), info, **size) as writer, watching as watch:
        done = 0
        for turn in turns:
            kv_cache = engine.make_cache()
            for chunk, is_prefill in _forwards(turn, num_prompt_tokens, engine):
                writer.write_step(watch.forward(chunk, kv_cache, is_prefill=is_prefill))
                done += len(chunk)
                if progress is not None:
                    progress("Tokens", done, sum(map(len, turns)))
        writer.finish(bandwidth_bytes_s=watch.bandwidth_bytes_s)
    return RecordingReport(
        path=str(path),
        num_steps=watch.num_steps,
        num_prompt_tokens=num_prompt_tokens * len(turns),
        num_decode_tokens=len(watch.decode_s),
        tpot_s=sum(watch.decode_s) / len(watch.decode_s),
        hit_rate=watch.decoded.hit_rate,
        bandwidth_bytes_s=watch.bandwidth_bytes_s,
    )


class _Watch:
    """Runs forwards, and takes down from the runtime's own hooks what happens in them.

    Attributes:
        num_steps: Forwards so far.
        decode_s: Duration of each decoded token's forward.
        decoded: What was counted in these.
    """

    def __init__(self, engine: Engine) -> None:
        self.num_steps = 0
        self.decode_s: list[float] = []
        self.decoded = Metrics()
        self._engine = engine
        spec = engine.spec
        self._recorder = RoutingRecorder(spec.num_moe_layers, spec.num_experts, with_weights=True)
        self._reached_s: list[float] = []
        self._copies: list[tuple[float, float]] = []
        self._bytes_before = engine.metrics.bytes_moved

    def __enter__(self) -> _Watch:
        runtime, timeline = self._engine.runtime, self._engine.timeline
        self._before = (runtime.on_routing, runtime.on_predictions, timeline.is_on, timeline.spans)
        runtime.on_routing = self._see_routing
        runtime.on_predictions = self._recorder.see_predictions
        timeline.is_on = True
        return self

    def __exit__(self, *error: object) -> None:
        runtime, timeline = self._engine.runtime, self._engine.timeline
        runtime.on_routing, runtime.on_predictions, timeline.is_on, timeline.spans = self._before

    def forward(self, token_ids: list[int], kv_cache: Any, *, is_prefill: bool) -> list[LayerVisit]:
        """Run one forward, and give its layer visits."""
        engine = self._engine
        self._recorder.is_prefill = is_prefill
        self._reached_s.clear()
        engine.timeline.clear()
        before = engine.metrics.snapshot()
        start_s = time.perf_counter()
        engine.forward(torch.tensor([token_ids]), kv_cache)
        end_s = time.perf_counter()
        self.num_steps += 1
        if not is_prefill:
            self.decode_s.append(end_s - start_s)
            self.decoded.add(engine.metrics.since(before))
        spans = engine.timeline.spans
        self._copies += [(span.start_s, span.end_s) for span in spans if span.lane == "disk"]
        visits = self._recorder.trace.steps.pop()
        times = _times_of([start_s, *self._reached_s[1:], end_s], spans)
        return [replace(visit, times=at) for visit, at in zip(visits, times, strict=True)]

    @property
    def bandwidth_bytes_s(self) -> float | None:
        """Give the bytes copied per second in which at least one copy was moving."""
        moved = self._engine.metrics.bytes_moved - self._bytes_before
        busy_s, until_s = 0.0, 0.0
        for start_s, end_s in sorted(self._copies):
            busy_s += max(0.0, end_s - max(start_s, until_s))
            until_s = max(until_s, end_s)
        return moved / busy_s if moved and busy_s else None

    def _see_routing(self, event: RoutingEvent, wanted: list[int]) -> None:
        self._reached_s.append(time.perf_counter())
        self._recorder(event, wanted)
        runtime = self._engine.runtime
        # Guesses are recorded also while prefetching is switched off because it does not pay.
        if runtime.predictor is not None and not runtime.is_prefetching:
            self._recorder.see_predictions(event, runtime.predictor.predict(event))


class _DeviceWatch:
    """Runs forwards where the device decides, and takes down their routing.

    Attributes:
        num_steps: Forwards so far.
        decode_s: Duration of each decoded token's forward.
        decoded: What was counted in these.
        bandwidth_bytes_s: Not known.
    """

    bandwidth_bytes_s = None

    def __init__(self, engine: Engine) -> None:
        self.num_steps = 0
        self.decode_s: list[float] = []
        self.decoded = Metrics()
        self._engine = engine
        spec = engine.spec
        self._recorder = RoutingRecorder(spec.num_moe_layers, spec.num_experts, with_weights=True)

    def __enter__(self) -> _DeviceWatch:
        self._showing = self._engine.device_runtime.showing(self._recorder)
        self._showing.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._showing.__exit__(*error)

    def forward(self, token_ids: list[int], kv_cache: Any, *, is_prefill: bool) -> list[LayerVisit]:
        """Run one forward, and give its layer visits."""
        engine, runtime = self._engine, self._engine.device_runtime
        self._recorder.is_prefill = is_prefill
        runtime.count()
        before = engine.metrics.snapshot()
        start_s = time.perf_counter()
        engine.forward(torch.tensor([token_ids]), kv_cache)
        duration_s = time.perf_counter() - start_s
        self.num_steps += 1
        if not is_prefill:
            runtime.count()
            self.decode_s.append(duration_s)
            self.decoded.add(engine.metrics.since(before))
        return self._recorder.trace.steps.pop()


def _times_of(edges: Sequence[float], spans: Sequence[TimeSpan]) -> list[VisitTimes]:
    """Share out a forward's time among its layers.

    Args:
        edges: When each layer's share begins, and when the last one ends.
        spans: What was drawn of the forward.
    """
    compute_s, stall_s = [0.0] * (len(edges) - 1), [0.0] * (len(edges) - 1)
    lanes = {"compute": compute_s, "stall": stall_s}
    for span in spans:
        if span.lane in lanes:
            layer = bisect.bisect_right(edges, span.start_s, 1, len(edges) - 1) - 1
            lanes[span.lane][layer] += span.end_s - span.start_s
    return [
        VisitTimes(max(0.0, end - start - computed - stalled), computed, stalled)
        for (start, end), computed, stalled in zip(
            itertools.pairwise(edges), compute_s, stall_s, strict=True
        )
    ]


def _turns(
    engine: Engine, token_ids: Sequence[int], num_prompt_tokens: int
) -> Iterator[Sequence[int]]:
    """Cut the text into contexts that are longer than a prompt."""
    size = engine.max_positions or len(token_ids)
    for start in range(0, len(token_ids), size):
        turn = token_ids[start : start + size]
        if len(turn) > num_prompt_tokens:
            yield turn


def _forwards(
    turn: Sequence[int], num_prompt_tokens: int, engine: Engine
) -> Iterator[tuple[list[int], bool]]:
    """Give the tokens of each forward, and whether they are the prompt's."""
    chunk = engine.config.prefill_chunk
    for start in range(0, num_prompt_tokens, chunk):
        yield list(turn[start : min(start + chunk, num_prompt_tokens)]), True
    for token in turn[num_prompt_tokens:]:
        yield [token], False
