"""Trains the demo model that ships inside the package.

A small Qwen3-MoE language model of Python source (8 layers, 32 experts, 4 of them per token) is
trained from scratch on the standard library of the running interpreter::

    python examples/train_demo_model.py --minutes 80 --out src/foreload/demo

On a CPU two processes of one thread each share the weights; on CUDA one process does it all.
Weights and gradients are bfloat16, the optimizer keeps float32 masters.  Matrices are optimized by
Muon, the rest by AdamW; the learning rate follows the wall clock, so that a shared machine changes
how much is learned but not when the run ends.  An interrupted run goes on with ``--resume``.

The routers are trained to be decisive: besides the usual load-balancing loss, the mutual
information of token and expert is raised (the entropy of the choice per token is pushed down, the
entropy of the choice averaged over tokens up).
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import math
import os
import shutil
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import demo_corpus
import numpy as np
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

ROW_MULTIPLE = 64  # rows of an expert are padded to this: few shapes for the matrix kernels
ATTENTION_BLOCK = 128
LOSS_ROWS = 1024


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
class Recipe:
    """Everything about the optimization that is not a dimension of the model."""

    batch_tokens: int = 8192
    short: int = 512
    long_from: float = 0.7  # share of the run after which sequences have the full context
    warmup_steps: int = 60
    decay_from: float = 0.5
    muon_lr: float = 0.02
    adam_lr: float = 3e-3
    router_lr: float = 4e-3
    weight_decay: float = 0.1
    balance_weight: float = 0.02
    diversity_weight: float = 0.01
    entropy_weight: float = 0.02
    entropy_target: float = 1.7
    z_weight: float = 1e-4
    seed: int = 0


# --- model --------------------------------------------------------------------------------------


def _fused(function):
    """Compiles a function of fixed shapes, unless FORELOAD_EAGER is set."""
    return function if os.environ.get("FORELOAD_EAGER") else torch.compile(function, dynamic=False)


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


@_fused
def _attention_block(
    x: Tensor, weights: list[Tensor], cos: Tensor, sin: Tensor, batch: int, dims: tuple
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


@_fused
def _router_block(x: Tensor, norm: Tensor, gate: Tensor, top_k: int, eps: float):
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


def _swiglu(h: Tensor) -> Tensor:
    gate, up = h.float().chunk(2, -1)
    return (F.silu(gate) * up).to(h.dtype)


def _swiglu_backward(grad: Tensor, h: Tensor) -> Tensor:
    gate, up = h.float().chunk(2, -1)
    grad = grad.float()
    sigmoid = gate.sigmoid()
    d_gate = grad * up * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat([d_gate, grad * gate * sigmoid], -1).to(h.dtype)


def _weighted_sum(parts: Tensor, weights: Tensor) -> Tensor:
    return (parts.float() * weights.float().unsqueeze(-1)).sum(1).to(parts.dtype)


def _weighted_sum_backward(grad: Tensor, parts: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    wide = grad.float()
    d_weights = (wide * parts.float()).sum(-1).to(weights.dtype)
    return d_weights, (wide * weights.float().unsqueeze(-1)).to(grad.dtype)


if not os.environ.get("FORELOAD_EAGER"):  # the number of rows varies here
    _swiglu = torch.compile(_swiglu, dynamic=True)
    _swiglu_backward = torch.compile(_swiglu_backward, dynamic=True)
    _weighted_sum = torch.compile(_weighted_sum, dynamic=True)
    _weighted_sum_backward = torch.compile(_weighted_sum_backward, dynamic=True)


class _Experts(torch.autograd.Function):
    """The feed-forward experts, each applied to the rows routed to it; no row is dropped.

    Rows are sorted by expert, and every expert's run is padded to a multiple of ROW_MULTIPLE by
    rows of weight zero.
    """

    @staticmethod
    def forward(ctx, x, weights, chosen, gate_up, down):
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

        spans = [(e, a, b) for e, (a, b) in enumerate(zip([0, *ends], ends)) if b > a]
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
    def backward(ctx, grad):
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


@_fused
def _loss_sum(x: Tensor, norm: Tensor, head: Tensor, targets: Tensor, eps: float) -> Tensor:
    logits = F.linear(_rms_norm(x, norm, eps), head)
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def rotary_tables(shape: ModelShape, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns the cosines and sines of the rotary embedding, (length, head_dim) in bfloat16."""
    exponent = torch.arange(0, shape.head_dim, 2).float() / shape.head_dim
    angles = torch.outer(torch.arange(length).float(), shape.rope_theta**-exponent).repeat(1, 2)
    return angles.cos().to(device, torch.bfloat16), angles.sin().to(device, torch.bfloat16)


