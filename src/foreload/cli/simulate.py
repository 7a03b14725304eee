"""`foreload simulate`: what caches and predictors would make of a recorded trace."""

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from foreload.cli.narrow_table import narrow_table
from foreload.cli.options import parse_bandwidth, parse_budgets, parse_bytes
from foreload.cli.slot_table import slot_table
from foreload.cli.terminal import Terminal
from foreload.cli.verb import verb
from foreload.config import EngineConfig
from foreload.errors import ConfigError

if TYPE_CHECKING:
    from foreload.trace.record import RoutingTrace, TraceInfo
    from foreload.trace.simulate import SimulationSettings

__all__ = ["simulate"]

_DEFAULTS = EngineConfig()
_DURATION = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*(s|ms|us)\s*")
_UNITS_S = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
_EXPERTS_SHARE = 0.5
"""Of a token's time, where the trace has no times of its own."""

_PREDICTORS = ("none", "trace", "oracle")
_TIMES = ("tpot_s", "compute_s", "stall_s_per_token", "wire_limit_s", "belady_limit_s")


class _Machine(NamedTuple):
    bandwidth_bytes_s: float
    dense_s: float
    expert_s: float


_INSTANT = _Machine(math.inf, 0.0, 0.0)


class Start(StrEnum):
    """Where a replay begins."""

    PREFILL = "prefill"
    DECODE = "decode"


TraceArgument = Annotated[
    Path,
    typer.Argument(
        help="Made by foreload trace, or a route_trace CSV.",
        metavar="TRACE",
        exists=True,
        dir_okay=False,
    ),
]
EvictionsOption = Annotated[
    str, typer.Option(help=f"Policies: {', '.join(EngineConfig.CHOICES['eviction'])}.")
]
BudgetsOption = Annotated[
    str, typer.Option(help="Expert memories: percent of all experts, 2GiB, or 200slots.")
]
PredictorOption = Annotated[
    str, typer.Option(help="none, trace (its own predictions), oracle, or a recall from 0 to 1.")
]
BandwidthOption = Annotated[
    str | None, typer.Option(help="Of the link, such as 3.2GB/s.", show_default="the trace's")
]
ComputeTimeOption = Annotated[
    str | None,
    typer.Option(
        help="Time per token with every expert in memory, such as 40ms.",
        show_default="the trace's",
    ),
]
LatencyOption = Annotated[str, typer.Option(help="Before the first byte of each copy.")]
WorkersOption = Annotated[int, typer.Option(help="Pieces in flight at once.", min=1)]
LookaheadOption = Annotated[
    int, typer.Option(help="How many MoE layers ahead is predicted, at most.", min=1)
]
FromOption = Annotated[
    Start,
    typer.Option(
        "--from",
        help="Begin with an empty cache at the prompt, or where decoding begins. Decoded tokens "
        "are counted.",
    ),
]
SeedOption = Annotated[int, typer.Option(help="Draws which guesses of a given recall are wrong.")]


