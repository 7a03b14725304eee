"""The figures of the suite about drafts: which are drawn, and from what."""

from __future__ import annotations

from typing import TYPE_CHECKING

from test_moe_speq_report import draft_limits, draft_sample

from foreload.bench.moe_speq_plots import plot_moe_speq

if TYPE_CHECKING:
    from pathlib import Path

ROOFS = [
    {
        "num_draft_tokens": number,
        "union": 4.0 + number,
        "intensity": (1 + number) * 1e-8,
        "io_roof": 10.0 + number,
        "compute_roof": 20.0 - number,
        "predicted": 8.0 + number,
        "num_rounds": number,
    }
    for number in range(3)
]


def test_tpot_and_roofs_are_drawn(tmp_path: Path) -> None:
    samples = [draft_sample("lru", 40), draft_sample("governor", 20, roofs=ROOFS)]
    plot_moe_speq(samples, [draft_limits()], tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"tpot-40.png", "roofs-40-100.png"}


def test_wrong_logits_and_no_copies_have_no_roofs(tmp_path: Path) -> None:
    wrong = draft_sample("governor", 20, roofs=ROOFS, is_equal=False)
    plot_moe_speq([draft_sample("lru", 40), wrong], [draft_limits()], tmp_path)
    endless = [{**roof, "intensity": float("inf")} for roof in ROOFS]
    nothing = draft_sample("governor", 20, roofs=endless)
    plot_moe_speq([draft_sample("lru", 40), nothing], [draft_limits()], tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"tpot-40.png"}
