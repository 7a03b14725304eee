"""torch's profile of some captured steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpu.models import open_engine, shares_of, widened_demo
from gpu.rows import attempt, show
from gpu.settings import PROMPT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gpu.rows import Row
    from gpu.settings import Settings


def profile(settings: Settings) -> Iterator[Row]:
    """Writes torch's profile of some captured steps, at 30 % of the experts."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiling

    model = widened_demo(settings)
    share = shares_of(model, (30,))[0]

    def measure() -> Row:
        with open_engine(model, share) as engine:
            engine.generate(PROMPT, max_new_tokens=settings.num_warm)
            activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
            with profiling(activities=activities) as found:
                stats = engine.generate(PROMPT, max_new_tokens=settings.num_warm).stats
            found.export_chrome_trace(str(settings.output / f"{settings.stem}.trace.json.gz"))
            table = found.key_averages().table(sort_by="device_time_total", row_limit=30)
        return {"tpot_s": stats.tpot_s, "table": table.splitlines()}

    yield show(attempt({"share": share}, measure))