@verb()
def simulate(
    terminal: Terminal,
    trace: TraceArgument,
    evictions: EvictionsOption = "lru,least-stale,lfu,next-use,history",
    budgets: BudgetsOption = "10,25,50",
    predictor: PredictorOption = "none",
    bandwidth: BandwidthOption = None,
    compute_time: ComputeTimeOption = None,
    latency: LatencyOption = "0s",
    num_workers: WorkersOption = _DEFAULTS.num_workers,
    lookahead_layers: LookaheadOption = _DEFAULTS.lookahead_layers,
    start: FromOption = Start.PREFILL,
    seed: SeedOption = 0,
) -> None:
    """Replay a trace under other caches, predictors and links, beside the best possible.

    No model is needed. Where neither the options nor the trace tell bandwidth and compute time,
    only hit rates are shown. Below: what a device's slots miss, equal and planned per layer.
    """
    policies = _parse_policies(evictions)
    guesses = _parse_predictor(predictor)
    latency_s = _parse_duration("--latency", latency)
    with terminal.status("Reading"):
        from foreload.trace.read import read_trace
        from foreload.trace.simulate import SimulationSettings

        recorded = read_trace(trace)
    info = recorded.info
    if info is None:
        raise ConfigError(f"{trace} does not say what it was recorded from")
    machine = _find_machine(recorded, info, bandwidth, compute_time)
    if machine is None and guesses != "none":
        raise ConfigError(
            "whether a prefetch arrives in time depends on times, and the trace has none",
            hint="give --bandwidth and --compute-time",
        )
    settings = SimulationSettings(
        num_slots=1,
        expert_bytes=info.expert_bytes,
        **(machine or _INSTANT)._asdict(),
        latency_s=latency_s,
        num_workers=num_workers,
        predictor=guesses,
        lookahead_layers=lookahead_layers,
        seed=seed,
    )
    slots = [_parse_budget(word, recorded, info) for word in _split("--budgets", budgets)]
    if start is Start.DECODE:
        recorded = recorded.decode_part()
    with terminal.progress() as report:
        results: list[dict[str, Any]] = []
        for num_slots in slots:
            report("Budgets", len(results), len(slots))
            here = replace(settings, num_slots=num_slots)
            results.append(
                _simulate_budget(recorded, here, policies, has_times=machine is not None)
            )
    terminal.print_json(
        {
            "trace": {"path": str(trace), **asdict(info)},
            "settings": {
                "from": start.value,
                "predictor": guesses,
                "lookahead_layers": lookahead_layers,
                "latency_s": latency_s,
                "num_workers": num_workers,
                "seed": seed,
                "machine": None if machine is None else machine._asdict(),
            },
            "budgets": results,
        }
    )
    terminal.show(_table(recorded, results))
    gains = [result["slots_per_layer"] for result in results if result["slots_per_layer"]]
    if gains:
        terminal.show("")
        terminal.show(slot_table(gains, recorded.num_layers * recorded.num_experts))
    if machine is None:
        terminal.note("for times give --bandwidth and --compute-time: the trace has none")


def _simulate_budget(
    trace: "RoutingTrace",
    settings: "SimulationSettings",
    policies: Sequence[str],
    *,
    has_times: bool,
) -> dict[str, Any]:
    """Run every policy at one budget; give the results and the limits, JSON-ready."""
    from foreload.trace.layer_slots import slot_plan_gain
    from foreload.trace.simulate import simulate as run
    from foreload.trace.simulate import simulation_limits, wire_limit_s

    arms = {}
    for eviction in policies:
        here = replace(settings, eviction=eviction)
        arms[eviction] = run(trace, here).to_dict() | {"wire_limit_s": wire_limit_s(trace, here)}
        del arms[eviction]["step_s"]
    limits = simulation_limits(trace, settings).to_dict()
    if not has_times:
        for values in (limits, *arms.values()):
            values |= {name: None for name in _TIMES if name in values}
    least = trace.info.top_k if trace.info is not None else 1
    gain = slot_plan_gain(trace, settings.num_slots, least=least)
    return {
        "num_slots": settings.num_slots,
        "share": settings.num_slots / (trace.num_layers * trace.num_experts),
        "arms": arms,
        "limits": limits,
        "slots_per_layer": None if gain is None else gain.to_dict(),
    }


