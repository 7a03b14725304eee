"""`foreload plan`: what fits, which settings to use and what to expect, before anything runs."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foreload.cli.options import (
    DEFAULT_MODEL,
    ENGINE,
    ModelArgument,
    parse_bandwidth,
    parse_budgets,
    parse_bytes,
)
from foreload.cli.slot_table import slot_table
from foreload.cli.terminal import Terminal
from foreload.cli.verb import verb
from foreload.config import EngineConfig, format_bytes

if TYPE_CHECKING:
    from foreload.bench.planner import RunPlan

__all__ = ["plan"]

_ONLY_DTYPE = ENGINE.without(*(p.name for p in ENGINE.parameters if p.name != "dtype"))
_MACHINE = "Machine"

TraceOption = Annotated[
    Path | None,
    typer.Option(
        help="Recorded routing, by `foreload trace` or as route_trace CSV.",
        show_default="none: hit rates are then not known",
        exists=True,
        dir_okay=False,
    ),
]
BudgetsOption = Annotated[str, typer.Option(help="Expert memories, in percent of all experts.")]
DiskOption = Annotated[
    str | None,
    typer.Option(
        help='What the disk delivers per second, such as "3GB/s".',
        metavar="SIZE",
        show_default="measured",
        rich_help_panel=_MACHINE,
    ),
]
BandwidthOption = Annotated[
    str | None,
    typer.Option(
        help="What a product of a matrix and a vector reads from memory per second.",
        metavar="SIZE",
        show_default="measured",
        rich_help_panel=_MACHINE,
    ),
]
MemoryOption = Annotated[
    str | None,
    typer.Option(
        help="Memory that is free; 1 GiB of it is left to the machine.",
        metavar="SIZE",
        show_default="what is free",
        rich_help_panel=_MACHINE,
    ),
]
LayerOption = Annotated[
    float | None,
    typer.Option(
        help="Milliseconds that each MoE layer costs beside its bytes.",
        metavar="MS",
        show_default="measured",
        min=0.0,
        max=1e6,
        rich_help_panel=_MACHINE,
    ),
]

_FIGURES = {
    "disk_bytes_s": "disk",
    "memory_bytes_s": "memory bandwidth",
    "flop_s": "arithmetic",
    "layer_s": "beside bytes, per MoE layer",
    "prediction_s": "guessing, per MoE layer",
    "call_s": "calls, per copy",
    "compute_share": "speed of computing beside copies",
    "copy_share": "speed of copies beside computing",
}
_LIMITS = {"wire": "the disk", "compute": "computing"}


@verb(_ONLY_DTYPE)
def plan(
    terminal: Terminal,
    settings: EngineConfig,
    model: ModelArgument = DEFAULT_MODEL,
    trace: TraceOption = None,
    budgets: BudgetsOption = "10,25,50,75,100",
    disk_bandwidth: DiskOption = None,
    memory_bandwidth: BandwidthOption = None,
    memory: MemoryOption = None,
    layer_overhead: LayerOption = None,
) -> None:
    """Tell what fits, which settings to use, and what time per token to expect.

    Reads headers only; figures of the machine that are not given are measured on this one, in a
    few seconds.
    """
    shares = parse_budgets(budgets)
    bandwidths = [
        None if text is None else float(parse_bandwidth(name, text))
        for text, name in (
            (disk_bandwidth, "--disk-bandwidth"),
            (memory_bandwidth, "--memory-bandwidth"),
        )
    ]
    memory_bytes = None if memory is None else parse_bytes("--memory", memory)
    with terminal.status("Starting"):
        from foreload.bench.planner import GivenFigures, make_run_plan

    given = GivenFigures(
        disk_bytes_s=bandwidths[0],
        memory_bytes_s=bandwidths[1],
        memory_bytes=memory_bytes,
        layer_s=None if layer_overhead is None else layer_overhead / 1000,
    )
    with terminal.progress() as report:
        answer = make_run_plan(
            model,
            dtype=settings.dtype,
            given=given,
            budgets=shares,
            trace=trace,
            progress=report,
        )
    terminal.print_json(answer.to_dict())
    terminal.show(_machine_table(answer))
    terminal.show(_arms_table(answer))
    if answer.slot_plans:
        terminal.show(slot_table([gain.to_dict() for gain in answer.slot_plans], answer.num_slots))
    terminal.show(_advice(answer))
    for note in [*_left_out(answer, shares), *answer.notes]:
        terminal.note(note)


def _machine_table(answer: "RunPlan") -> Any:
    from rich.table import Table

    table = Table(title="Machine", title_justify="left")
    for name in ("figure", "value", ""):
        table.add_column(name)
    machine = answer.machine
    for name, label in _FIGURES.items():
        origin = machine.origins[name]
        table.add_row(label, _written(name, getattr(machine.rates, name)), origin)
    table.add_row("memory", format_bytes(machine.memory_bytes), machine.origins["memory_bytes"])
    return table


def _arms_table(answer: "RunPlan") -> Any:
    from rich.table import Table

    table = Table(
        title=f"{answer.model}: {answer.num_slots} experts of {format_bytes(answer.slot_bytes)}, "
        f"everything else {format_bytes(answer.dense_bytes)}",
        title_justify="left",
        caption=_caption(answer),
        caption_justify="left",
    )
    for name in ("expert memory", "fits", "arm", "hits", "copies ms", "ms per token"):
        is_text = name in ("arm", "fits")
        table.add_column(name, justify="left" if is_text else "right", no_wrap=True)
    before = 0
    for arm in answer.arms:
        memory, fits = f"{format_bytes(arm.num_slots * answer.slot_bytes)}, {arm.budget:.0%}", "yes"
        if arm.num_slots > answer.num_fitting:
            fits = "no"
        if arm.num_slots == before:
            memory, fits = "", ""
        elif before and answer.basis == "trace":
            table.add_section()
        before = arm.num_slots
        hits, wire = f"{arm.hit_rate:.2f}", f"{arm.wire_s * 1000:.1f}"
        table.add_row(memory, fits, arm.arm, hits, wire, _range(arm.best_tpot_s, arm.tpot_s))
    return table


def _caption(answer: "RunPlan") -> str:
    bounds = (
        f"on demand {answer.on_demand_s * 1000:.1f} ms per token, "
        f"all resident {answer.resident_s * 1000:.1f}"
    )
    if answer.basis == "trace":
        return f"{bounds}; simulated on the trace"
    return f"{bounds}; ranges: perfect prefetch to none, hits as if routing knew no past"


def _advice(answer: "RunPlan") -> str:
    advice = answer.recommendation
    if advice.tpot_s is None or advice.best_tpot_s is None:
        return f"It does not fit: {advice.reason}."
    expected = _range(advice.best_tpot_s, advice.tpot_s)
    return (
        f"Use --expert-memory {advice.expert_memory_bytes} "
        f"({format_bytes(advice.expert_memory_bytes)}) --eviction {advice.eviction} "
        f"--predictor {advice.predictor}: expect {expected} ms per token. "
        f"Limited by {_LIMITS[advice.limit]}: {advice.reason}."
    )


def _left_out(answer: "RunPlan", shares: Sequence[float]) -> list[str]:
    """Name the budgets that no engine could run in."""
    least = min((arm.num_slots for arm in answer.arms), default=answer.num_slots)
    small = [f"{100 * share:g}%" for share in shares if round(share * answer.num_slots, 6) < least]
    if not small:
        return []
    return [f"left out: {', '.join(small)} of the experts are fewer than a model at work needs"]


def _range(low_s: float, high_s: float) -> str:
    low, high = f"{low_s * 1000:.1f}", f"{high_s * 1000:.1f}"
    return high if low == high else f"{low} to {high}"


def _written(name: str, value: float) -> str:
    if math.isinf(value):
        return "no limit"
    if name == "flop_s":
        return f"{value / 1e9:.0f} GFLOP/s"
    if name.endswith("_bytes_s"):
        return f"{value / 1e9:.2f} GB/s"
    if name.endswith("_share"):
        return f"{value:.0%}"
    return f"{value * 1000:.3f} ms"
