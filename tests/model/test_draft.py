"""A draft resembles its model, with its packed kernels and without them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from drafting import KINDS, MOST_ERROR, errors_of, make_inputs, read
from streaming import StreamedExperts

from foreload.errors import ForeloadError

if TYPE_CHECKING:
    from pathlib import Path

    from foreload.model.hf import LoadedModel


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_tokens", [1, 32])
def test_a_draft_comes_close_to_the_true_experts(
    loaded: LoadedModel, folders: dict[str, Path], kind: str, num_tokens: int
) -> None:
    errors = errors_of(loaded, read(loaded, folders[kind], kind), num_tokens)
    assert 0 < min(errors) <= max(errors) < MOST_ERROR[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_every_expert_is_itself(loaded: LoadedModel, folders: dict[str, Path], kind: str) -> None:
    draft, run_true = read(loaded, folders[kind], kind), StreamedExperts(loaded.plans)
    site = loaded.sites[2]
    hidden = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    for expert in range(site.num_experts):
        routing = torch.tensor([[expert]]), torch.ones(1, 1)
        wanted = run_true(2, site.experts, hidden, *routing)
        found = draft.run_layer(2, site.experts, hidden, *routing)
        assert (found - wanted).norm() < 0.5 * wanted.norm(), expert


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_tokens", [1, 16])
def test_without_kernels_it_gives_the_same_but_for_rounding(
    loaded: LoadedModel, folders: dict[str, Path], kind: str, num_tokens: int
) -> None:
    draft = read(loaded, folders[kind], kind)
    bare = draft.without_kernels()
    assert (bare.kind, bare.num_bytes) == (draft.kind, draft.num_bytes)
    for site in loaded.sites:
        inputs = make_inputs(loaded, site.layer, num_tokens)
        one, other = (d.run_layer(site.layer, site.experts, *inputs) for d in (draft, bare))
        assert (one - other).norm() < 0.01 * one.norm()


def test_a_draft_that_was_let_go_of_says_so(loaded: LoadedModel, folders: dict[str, Path]) -> None:
    draft = read(loaded, folders["int4"])
    draft.release()
    assert draft.num_bytes == 0
    with pytest.raises(ForeloadError, match="engine is closed"):
        draft.run_layer(0, loaded.sites[0].experts, *make_inputs(loaded, 0, 1))
    draft.release()
