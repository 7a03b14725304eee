"""Measure what an estimator's inputs buy: recall against the time left to use the guess.

    python benchmarks/estimator_inputs.py notes.txt

For each point of a token's way to the next router (before this layer's experts, after them, and
one layer earlier), the demo's next router is asked with what is known there: as it is, and
corrected by networks of equal size, with and without the token before. Beside it stands the time
until that router speaks, of single tokens with all experts in memory. Changes nothing.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from foreload import Engine
from foreload.predict.calibration import calibration_path, read_default_vectors
from foreload.predict.estimator import LayerNetwork
from foreload.predict.estimator_recall import count_right
from foreload.predict.fitting import FeatureBuffer, Fitter
from foreload.predict.lookahead import DefaultVectors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from foreload.predict.estimator import CorrectedRouter
    from foreload.types import RoutingEvent

WINDOW, WIDTH, PASSES = 512, 72, 4
POINTS = ("two layers ahead", "before the experts", "after the experts")
HELD_OUT = Path(__file__).parents[1] / "src" / "foreload" / "demo" / "held_out.txt"


class Watcher:
    """Fills one buffer per point while text runs through the model, and times the points."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.routers = engine.early_routers()
        self.layers = {r.site.layer: r.site.num_experts for r in self.routers[2:]}
        spec = engine.spec
        shape = (spec.num_moe_layers, spec.num_experts, spec.hidden_size)
        path = calibration_path(engine.cache_dir, spec.identity)
        vectors = read_default_vectors(path, spec.identity, shape)
        self.defaults = DefaultVectors(self.routers, list(vectors))
        self.estimates: dict[tuple[str, int], Tensor] = {}
        self.times: dict[tuple[str, int], float] = {}
        self.left: dict[str, list[float]] = {point: [] for point in POINTS}
        for router in self.routers[1:]:
            router.site.decoder.register_forward_pre_hook(
                lambda module, args, kwargs, layer=router.site.layer: self.enter(
                    layer, args[0] if args else kwargs["hidden_states"]
                ),
                with_kwargs=True,
            )

    def collect(self, token_ids: Sequence[int]) -> dict[str, FeatureBuffer]:
        """Run a text in windows."""
        spec, dtype = self.engine.spec, self.engine.model.dtype
        size = len(token_ids)
        self.buffers = {
            point: FeatureBuffer(self.layers, size, spec.hidden_size, spec.top_k, dtype)
            for point in POINTS
        }
        self.engine.runtime.on_routing = lambda event, wanted: self.see(event)
        for start in range(0, size, WINDOW):
            self.start = start
            self.engine.forward(
                torch.tensor([list(token_ids[start : start + WINDOW])]), self.engine.make_cache()
            )
        for buffer in self.buffers.values():
            buffer.size = size
        return self.buffers

    def enter(self, layer: int, stream: Tensor) -> None:
        """Note the stream that enters a decoder layer: the experts before it have answered."""
        flat = stream.reshape(-1, stream.shape[-1])
        self.keep("after the experts", layer, flat)

    def keep(self, point: str, layer: int, stream: Tensor) -> None:
        """Note what is known at a point about the input of a coming router."""
        if layer < len(self.routers):
            self.times[point, layer] = time.perf_counter()
            self.estimates[point, layer] = self.routers[layer].quasi_hidden(stream)

    def see(self, event: RoutingEvent) -> None:
        """Keep the truth about a layer, beside what was known of it before."""
        now, layer, router = time.perf_counter(), event.layer, self.routers[event.layer]
        if layer in self.layers:
            true = router.quasi_hidden(event.residual)
            target = torch.softmax(router.route(true).logits.float(), -1)
            rows = slice(self.start, self.start + true.shape[0])
            for point, buffer in self.buffers.items():
                self.left[point].append(now - self.times[point, layer])
                buffer.hidden[layer][rows] = self.estimates.pop((point, layer))
                buffer.previous[layer][rows][1:] = true[:-1]
                buffer.target[layer][rows] = target
                buffer.index[layer][rows] = event.top_k_index
        stream = self.defaults.estimate(event)
        self.keep("before the experts", layer + 1, stream)
        self.keep("two layers ahead", layer + 2, stream)

    def time_tokens(self, token_ids: Sequence[int]) -> dict[str, float]:
        """Give the seconds between each point and its router, for single tokens."""
        for times in self.left.values():
            times.clear()
        cache = self.engine.make_cache()
        for self.start, token in enumerate(token_ids):
            self.engine.forward(torch.tensor([[token]]), cache)
        return {point: statistics.median(times) for point, times in self.left.items()}


def without_previous(features: FeatureBuffer) -> FeatureBuffer:
    """Copy the features with nothing known of the token before."""
    part = features.rows(0, features.size)
    part.previous = {layer: torch.zeros_like(rows) for layer, rows in part.previous.items()}
    return part


def recall(routers: dict[int, CorrectedRouter], features: FeatureBuffer, top_k: int) -> float:
    """Give the mean recall at top_k over the layers."""
    right = 0
    for layer, router in routers.items():
        for start in range(0, features.size, WINDOW):
            part = features.rows(start, min(start + WINDOW, features.size))
            with torch.no_grad():
                answer = router.ask(part.hidden[layer], part.previous[layer])
            right += count_right(answer, part.index[layer], (top_k,))[0]
    return right / (features.size * len(routers) * top_k)


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=81920)
    options = parser.parse_args()
    torch.manual_seed(0)
    engine = Engine.from_pretrained(
        "demo", expert_memory="100%", predictor="lookahead", lookahead_layers=1
    )
    top_k = engine.spec.top_k
    train_ids, test_ids = (
        engine.tokenizer(path.read_text(), verbose=False)["input_ids"][:count]
        for path, count in ((options.text, options.tokens), (HELD_OUT, 16384))
    )
    watcher = Watcher(engine)
    train, test = watcher.collect(train_ids), watcher.collect(test_ids)
    left = watcher.time_tokens(test_ids[:256])
    print("| known at | time left, µs | as it is | corrected | and with the token before |")
    print("|---|---|---|---|---|")
    for point in POINTS:
        known = {True: (train[point], test[point])}
        known[False] = tuple(without_previous(buffer) for buffer in known[True])
        cells = []
        for has_previous in (False, True):
            networks = {
                layer: LayerNetwork(engine.spec.hidden_size, count, WIDTH)
                for layer, count in watcher.layers.items()
            }
            routers = {
                layer: router
                for layer, router in enumerate(engine.corrected_routers(networks))
                if router is not None
            }
            seen, unseen = known[has_previous]
            # Untrained, a network changes nothing.
            cells = cells or [recall(routers, unseen, top_k)]
            fitter = Fitter(routers, num_batches=PASSES * Fitter.batches_in(seen.size), seed=0)
            for _ in range(PASSES):
                fitter.run_pass(seen, lambda batch: None)
            cells.append(recall(routers, unseen, top_k))
        shares = " | ".join(f"{100 * cell:.1f}" for cell in cells)
        print(f"| {point} | {1e6 * left[point]:.0f} | {shares} |", flush=True)
    engine.close()


if __name__ == "__main__":
    main()
