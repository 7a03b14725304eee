"""The demo model's network in a form that trains fast on a CPU: Qwen3-MoE in bfloat16.

Parameters carry the names of transformers' ``Qwen3MoeForCausalLM``, and the arithmetic is the same.
Element-wise work is fused by ``torch.compile``; matrix products go to the library as they are.
"""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROW_MULTIPLE = 64  # rows of an expert are padded to this: few shapes for the matrix kernels
ATTENTION_BLOCK = 128
LOSS_ROWS = 1024
ATTENTION_WEIGHTS = [
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "self_attn.q_norm",
    "self_attn.k_norm",
]


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """Dimensions of the model."""

    vocab: int = 4096
    hidden: int = 256
    layers: int = 8
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    experts: int = 32
    top_k: int = 4
    expert_hidden: int = 128
    context: int = 1024
    rope_theta: float = 10000.0
    eps: float = 1e-6

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every parameter under its name in transformers."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab, self.hidden),
            "model.norm.weight": (self.hidden,),
        }
        for layer in range(self.layers):
            local = {
                "input_layernorm.weight": (self.hidden,),
                "self_attn.q_proj.weight": (query, self.hidden),
                "self_attn.k_proj.weight": (key, self.hidden),
                "self_attn.v_proj.weight": (key, self.hidden),
                "self_attn.o_proj.weight": (self.hidden, query),
                "self_attn.q_norm.weight": (self.head_dim,),
                "self_attn.k_norm.weight": (self.head_dim,),
                "post_attention_layernorm.weight": (self.hidden,),
                "mlp.gate.weight": (self.experts, self.hidden),
                "mlp.experts.gate_up_proj": (self.experts, 2 * self.expert_hidden, self.hidden),
                "mlp.experts.down_proj": (self.experts, self.hidden, self.expert_hidden),
            }
            shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in local.items()}
        return shapes


