"""Times of random weights in the shape of Qwen3-30B-A3B, under routing that was recorded."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from foreload.errors import ConfigError
from foreload.model.hf import load_model
from gpu.arms import Forcing
from gpu.models import shares_of
from gpu.rows import show
from gpu.suites import LRU, on_device, on_host, open_bench, tell_all, tell_belady, tell_goals
from gpu.trials import TOO_LATE, read_windows, run_trials

SHAPE = "qwen3-30b-a3b"
GUESSED = {"recall-90": 0.9, "oracle": 1.0}
"""Recall of guesses one layer ahead: what early answers of trained routers have, and the best."""

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gpu.rows import Row
    from gpu.settings import Settings


def replay(settings: Settings) -> Iterator[Row]:
    """Times each share beside the resident model under one graph, all of them routed alike."""
    from foreload.bench.random_models import make_random_checkpoint, random_model_config
    from foreload.trace.read import read_trace

    if settings.trace is None:
        raise ConfigError("replay needs --trace FILE, a recorded routing")
    # Before the checkpoint, which takes gigabytes.
    trace = read_trace(settings.trace).decode_part()
    steps = [step[: settings.layers] for step in trace.steps if len(step) >= settings.layers]
    steps = steps[: settings.num_decode_tokens]
    if not steps:
        raise ConfigError(
            f"{settings.trace} has no decoded token with {settings.layers} MoE layers"
        )
    demands = [[visit.experts for visit in step] for step in steps]
    top_k = min(len(experts) for step in demands for experts in step)
    most = max(expert for step in demands for experts in step for expert in experts)
    shape = random_model_config(SHAPE)
    if most >= shape.num_experts or not 1 <= top_k <= shape.num_experts_per_tok:
        raise ConfigError(
            f"{settings.trace} wants {top_k} experts up to number {most}: the model has "
            f"{shape.num_experts}, {shape.num_experts_per_tok} to a token"
        )
    model = settings.build / f"{SHAPE}-{settings.layers}"
    if not model.is_dir():
        make_random_checkpoint(SHAPE, model, num_layers=settings.layers)
    # From the second time on nothing is asked for that was not there before.
    twice = dataclasses.replace(trace, num_layers=settings.layers, steps=steps + steps)
    windows = read_windows(settings, model, num_decode_tokens=len(steps))
    forcing = Forcing(demands, top_k, load_model(model).spec.num_experts)
    with open_bench(settings, model, windows, forcing) as bench:
        for share in shares_of(model, settings.shares):
            if share >= 100:
                continue
            place = {"share": share, "layers": settings.layers, "top_k": top_k}
            if settings.is_over():
                yield show({**place, "left_out": TOO_LATE})
                continue
            arms = [
                on_device(bench, "none", share, predictor="none"),
                *(
                    on_device(bench, name, share, predictor="lookahead", recall=recall)
                    for name, recall in GUESSED.items()
                ),
            ]
            rivals = [on_host(bench, "host-lru", share, **LRU)]
            found = run_trials(settings, [*bench.resident, *arms, *rivals], bench.texts)
            yield from tell_all(found, place)
            yield from tell_goals(found, share, [each.name for each in arms])
            traces = [twice] * len(windows)
            yield from tell_belady(found, share, model, arms, traces, count_from=len(steps))
