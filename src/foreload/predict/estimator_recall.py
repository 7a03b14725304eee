"""How well routers that are asked early name the experts, and what asking them takes.

Looks at collected features; runs no model.
"""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from foreload.predict.estimator import CorrectedRouter
    from foreload.predict.fitting import FeatureBuffer
    from foreload.types import RouterOutput

__all__ = ["count_right", "measure_recall", "time_routers"]

_MOST_TOKENS = 512
_NUM_TIMED_TOKENS = 32


def measure_recall(
    routers: Mapping[int, CorrectedRouter], features: FeatureBuffer, depths: Sequence[int]
) -> dict[str, dict[int, dict[int, float]]]:
    """Measure the recall of each predictor that the features tell of, by layer and n.

    Args:
        routers: By MoE layer, its router corrected by its network.
        features: Tokens; those without default vectors too if `lookahead` is to be measured.
        depths: The n.

    Returns:
        By predictor, layer and n, the share of the truly routed experts among the n named.
    """
    recall: dict[str, dict[int, dict[int, float]]] = {}
    for layer, router in routers.items():
        right: dict[str, list[int]] = {}
        for start in range(0, features.size, _MOST_TOKENS):
            rows = slice(start, min(start + _MOST_TOKENS, features.size))
            hidden, true = features.hidden[layer][rows], features.index[layer][rows]
            with torch.no_grad():
                answers = {
                    "default-vectors": router.router.route(hidden),
                    "estimator": router.ask(hidden, features.previous[layer][rows]),
                }
                if features.plain:
                    answers["lookahead"] = router.router.route(features.plain[layer][rows])
            for name, answer in answers.items():
                if answer is None:
                    continue
                old = right.get(name, [0] * len(depths))
                new = count_right(answer, true, depths)
                right[name] = [a + b for a, b in zip(old, new, strict=True)]
        demanded = features.size * features.index[layer].shape[1]
        for name, counts in right.items():
            shares = (count / demanded for count in counts)
            recall.setdefault(name, {})[layer] = dict(zip(depths, shares, strict=True))
    return recall


def time_routers(
    routers: Mapping[int, CorrectedRouter], features: FeatureBuffer
) -> tuple[float, float]:
    """Time asking every layer's router for a single token, with the networks and without."""
    num_tokens = min(_NUM_TIMED_TOKENS, features.size)
    spent: tuple[list[float], list[float]] = ([], [])
    with torch.inference_mode():
        for row in range(num_tokens):
            rows = slice(row, row + 1)
            for times, has_network in zip(spent, (True, False), strict=True):
                start = time.perf_counter()
                for layer, router in routers.items():
                    hidden = features.hidden[layer][rows]
                    if has_network:
                        router.ask(hidden, features.previous[layer][rows])
                    else:
                        router.router.route(hidden)
                times.append(time.perf_counter() - start)
    with_networks, without = (statistics.median(times) for times in spent)
    return with_networks, without


def count_right(output: RouterOutput, true: Tensor, depths: Sequence[int]) -> list[int]:
    """Count truly routed experts inside the n first that an early answer names.

    Args:
        output: The answer for T tokens; the router's own choice ranks first, then the rest.
        true: (T, K) the true choice.
        depths: The n.
    """
    if output.logits is None:
        raise ValueError("this router gives no logits")
    scores = output.logits.float()
    margin = scores.amax() - scores.amin() + 1
    chosen = torch.zeros_like(scores).scatter_(1, output.top_k_index, float(margin))
    ranking = (scores + chosen).argsort(dim=-1, descending=True, stable=True)
    found = ranking[:, :, None] == true[:, None, :]  # (T, E, K)
    return [int(found[:, :n].sum()) for n in depths]