@dataclasses.dataclass(frozen=True)
class RouterLoss:
    """Weights of the router losses, all averaged over layers.

    Attributes:
        balance: Of the usual load-balancing loss.
        diversity: Of how far the entropy of the batch's mean choice is below its maximum.
        entropy: Of the mean entropy per token, as far as it is above `entropy_target`.
        entropy_target: In nats.
        z: Of the mean squared logsumexp of the router's logits.
    """

    balance: float = 0.02
    diversity: float = 0.01
    entropy: float = 0.02
    entropy_target: float = 1.7
    z: float = 1e-4


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return wide.to(x.dtype) * weight


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def _causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attends block of queries by block of queries, each to the keys up to its end."""
    length, out = q.shape[1], []
    for start in range(0, length, ATTENTION_BLOCK):
        end = min(start + ATTENTION_BLOCK, length)
        scores = torch.bmm(q[:, start:end], k[:, :end].transpose(1, 2)).float()
        rows = torch.arange(start, end, device=q.device)[:, None]
        scores = scores.masked_fill(torch.arange(end, device=q.device) > rows, -1e30)
        out.append(torch.bmm(scores.softmax(-1).to(q.dtype), v[:, :end]))
    return torch.cat(out, 1)


@torch.compile(dynamic=False)
def _attention_block(
    x: Tensor, weights: list[Tensor], cos: Tensor, sin: Tensor, batch: int, dims: tuple[Any, ...]
) -> Tensor:
    """Adds a layer's attention to the residual stream (rows of all sequences, hidden)."""
    norm, wq, wk, wv, wo, q_norm, k_norm = weights
    heads, kv_heads, head_dim, eps = dims
    h = _rms_norm(x, norm, eps)

    def split(y: Tensor, count: int) -> Tensor:
        return y.view(batch, -1, count, head_dim)

    q = _rotate(_rms_norm(split(F.linear(h, wq), heads), q_norm, eps).transpose(1, 2), cos, sin)
    k = _rotate(_rms_norm(split(F.linear(h, wk), kv_heads), k_norm, eps).transpose(1, 2), cos, sin)
    v = split(F.linear(h, wv), kv_heads).transpose(1, 2)
    k, v = (y.repeat_interleave(heads // kv_heads, 1).flatten(0, 1) for y in (k, v))
    out = _causal_attention((q * head_dim**-0.5).flatten(0, 1), k, v)
    out = out.view(batch, heads, -1, head_dim).transpose(1, 2).reshape(x.shape[0], -1)
    return x + F.linear(out, wo)


@torch.compile(dynamic=False)
def _router_block(
    x: Tensor, norm: Tensor, gate: Tensor, top_k: int, eps: float
) -> tuple[Tensor, ...]:
    """Normalizes the stream and chooses experts.

    Returns:
        The normalized stream, weights and ids of the chosen experts, and the router's measures: its
        mean entropy per token, the entropy of its mean, the balance loss, the mean squared
        logsumexp and the load of every expert relative to the mean.
    """
    h = _rms_norm(x, norm, eps)
    logits = F.linear(h, gate).float()
    log_probs = logits.log_softmax(-1)
    probs = log_probs.exp()
    weights, chosen = probs.topk(top_k, -1)
    weights = weights / weights.sum(-1, keepdim=True)
    experts = gate.shape[0]
    load = F.one_hot(chosen, experts).sum((0, 1)).float() * (experts / chosen.numel())
    mean = probs.mean(0)
    per_token = -(probs * log_probs).sum(-1).mean()
    of_mean = -(mean * (mean + 1e-9).log()).sum()
    balance = (load.detach() * mean).sum()
    z = logits.logsumexp(-1).pow(2).mean()
    return h, weights.to(x.dtype), chosen, per_token, of_mean, balance, z, load.detach()


@torch.compile(dynamic=True)  # the number of rows varies
def _swiglu(h: Tensor) -> Tensor:
    gate, up = h.float().chunk(2, -1)
    return (F.silu(gate) * up).to(h.dtype)


@torch.compile(dynamic=True)  # the number of rows varies
def _swiglu_backward(grad: Tensor, h: Tensor) -> Tensor:
    gate, up = h.float().chunk(2, -1)
    grad = grad.float()
    sigmoid = gate.sigmoid()
    d_gate = grad * up * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat([d_gate, grad * gate * sigmoid], -1).to(h.dtype)


@torch.compile(dynamic=True)  # the number of rows varies
def _weighted_sum(parts: Tensor, weights: Tensor) -> Tensor:
    return (parts.float() * weights.float().unsqueeze(-1)).sum(1).to(parts.dtype)


@torch.compile(dynamic=True)  # the number of rows varies
def _weighted_sum_backward(grad: Tensor, parts: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    wide = grad.float()
    d_weights = (wide * parts.float()).sum(-1).to(weights.dtype)
    return d_weights, (wide * weights.float().unsqueeze(-1)).to(grad.dtype)


class _Experts(torch.autograd.Function):
    """The feed-forward experts, each applied to the rows routed to it; no row is dropped.

    Rows are sorted by expert, and every expert's run is padded to a multiple of ROW_MULTIPLE by
    rows of weight zero.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, chosen: Tensor, gate_up: Tensor, down: Tensor
    ) -> Tensor:
        rows, top_k = chosen.shape
        flat = chosen.reshape(-1)
        order = torch.argsort(flat)
        counts = torch.bincount(flat, minlength=gate_up.shape[0])
        padded = (counts + ROW_MULTIPLE - 1) // ROW_MULTIPLE * ROW_MULTIPLE
        shift = (padded.cumsum(0) - padded) - (counts.cumsum(0) - counts)
        ends = padded.cumsum(0).tolist()
        slots = torch.arange(rows * top_k, device=x.device) + shift[flat[order]]
        row_of_slot = torch.zeros(ends[-1], dtype=torch.long, device=x.device)
        row_of_slot[slots] = order // top_k
        slot_weights = weights.new_zeros(ends[-1])
        slot_weights[slots] = weights.reshape(-1)[order]
        slot_of_pair = torch.empty_like(order)
        slot_of_pair[order] = slots

        spans = [(e, a, b) for e, (a, b) in enumerate(pairwise([0, *ends])) if b > a]
        xs = x.index_select(0, row_of_slot)
        h = x.new_empty(ends[-1], gate_up.shape[1])
        y = torch.empty_like(xs)
        for e, a, b in spans:
            torch.mm(xs[a:b], gate_up[e].t(), out=h[a:b])
        act = _swiglu(h)
        for e, a, b in spans:
            torch.mm(act[a:b], down[e].t(), out=y[a:b])
        ctx.save_for_backward(xs, h, act, y, row_of_slot, slot_weights, slot_of_pair, gate_up, down)
        ctx.spans, ctx.pairs = spans, (rows, top_k)
        return _weighted_sum(y.index_select(0, slot_of_pair).view(rows, top_k, -1), weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        xs, h, act, y, row_of_slot, slot_weights, slot_of_pair, gate_up, down = ctx.saved_tensors
        d_weights, dy = _weighted_sum_backward(grad.index_select(0, row_of_slot), y, slot_weights)
        d_act, dxs = torch.empty_like(act), torch.empty_like(xs)
        d_gate_up, d_down = torch.zeros_like(gate_up), torch.zeros_like(down)
        for e, a, b in ctx.spans:
            torch.mm(dy[a:b], down[e], out=d_act[a:b])
            torch.mm(dy[a:b].t(), act[a:b], out=d_down[e])
        dh = _swiglu_backward(d_act, h)
        for e, a, b in ctx.spans:
            torch.mm(dh[a:b], gate_up[e], out=dxs[a:b])
            torch.mm(dh[a:b].t(), xs[a:b], out=d_gate_up[e])
        dx = dxs.index_select(0, slot_of_pair).view(*ctx.pairs, -1)
        dx = _weighted_sum(dx, torch.ones(ctx.pairs, dtype=dx.dtype, device=dx.device))
        d_weights = d_weights.index_select(0, slot_of_pair).view(ctx.pairs)
        return dx, d_weights, None, d_gate_up, d_down


@torch.compile(dynamic=False)
def _loss_sum(x: Tensor, norm: Tensor, head: Tensor, targets: Tensor, eps: float) -> Tensor:
    logits = F.linear(_rms_norm(x, norm, eps), head)
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def rotary_tables(shape: ModelShape, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns the cosines and sines of the rotary embedding, (length, head_dim) in bfloat16."""
    exponent = torch.arange(0, shape.head_dim, 2).float() / shape.head_dim
    angles = torch.outer(torch.arange(length).float(), shape.rope_theta**-exponent).repeat(1, 2)
    return angles.cos().to(device, torch.bfloat16), angles.sin().to(device, torch.bfloat16)


def forward(
    shape: ModelShape,
    router: RouterLoss,
    weights: dict[str, Tensor],
    ids: Tensor,
    targets: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs the model.

    Args:
        shape: Dimensions.
        router: Weights of the router losses.
        weights: Parameters under their names in transformers.
        ids: Token ids, (sequences, length).
        targets: The ids one position later.

    Returns:
        The mean loss, the router loss and the routers' measures, per layer: mean entropy per token,
        entropy of the mean, then the relative load of every expert.
    """
    batch, length = ids.shape
    cos, sin = rotary_tables(shape, length, ids.device)
    dims = (shape.heads, shape.kv_heads, shape.head_dim, shape.eps)
    x = F.embedding(ids, weights["model.embed_tokens.weight"]).flatten(0, 1)
    router_loss = torch.zeros((), device=x.device)
    measures = []
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        own = [weights[f"{prefix}{name}.weight"] for name in ATTENTION_WEIGHTS]
        x = _attention_block(x, own, cos, sin, batch, dims)
        norm = weights[prefix + "post_attention_layernorm.weight"]
        gate = weights[prefix + "mlp.gate.weight"]
        h, mix, chosen, entropy, mean_entropy, balance, z, load = _router_block(
            x, norm, gate, shape.top_k, shape.eps
        )
        router_loss = (
            router_loss
            + router.entropy * F.relu(entropy - router.entropy_target)
            + router.diversity * (math.log(shape.experts) - mean_entropy)
            + router.balance * balance
            + router.z * z
        )
        measures.append(torch.cat([torch.stack([entropy, mean_entropy]).detach(), load]))
        experts = [weights[f"{prefix}mlp.experts.{name}"] for name in ("gate_up_proj", "down_proj")]
        x = x + _Experts.apply(h, mix, chosen, *experts)
    norm, head = weights["model.norm.weight"], weights["model.embed_tokens.weight"]
    flat = targets.flatten()
    loss = torch.zeros((), device=x.device)
    for start in range(0, len(flat), LOSS_ROWS):
        part = slice(start, start + LOSS_ROWS)
        loss = loss + _loss_sum(x[part], norm, head, flat[part], shape.eps)
    return loss / len(flat), router_loss / shape.layers, torch.stack(measures)
