"""Checks and times of three tiers: the device's slots, a host tier too small, the disk."""

from __future__ import annotations

import functools
import itertools
import time
from typing import TYPE_CHECKING

import torch

from gpu.checks import resident_logits
from gpu.models import open_staged, widened_demo
from gpu.rows import attempt, compare, show
from gpu.settings import PROMPT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor

    from gpu.rows import Row
    from gpu.settings import Settings


def tiers(settings: Settings) -> Iterator[Row]:
    """Checks and times three tiers: a host tier too small for the experts, over the disk."""
    from foreload.model.source import resolve_model

    demo = resolve_model("demo")
    ids, wanted = resident_logits(demo, settings.num_staged_tokens)
    for share, host_share in settings.staged:
        row: Row = {"what": "logits", "share": share, "host_share": host_share}
        decode = functools.partial(_decode_staged, demo, share, host_share, ids, wanted)
        yield show(attempt(row, decode))
    say = functools.partial(_say_staged, demo, settings)
    yield show(attempt({"what": "a draft's texts"}, say))
    for draft in ("none", "int4"):
        for host_share in settings.host_shares:
            row = {"what": "times", "draft": draft, "host_share": host_share}
            row["share"] = settings.share_with_draft
            yield show(attempt(row, functools.partial(_time_staged, settings, host_share, draft)))


def _decode_staged(
    path: Path, share: float, host_share: float, ids: list[int], wanted: Tensor
) -> Row:
    """Runs given tokens one by one, with experts from all three tiers."""
    with open_staged(path, share, host_share, dtype="float32", predictor="lookahead") as engine:
        cache = engine.make_cache()
        logits = [engine.forward(torch.tensor([[token]]), cache).float() for token in ids]
        stats = engine.stats
        return {
            "hit_rate": stats["hit_rate"],
            "host_bytes": stats["host_bytes"],
            "bytes_moved": stats["bytes_moved"],
            **compare(torch.stack(logits), wanted),
        }


def _say_staged(path: Path, settings: Settings) -> Row:
    """Compares greedy texts with a draft and without."""
    said = {}
    for draft in ("none", "int4"):
        share, host_share = settings.share_with_draft, settings.host_shares[-1]
        with open_staged(path, share, host_share, dtype="float32", draft=draft) as engine:
            said[draft] = engine.generate(PROMPT, max_new_tokens=settings.num_staged_tokens)
    pairs = zip(said["none"].token_ids, said["int4"].token_ids, strict=False)
    num_same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    return {
        "num_tokens": len(said["none"].token_ids),
        "num_same": num_same,
        "acceptance_rate": said["int4"].stats.acceptance_rate,
        "is_fine": said["none"].token_ids == said["int4"].token_ids,
    }


def _time_staged(settings: Settings, host_share: float, draft: str) -> Row:
    """Times the widened demo in bfloat16."""
    model = widened_demo(settings)
    start = time.perf_counter()
    with open_staged(model, settings.share_with_draft, host_share, draft=draft) as engine:
        opened_s = time.perf_counter() - start
        engine.generate(PROMPT, max_new_tokens=settings.num_warm)
        runs = [
            engine.generate(PROMPT, max_new_tokens=settings.num_timed).stats
            for _ in range(settings.num_staged_runs)
        ]
        return {
            "opened_s": opened_s,
            "num_slots": engine.num_slots,
            "tpot_s": [run.tpot_s for run in runs],
            "ttft_s": [run.ttft_s for run in runs],
            "hit_rate": runs[-1].hit_rate,
            "bytes_per_token": runs[-1].bytes_per_token,
            "host_bytes": engine.stats["host_bytes"],
            "bytes_moved": engine.stats["bytes_moved"],
            "acceptance_rate": runs[-1].acceptance_rate,
        }
