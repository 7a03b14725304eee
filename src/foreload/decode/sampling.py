"""From logits to a token, and from a draft's tokens to those the target agrees with."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from foreload.config import SamplingConfig

__all__ = ["Verdict", "probabilities", "sample", "verify"]


class Verdict(NamedTuple):
    """What the target says to a draft: how many of its tokens stand, and the token after them."""

    num_accepted: int
    token: int


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
        # Also where top_p is so small that float32 rounds it to 0.
        drop[..., 0] = False
        shares = shares.masked_fill(drop.scatter(-1, order, drop), 0.0)
        shares = shares / shares.sum(-1, keepdim=True)
    return shares


def sample(logits: Tensor, config: SamplingConfig, generator: torch.Generator) -> int:
    """Choose one token.

    Args:
        logits: (V,), on any device.
        config: Sampling settings.
        generator: Source of randomness, on the CPU; not touched at temperature 0.
    """
    if config.temperature == 0:
        return int(logits.argmax())
    shares = probabilities(logits.cpu(), config)
    return int(torch.multinomial(shares, 1, generator=generator))


def verify(
    draft_ids: Sequence[int],
    draft_logits: Sequence[Tensor],
    target_logits: Tensor,
    config: SamplingConfig,
    generator: torch.Generator,
) -> Verdict:
    """Accept the drafted tokens that the target stands by, and choose the one after them.

    At temperature 0 a token stands if the target would have chosen it. Otherwise token x, drafted
    with probability q(x), stands with probability min(1, p(x) / q(x)), p being the target's; in
    place of the first that falls one is drawn from max(0, p - q), and behind a draft that stands
    as a whole one from p. So tokens are distributed as if the target alone had drawn them.

    Args:
        draft_ids: The drafted tokens, k of them.
        draft_logits: For each, the logits (V,) it was chosen from.
        target_logits: (k + 1, V), the target's before each drafted token and behind the last.
        config: Sampling settings; temperature, top-k and top-p apply to both.
        generator: Source of randomness; not touched at temperature 0.

    Reference:
        Leviathan et al. 2023, "Fast inference from transformers via speculative decoding",
        arXiv:2211.17192, algorithm 1 and appendix A.1.
    """
    if config.temperature == 0:
        best = target_logits.argmax(-1).tolist()
        agreed = 0
        while agreed < len(draft_ids) and best[agreed] == draft_ids[agreed]:
            agreed += 1
        return Verdict(agreed, int(best[agreed]))
    target_logits = target_logits.cpu()
    for place, token in enumerate(draft_ids):
        wanted = probabilities(target_logits[place], config)
        drafted = probabilities(draft_logits[place].cpu(), config)
        chance = float(torch.rand((), generator=generator))
        if chance * float(drafted[token]) < float(wanted[token]):
            continue
        rest = (wanted - drafted).clamp(min=0)
        # Nothing is left only where both agree up to rounding.
        rest = rest if bool(rest.sum() > 0) else wanted
        return Verdict(place, int(torch.multinomial(rest, 1, generator=generator)))
    return Verdict(len(draft_ids), sample(target_logits[-1], config, generator))
