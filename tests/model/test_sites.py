"""MoE layers are found without names, and their routers can be asked early."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

import zoo
from foreload.model.sites import (
    MoeSite,
    discover_sites,
    expert_parameters,
    predict_routing,
    probe_sites,
    silenced_experts,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROMPT = zoo.prompt()


class Seen:
    """What one forward showed at each site: the residual stream and the routing it led to."""

    def __init__(self, model: PreTrainedModel, sites: list[MoeSite], **inputs: Tensor) -> None:
        self.residual: dict[int, Tensor] = {}
        self.routing: dict[int, tuple[Tensor, Tensor]] = {}
        handles = []
        for site in sites:
            handles.append(site.experts.register_forward_pre_hook(self.see_routing(site.layer)))
            if site.residual_module is not None:
                hook = self.see_residual(site.layer)
                handles.append(site.residual_module.register_forward_pre_hook(hook))
        model.set_experts_implementation("eager")
        with torch.no_grad():
            model(input_ids=PROMPT, use_cache=False, **inputs)
        for handle in handles:
            handle.remove()

    def see_residual(self, layer: int) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.residual.setdefault(layer, args[0].reshape(-1, args[0].shape[-1]))

        return hook

    def see_routing(self, layer: int) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.routing.setdefault(layer, (args[1], args[2]))

        return hook


@pytest.mark.parametrize("arch", zoo.SEVEN_FAMILIES)
def test_the_true_residual_gives_the_true_routing(arch: str) -> None:
    model = zoo.build_family(arch)
    sites = discover_sites(model)
    assert [site.layer for site in sites] == list(range(len(sites)))
    probe_sites(model, sites, PROMPT)
    seen = Seen(model, sites)
    for site in sites:
        assert site.is_predictable
        assert site.norm is not None
        output = predict_routing(site, seen.residual[site.layer])
        assert output is not None
        index, weights = seen.routing[site.layer]
        assert torch.equal(output.top_k_index, index)
        assert torch.equal(output.top_k_weights, weights.reshape(index.shape))
        assert output.logits is not None
        assert output.logits.shape == (PROMPT.numel(), site.num_experts)


def test_layers_are_counted_among_moe_layers_and_among_all() -> None:
    sites = discover_sites(zoo.build_family("qwen3_moe"))  # layer 1 is dense
    assert [site.layer for site in sites] == [0, 1, 2]
    assert [site.decoder_layer for site in sites] == [0, 2, 3]
    assert [site.name for site in sites][1] == "model.layers.2.mlp.experts"
    assert {(site.num_experts, site.top_k) for site in sites} == {(16, 4)}


def test_a_dense_model_has_no_sites() -> None:
    assert discover_sites(nn.Sequential(nn.Linear(2, 2))) == []


def test_sites_are_found_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = zoo.build_tiny("gpt_oss")
    (site, *_) = discover_sites(model)
    assert set(expert_parameters(site.experts)) == {
        "gate_up_proj",
        "gate_up_proj_bias",
        "down_proj",
        "down_proj_bias",
    }


def test_nothing_is_predicted_before_the_probe() -> None:
    (site, *_) = discover_sites(zoo.build_tiny("qwen3_moe"))
    assert predict_routing(site, torch.zeros(1, 64)) is None


def test_probing_calls_no_experts_and_leaves_no_hooks() -> None:
    model = zoo.build_tiny("mixtral")
    sites = discover_sites(model)
    calls: list[int] = []
    forwards = [site.experts.forward for site in sites]
    for site in sites:
        site.experts._apply_gate = lambda *args: calls.append(1)
    probe_sites(model, sites, PROMPT)
    assert not calls
    assert [site.experts.forward for site in sites] == forwards
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_experts_speak_again_after_an_error() -> None:
    model = zoo.build_tiny("mixtral")
    sites = discover_sites(model)
    with silenced_experts(sites):
        assert not sites[0].experts(torch.ones(3, 64), None, None).any()
    with pytest.raises(ZeroDivisionError), silenced_experts(sites):
        raise ZeroDivisionError
    assert "forward" not in vars(sites[0].experts)


@pytest.mark.parametrize(
    ("arch", "predictable"), [("zaya", [True, False, False]), ("deepseek_v4", None)]
)
def test_routers_that_want_more_than_the_residual_are_left_alone(
    arch: str, predictable: list[bool] | None
) -> None:
    model = zoo.build_tiny(arch)
    sites = discover_sites(model)
    probe_sites(model, sites, PROMPT)
    found = [site.is_predictable for site in sites]
    if predictable is not None:
        assert found == predictable
    assert not all(found)
    residual = torch.zeros(2, 64)
    for site in sites:
        if not site.is_predictable:
            assert predict_routing(site, residual) is None


@pytest.mark.parametrize("arch", ["afmoe", "lfm2_moe", "minimax_m2"])
def test_constant_extra_arguments_are_learned(arch: str) -> None:
    model = zoo.build_tiny(arch)
    sites = discover_sites(model)
    probe_sites(model, sites, PROMPT)
    seen = Seen(model, sites)
    for site in sites:
        output = predict_routing(site, seen.residual[site.layer])
        assert output is not None
        assert torch.equal(
            output.top_k_index.sort(-1).values, seen.routing[site.layer][0].sort(-1).values
        )
