"""A draft is worth its memory where the link decides and the cache stays large enough."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from foreload.model.draft_choice import DraftFigures, draft_pays, measure_figures
from foreload.model.hf import load_model

if TYPE_CHECKING:
    from pathlib import Path

    from foreload.types import ModelSpec

FIGURES = DraftFigures(copy_s=1e-3, one_s=1e-4, four_s=1.5e-4, draft_s=4e-5, dense_s=1e-3)


def spec_of(tiny_checkpoint: Path) -> ModelSpec:
    return replace(load_model(tiny_checkpoint).spec, num_moe_layers=32, num_experts=64, top_k=4)


def test_it_pays_where_copies_decide(tiny_checkpoint: Path) -> None:
    spec = spec_of(tiny_checkpoint)
    assert draft_pays(spec, FIGURES, plain_slots=1024, slots_beside=960)


def test_it_does_not_pay_where_everything_fits_without_it(tiny_checkpoint: Path) -> None:
    spec = spec_of(tiny_checkpoint)
    rows = replace(FIGURES, four_s=4e-4)
    assert not draft_pays(spec, rows, plain_slots=2048, slots_beside=1500)


def test_it_does_not_pay_where_it_takes_nearly_the_whole_cache(tiny_checkpoint: Path) -> None:
    spec = spec_of(tiny_checkpoint)
    rows = replace(FIGURES, four_s=4e-4, copy_s=1e-4)
    assert not draft_pays(spec, rows, plain_slots=1800, slots_beside=5)


def test_figures_are_measured_on_the_model_itself(tiny_checkpoint: Path) -> None:
    loaded = load_model(tiny_checkpoint)
    figures = measure_figures(loaded.sites, loaded.plans, loaded.spec, "int4", num_workers=2)
    assert min(figures.copy_s, figures.one_s, figures.four_s, figures.draft_s) > 0
    assert figures.dense_s > 0
