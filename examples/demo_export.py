"""Writes the finished demo model: the checkpoint, measurements of it, its card."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import math
import shutil
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

import demo_corpus
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from demo_network import ModelShape
    from tokenizers import Tokenizer
    from torch import Tensor


def save_model(
    shape: ModelShape, weights: dict[str, Tensor], tokenizer: Tokenizer, out: Path
) -> None:
    """Writes a checkpoint that transformers loads.

    Args:
        shape: Dimensions.
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
    for path in out.glob("*.safetensors"):
        path.chmod(0o644)


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
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = torch.tensor([0, *tokenizer(text, verbose=False)["input_ids"]])
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
            chosen = log_probs.topk(top_k).indices.flatten()
            load[layer] += torch.bincount(chosen, minlength=experts)
    load *= experts / (count * top_k)
    return Measurement(
        total / count,
        total / math.log(2) / len(text.encode()),
        (entropy / count).tolist(),
        load.amax(1).tolist(),
        load.amin(1).tolist(),
    )


@torch.no_grad()
def continuation(directory: Path, prompt: str, tokens: int = 120) -> str:
    """Returns a prompt and how the model goes on, sampled at temperature 0.7 from seed 0."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = torch.tensor([[0, *tokenizer(prompt)["input_ids"]]])
    torch.manual_seed(0)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=True,
        temperature=0.7,
        top_k=0,
        top_p=0.95,
    )
    return tokenizer.decode(out[0], skip_special_tokens=True).rstrip()


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def model_card(shape: ModelShape, short: int, recipe: str, machine: str, out: Path) -> str:
    """Measures the exported model on held_out.txt and writes its card.

    Args:
        shape: Dimensions.
        short: A window to measure with, besides the full context.
        recipe: How it was trained, Markdown.
        machine: The kind of machine it was trained on.
        out: The exported model, the held-out text and the log next to it.

    Returns:
        The card, Markdown.
    """
    text = (out / "held_out.txt").read_text(encoding="utf-8")
    measured = {window: measure(out, text, window) for window in (short, shape.context)}
    full = measured[shape.context]
    with (out / "training_log.csv").open(newline="") as file:
        log = [row for row in csv.DictReader(file) if row["held_out_loss"]][-1]
    cost = (
        f"{int(log['tokens']) / 1e6:.1f} million tokens in {log['step']} steps"
        f" and {int(log['seconds']) / 60:.0f} minutes"
    )
    losses = [
        _row([str(window), f"{result.loss:.3f}", f"{result.bits_per_byte:.3f}"])
        for window, result in measured.items()
    ]
    routers = [
        _row([name, *(f"{value:.2f}" for value in values)])
        for name, values in (
            ("entropy", full.entropy),
            ("most used", full.imbalance),
            ("least used", full.least),
        )
    ]
    return _CARD.format(
        shape=shape,
        cost=cost,
        date=f"{datetime.datetime.now(datetime.UTC):%d %B %Y}",
        machine=machine,
        python=sysconfig.get_python_version(),
        held_out=", ".join(f"`{name}`" for name in demo_corpus.HELD_OUT),
        losses="\n".join(losses),
        sampled=float(log["held_out_loss"]),
        maximum=math.log(shape.experts),
        layers=_row(["layer", *map(str, range(shape.layers))]),
        rule=_row(["---"] * (shape.layers + 1)),
        routers="\n".join(routers),
        recipe=recipe,
        prompt=_PROMPT,
        sample=continuation(out, _PROMPT),
    )


_PROMPT = "def read_file(path):"
_CARD = """\
---
license: other
license_name: PSF-2.0
tags: [qwen3_moe, demo]
---
# Demo model of Python source

A Mixture-of-Experts language model, small enough to ship and real enough to show what streaming
experts does: it has learnt to write Python, and its routers make decisions. It is of no other use.

* Architecture: Qwen3-MoE, {shape.layers} layers, hidden size {shape.hidden}, {shape.experts}
  experts of width {shape.expert_hidden}, {shape.top_k} per token, {shape.heads} query and
  {shape.kv_heads} key heads of {shape.head_dim}, tied embeddings, context {shape.context};
  bfloat16.
* Tokenizer: byte-level BPE of {shape.vocab} tokens, trained on the training text.
* Trained from scratch: {cost}, on {date}, on {machine}.

## Data and licence

The sources of the standard library of Python {python}, its tests included, and nothing else.
Files that carry a licence of their own, generated files, data tables and near-duplicates were left
out. That text is under the PSF License Version 2 (`LICENSE-python.txt`; Copyright (c) 2001 and
later, Python Software Foundation; All Rights Reserved), and so is all that was made of it here: the
weights, the vocabulary and the excerpts, `held_out.txt` from held-out modules and `calibration.txt`
from training modules.

Held out, together with their tests: {held_out}.

## Measurements on `held_out.txt`

In float32 under transformers; a window knows nothing of the one before.

| window | loss, nats per token | bits per byte |
| --- | --- | --- |
{losses}

At the end of the training, on a sample of all held-out files: {sampled:.3f} nats per token.

Routers at the full context: entropy of the choice per token in nats (at most {maximum:.2f}), load
of the most and of the least used expert relative to the mean.

{layers}
{rule}
{routers}

## Recipe

{recipe}
The course of it is in `training_log.csv`. All files here were made by
`examples/train_demo_model.py`.

## Sample

At temperature 0.7, after `{prompt}`:

```python
{sample}
```
"""


def export(
    shape: ModelShape,
    weights: dict[str, Tensor],
    corpus: demo_corpus.Corpus,
    tokenizer: Tokenizer,
    log: Path,
    out: Path,
) -> None:
    """Writes the model and the texts that go with it, all but the card.

    Args:
        shape: Dimensions.
        weights: The trained parameters.
        corpus: The corpus.
        tokenizer: The tokenizer.
        log: The log of the training.
        out: Directory to write to.
    """
    out.mkdir(parents=True, exist_ok=True)
    save_model(shape, weights, tokenizer, out)
    shutil.copyfile(log, out / "training_log.csv")
    licence = Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt"
    if licence.exists():
        shutil.copyfile(licence, out / "LICENSE-python.txt")
    held_out = demo_corpus.interleaved(corpus.held_out)
    demo_corpus.write_sample(out / "held_out.txt", held_out, limit=190_000, longest=10_000)
    demo_corpus.write_sample(out / "calibration.txt", corpus.train, limit=145_000, longest=10_000)
