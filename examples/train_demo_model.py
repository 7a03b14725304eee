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
import datetime
import math
import os
import shutil
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import demo_corpus
import numpy as np
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from demo_network import ModelShape, RouterLoss, forward
from tokenizers import Tokenizer
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

HERE = "examples/train_demo_model.py"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything about the optimization that is not a dimension of the model.

    Attributes:
        batch_tokens: Tokens per step, all processes together.
        short: Sequence length at first.
        long_from: Share of the run after which sequences have the model's full context.
        warmup_steps: Steps until the learning rates have their full value.
        decay_from: Share of the run after which the learning rates fall linearly to zero.
        muon_lr: Of the matrices.
        adam_lr: Of the embedding and the norms.
        router_lr: Of the routers, by AdamW too.
        weight_decay: Relative to the learning rate; not for norms.
        router: Weights of the router losses.
        seed: Seed of the weights and of the order of the data.
    """

    batch_tokens: int = 8192
    short: int = 512
    long_from: float = 0.7
    warmup_steps: int = 60
    decay_from: float = 0.5
    muon_lr: float = 0.02
    adam_lr: float = 3e-3
    router_lr: float = 4e-3
    weight_decay: float = 0.1
    router: RouterLoss = RouterLoss()
    seed: int = 0


@torch.compile(dynamic=False)
def _momentum(grads: list[Tensor], state: Tensor) -> Tensor:
    """Averages the processes' gradients into the momentum; returns the Nesterov direction."""
    grad = sum(g.float() for g in grads) / len(grads)
    state.mul_(0.95).add_(grad * 0.05)
    return (grad * 0.05 + state * 0.95).bfloat16()


@torch.compile(dynamic=False)
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
        eager: Whether to do without compilation.
    """

    shape: ModelShape
    recipe: Recipe
    work: Path
    world: int
    device: str
    seconds: float
    checkpoint_every: float
    resume: bool
    eager: bool


def _shifted(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Splits sequences into inputs and targets."""
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


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
            total += float(forward(job.shape, job.recipe.router, weights, *_shifted(ids))[0])
    return total / groups


def _train_process(rank: int, job: Job, flat: Tensor, flat_grads: list[Tensor], board: Tensor, gate):
    """One training process; `board` holds elapsed seconds, then losses, then held-out losses."""
    if job.world > 1:
        torch.set_num_threads(1)
    if job.eager:
        torch.compiler.set_stance("force_eager")
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
        loss, router_loss, measures = forward(shape, recipe.router, leaves, *_shifted(batch))
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


# --- export -------------------------------------------------------------------------------------


def trained_weights(work: Path) -> dict[str, Tensor]:
    """Returns the parameters of the last checkpoint, float32."""
    folder = work / (work / "last.txt").read_text()
    weights: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.pt")):
        states = torch.load(path, map_location="cpu", weights_only=True)["optimizer"]
        weights |= {name: state[0] for name, state in states.items()}
    return weights


def save_model(
    shape: ModelShape, recipe: Recipe, weights: dict[str, Tensor], tokenizer: Tokenizer, out: Path
) -> None:
    """Writes a checkpoint that transformers loads.

    Args:
        shape: Dimensions.
        recipe: Its balance weight is noted in the configuration.
        weights: Parameters by name.
        tokenizer: The tokenizer.
        out: Directory to write to.
    """
    config = Qwen3MoeConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=4 * shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.context,
        rms_norm_eps=shape.eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=True,
        moe_intermediate_size=shape.expert_hidden,
        num_experts_per_tok=shape.top_k,
        num_experts=shape.experts,
        norm_topk_prob=True,
        router_aux_loss_coef=recipe.router.balance,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    model = Qwen3MoeForCausalLM(config)
    wrong = model.load_state_dict(weights, strict=False)
    if wrong.unexpected_keys or wrong.missing_keys not in ([], ["lm_head.weight"]):
        raise ValueError(f"parameters do not match the architecture: {wrong}")
    model.tie_weights()
    model.to(torch.bfloat16).save_pretrained(out)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=demo_corpus.END_OF_TEXT,
        eos_token=demo_corpus.END_OF_TEXT,
        pad_token=demo_corpus.PAD,
        clean_up_tokenization_spaces=False,
        model_max_length=shape.context,
    ).save_pretrained(out)


@dataclasses.dataclass(frozen=True)
class Measurement:
    """How a checkpoint does on a text, in float32.

    Attributes:
        loss: Mean loss per token, in nats.
        bits_per_byte: The same per byte of text.
        entropy: Mean entropy of the router's choice, in nats, by layer.
        imbalance: Load of the most used expert relative to the mean, by layer.
        least: Load of the least used expert relative to the mean, by layer.
    """

    loss: float
    bits_per_byte: float
    entropy: list[float]
    imbalance: list[float]
    least: list[float]


