"""Times of the widened demo: its limits, its rivals, executed guesses, drafts, a slot plan."""

from __future__ import annotations

import dataclasses
import functools
from contextlib import ExitStack, contextmanager, nullcontext
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

from foreload.bench.arm import Arm
from foreload.bench.moe_speq import MOE_SPEQ_ARMS
from foreload.bench.speculating_experts import SPECULATION_ARMS
from foreload.bench.workload import check_contexts
from foreload.model.hf import load_model
from foreload.recording import record_trace
from foreload.trace.replay import replay as replay_trace
from gpu.arms import (
    RESIDENT,
    Forcing,
    ResidentModel,
    accelerate_arm,
    device_arm,
    host_arm,
    record_routing,
)
from gpu.models import open_engine, shares_of, widened_demo
from gpu.rows import attempt, or_broken, show
from gpu.suite_arms import contenders, pick_arms, tell_left_out
from gpu.trials import (
    TOO_LATE,
    Comparison,
    Contender,
    Texts,
    read_windows,
    run_trials,
    spread,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from foreload.bench.workload import Workload
    from foreload.trace.record import RoutingTrace
    from gpu.arms import RunText
    from gpu.rows import Row
    from gpu.settings import Settings

WITHIN_GRAPH, WITHIN_LIMIT, LAUNCH_MS = 1.10, 1.15, 0.2
PAPER_CUT, PAPER_RATIO = 0.14, 2.34
LRU = {"eviction": "lru", "predictor": "none"}
DEVICE_LRU = Arm("device-lru", {"predictor": "none"})
SUITES = {"speculation": SPECULATION_ARMS, "drafts": (DEVICE_LRU, *MOE_SPEQ_ARMS)}
USUAL_DRAFTS = (DEVICE_LRU.name, "lru", "no-draft", "draft-4", "draft-8", "governor")
USUAL_SPECULATION = (
    "layerwise-on-demand",
    "layerwise-speculate",
    "cache",
    "cache-prefetch",
    "cache-speculate",
    "cache-speculate-when-90",
)
# Beside which arm a name's beginning is set: the same memory, used alike.
CUTS = {
    "layerwise-": "layerwise-on-demand",
    "prefetch": "on-demand",
    "speculate-": "on-demand",
    "cache-": "cache",
}


class Bench(NamedTuple):
    """A model, what is decoded with it, and the arms with all experts on the device, kept open."""

    model: Path
    texts: Texts
    resident: list[Contender]
    forcing: Forcing | None


@contextmanager
def open_bench(
    settings: Settings, model: Path, windows: list[Workload], forcing: Forcing | None = None
) -> Iterator[Bench]:
    """Opens what every comparison needs: one graph of transformers' own model, and all of ours."""
    with ExitStack() as stack:
        whole = ResidentModel(model, forcing)
        stack.callback(whole.close)
        texts = Texts(windows, [whole.eager_logits(window) for window in windows])
        runs: dict[str, RunText] = {name: functools.partial(whole.run, name) for name in RESIDENT}
        ours = device_arm(model, 100, forcing=forcing, predictor="none")
        runs["all-resident"] = stack.enter_context(ours)
        resident = [
            Contender(name, functools.partial(_kept_open, run), is_resident=True)
            for name, run in runs.items()
        ]
        yield Bench(model, texts, resident, forcing)


def _kept_open(run: RunText) -> AbstractContextManager[RunText]:
    return nullcontext(run)


def on_device(bench: Bench, name: str, share: float, **given: Any) -> Contender:
    """Gives an arm whose device decides."""
    opened = functools.partial(device_arm, bench.model, share, forcing=bench.forcing, **given)
    return Contender(name, opened, is_lossy=given.get("policy", "exact") != "exact")


def on_host(bench: Bench, name: str, share: float, **given: Any) -> Contender:
    """Gives an arm whose host decides, all experts being in its memory."""
    opened = functools.partial(host_arm, bench.model, share, forcing=bench.forcing, **given)
    return Contender(name, opened, is_lossy=given.get("policy", "exact") != "exact")


def suites(settings: Settings) -> Iterator[Row]:
    """Times each share beside the resident model under one graph, the wire limit and Belady's."""
    model = widened_demo(settings)
    windows = read_windows(settings, model, num_decode_tokens=settings.num_decode_tokens)
    traces = record_routing(model, windows)
    with open_bench(settings, model, windows) as bench:
        for share in _partial_shares(settings, model):
            if settings.is_over():
                yield show({"share": share, "left_out": TOO_LATE})
                continue
            arms = [on_device(bench, name, share, predictor=name) for name in ("none", "lookahead")]
            found = run_trials(settings, [*bench.resident, *arms], bench.texts)
            yield from tell_all(found, {"share": share})
            yield from tell_goals(found, share, [each.name for each in arms])
            yield from tell_belady(found, share, model, arms, traces)


def baselines(settings: Settings) -> Iterator[Row]:
    """Times a plain LRU that the host orchestrates, and accelerate, beside the device's own way."""
    model = widened_demo(settings)
    windows = read_windows(settings, model, num_decode_tokens=settings.num_decode_tokens)
    with open_bench(settings, model, windows) as bench:
        for share in _partial_shares(settings, model):
            if settings.is_over():
                yield show({"share": share, "left_out": TOO_LATE})
                continue
            arms = [
                on_device(bench, "device", share, predictor="lookahead"),
                on_host(bench, "host-lru", share, **LRU),
            ]
            found = run_trials(settings, [*bench.resident, *arms], bench.texts)
            yield from tell_all(found, {"share": share})
            yield tell_ratio(found, {"share": share}, "host-lru", "device")
        if find_spec("accelerate") is None:
            yield show({"arm": "accelerate", "left_out": "it is not installed here"})
            return
        # It keeps no expert, whatever the share, and a token takes it many times as long.
        brought = functools.partial(accelerate_arm, model)
        slow = Contender("accelerate", brought, num_tokens=settings.num_slow_tokens)
        yield from tell_all(run_trials(settings, [*bench.resident, slow], bench.texts), {})


def speculation(settings: Settings) -> Iterator[Row]:
    """Times executed guesses: without a cache as the paper does, and with one on the device."""

    def tell(found: Comparison, place: Row) -> Iterator[Row]:
        for name in found.trials:
            for start, other in CUTS.items():
                if name.startswith(start) and name != other and other in found.trials:
                    yield tell_cut(found, place, name, other)

    shares = settings.speculation_shares
    return _run_suite(settings, SUITES["speculation"], USUAL_SPECULATION, shares, tell)


def drafts(settings: Settings) -> Iterator[Row]:
    """Times rounds with a draft beside caches of the same memory, the draft being a part of it."""

    def tell(found: Comparison, place: Row) -> Iterator[Row]:
        for name in found.trials:
            for other in ("lru", DEVICE_LRU.name):
                if name.startswith(("draft-", "governor")) and other in found.trials:
                    yield tell_ratio(found, {**place, "paper": PAPER_RATIO}, other, name)

    return _run_suite(settings, SUITES["drafts"], USUAL_DRAFTS, settings.draft_shares, tell)


def _run_suite(
    settings: Settings,
    arms: Sequence[Arm],
    usual: Sequence[str],
    shares: tuple[float, ...],
    tell: Callable[[Comparison, Row], Iterator[Row]],
) -> Iterator[Row]:
    """Runs the arms of a suite that were asked for at every context and share."""
    picked = pick_arms(settings, arms, usual)
    model = widened_demo(settings)
    contexts = settings.contexts or (settings.num_prompt_tokens,)
    limit = load_model(model).generation.max_positions
    check_contexts(contexts, settings.num_decode_tokens, limit)
    yield from tell_left_out(model, picked)
    longest = dataclasses.replace(settings, num_prompt_tokens=max(contexts))
    texts = read_windows(longest, model, num_decode_tokens=settings.num_decode_tokens)

    def run(bench: Bench, place: Row) -> Iterator[Row]:
        running = contenders(model, picked, place["share"], bench.texts.windows)
        found = run_trials(settings, [*bench.resident, *running], bench.texts)
        yield from tell_all(found, place)
        yield from tell(found, place)

    def run_context(context: int) -> Iterator[Row]:
        windows = [text.shortened(context) for text in texts]
        with open_bench(settings, model, windows) as bench:
            for share in shares_of(model, shares):
                place = {"share": share, "context": context}
                if settings.is_over():
                    yield show({**place, "left_out": TOO_LATE})
                else:
                    yield from or_broken(place, run(bench, place))

    for context in contexts:
        if settings.is_over():
            yield show({"context": context, "left_out": TOO_LATE})
        else:
            yield from or_broken({"context": context}, run_context(context))


def slot_plan(settings: Settings) -> Iterator[Row]:
    """Times slots divided by a trace of another text beside the same number in every layer."""
    from foreload.model.source import resolve_model

    model = widened_demo(settings)
    windows = read_windows(settings, model, num_decode_tokens=settings.num_decode_tokens)
    spec = load_model(model).spec
    # The same slots for both: equal ones are rounded down.
    number = int(shares_of(model, (settings.plan_share,))[0] / 100 * spec.num_experts)
    share = 100 * number / spec.num_experts + 1e-6
    trace = settings.output / f"{settings.stem}.trace.jsonl.gz"
    text = (resolve_model("demo") / "calibration.txt").read_text()

    def record() -> Row:
        with open_engine(model, share, predictor="none") as engine:
            report = record_trace(
                engine,
                text,
                trace,
                num_prompt_tokens=settings.num_prompt_tokens,
                max_tokens=settings.num_recorded_tokens,
            )
            return report.to_dict()

    yield show(attempt({"what": "recording"}, record))
    with open_bench(settings, model, windows) as bench:
        plans = {"equal": "equal", "planned": str(trace)}
        arms = [
            on_device(bench, name, share, predictor="none", slot_plan=plan)
            for name, plan in plans.items()
        ]
        found = run_trials(settings, [*bench.resident, *arms], bench.texts)
        yield from tell_all(found, {"share": share})
        yield tell_ratio(found, {"share": share}, "equal", "planned")


def tell_all(found: Comparison, place: Row) -> Iterator[Row]:
    """Tells every arm of a comparison."""
    for row in found.rows(place):
        yield show(row)


def tell_goals(found: Comparison, share: float, names: Sequence[str]) -> Iterator[Row]:
    """Tells what was to be reached beside the resident graph, the limit, and in host's time."""
    # Beside the quicker of both.
    graphs = [over for over in (found.over("all-resident", name) for name in RESIDENT) if over]
    beside = [max(each) for each in zip(*graphs, strict=False)]
    goals: dict[str, tuple[list[float], float]] = {"all-resident / graph": (beside, WITHIN_GRAPH)}
    for name in names:
        goals[f"{name} / limit"] = found.over_limit(name), WITHIN_LIMIT
        goals[f"{name}, ms to launch"] = found.launches_ms(name), LAUNCH_MS
    for what, (values, goal) in goals.items():
        got = spread(values)
        reached = None if got is None else got["median"] <= goal
        yield show({"share": share, "what": what, "goal": goal, "got": got, "reached": reached})


def tell_belady(
    found: Comparison,
    share: float,
    model: Path,
    arms: Sequence[Contender],
    traces: Sequence[RoutingTrace],
    *,
    count_from: int = 1,
) -> Iterator[Row]:
    """Tells how far arms are from Belady's limit, for as many slots shared by all layers."""
    expert_bytes = load_model(model).plans[0][0].read_bytes
    for arm in arms:
        moved = {}
        for number, trial in found.trials[arm.name].items():
            trace, slots = traces[number], trial.counted["num_slots"]
            best = replay_trace(trace, slots, "belady", count_from=count_from)
            moved[number] = best.num_misses * expert_bytes / (len(trace.steps) - count_from)
        over = spread(found.over_limit(arm.name, moved))
        yield show({"share": share, "what": f"{arm.name} / Belady limit", "got": over})


def tell_ratio(found: Comparison, place: Row, slower: str, faster: str) -> Row:
    """Tells how many times as long one arm takes as another, trial by trial."""
    got = spread(found.over(slower, faster))
    return show({**place, "what": f"{slower} / {faster}", "got": got})


def tell_cut(found: Comparison, place: Row, name: str, other: str) -> Row:
    """Tells what part of another arm's time one saves, trial by trial."""
    got = spread([1 - ratio for ratio in found.over(name, other)])
    return show({**place, "what": f"cut of {name}", "paper": PAPER_CUT, "got": got})


def _partial_shares(settings: Settings, model: Path) -> list[float]:
    """Gives the shares that leave something to fetch."""
    return [share for share in shares_of(model, settings.shares) if share < 100]
