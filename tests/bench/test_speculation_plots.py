"""Figures name a lossy arm with its quality, and draw no time of a wrong arm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from foreload.bench import speculation_plots
from foreload.bench.arm import Sample
from foreload.bench.report import BudgetLimits
from foreload.bench.speculation_plots import plot_speculation

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

QUALITY = {
    "kl": [0.02, 0.04],
    "nll": [2.1, 2.0],
    "nll_exact": [2.0, 2.0],
    "agrees": [1.0, 0.0],
}
LOSSY = "speculate-hybrid (KL 0.03, perplexity x1.051)"


def sample(arm: str, tpot_ms: float, context: int = 100, **values: Any) -> Sample:
    given = {"budget": 0.25, "trial": 0, "eviction": "none", "is_equal": True, **values}
    return Sample(arm=arm, context=context, tpot_s=tpot_ms / 1e3, prefill_s=0.5, step_s=[], **given)


def speculate(tpot_ms: float, context: int = 100, **values: Any) -> Sample:
    recalls = {1: {1: 0.5}, 2: {1: 0.75}}
    given = {"is_lossy": True, "quality": QUALITY, "recall_at_n": recalls, **values}
    return sample("speculate-hybrid", tpot_ms, context, **given)


def limits(context: int = 100, budget: float = 0.25) -> BudgetLimits:
    return BudgetLimits(
        budget=budget,
        context=context,
        trial=0,
        num_slots=4,
        bandwidth_bytes_s=1e9,
        compute_s=2e-3,
        expert_bytes=10**6,
        hit_rates={},
        misses_per_token={"none": 20.0, "history": 10.0},
    )


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Axes]:
    """The axes of every figure by file name."""
    axes: dict[str, Axes] = {}
    save = speculation_plots.save_figure

    def keep(figure: Any, path: Path) -> None:
        axes[path.name] = figure.axes[0]
        save(figure, path)

    monkeypatch.setattr(speculation_plots, "save_figure", keep)
    return axes


def test_every_arm_has_a_bar_per_context(drawn: dict[str, Axes], tmp_path: Path) -> None:
    samples = [
        *(sample("on-demand", time) for time in (30.0, 24.0, 25.0)),
        sample("on-demand", 40.0, 900),
        speculate(20.0),
        speculate(21.0, 900),
    ]
    plot_speculation(samples, [limits(), limits(900)], tmp_path)
    axes = drawn["tpot-by-context-25.png"]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == [
        "on-demand",
        LOSSY,
        "all resident",
        "wire limit, no cache",
        "wire limit, history",
    ]
    short, long = axes.containers[1], axes.containers[3]
    assert [bar.get_width() for bar in short.patches] == pytest.approx([25, 20, 2, 20, 10])
    assert [bar.get_width() for bar in long.patches] == pytest.approx([40, 21, 2, 20, 10])
    assert {path.name for path in tmp_path.iterdir()} == set(drawn)


def test_quality_is_drawn_against_time_with_exact_arms_at_zero(
    drawn: dict[str, Axes], tmp_path: Path
) -> None:
    plot_speculation([sample("on-demand", 24.0), speculate(20.0)], [limits()], tmp_path)
    axes = drawn["quality-25-100.png"]
    _, labels = axes.get_legend_handles_labels()
    assert labels == ["on-demand", LOSSY]
    points = [bars.lines[0].get_xydata()[0].tolist() for bars in axes.containers]
    assert points[0] == pytest.approx([0, 24])
    assert points[1] == pytest.approx([0.03, 20])


def test_recall_is_drawn_per_layer(drawn: dict[str, Axes], tmp_path: Path) -> None:
    plot_speculation([speculate(20.0)], [limits()], tmp_path)
    (line,) = drawn["recall.png"].lines
    assert line.get_label() == "speculate-hybrid"
    assert line.get_xydata().tolist() == [[1, 50], [2, 75]]


def test_random_weights_have_no_quality_figure(drawn: dict[str, Axes], tmp_path: Path) -> None:
    plot_speculation([sample("on-demand", 24.0), speculate(20.0, quality={})], [limits()], tmp_path)
    assert set(drawn) == {"tpot-by-context-25.png", "recall.png"}
    names = [label.get_text() for label in drawn["tpot-by-context-25.png"].get_yticklabels()]
    assert names[1] == "speculate-hybrid (lossy; random weights, no quality)"


def test_an_arm_that_went_wrong_is_not_drawn(drawn: dict[str, Axes], tmp_path: Path) -> None:
    samples = [sample("on-demand", 24.0), speculate(20.0, is_equal=False)]
    plot_speculation(samples, [limits()], tmp_path)
    assert set(drawn) == {"tpot-by-context-25.png"}
    names = [label.get_text() for label in drawn["tpot-by-context-25.png"].get_yticklabels()]
    assert not any("speculate" in name for name in names)