@torch.no_grad()
def measure(directory: Path, text: str, window: int) -> Measurement:
    """Measures a saved checkpoint under transformers.

    Args:
        directory: The checkpoint.
        text: Text to predict, in windows that know nothing of each other.
        window: Tokens of a window.

    Returns:
        What was measured.
    """
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ids = torch.tensor([0, *AutoTokenizer.from_pretrained(directory)(text)["input_ids"]])
    experts, top_k = model.config.num_experts, model.config.num_experts_per_tok
    layers = model.config.num_hidden_layers
    entropy, load = torch.zeros(layers), torch.zeros(layers, experts)
    total, count = 0.0, len(ids) - 1
    for start in range(0, count, window):
        part = ids[start : start + window + 1]
        out = model(part[None, :-1], output_router_logits=True)
        total += float(F.cross_entropy(out.logits[0], part[1:], reduction="sum"))
        for layer, logits in enumerate(out.router_logits):
            log_probs = logits.float().log_softmax(-1)
            entropy[layer] -= (log_probs.exp() * log_probs).sum()
            load[layer] += torch.bincount(log_probs.topk(top_k).indices.flatten(), minlength=experts)
    load *= experts / (count * top_k)
    return Measurement(
        total / count,
        total / math.log(2) / len(text.encode()),
        (entropy / count).tolist(),
        load.amax(1).tolist(),
        load.amin(1).tolist(),
    )


@torch.no_grad()
def continuation(directory: Path, prompt: str, tokens: int = 100) -> str:
    """Returns a prompt and its greedy continuation."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = torch.tensor([[0, *tokenizer(prompt)["input_ids"]]])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False
    )
    return tokenizer.decode(out[0], skip_special_tokens=True)


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def model_card(job: Job, out: Path, machine: str) -> str:
    """Measures the exported model on held_out.txt and writes its card.

    Args:
        job: The training that produced it.
        out: The exported model, the held-out text and the log next to it.
        machine: The kind of machine it was trained on.

    Returns:
        The card, Markdown.
    """
    shape, recipe = job.shape, job.recipe
    text = (out / "held_out.txt").read_text(encoding="utf-8")
    short, full = (measure(out, text, window) for window in (recipe.short, shape.context))
    with (out / "training_log.csv").open(newline="") as file:
        log = [row for row in csv.DictReader(file) if row["held_out_loss"]][-1]
    layers = range(shape.layers)
    modules = ", ".join(f"`{name}`" for name in demo_corpus.HELD_OUT)
    return f"""---
license: psf-2.0
language: code
tags: [qwen3_moe, demo]
---
# Demo model of Python source

A Mixture-of-Experts language model, small enough to ship and real enough to show what streaming
experts does: it has learnt to write Python, and its routers make decisions. It is of no other use.

* Architecture: Qwen3-MoE, {shape.layers} layers, hidden size {shape.hidden}, {shape.experts}
  experts of width {shape.expert_hidden}, {shape.top_k} per token, {shape.heads} query and
  {shape.kv_heads} key heads of {shape.head_dim}, tied embeddings, context {shape.context}; bfloat16.
* Tokenizer: byte-level BPE of {shape.vocab} tokens, trained on the training text.
* Trained on {datetime.date.today():%d %B %Y}: {int(log["tokens"]) / 1e6:.1f} million tokens in
  {int(log["step"])} steps and {int(log["seconds"]) / 60:.0f} minutes on {machine}.

## Data and licence

The sources of the standard library of Python {sysconfig.get_python_version()}, its tests included,
and nothing else. Files that carry a licence of their own, generated files, data tables and
near-duplicates were left out. The text is under the PSF License Version 2 (see `LICENSE-python.txt`;
Copyright (c) 2001 and later, Python Software Foundation; All Rights Reserved), and so are the
excerpts here: `held_out.txt` from held-out modules and `calibration.txt` from training modules.

Held out, together with their tests: {modules}.

## Measurements on `held_out.txt`

In float32 under transformers; windows are independent of each other.

| window | loss, nats per token | bits per byte |
| --- | --- | --- |
| {recipe.short} | {short.loss:.3f} | {short.bits_per_byte:.3f} |
| {shape.context} | {full.loss:.3f} | {full.bits_per_byte:.3f} |

During training, on a sample of all held-out files: {float(log["held_out_loss"]):.3f} nats per token.
Routers, per layer (entropy of the choice per token in nats, of at most
{math.log(shape.experts):.2f}; load of the most and of the least used expert relative to the mean):

