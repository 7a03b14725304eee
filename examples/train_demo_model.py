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
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import demo_corpus
import numpy as np
import torch
import torch.multiprocessing as mp
from demo_network import ModelShape, RouterLoss, forward
from tokenizers import Tokenizer
from torch import Tensor

LAST = "last.txt"  # names the last complete checkpoint


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
    router: RouterLoss = dataclasses.field(default_factory=RouterLoss)
    seed: int = 0

    def describe(self, shape: ModelShape) -> str:
        """Returns the recipe in words, Markdown."""
        router = self.router
        return f"""\
Muon for the matrices (learning rate {self.muon_lr}), AdamW for embedding and norms ({self.adam_lr})
and for the routers ({self.router_lr}), weight decay {self.weight_decay}; {self.batch_tokens} tokens
per step; {self.warmup_steps} steps of warm-up, then a linear decay over the last
{1 - self.decay_from:.0%} of the time; sequences of {self.short} tokens, of {shape.context} in the
last {1 - self.long_from:.0%} of the time. Losses of the routers: load balance ({router.balance}),
entropy of the mean choice ({router.diversity}), entropy per token above {router.entropy_target}
nats ({router.entropy}), squared logsumexp ({router.z})."""


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


class Log:
    """Writes training_log.csv, a row every 50 steps and at every held-out measurement.

    Args:
        path: The file.
        step: Steps done before; what the file says about later ones is dropped.
    """

    COLUMNS = (
        "step",
        "seconds",
        "tokens",
        "train_loss",
        "held_out_loss",
        "router_entropy",
        "imbalance",
    )

    def __init__(self, path: Path, step: int) -> None:
        self._path, self._smooth = path, 0.0
        rows = path.read_text().splitlines()[1:] if step else []
        rows = [row for row in rows if int(row.split(",")[0]) <= step]
        path.write_text("\n".join([",".join(self.COLUMNS), *rows]) + "\n")

    def add(
        self,
        step: int,
        seconds: float,
        tokens: int,
        loss: float,
        held_out: float | None,
        measures: Tensor,
    ) -> None:
        """Takes note of a step.

        Args:
            step: Steps done, this one included.
            seconds: Wall time so far.
            tokens: Tokens so far.
            loss: Training loss of the step; the log has it smoothed.
            held_out: Held-out loss, if measured.
            measures: What `forward` says about the routers.
        """
        self._smooth = self._smooth + 0.04 * (loss - self._smooth) if self._smooth else loss
        if step % 50 and held_out is None:
            return
        entropy, load = measures[:, 0].mean(), measures[:, 2:].amax(1).mean()
        held = "" if held_out is None else f"{held_out:.4f}"
        row = [step, round(seconds), tokens, f"{self._smooth:.4f}", held]
        with self._path.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow([*row, f"{entropy:.3f}", f"{load:.2f}"])


class _NoGate:
    """Stands in for a barrier when there is one process."""

    def wait(self) -> None:
        """Returns at once."""


def _last_checkpoint(work: Path) -> Path:
    return work / (work / LAST).read_text()


def _save_checkpoint(work: Path, rank: int, saved: dict[str, Any], gate: Any) -> None:
    """Saves this process's share; once all have, makes it the last checkpoint."""
    folder = work / f"checkpoint-{saved['step']}"
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(saved, folder / f"{rank}.pt")
    gate.wait()
    if rank == 0:
        (work / LAST).write_text(folder.name)
        for old in work.glob("checkpoint-*"):
            if old != folder:
                shutil.rmtree(old, ignore_errors=True)


def _train_process(
    rank: int, job: Job, flat: Tensor, flat_grads: list[Tensor], board: Tensor, gate: Any
) -> None:
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
    if job.resume and (job.work / LAST).exists():
        saved = torch.load(_last_checkpoint(job.work) / f"{rank}.pt", weights_only=True)
        optimizer.load(saved["optimizer"])
        sampler.load(saved["sampler"])
        step, tokens, elapsed = saved["step"], saved["tokens"], saved["elapsed"]
        gate.wait()
    began, checkpointed = time.monotonic() - elapsed, elapsed
    log = Log(job.work / "training_log.csv", step) if rank == 0 else None
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
            _save_checkpoint(job.work, rank, saved, gate)
        if log:
            held_out = float(board[1 + world : 1 + 2 * world].mean()) if due else None
            log.add(step, elapsed, tokens, train_loss, held_out, measures)


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
        _train_process(0, job, buffers[0], buffers[1:], board, _NoGate())
    else:
        for tensor in [*buffers, board]:
            tensor.share_memory_()
        gate = mp.get_context("spawn").Barrier(job.world)
        mp.spawn(_train_process, (job, buffers[0], buffers[1:], board, gate), nprocs=job.world)


def trained_weights(work: Path) -> dict[str, Tensor]:
    """Returns the parameters of the last checkpoint, float32."""
    weights: dict[str, Tensor] = {}
    for path in sorted(_last_checkpoint(work).glob("*.pt")):
        states = torch.load(path, map_location="cpu", weights_only=True)["optimizer"]
        weights |= {name: state[0] for name, state in states.items()}
    return weights


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
    parser.add_argument("--out", type=Path, help="directory to export to; if absent, only train")
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
    if args.out is None:
        return

    import demo_export  # not above: the training processes need no transformers

    torch.set_num_threads(os.cpu_count() or 1)
    weights = trained_weights(args.work)
    log = args.work / "training_log.csv"
    demo_export.export(shape, weights, corpus, tokenizer, log, args.out)
    recipe_text = recipe.describe(shape)
    card = demo_export.model_card(shape, recipe.short, recipe_text, args.machine, args.out)
    (args.out / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
