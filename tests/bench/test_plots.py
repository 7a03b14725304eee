"""Figures are drawn from results alone: a typical token, and no time of a wrong arm."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import pytest

from foreload.bench import plots
from foreload.bench.arm import Sample
from foreload.bench.report import BudgetLimits
from foreload.errors import MissingExtraError
from foreload.metrics import Timeline

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

PNG = b"\x89PNG\r\n"


def sample(arm: str, tpot_ms: float, budget: float = 0.25, **values: Any) -> Sample:
    given = {"trial": 0, "prefill_s": 0.5, "step_s": [], "is_equal": True, **values}
    return Sample(arm=arm, budget=budget, tpot_s=tpot_ms / 1e3, **given)


def limits(budget: float = 0.25, context: int = 0) -> BudgetLimits:
    return BudgetLimits(
        budget=budget,
        context=context,
        trial=0,
        num_slots=4,
        bandwidth_bytes_s=1e9,
        compute_s=2e-3,
        expert_bytes=10**6,
        hit_rates={},
        misses_per_token={"history": 10.0, "belady": 5.0},
    )


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Axes]:
    """The axes of every figure that is saved."""
    axes: list[Axes] = []
    save = plots.save_figure
    monkeypatch.setattr(
        plots, "save_figure", lambda figure, path: (axes.extend(figure.axes), save(figure, path))
    )
    return axes


def bars(axes: Axes) -> dict[str, float]:
    names = [label.get_text() for label in axes.get_yticklabels()]
    widths = [bar.get_width() for bar in axes.patches]
    return dict(zip(names, widths, strict=True))


def test_every_budget_has_a_figure_with_medians_and_both_limits(
    drawn: list[Axes], tmp_path: Path
) -> None:
    samples = [
        *(sample("auto", time) for time in (30.0, 10.0, 14.0)),
        sample("auto", 5.0, 0.5),
        sample("lru", 50.0, 1.0),
        sample("all-resident", 2.0, 1.0, is_resident=True),
    ]
    plots.plot_tpot(samples, [limits(), limits(0.5)], tmp_path)
    for name in ("tpot-25.png", "tpot-50.png"):
        assert (tmp_path / name).read_bytes().startswith(PNG)
    quarter, half = drawn
    assert bars(quarter) == pytest.approx({"auto": 14.0, "all-resident": 2.0})
    assert bars(half) == pytest.approx({"auto": 5.0, "all-resident": 2.0})
    at = {str(line.get_label()): line.get_xdata()[0] for line in quarter.lines}
    assert at["wire limit (history)"] == pytest.approx(10.0)
    assert at["Belady limit"] == pytest.approx(5.0)


def test_every_context_has_a_figure_of_its_own(drawn: list[Axes], tmp_path: Path) -> None:
    samples = [sample("auto", 9.0, context=100), sample("auto", 5.0, context=400)]
    plots.plot_tpot(samples, [limits(context=100), limits(context=400)], tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"tpot-25-100.png", "tpot-25-400.png"}
    assert [bars(axes) for axes in drawn] == [{"auto": 9.0}, {"auto": 5.0}]


def test_an_arm_that_differed_in_one_trial_is_not_drawn(drawn: list[Axes], tmp_path: Path) -> None:
    samples = [sample("auto", 9.0), sample("lru", 5.0), sample("lru", 6.0, is_equal=False)]
    plots.plot_tpot(samples, [limits()], tmp_path)
    assert list(bars(drawn[0])) == ["auto"]


def three_steps() -> tuple[Timeline, list[float]]:
    """Steps of 10, 30 and 20 ms, each two layers of two experts, with a read and a stall."""
    timeline = Timeline()
    timeline.is_on = True
    steps = [0.010, 0.030, 0.020]
    start = 1.0
    for length in steps:
        for part, name in enumerate(("0.1", "0.7", "1.2", "1.0")):
            begin = start + part * length / 4
            timeline.add("compute", name, begin, begin + length / 4)
        timeline.add("disk", "1.2", start, start + length / 2)
        timeline.add("stall", "stall", start + length / 4, start + length / 2)
        start += length
    return timeline, steps


def test_the_step_nearest_the_median_is_drawn(drawn: list[Axes], tmp_path: Path) -> None:
    timeline, steps = three_steps()
    assert plots._typical_step(timeline, steps) == pytest.approx((1.040, 1.060))
    plots.plot_timeline(timeline, steps, tmp_path / "one.png", title="lru, 25%")
    assert (tmp_path / "one.png").read_bytes().startswith(PNG)
    (axes,) = drawn
    assert axes.get_xlim() == pytest.approx((0, 20))
    assert axes.get_title() == "one token: lru, 25%"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["disk", "compute", "stall"]
    counts = [len(lane.get_paths()) for lane in axes.collections]
    assert counts == [1, 4, 1]


def test_an_empty_timeline_draws_nothing(tmp_path: Path) -> None:
    plots.plot_timeline(Timeline(), [0.1], tmp_path / "none.png", title="")
    assert not (tmp_path / "none.png").exists()


def test_without_matplotlib_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match="plots"):
        plots.plot_tpot([sample("auto", 1.0)], [limits()], tmp_path)
