"""Measure what asking each predictor costs the computing thread, per decoded token.

    python benchmarks/predictor_cost.py --model demo

All experts are in memory, so nothing is copied; the predictors take turns token by token over the
same held-out text. Medians over the tokens, in milliseconds, beside the time of a whole token.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import TYPE_CHECKING

import torch

from foreload import Engine
from foreload.model.source import resolve_model

if TYPE_CHECKING:
    from foreload.types import Prediction, Predictor, RoutingEvent

NAMES = ("lookahead", "default-vectors", "estimator")
PROMPT = 32


class Timed:
    """Passes everything on, and adds up the time it takes."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        self.name = predictor.name
        self.taken_s = 0.0

    def predict(self, event: RoutingEvent) -> list[Prediction]:
        """Asks the predictor."""
        start = time.perf_counter()
        guesses = self.predictor.predict(event)
        self.taken_s += time.perf_counter() - start
        return guesses


def main() -> None:
    """Prints one line per predictor."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--tokens", type=int, default=600)
    options = parser.parse_args()
    text = (resolve_model("demo") / "held_out.txt").read_text()
    settings = {"expert_memory": "100%", "lookahead_layers": 1}
    predictors = []
    for name in NAMES:
        with Engine.from_pretrained(options.model, predictor=name, **settings) as engine:
            predictors.append(Timed(engine.runtime.predictor))
    with Engine.from_pretrained(options.model, predictor="lookahead", **settings) as engine:
        # Where nothing is copied guessing loses, and would be switched off.
        engine.runtime._switch = None
        ids = engine.tokenizer(text[:20_000], verbose=False)["input_ids"]
        cache = engine.make_cache()
        engine.forward(torch.tensor([ids[:PROMPT]]), cache)
        asked: dict[str, list[float]] = {name: [] for name in NAMES}
        whole: dict[str, list[float]] = {name: [] for name in NAMES}
        for step, token in enumerate(ids[PROMPT : PROMPT + options.tokens]):
            timed = predictors[step % len(predictors)]
            timed.taken_s = 0.0
            engine.runtime.predictor = timed
            start = time.perf_counter()
            engine.forward(torch.tensor([[token]]), cache)
            whole[timed.name].append(time.perf_counter() - start)
            asked[timed.name].append(timed.taken_s)
    for name in NAMES:
        print(
            f"{name}: {statistics.median(asked[name]) * 1e3:.2f} ms of "
            f"{statistics.median(whole[name]) * 1e3:.2f} ms per token"
        )


if __name__ == "__main__":
    main()
