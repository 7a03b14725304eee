"""From logits to a token."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from foreload.config import SamplingConfig

__all__ = ["probabilities", "sample"]


def probabilities(logits: Tensor, config: SamplingConfig) -> Tensor:
    """Turn logits into the distribution a token is drawn from.

    Temperature first, then top-k, then top-p, then renormalisation. Temperature 0 puts all
    probability on the first of the largest logits.

    Args:
        logits: (..., V).
        config: Sampling settings.

    Returns:
        (..., V) float32.
    """
    scores = logits.float()
    if config.temperature == 0:
        best = scores.argmax(-1, keepdim=True)
        return torch.zeros_like(scores).scatter_(-1, best, 1.0)
    # The largest becomes 0, so that no temperature, however small, makes it overflow.
    scores = (scores - scores.amax(-1, keepdim=True)) / config.temperature
    if 0 < config.top_k < scores.shape[-1]:
        least = scores.topk(config.top_k, -1).values[..., -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    shares = scores.softmax(-1)
    if config.top_p < 1:
        ordered, order = torch.sort(shares, dim=-1, descending=True, stable=True)
        # A token stays while the likelier ones have not reached top_p: the first always stays.
        drop = ordered.cumsum(-1) - ordered >= config.top_p
        shares = shares.masked_fill(drop.scatter(-1, order, drop), 0.0)
        shares = shares / shares.sum(-1, keepdim=True)
    return shares


def sample(logits: Tensor, config: SamplingConfig, generator: torch.Generator) -> int:
    """Choose one token.

    Args:
        logits: (V,).
        config: Sampling settings.
        generator: Source of randomness; not touched at temperature 0.
    """
    if config.temperature == 0:
        return int(logits.argmax())
    shares = probabilities(logits, config)
    return int(torch.multinomial(shares, 1, generator=generator))