def _find_machine(
    trace: "RoutingTrace", info: "TraceInfo", bandwidth: str | None, compute_time: str | None
) -> _Machine | None:
    """Give bandwidth and times as asked for, else as recorded; None where one is not known."""
    bytes_s = info.bandwidth_bytes_s
    if bandwidth is not None:
        bytes_s = parse_bandwidth("--bandwidth", bandwidth)
    dense_s, expert_s = info.dense_s, info.expert_s
    if compute_time is not None:
        token_s = _parse_duration("--compute-time", compute_time)
        num_executed = trace.num_layers * info.top_k
        share = _EXPERTS_SHARE
        if dense_s is not None and expert_s is not None:
            experts_s = expert_s * num_executed
            share = experts_s / (experts_s + dense_s * trace.num_layers)
        dense_s = (1 - share) * token_s / trace.num_layers
        expert_s = share * token_s / num_executed
    if bytes_s is None or dense_s is None or expert_s is None:
        return None
    return _Machine(bytes_s, dense_s, expert_s)


def _table(trace: "RoutingTrace", results: Sequence[dict[str, Any]]) -> Any:
    table = narrow_table(
        f"{trace.num_layers} layers of {trace.num_experts} experts, "
        f"{len(trace.decode_part().steps)} decoded tokens; percent of lookups, per token",
        gap=2,
    )
    table.add_column("slots", justify="right")
    table.add_column("eviction", min_width=len("least-stale"))
    for name in ("hits", "late", "misses", "MB", "stall\nms", "TPOT\nms", "limit\nms"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in results:
        slots = f"{result['num_slots']} ({result['share']:.0%})"
        limits = result["limits"]
        for eviction, arm in result["arms"].items():
            rates = [f"{arm[name] * 100:.1f}" for name in ("hit_rate", "late_rate", "miss_rate")]
            times = [_ms(arm[name]) for name in ("stall_s_per_token", "tpot_s", "wire_limit_s")]
            table.add_row(slots, eviction, *rates, f"{arm['bytes_per_token'] / 1e6:.1f}", *times)
            slots = ""
        for name in ("lru", "belady"):
            if name not in result["arms"]:
                limit = _ms(limits.get(f"{name}_limit_s"))
                hits = f"{limits[f'{name}_hit_rate'] * 100:.1f}"
                table.add_row("", f"{name}, no prefetch", hits, "", "", "", "", "", limit)
        table.add_section()
    return table


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.2f}"


def _split(option: str, text: str) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise typer.BadParameter(f"{option}: give at least one")
    return words


def _parse_policies(text: str) -> list[str]:
    known = EngineConfig.CHOICES["eviction"]
    policies = _split("--evictions", text)
    for name in policies:
        if name not in known:
            raise typer.BadParameter(f"--evictions: {name!r} is none of {', '.join(known)}")
    return policies


def _parse_predictor(text: str) -> str | float:
    if text in _PREDICTORS:
        return text
    try:
        recall = float(text)
    except ValueError:
        recall = math.nan
    if not 0 <= recall <= 1:
        raise typer.BadParameter(
            f"--predictor {text!r}: give {', '.join(_PREDICTORS)}, or a recall from 0 to 1"
        )
    return recall


def _parse_budget(text: str, trace: "RoutingTrace", info: "TraceInfo") -> int:
    """Turn a share, bytes or slots into slots."""
    whole = trace.num_layers * trace.num_experts
    words = text.removesuffix("%").rstrip()
    if text.endswith("slots") and text.removesuffix("slots").strip().isdecimal():
        num_slots = int(text.removesuffix("slots"))
    elif text.endswith("%") or words.replace(".", "", 1).isdecimal():
        num_slots = int(parse_budgets(words)[0] * whole)
    else:
        num_slots = parse_bytes("--budgets", text) // max(info.expert_bytes)
    least = info.top_k + 1
    if num_slots < least:
        raise typer.BadParameter(
            f"--budgets {text!r}: that is {num_slots} of {whole} experts; the least is "
            f"{least}slots, for {info.top_k} experts at work and one on its way"
        )
    return min(num_slots, whole)


def _parse_duration(option: str, text: str) -> float:
    match = _DURATION.fullmatch(text)
    if match is None:
        raise typer.BadParameter(f"{option} {text!r}: write it as 40ms, 0.04s or 40000us")
    return float(match[1]) * _UNITS_S[match[2]]
