"""MoE layers are found without names, and their routers can be asked early."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

import zoo
from foreload.model.sites import (
    EarlyRouter,
    MoeSite,
    discover_sites,
    expert_parameters,
    probe_sites,
    router_logits,
    silenced_experts,
)
from foreload.ops.scores import LayerScores, ScoreRule

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
        output = EarlyRouter(site)(seen.residual[site.layer])
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
    assert EarlyRouter(site)(torch.zeros(1, 64)) is None


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
            assert EarlyRouter(site)(residual) is None


@pytest.mark.parametrize("arch", ["afmoe", "lfm2_moe", "minimax_m2"])
def test_constant_extra_arguments_are_learned(arch: str) -> None:
    model = zoo.build_tiny(arch)
    sites = discover_sites(model)
    probe_sites(model, sites, PROMPT)
    seen = Seen(model, sites)
    for site in sites:
        output = EarlyRouter(site)(seen.residual[site.layer])
        assert output is not None
        assert torch.equal(
            output.top_k_index.sort(-1).values, seen.routing[site.layer][0].sort(-1).values
        )


# MoE layers whose routing cannot be executed ahead of time, and why.
NOT_WHOLE: dict[str, tuple[set[int], str]] = {
    "deepseek_v4": ({0, 1}, "they route by token ids"),
    "ernie4_5_vl_moe": ({1, 3}, "vision experts see no text"),
    "zaya": ({1, 2}, "their routers continue the routing of the layer before"),
}

# MoE layers whose weights no rule explains, and why.
NO_RULE: dict[str, tuple[set[int], str]] = {
    "deepseek_v4": ({0, 1}, "their routers are not asked"),
    "diffusion_gemma": ({0, 1, 2, 3, 4, 5}, "each expert has a factor of its own"),
    "ernie4_5_vl_moe": ({1, 3}, "vision experts see no text"),
    "gemma4": ({0, 1, 2}, "each expert has a factor of its own"),
    "phimoe": ({0, 1, 2}, "each choice is a softmax over what is left"),
    "zaya": ({0, 1, 2}, "one expert per token tells nothing"),
}


@pytest.mark.parametrize("arch", zoo.buildable_architectures())
def test_the_routing_of_every_other_architecture_can_be_executed(arch: str) -> None:
    model = zoo.build_tiny(arch)
    sites = discover_sites(model)
    tokens = torch.tensor([[1, 2, 3, 4] * 4])
    probe_sites(model, sites, tokens, extra_inputs=zoo.extra_inputs(arch))
    broken = {site.layer for site in sites if not site.is_routing_whole}
    assert broken == NOT_WHOLE.get(arch, (set(), ""))[0]
    unexplained = {site.layer for site in sites if site.scores is None}
    assert unexplained == NO_RULE.get(arch, (set(), ""))[0]
    for site in sites:
        assert site.is_predictable or not site.is_routing_whole
    (normalised,) = {site.scores.is_normalised for site in sites if site.scores} or {None}
    config = model.config.get_text_config()
    if normalised is not None and hasattr(config, "norm_topk_prob"):
        assert normalised is bool(config.norm_topk_prob)


def probed(arch: str, **settings: Any) -> tuple[PreTrainedModel, list[MoeSite]]:
    cls = zoo.model_class(arch)
    config = cls.config_class(**{**zoo.SEVEN_FAMILIES[arch], **settings})
    model = zoo._build(cls, config, torch.float32, seed=0)
    sites = discover_sites(model)
    probe_sites(model, sites, PROMPT)
    return model, sites


@pytest.mark.parametrize(
    ("arch", "settings", "rule", "is_normalised"),
    [
        ("qwen3_moe", {}, ScoreRule.SOFTMAX, True),
        ("qwen3_moe", {"norm_topk_prob": False}, ScoreRule.SOFTMAX, False),
        ("mixtral", {}, ScoreRule.SOFTMAX, True),
        ("olmoe", {}, ScoreRule.SOFTMAX, False),
        ("deepseek_v2", {}, ScoreRule.SOFTMAX, False),
        ("deepseek_v3", {}, ScoreRule.SIGMOID, True),
        ("deepseek_v3", {"norm_topk_prob": False}, ScoreRule.SIGMOID, False),
        ("gpt_oss", {}, ScoreRule.SOFTMAX, True),
    ],
)
def test_how_weights_are_made_is_found_out(
    arch: str, settings: dict[str, Any], rule: ScoreRule, is_normalised: bool
) -> None:
    _, sites = probed(arch, **settings)
    for site in sites:
        assert site.is_routing_whole
        assert site.scores == LayerScores(rule, is_normalised)


@pytest.mark.parametrize("arch", zoo.SEVEN_FAMILIES)
def test_logits_are_read_from_what_the_router_gave(arch: str) -> None:
    model, sites = probed(arch)
    given: dict[int, Tensor | None] = {}

    def see(site: MoeSite) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            given[site.layer] = router_logits(site, output)

        return hook

    for site in sites:
        site.router.register_forward_hook(see(site))
    Seen(model, sites)
    for site in sites:
        assert given[site.layer].shape == (PROMPT.numel(), site.num_experts)


class Projecting(nn.Module):
    """A router that is only a projection; its block makes the weights."""

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.weight = router.weight

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden @ self.weight.T


def test_a_router_whose_block_makes_the_weights_names_experts_only() -> None:
    model, sites = probed("qwen3_moe")
    for site in sites:
        whole, site.router = site.router, Projecting(site.router)
        site.block.gate = site.router

        def route(hidden: Tensor, block: Any = site.block, whole: Any = whole) -> Tensor:
            block.gate(hidden)  # asked, and then not used
            _, weights, index = whole(hidden)
            return block.experts(hidden, index, weights)

        site.block.forward = route
    for site in sites:
        site.is_routing_whole, site.scores = False, None
    probe_sites(model, sites, PROMPT[:, :4])
    for site in sites:
        assert not site.is_routing_whole
        assert site.scores == LayerScores(ScoreRule.SOFTMAX, is_normalised=True)
        answer = EarlyRouter(site)(torch.randn(1, 64))
        assert answer is not None
        assert answer.top_k_weights is None
        assert answer.top_k_index.shape == (1, 4)


def test_gradients_reach_the_router_input() -> None:
    _, sites = probed("qwen3_moe")
    router = EarlyRouter(sites[1])
    hidden = router.quasi_hidden(torch.randn(2, 64)).detach().requires_grad_()
    answer = router.route(hidden)
    assert answer is not None
    answer.logits.sum().backward()
    assert hidden.grad.abs().sum() > 0
    assert not router(torch.randn(2, 64)).logits.requires_grad
