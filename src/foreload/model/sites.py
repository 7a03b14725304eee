"""Find the MoE layers of any transformers model, and ask their routers early.

transformers marks every experts module it can dispatch; from there the decoder layer, the block
and the router follow from the module tree. Which norm feeds the router, and what else the router
wants to see, is learned from one forward pass whose experts answer zero, so it needs no expert
weights. No architecture is known by name here, and transformers is not imported.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from foreload.errors import UnsupportedModelError
from foreload.ops.scores import LayerScores, find_scores
from foreload.types import RouterOutput, Routing

__all__ = [
    "EarlyRouter",
    "MoeSite",
    "discover_sites",
    "expert_parameters",
    "is_experts",
    "probe_sites",
    "router_logits",
    "silenced_experts",
]

_MARKS = ("is_transposed", "has_gate", "has_bias", "_apply_gate")
_ROUTER_NAMES = ("gate", "router")
_TOP_K_NAMES = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "top_k_experts",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "top_k",
    "num_selected_experts",
)


@dataclass(slots=True)
class MoeSite:
    """One MoE layer of a model.

    Attributes:
        layer: Number among the MoE layers, from 0; `ExpertKey.layer`.
        decoder_layer: Number among all decoder layers.
        name: The experts module's name in the model.
        experts: The experts module.
        block: The module that holds it.
        decoder: The decoder layer.
        router: The router, or None where none was found.
        num_experts: E of this layer.
        top_k: K of this layer, or None where the configuration does not say.
        norm: The module whose output is the router's input; None where the router reads the
            residual stream itself. Known after `probe_sites`.
        router_args: What the router is given besides its input.
        router_kwargs: The same, by keyword.
        is_flat: Whether the router wants (T, H) instead of (1, T, H).
        is_predictable: Whether the router can be asked with nothing but a residual stream. False
            until `probe_sites` has seen it.
        is_routing_whole: Whether the router alone gives what the experts are called with, weights
            included, so that its answer to another residual may be executed. As above.
        scores: How weights are made of the router's logits; None where that was not found out.
    """

    layer: int
    decoder_layer: int
    name: str
    experts: nn.Module
    block: nn.Module
    decoder: nn.Module
    router: nn.Module | None
    num_experts: int
    top_k: int | None
    norm: nn.Module | None = None
    router_args: tuple[Any, ...] = ()
    router_kwargs: dict[str, Any] = field(default_factory=dict)
    is_flat: bool = True
    is_predictable: bool = False
    is_routing_whole: bool = False
    scores: LayerScores | None = None

    @property
    def residual_module(self) -> nn.Module | None:
        """Give the module whose first input is the residual stream before this MoE layer."""
        return self.norm if self.norm is not None else self.router


def is_experts(module: nn.Module) -> bool:
    """Tell whether transformers can dispatch this experts module to another implementation."""
    return all(hasattr(module, mark) for mark in _MARKS) and hasattr(module, "down_proj")


def _count_experts(experts: Any) -> int:
    return int(experts.down_proj.shape[0])


def expert_parameters(experts: nn.Module) -> dict[str, Tensor]:
    """Give the module's parameters that have one row per expert, by name.

    They are found both before and after `strip_experts` replaced them by plain meta tensors.
    """
    num_experts = _count_experts(experts)
    found: dict[str, Tensor] = dict(experts.named_parameters(recurse=False))
    for name, value in vars(experts).items():
        if isinstance(value, Tensor) and value.is_meta:
            found[name] = value
    return {
        name: value
        for name, value in found.items()
        if value.dim() >= 2 and value.shape[0] == num_experts
    }


def discover_sites(model: nn.Module) -> list[MoeSite]:
    """Find the MoE layers of `model`, in the order they run.

    Args:
        model: A transformers model, on any device.

    Returns:
        One site per experts module; empty for a dense model.
    """
    modules = dict(model.named_modules())
    router_classes = _recorded_router_classes(modules.values())
    sites: list[MoeSite] = []
    for name, module in modules.items():
        if not is_experts(module):
            continue
        decoder_name = _decoder_name(name, modules)
        block = modules[name.rpartition(".")[0]]
        decoder = modules[decoder_name]
        sites.append(
            MoeSite(
                layer=len(sites),
                decoder_layer=int(decoder_name.rpartition(".")[2]),
                name=name,
                experts=module,
                block=block,
                decoder=decoder,
                router=_find_router(decoder, block, router_classes),
                num_experts=_count_experts(module),
                top_k=_find_top_k(module, block, model),
            )
        )
    return sites


def _decoder_name(name: str, modules: Mapping[str, nn.Module]) -> str:
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        if isinstance(modules[".".join(parts[:end])], nn.ModuleList) and parts[end].isdigit():
            return ".".join(parts[: end + 1])
    raise UnsupportedModelError(
        f"the experts {name} stand outside any list of decoder layers",
        hint="run this model with transformers itself",
    )


def _recorded_router_classes(modules: Iterable[nn.Module]) -> tuple[type, ...]:
    """Give the classes transformers records router logits from."""
    found = set()
    for module in modules:
        recorders = getattr(module, "_can_record_outputs", None)
        if not isinstance(recorders, Mapping):
            continue
        recorded = recorders.get("router_logits") or ()
        for recorder in recorded if isinstance(recorded, list | tuple) else (recorded,):
            target = getattr(recorder, "target_class", recorder)
            if isinstance(target, type):
                found.add(target)
    return tuple(found)


def _find_router(
    decoder: nn.Module, block: nn.Module, classes: tuple[type, ...]
) -> nn.Module | None:
    for scope in (block, decoder):
        for module in _descendants(scope):
            # Logits may be recorded from the block, too; asking that would run its experts.
            if type(module) in classes and not any(is_experts(m) for m in module.modules()):
                return module
    for scope in (block, decoder):
        named: Iterable[tuple[str, nn.Module]] = scope.named_modules()
        for name, module in named:
            if name.rpartition(".")[2] in _ROUTER_NAMES:
                return module
    return None


def _descendants(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        yield child
        yield from _descendants(child)


def _find_top_k(experts: nn.Module, block: nn.Module, model: nn.Module) -> int | None:
    configs = [getattr(module, "config", None) for module in (experts, block, model)]
    configs += [getattr(config, "text_config", None) for config in configs]
    for config in configs:
        for name in _TOP_K_NAMES:
            value = getattr(config, name, None)
            if isinstance(value, list) and value:
                value = max(value)
            if isinstance(value, int) and value > 0:
                return value
    return None


@contextmanager
def silenced_experts(
    sites: Sequence[MoeSite], on_call: Callable[[int, Sequence[Any]], None] | None = None
) -> Iterator[None]:
    """Let the experts of `sites` answer zero inside the block; needs no expert weights.

    Args:
        sites: Whose experts.
        on_call: Told the layer and what its experts were given after the hidden states.
    """

    def answer_zero(layer: int, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if on_call is not None:
            on_call(layer, (*args, *kwargs.values()))
        return torch.zeros_like(hidden_states)

    try:
        for site in sites:
            site.experts.__dict__["forward"] = functools.partial(answer_zero, site.layer)
        yield
    finally:
        for site in sites:
            site.experts.__dict__.pop("forward", None)


def probe_sites(
    model: nn.Module,
    sites: Sequence[MoeSite],
    input_ids: Tensor,
    *,
    extra_inputs: Mapping[str, Any] | None = None,
) -> None:
    """Learn what feeds each router, and fill it in at `sites`.

    Runs one forward without the experts, so it may run before any expert was read. Sites whose
    router wants something that changes with the input (the token ids, another layer's routing)
    stay unpredictable.

    Args:
        model: The model the sites were found in, weights loaded.
        sites: What `discover_sites` gave.
        input_ids: (1, T) a few token ids.
        extra_inputs: What else the forward of this model wants.

    Cost:
        One dense forward of T tokens; keeps the outputs of the norms alive meanwhile.
    """
    probe = _Probe(model)
    with (
        probe.watching(sites),
        silenced_experts(sites, probe.see_experts),
        torch.no_grad(),
    ):
        model(input_ids=input_ids, use_cache=False, **(extra_inputs or {}))
        for site in sites:
            probe.settle(site)


@dataclass(frozen=True, slots=True)
class _RouterCall:
    router_input: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Probe:
    """What one forward showed about the routers."""

    def __init__(self, model: nn.Module) -> None:
        self._owned = {id(t) for t in (*model.parameters(), *model.buffers())}
        # keeping the outputs keeps their addresses from being used again
        self._produced: dict[int, tuple[nn.Module, Tensor]] = {}
        self._calls: dict[int, _RouterCall] = {}
        self._given: dict[int, Routing] = {}

    @contextmanager
    def watching(self, sites: Sequence[MoeSite]) -> Iterator[None]:
        handles = []
        try:
            for site in sites:
                for name, module in site.decoder.named_children():
                    if "norm" in name.lower():
                        handles.append(module.register_forward_hook(self._see_norm))
                if site.router is not None:
                    handles.append(
                        site.router.register_forward_pre_hook(
                            self._router_hook(site.layer), with_kwargs=True
                        )
                    )
            yield
        finally:
            for handle in handles:
                handle.remove()

    def settle(self, site: MoeSite) -> None:
        call = self._calls.get(site.layer)
        if call is None:
            return
        site.norm = None
        producer = self._produced.get(call.router_input.data_ptr())
        if producer is not None and any(producer[0] is m for m in site.decoder.children()):
            site.norm = producer[0]
        site.is_flat = call.router_input.dim() == 2
        site.router_args, site.router_kwargs = call.args, call.kwargs
        site.is_predictable = all(
            self._is_constant(value) for value in (*call.args, *call.kwargs.values())
        )
        if site.is_predictable:
            self._compare(site, call.router_input)

    def see_experts(self, layer: int, given: Sequence[Any]) -> None:
        self._given.setdefault(layer, Routing(*given))

    def _compare(self, site: MoeSite, router_input: Tensor) -> None:
        """See whether the router's answer is what its experts are called with."""
        answer = _ask_router(site, router_input)
        given = self._given.get(site.layer)
        if answer is None or given is None:
            return
        index, weights = given
        if answer.top_k_weights is not None:
            # Weights may be cast on their way; so are those of an answer that is executed.
            own = answer.top_k_weights.to(weights.dtype)
            site.is_routing_whole = torch.equal(answer.top_k_index, index) and torch.equal(
                own, weights
            )
        if answer.logits is not None:
            site.scores = find_scores(answer.logits, index, weights)

    def _see_norm(self, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            self._produced[output.data_ptr()] = (module, output)

    def _router_hook(self, layer: int) -> Any:
        def see_router(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rest = dict(kwargs)
            if args:
                given, args = args[0], args[1:]
            else:
                given = rest.pop("hidden_states", None)
            if isinstance(given, Tensor):
                self._calls.setdefault(layer, _RouterCall(given, args, rest))

        return see_router

    def _is_constant(self, value: Any) -> bool:
        return id(value) in self._owned if isinstance(value, Tensor) else _is_plain(value)


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


@dataclass(frozen=True, slots=True)
class EarlyRouter:
    """A probed site's norm and router, to be asked ahead of time.

    Answers None where the router wants more than a residual stream. Its answer has weights where
    the experts would be called with them, so that they may be executed.

    Cost:
        One norm and one router, 2*T*H*E FLOP; no host sync.
    """

    site: MoeSite

    def __call__(self, residual: Tensor) -> RouterOutput | None:
        """Give the router's answer to a residual stream (T, H), true or guessed."""
        with torch.no_grad():
            return self.route(self.quasi_hidden(residual))

    def quasi_hidden(self, residual: Tensor) -> Tensor:
        """Give what the router would read, (T, H): the normalised stream."""
        norm = self.site.norm
        hidden: Tensor = residual if norm is None else norm(residual)
        return hidden

    def route(self, hidden: Tensor) -> RouterOutput | None:
        """Give the router's answer to its input (T, H); differentiable in the logits."""
        site = self.site
        if not site.is_predictable:
            return None
        answer = _ask_router(site, hidden if site.is_flat else hidden.unsqueeze(0))
        if answer is None or site.is_routing_whole:
            return answer
        return answer._replace(top_k_weights=None)


def router_logits(site: MoeSite, output: Any) -> Tensor | None:
    """Read the logits (T, E) from what a site's router gave; None where it gives none."""
    # The logits come first: with K equal to E the last floats are the weights.
    for value in _tensors(output):
        if value.is_floating_point() and value.shape[-1] == site.num_experts:
            return value.reshape(-1, site.num_experts)
    return None


def _ask_router(site: MoeSite, hidden: Tensor) -> RouterOutput | None:
    if site.router is None:
        return None
    output = site.router(hidden, *site.router_args, **site.router_kwargs)
    return _read_router_output(output, site)


def _tensors(output: Any) -> list[Tensor]:
    given = output if isinstance(output, list | tuple) else (output,)
    return [value for value in given if isinstance(value, Tensor)]


def _read_router_output(output: Any, site: MoeSite) -> RouterOutput | None:
    logits = router_logits(site, output)
    tensors = _tensors(output)
    index = next((t for t in tensors if not t.is_floating_point()), None)
    if index is None:
        # A router that is only a projection; the choice of the largest is made by its block.
        if logits is None or site.top_k is None:
            return None
        weights, index = torch.softmax(logits.float(), -1).topk(site.top_k, -1)
        return RouterOutput(index, weights, logits)
    floats = [t for t in tensors if t.is_floating_point()]
    weights_found = [f for f in floats if f.shape[-1] == index.shape[-1]]
    if not weights_found:
        return None
    index = index.reshape(-1, index.shape[-1])
    return RouterOutput(index, weights_found[-1].reshape(index.shape), logits)
