"""The simplest thing that runs a model's experts from plans: read, compute, forget."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from foreload.types import ExpertPlan, Span


def read_span(span: Span) -> Tensor:
    with open(span.path, "rb") as file:
        file.seek(span.offset)
        data = file.read(span.num_bytes)
    assert len(data) == span.num_bytes
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).clone()


def read_expert(plan: ExpertPlan) -> dict[str, Tensor]:
    spans = [read_span(span) for span in plan.spans]
    if plan.convert is not None:
        return dict(plan.convert(spans))
    result = {}
    for tensor in plan.tensors:
        data = spans[tensor.span][tensor.start : tensor.start + tensor.num_bytes]
        dtype = getattr(torch, tensor.dtype)
        result[tensor.name] = data.clone().view(dtype).view(tensor.shape)
    return result


class StreamedExperts:
    """An experts runner for `attach`, in the arithmetic of transformers' eager experts."""

    def __init__(self, plans: list[list[ExpertPlan]]) -> None:
        self.plans = plans
        self.layers: list[int] = []

    def __call__(
        self, layer: int, experts: Any, hidden: Tensor, index: Tensor, weights: Tensor
    ) -> Tensor:
        self.layers.append(layer)
        output = torch.zeros_like(hidden)
        for expert in index.unique().tolist():
            if expert >= experts.num_experts:
                continue
            position, token = torch.where((index == expert).t())
            one = run_expert(experts, hidden[token], read_expert(self.plans[layer][expert]))
            one = one * weights[token, position, None]
            output.index_add_(0, token, one.to(output.dtype))
        return output


def run_expert(experts: Any, rows: Tensor, parameters: dict[str, Tensor]) -> Tensor:
    up = "gate_up_proj" if experts.has_gate else "up_proj"
    hidden = project(experts, rows, parameters, up)
    hidden = experts._apply_gate(hidden) if experts.has_gate else experts.act_fn(hidden)
    hidden = project(experts, hidden, parameters, "down_proj")
    if getattr(experts, "has_post_expert_norm", False):
        hidden = experts.post_expert_norm(hidden)
    return hidden


def project(experts: Any, rows: Tensor, parameters: dict[str, Tensor], name: str) -> Tensor:
    weight = parameters[name]
    result = rows @ weight if experts.is_transposed else F.linear(rows, weight)
    return result + parameters[f"{name}_bias"] if experts.has_bias else result


def align(model: nn.Module) -> nn.Module:
    """Copy what transformers maps from the file to where torch itself would put it.

    Matrix products of one and the same matrix differ in the last bit with its address modulo 64.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model
