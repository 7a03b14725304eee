"""Measure how well quantised drafts agree with the model: routing, acceptance, tokens per round.

    python benchmarks/draft_agreement.py --tokens 4096

Drafts eight tokens per round along held-out text, whatever the draft itself would have said, and
counts a token as accepted where draft and target agree which one is the likeliest. Variants of the
quantisation stand beside each other: round to nearest, searched scales, and scales searched with
errors weighted by the size of what they are multiplied with. Changes nothing that is kept.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from foreload.bench.forced import run_rounds
from foreload.bench.workload import make_workloads
from foreload.config import EngineConfig
from foreload.engine import Engine
from foreload.model.draft_files import build_draft, read_draft
from foreload.model.hf import load_model, load_tokenizer
from foreload.model.source import resolve_model
from foreload.resolution import resolve

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from foreload.model.hf import LoadedModel
    from foreload.model.self_draft import DraftRound
    from foreload.types import RoutingEvent

    Importance = Callable[[int, str], Tensor | None]

MOST = 8
WINDOW, PROMPT = 512, 64


@dataclass
class Tally:
    """Counts by layer, and by drafted position."""

    same_set: list[int]
    right: list[int]
    wanted: list[int]
    tokens: list[int]
    tested: list[int] = field(default_factory=lambda: [0] * MOST)
    accepted: list[int] = field(default_factory=lambda: [0] * MOST)
    rounds: int = 0

    def see(self, this: DraftRound, routing: dict[int, Tensor]) -> None:
        """Compare a round's drafted routing with the target's."""
        drafted = len(this.token_ids) - 1
        for layer, true in routing.items():
            for token in range(drafted):
                guess = this.prefetches.buffer.routing(token, layer)
                if guess is None:
                    continue
                wanted = set(true[token].tolist())
                right = len(wanted & set(guess.experts))
                self.tokens[layer] += 1
                self.wanted[layer] += len(wanted)
                self.right[layer] += right
                self.same_set[layer] += right == len(wanted)
        if drafted == MOST:
            self.rounds += 1
            for place in range(min(this.num_accepted + 1, MOST)):
                self.tested[place] += 1
                self.accepted[place] += place < this.num_accepted


def measure(loaded: LoadedModel, draft: Any, kind: str, num_tokens: int) -> Tally:
    """Run held-out text in rounds of eight drafted tokens."""
    tokenizer = load_tokenizer(loaded.index.directory)
    text = (resolve_model("demo") / "held_out.txt").read_text()
    workloads = make_workloads(
        tokenizer,
        text,
        num_workloads=num_tokens // (WINDOW - PROMPT),
        num_prompt_tokens=PROMPT,
        num_decode_tokens=WINDOW - PROMPT,
        vocab_size=0,
    )
    config = resolve(
        EngineConfig(expert_memory="200%", predictor="none", draft=kind, num_draft_tokens=MOST),
        loaded,
    )
    layers = loaded.spec.num_moe_layers
    tally = Tally(*([0] * layers for _ in range(4)))
    routing: dict[int, Tensor] = {}

    def note(event: RoutingEvent, wanted: list[int]) -> None:
        routing[event.layer] = event.top_k_index

    with Engine(loaded, None, config, cache_dir=Path("unused"), draft=draft) as engine:
        engine.runtime.on_routing = note
        drafter = engine.drafter
        if drafter is None:
            raise SystemExit("the engine has no draft")
        drafter.on_round = lambda this: tally.see(this, routing)
        for workload in workloads:
            run_rounds(drafter, engine._prefill, workload, engine.make_request_cache())
    return tally


def by_norm(loaded: LoadedModel) -> Importance:
    """Weigh input columns by the squared weights of the norm before the experts."""

    def importance(layer: int, matrix: str) -> Tensor | None:
        norm = next(
            (
                module
                for name, module in loaded.sites[layer].decoder.named_children()
                if "post_attention" in name
            ),
            None,
        )
        weight = getattr(norm, "weight", None)
        return weight.float() ** 2 if matrix == "first" and weight is not None else None

    return importance


def show(name: str, tally: Tally) -> None:
    """Print one draft's counts."""
    exact = [same / n for same, n in zip(tally.same_set, tally.tokens, strict=True)]
    recall = [right / n for right, n in zip(tally.right, tally.wanted, strict=True)]
    acceptance = [a / max(t, 1) for a, t in zip(tally.accepted, tally.tested, strict=True)]
    length = 1 + sum(tally.accepted) / max(tally.rounds, 1)
    print(f"{name}: {sum(tally.tokens) // len(tally.tokens)} drafted tokens")
    print("  same experts by layer, %: ", " ".join(f"{100 * v:.1f}" for v in exact))
    print("  recall by layer, %:       ", " ".join(f"{100 * v:.1f}" for v in recall))
    print(
        f"  means: same {100 * sum(exact) / len(exact):.2f}, "
        f"recall {100 * sum(recall) / len(recall):.2f}"
    )
    print("  accepted by position, %:  ", " ".join(f"{100 * v:.1f}" for v in acceptance))
    print(
        f"  all positions: {sum(tally.accepted) / max(sum(tally.tested), 1):.4f}, "
        f"tokens per round of {MOST}: {length:.2f}"
    )


def main() -> None:
    """Builds each draft in a folder of its own, measures it, and throws it away."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--tokens", type=int, default=4096)
    options = parser.parse_args()
    torch.set_num_threads(1)
    loaded = load_model(resolve_model(options.model))
    weighted = by_norm(loaded)
    variants: list[tuple[str, str, dict[str, Any]]] = [
        ("int4, round to nearest", "int4", {"search": False}),
        ("int4, searched scales", "int4", {}),
        ("int4, searched and weighted by the norm", "int4", {"importance": weighted}),
        ("int8", "int8", {}),
    ]
    for name, kind, settings in variants:
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / "draft"
            identity = loaded.spec.identity
            build_draft(loaded.sites, loaded.plans, identity, folder, kind, **settings)
            draft = read_draft(loaded.sites, loaded.plans, identity, folder, kind)
            show(name, measure(loaded, draft, kind, options.tokens))


if __name__ == "__main__":
    main()
