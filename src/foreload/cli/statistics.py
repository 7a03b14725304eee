"""Write settings and statistics for people: milliseconds, percent, GiB."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from foreload.config import format_bytes

if TYPE_CHECKING:
    from rich.table import Table

    from foreload.config import EngineConfig
    from foreload.engine import Engine
    from foreload.metrics import RequestStats

__all__ = ["comparison_table", "config_line", "ratios", "statistics_line"]


def config_line(engine: Engine) -> str:
    """Give the resolved settings in one line."""
    config, spec = engine.config, engine.spec
    share = engine.num_slots / (spec.num_moe_layers * spec.num_experts)
    guessed_by = config.predictor
    if config.orchestration == "host":
        predictor = engine.runtime.predictor
        if predictor is not None and predictor.name != guessed_by:
            guessed_by = f"{guessed_by} ({predictor.name})"
    policy = config.policy
    if policy == "speculate-when":
        policy = f"{policy} (confidence {config.confidence:g})"
    return ", ".join(
        (
            f"{config.model}: {spec.architecture}",
            config.dtype,
            f"device {config.device}",
            f"expert memory {format_bytes(engine.expert_memory_bytes)} "
            f"({_percent(min(share, 1.0))} of all experts)",
            f"predictor {guessed_by}",
            f"eviction {config.eviction}",
            f"policy {policy}",
            *_draft_parts(engine),
        )
    )


def _draft_parts(engine: Engine) -> list[str]:
    draft = None if engine.drafter is None else engine.drafter.draft
    if draft is None:
        return []
    tokens = engine.config.num_draft_tokens
    return [f"draft {draft.kind} ({format_bytes(draft.num_bytes)} of it), {tokens} tokens a round"]


def statistics_line(stats: RequestStats, finish_reason: str, policy: str) -> str:
    """Give a request's statistics in one line; what was speculated, where the policy does that."""
    parts = [
        f"{stats.num_output_tokens} tokens ({finish_reason})",
        f"TTFT {_seconds(stats.ttft_s)}",
        f"TPOT {_seconds(stats.tpot_s)}",
        f"hit rate {_percent(stats.hit_rate)}",
        f"read {format_bytes(stats.bytes_moved)}",
        f"stalled {_percent(stats.stall_fraction)}",
    ]
    if stats.bytes_per_token is not None:
        parts[-2] += f" ({format_bytes(stats.bytes_per_token)} per token)"
    if stats.accept_length is not None:
        parts.append(
            f"{stats.accept_length:.2f} tokens a round of {_seconds(stats.round_s)} "
            f"({_percent(stats.acceptance_rate)} of the draft accepted)"
        )
    if policy != "exact":
        parts.append(f"speculated {_percent(stats.speculated_fraction)}")
    return ", ".join(parts)


def comparison_table(ours: RequestStats, on_demand: RequestStats, settings: EngineConfig) -> Table:
    """Set a run beside the same run on demand.

    Args:
        ours: Of the run.
        on_demand: Of the other.
        settings: Of the run, resolved.
    """
    from rich.table import Table

    kept = "the same memory" if settings.orchestration == "device" else "no expert is kept"
    table = Table(caption=f"on demand: exact, nothing is prefetched, {kept}")
    table.add_column("")
    more = ("speculated",) if settings.policy != "exact" else ()
    for name in ("TTFT", "TPOT", "hit rate", "bytes read", *more):
        table.add_column(name, justify="right")
    for name, stats in (("foreload", ours), ("on demand", on_demand)):
        table.add_row(
            name,
            _seconds(stats.ttft_s),
            _seconds(stats.tpot_s),
            _percent(stats.hit_rate),
            format_bytes(stats.bytes_moved),
            *(_percent(stats.speculated_fraction) for _ in more),
        )
    ratio = {name: _factor(value) for name, value in ratios(ours, on_demand).items()}
    table.add_section()
    table.add_row(
        "on demand / foreload", ratio["ttft_s"], ratio["tpot_s"], "", ratio["bytes_moved"]
    )
    return table


def ratios(ours: RequestStats, on_demand: RequestStats) -> dict[str, float | None]:
    """Give on demand / foreload: above 1 foreload is faster, or reads less."""
    result: dict[str, float | None] = {}
    for name in ("ttft_s", "tpot_s", "bytes_moved"):
        mine: Any = getattr(ours, name)
        other: Any = getattr(on_demand, name)
        result[name] = other / mine if mine and other is not None else None
    return result


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value * 1e3:.1f} ms" if value < 1 else f"{value:.2f} s"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value * 100:.1f} %"


def _factor(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"