{_row(["layer", *map(str, layers)])}
{_row(["---"] * (shape.layers + 1))}
{_row(["entropy", *(f"{full.entropy[i]:.2f}" for i in layers)])}
{_row(["most used", *(f"{full.imbalance[i]:.2f}" for i in layers)])}
{_row(["least used", *(f"{full.least[i]:.2f}" for i in layers)])}

## Recipe

`{HERE}` made every file here. Muon for the matrices (learning rate {recipe.muon_lr}), AdamW for the
embedding and norms ({recipe.adam_lr}) and the routers ({recipe.router_lr}), weight decay
{recipe.weight_decay}; {recipe.batch_tokens} tokens per step; {recipe.warmup_steps} steps of warm-up,
linear decay over the last {1 - recipe.decay_from:.0%} of the time; sequences of {recipe.short}
tokens, of {shape.context} in the last {1 - recipe.long_from:.0%} of the time. The routers' losses:
load balance ({recipe.router.balance}), entropy of the mean choice ({recipe.router.diversity}),
entropy per token above {recipe.router.entropy_target} nats ({recipe.router.entropy}), squared
logsumexp ({recipe.router.z}). `training_log.csv` has the course of it.

A greedy continuation:

```python
{continuation(out, "def read_file(path):")}
```
"""


def export(
    job: Job, corpus: demo_corpus.Corpus, tokenizer: Tokenizer, out: Path, machine: str
) -> None:
    """Writes the model, its card and the texts that go with it.

    Args:
        job: The finished training.
        corpus: Its corpus.
        tokenizer: Its tokenizer.
        out: Directory to write to.
        machine: The kind of machine it was trained on.
    """
    out.mkdir(parents=True, exist_ok=True)
    save_model(job.shape, job.recipe, trained_weights(job.work), tokenizer, out)
    shutil.copyfile(job.work / "training_log.csv", out / "training_log.csv")
    licence = Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt"
    if licence.exists():
        shutil.copyfile(licence, out / "LICENSE-python.txt")
    held_out = demo_corpus.interleaved(corpus.held_out, 2000, 50_000)
    demo_corpus.write_sample(out / "held_out.txt", held_out, 190_000)
    calibration = [d for d in corpus.train if 2000 <= len(d.text) <= 12_000]
    demo_corpus.write_sample(out / "calibration.txt", calibration, 145_000)
    (out / "README.md").write_text(model_card(job, out, machine), encoding="utf-8")


def prepare(
    source: Path | None, work: Path, vocab: int, reuse: bool
) -> tuple[demo_corpus.Corpus, Tokenizer]:
    """Reads the corpus and writes the token streams to the work directory.

    Args:
        source: Directory of sources; the standard library if None.
        work: Where to write.
        vocab: Size of the vocabulary.
        reuse: Whether to keep a tokenizer that is there already.

    Returns:
        The corpus and the tokenizer.
    """
    work.mkdir(parents=True, exist_ok=True)
    corpus = demo_corpus.collect(source)
    saved = work / "tokenizer.json"
    if reuse and saved.exists():
        tokenizer = Tokenizer.from_file(str(saved))
    else:
        texts = (document.text for document in corpus.train)
        tokenizer = demo_corpus.train_tokenizer(texts, vocab)
        tokenizer.save(str(saved))
    for name, documents in (("train", corpus.train), ("held_out", corpus.held_out)):
        demo_corpus.encode(tokenizer, documents).tofile(work / f"{name}.bin")
    return corpus, tokenizer


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line.

    Args:
        arguments: Its arguments; those of the process if None.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory of the finished model")
    parser.add_argument("--work", type=Path, default=Path("build/train"), help="for checkpoints")
    parser.add_argument("--source", type=Path, help="directory of Python sources to train on")
    parser.add_argument("--minutes", type=float, default=78.0, help="wall time of the training")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, to try the script")
    parser.add_argument("--machine", default="one machine", help="its kind, for the model card")
    args = parser.parse_args(arguments)

    shape, recipe = ModelShape(), Recipe()
    cuda = torch.cuda.is_available()
    if args.smoke:
        shape = ModelShape(512, 32, 2, 2, 1, 16, 4, 2, 16, 128)
        recipe = Recipe(batch_tokens=512, short=64, warmup_steps=5)
    elif cuda:
        recipe = dataclasses.replace(recipe, batch_tokens=4 * recipe.batch_tokens)
    job = Job(
        shape=shape,
        recipe=recipe,
        work=args.work,
        world=1 if cuda else 2,
        device="cuda" if cuda else "cpu",
        seconds=60 * args.minutes,
        checkpoint_every=300.0,
        resume=args.resume,
        eager=args.smoke,
    )
    corpus, tokenizer = prepare(args.source, args.work, shape.vocab, args.resume)
    train(job)
    export(job, corpus, tokenizer, args.out, args.machine)


if __name__ == "__main__":
    main()
