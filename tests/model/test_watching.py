"""What passes the MoE layers is shown as it is, until the handles are removed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from foreload.model.sites import MoeSite, discover_sites, probe_sites
from foreload.model.watching import watch_logits, watch_residuals

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

PROMPT = torch.tensor([[5, 9, 33, 7, 101]])


@pytest.fixture
def sites(tiny_model: PreTrainedModel) -> list[MoeSite]:
    found = discover_sites(tiny_model)
    probe_sites(tiny_model, found, torch.tensor([[1, 2, 3, 4] * 4]))
    return found


def run(model: PreTrainedModel) -> None:
    with torch.inference_mode():
        model(input_ids=PROMPT)


def test_residual_streams_are_what_the_norms_are_given(
    tiny_model: PreTrainedModel, sites: list[MoeSite]
) -> None:
    seen: dict[int, Tensor] = {}
    wanted: dict[int, Tensor] = {}
    handles = watch_residuals(sites, seen.__setitem__)
    for site in sites:
        assert site.norm is not None

        def keep(module: object, args: tuple[Tensor, ...], layer: int = site.layer) -> None:
            wanted[layer] = args[0][0]

        handles.append(site.norm.register_forward_pre_hook(keep))
    run(tiny_model)
    for handle in handles:
        handle.remove()
    assert sorted(seen) == [site.layer for site in sites]
    for layer, residual in seen.items():
        assert residual.shape == (5, tiny_model.config.hidden_size)
        assert torch.equal(residual, wanted[layer])
    seen.clear()
    run(tiny_model)
    assert not seen


def test_logits_are_one_for_each_expert(tiny_model: PreTrainedModel, sites: list[MoeSite]) -> None:
    seen: dict[int, Tensor] = {}
    residuals: dict[int, Tensor] = {}
    handles = [
        *watch_logits(sites, seen.__setitem__),
        *watch_residuals(sites, residuals.__setitem__),
    ]
    run(tiny_model)
    for handle in handles:
        handle.remove()
    for site in sites:
        assert site.router is not None
        assert site.norm is not None
        given = site.norm(residuals[site.layer])
        assert seen[site.layer].shape == (5, site.num_experts)
        torch.testing.assert_close(seen[site.layer], given @ site.router.weight.T)


def test_sites_without_a_router_are_left_out(sites: list[MoeSite]) -> None:
    sites[0].router = sites[0].norm = None
    for watch in (watch_logits, watch_residuals):
        handles = watch(sites, lambda layer, value: None)
        assert len(handles) == len(sites) - 1
        for handle in handles:
            handle.remove()