def forward(
    shape: ModelShape, recipe: Recipe, weights: dict[str, Tensor], ids: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs the model.

    Args:
        shape: Dimensions.
        recipe: Weights of the router losses.
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
    attention = "input_layernorm|self_attn.q_proj|self_attn.k_proj|self_attn.v_proj|" \
        "self_attn.o_proj|self_attn.q_norm|self_attn.k_norm".split("|")
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        own = [weights[f"{prefix}{name}.weight"] for name in attention]
        x = _attention_block(x, own, cos, sin, batch, dims)
        norm = weights[prefix + "post_attention_layernorm.weight"]
        gate = weights[prefix + "mlp.gate.weight"]
        h, mix, chosen, entropy, mean_entropy, balance, z, load = _router_block(
            x, norm, gate, shape.top_k, shape.eps
        )
        router_loss = (
            router_loss
            + recipe.entropy_weight * F.relu(entropy - recipe.entropy_target)
            + recipe.diversity_weight * (math.log(shape.experts) - mean_entropy)
            + recipe.balance_weight * balance
            + recipe.z_weight * z
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


# --- optimization -------------------------------------------------------------------------------


@_fused
def _momentum(grads: list[Tensor], state: Tensor) -> Tensor:
    """Averages the processes' gradients into the momentum; returns the Nesterov direction."""
    grad = sum(g.float() for g in grads) / len(grads)
    state.mul_(0.95).add_(grad * 0.05)
    return (grad * 0.05 + state * 0.95).bfloat16()


@_fused
def _step(master: Tensor, weight: Tensor, update: Tensor, keep: Tensor, scale: Tensor) -> None:
    master.mul_(keep).add_(update.float() * scale)
    weight.copy_(master)


def _orthogonalized(update: Tensor) -> Tensor:
    """Replaces the singular values of matrices (batch, rows, columns) by about one."""
    tall = update.shape[-2] > update.shape[-1]
    x = update.mT if tall else update
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(a, a, a, beta=-4.775, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x


def _is_muon(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) > 1 and "embed" not in name and "gate.weight" not in name


class Optimizer:
    """Updates the share of the parameters that one process owns.

    Args:
        shape: Dimensions of the model.
        recipe: Learning rates and weight decay.
        weights: Views of the bfloat16 weights.
        grads: Views of every process's gradients.
        rank: This process.
    """

    def __init__(
        self,
        shape: ModelShape,
        recipe: Recipe,
        weights: dict[str, Tensor],
        grads: list[dict[str, Tensor]],
        rank: int,
    ) -> None:
        self._recipe, self._weights, self._grads = recipe, weights, grads
        self._expert_hidden = shape.expert_hidden
        cost = {n: w.numel() * (6 if _is_muon(n, w.shape) else 1) for n, w in weights.items()}
        load = [0] * len(grads)
        self._state: dict[str, list[Tensor]] = {}
        for name in sorted(cost, key=lambda n: -cost[n]):
            owner = load.index(min(load))
            load[owner] += cost[name]
            if owner == rank:
                master = weights[name].float()
                moments = 1 if _is_muon(name, master.shape) else 2
                self._state[name] = [master] + [torch.zeros_like(master) for _ in range(moments)]

    def state(self) -> dict[str, list[Tensor]]:
        """Returns masters and moments by parameter."""
        return self._state

    def load(self, state: dict[str, list[Tensor]]) -> None:
        """Takes over saved masters and moments."""
        for name, tensors in self._state.items():
            for mine, saved in zip(tensors, state[name], strict=True):
                mine.copy_(saved)
            self._weights[name].copy_(tensors[0])

    @torch.no_grad()
    def step(self, step: int, lr_factor: float) -> None:
        """Applies the gradients.

        Args:
            step: Steps done before this one.
            lr_factor: Factor on every learning rate.
        """
        recipe = self._recipe
        for name, (master, *moments) in self._state.items():
            grads = [g[name] for g in self._grads]
            if _is_muon(name, master.shape):
                update = _momentum(grads, moments[0])
                rows = self._expert_hidden if "gate_up" in name else update.shape[-2]
                update = _orthogonalized(update.view(-1, rows, update.shape[-1]))
                scale = max(1.0, update.shape[-2] / update.shape[-1]) ** 0.5
                lr, update = recipe.muon_lr * lr_factor, update.reshape(master.shape)
            else:
                grad = sum(g.float() for g in grads) / len(grads)
                grad = grad / max(1.0, float(grad.norm()))
                mean, square = moments
                mean.lerp_(grad, 0.1)
                square.lerp_(grad * grad, 0.05)
                root = (square / (1 - 0.95 ** (step + 1))).sqrt() + 1e-10
                update = mean / (1 - 0.9 ** (step + 1)) / root
                lr = (recipe.router_lr if "gate.weight" in name else recipe.adam_lr) * lr_factor
                scale = 1.0
            decay = 0.0 if "norm" in name else lr * recipe.weight_decay
            keep, factor = torch.tensor(1 - decay), torch.tensor(-lr * scale)
            _step(master, self._weights[name], update, keep, factor)


def initial_weights(shape: ModelShape, recipe: Recipe) -> dict[str, Tensor]:
    """Draws the parameters.

    Args:
        shape: Dimensions.
        recipe: Its seed is used.

    Returns:
        Parameters by name, float32.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    weights = {}
    for name, size in shape.parameters().items():
        if "norm" in name:
            weights[name] = torch.ones(size)
            continue
        std = 0.02 if "embed" in name else size[-1] ** -0.5
        if name.endswith(("o_proj.weight", "down_proj")):
            std /= math.sqrt(2 * shape.layers)
        weights[name] = torch.randn(size, generator=generator) * std
    return weights


def _views(shape: ModelShape, flat: Tensor) -> dict[str, Tensor]:
    """Cuts one buffer into the parameters."""
    views, offset = {}, 0
    for name, size in shape.parameters().items():
        views[name] = flat[offset : offset + math.prod(size)].view(size)
        offset += math.prod(size)
    return views


class Sampler:
    """Cuts the token stream into sequences, in a new order and at a new offset every epoch.

    Args:
        stream: The tokens.
        seed: Seed of the orders.
    """

    def __init__(self, stream: np.ndarray, seed: int) -> None:
        self._stream, self._seed = stream, seed
        self._epoch, self._cursor, self._length = -1, 0, 0
        self._starts = np.empty(0, np.int64)

    def state(self) -> tuple[int, int, int]:
        """Returns what `load` needs to go on from here."""
        return self._epoch, self._cursor, self._length

    def load(self, state: tuple[int, int, int]) -> None:
        """Goes on from a saved state."""
        self._shuffle(state[0], state[2])
        self._cursor = state[1]

    def _shuffle(self, epoch: int, length: int) -> None:
        rng = np.random.default_rng((self._seed, epoch, length))
        offset = int(rng.integers(length))
        starts = np.arange(offset, len(self._stream) - length, length)
        self._starts = rng.permutation(starts)
        self._epoch, self._cursor, self._length = epoch, 0, length

    def next(self, count: int, length: int) -> np.ndarray:
        """Returns the next sequences.

        Args:
            count: Number of sequences.
            length: Tokens of each.

        Returns:
            Token ids, (count, length + 1): inputs and, one later, targets.
        """
        if length != self._length or self._cursor + count > len(self._starts):
            self._shuffle(self._epoch + 1, length)
        starts = self._starts[self._cursor : self._cursor + count]
        self._cursor += count
        return np.stack([self._stream[s : s + length + 1] for s in starts]).astype(np.int64)


def lr_factor(recipe: Recipe, step: int, progress: float) -> float:
    """Returns the factor on the learning rates: warm-up by steps, linear decay by time."""
    decay = 1.0
    if progress > recipe.decay_from:
        decay = max(0.0, (1 - progress) / (1 - recipe.decay_from))
    return min(1.0, (step + 1) / recipe.warmup_steps) * max(decay, 0.01)


@dataclasses.dataclass(frozen=True)
class Job:
    """What a training process is told.

    Attributes:
        shape: Dimensions of the model.
        recipe: The optimization.
        work: Directory of the token streams, the log and the checkpoints.
        world: Number of processes.
        device: Where to compute.
        seconds: Wall time to spend, the time before an interruption included.
        checkpoint_every: Seconds between checkpoints and between held-out measurements.
        resume: Whether to go on from the last checkpoint.
    """

    shape: ModelShape
    recipe: Recipe
    work: Path
    world: int
    device: str
    seconds: float
    checkpoint_every: float
    resume: bool


def held_out_loss(job: Job, weights: dict[str, Tensor], rank: int) -> float:
    """Measures this process's share of a fixed sample of held-out sequences."""
    stream = np.fromfile(job.work / "held_out.bin", np.uint16).astype(np.int64)
    length, count = job.recipe.short, job.recipe.batch_tokens // job.recipe.short // job.world
    groups = 4
    starts = np.linspace(0, len(stream) - length - 1, groups * count * job.world).astype(int)
    total = 0.0
    for group in np.split(starts[rank :: job.world], groups):
        cut = np.stack([stream[s : s + length + 1] for s in group])
        ids = torch.from_numpy(cut).to(job.device)
        with torch.no_grad():
            total += float(forward(job.shape, job.recipe, weights, ids[:, :-1], ids[:, 1:])[0])
    return total / groups


def _train_process(rank: int, job: Job, flat: Tensor, flat_grads: list[Tensor], board: Tensor, gate):
    """One training process; `board` holds elapsed seconds, then losses, then held-out losses."""
    torch.set_num_threads(1 if job.world > 1 else torch.get_num_threads())
    shape, recipe, world = job.shape, job.recipe, job.world
    weights = _views(shape, flat)
    grads = [_views(shape, g) for g in flat_grads]
    leaves = {name: torch.nn.Parameter(w) for name, w in weights.items()}
    for name, leaf in leaves.items():
        leaf.grad = grads[rank][name]
    optimizer = Optimizer(shape, recipe, weights, grads, rank)
    sampler = Sampler(np.memmap(job.work / "train.bin", np.uint16, "r"), recipe.seed)
    step, tokens, elapsed = 0, 0, 0.0
    last = job.work / "last.txt"
    if job.resume and last.exists():
        saved = torch.load(job.work / last.read_text() / f"{rank}.pt", weights_only=True)
        optimizer.load(saved["optimizer"])
        sampler.load(saved["sampler"])
        step, tokens, elapsed = saved["step"], saved["tokens"], saved["elapsed"]
        gate.wait()
    began, checkpointed = time.monotonic() - elapsed, elapsed
    log = Log(job, append=step > 0) if rank == 0 else None
    while elapsed < job.seconds:
        progress = elapsed / job.seconds
        length = recipe.short if progress < recipe.long_from else shape.context
        sequences = recipe.batch_tokens // length
        batch = torch.from_numpy(sampler.next(sequences, length)[rank::world]).to(job.device)
        flat_grads[rank].zero_()
        loss, router_loss, measures = forward(
            shape, recipe, leaves, batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
        )
        (loss + router_loss).backward()
        board[1 + rank] = float(loss.detach())
        if rank == 0:
            board[0] = time.monotonic() - began
        gate.wait()
        elapsed, train_loss = float(board[0]), float(board[1 : 1 + world].mean())
        optimizer.step(step, lr_factor(recipe, step, elapsed / job.seconds))
        gate.wait()
        step, tokens = step + 1, tokens + sequences * length
        due = elapsed - checkpointed > job.checkpoint_every or elapsed >= job.seconds
        if due:
            board[1 + world + rank] = held_out_loss(job, weights, rank)
            checkpointed = elapsed
            saved = {"optimizer": optimizer.state(), "sampler": sampler.state()}
            saved |= {"step": step, "tokens": tokens, "elapsed": elapsed}
            folder = job.work / f"checkpoint-{step}"
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(saved, folder / f"{rank}.pt")
            gate.wait()
            if rank == 0:
                previous = last.read_text() if last.exists() else ""
                last.write_text(folder.name)
                if previous and previous != folder.name:
                    shutil.rmtree(job.work / previous, ignore_errors=True)
        if log:
            held_out = float(board[1 + world : 1 + 2 * world].mean()) if due else None
            log.add(step, elapsed, tokens, train_loss, held_out, measures)


class Log:
    """Writes training_log.csv, a row every 50 steps and at every held-out measurement."""

    COLUMNS = "step seconds tokens train_loss held_out_loss router_entropy imbalance".split()

    def __init__(self, job: Job, append: bool) -> None:
        self._path, self._smooth = job.work / "training_log.csv", 0.0
        if not append:
            self._path.write_text(",".join(self.COLUMNS) + "\n")

    def add(
        self,
        step: int,
        seconds: float,
        tokens: int,
        loss: float,
        held_out: float | None,
        measures: Tensor,
    ) -> None:
        """Takes note of a step."""
        self._smooth = self._smooth + 0.04 * (loss - self._smooth) if self._smooth else loss
        if step % 50 and held_out is None:
            return
        entropy, load = measures[:, 0].mean(), measures[:, 2:].amax(1).mean()
        held = "" if held_out is None else f"{held_out:.4f}"
        row = [step, round(seconds), tokens, f"{self._smooth:.4f}", held]
        with self._path.open("a", newline="") as file:
            csv.writer(file).writerow([*row, f"{entropy:.3f}", f"{load:.2f}"])


def train(job: Job) -> None:
    """Trains; the result is the last checkpoint in the work directory.

    Args:
        job: What to do.
    """
    size = sum(math.prod(s) for s in job.shape.parameters().values())
    buffers = [torch.zeros(size, dtype=torch.bfloat16, device=job.device)]
    buffers += [torch.zeros_like(buffers[0]) for _ in range(job.world)]
    board = torch.zeros(1 + 2 * job.world, dtype=torch.float64)
    start = initial_weights(job.shape, job.recipe)
    for name, view in _views(job.shape, buffers[0]).items():
        view.copy_(start[name])
    if job.world == 1:
        return _train_process(0, job, buffers[0], buffers[1:], board, _NoGate())
    context = mp.get_context("spawn")
    for tensor in [*buffers, board]:
        tensor.share_memory_()
    arguments = (job, buffers[0], buffers[1:], board, context.Barrier(job.world))
    mp.spawn(_train_process, arguments, nprocs=job.world)


class _NoGate:
    """Stands in for a barrier when there is one process."""

    def wait(self) -> None:
        """Returns at once."""


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=80.0)
    parser.add_argument("--work", type=Path, default=Path("build/train"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    work = args.work
    work.mkdir(parents=True, exist_ok=True)
    corpus = demo_corpus.collect()
    tk = demo_corpus.train_tokenizer((d.text for d in corpus.train), 4096)
    tk.save(str(work / "tokenizer.json"))
    a = demo_corpus.encode(tk, corpus.train); a.tofile(work / "train.bin")
    b = demo_corpus.encode(tk, corpus.held_out); b.tofile(work / "held_out.bin")
    print(len(corpus.train), len(a), len(corpus.held_out), len(b), sum(len(d.text) for d in corpus.train)/len(a), flush=True)
    cuda = torch.cuda.is_available()
    recipe = Recipe()
    train(Job(ModelShape(), recipe, work, 1 if cuda else 2, "cuda" if cuda else "cpu", args.minutes * 60, float(os.environ.get('CK', 300)), args.resume))


if __name__ == "__main__":
    main()
