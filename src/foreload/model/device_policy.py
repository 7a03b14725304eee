"""What a step executes where the device decides: the counterpart of the policies on the host.

Who decides is settled when an engine is opened, because it goes into captured steps. Only tensors:
nothing here waits for the device.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import torch

from foreload.ops.present import choose_present
from foreload.schedule.policy import Exact, Speculate, SpeculateWhen
from foreload.types import Routing

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from foreload.ops.scores import LayerScores
    from foreload.schedule.policy import ExecutionPolicy
    from foreload.types import RouterOutput

    ChoosePresent = Callable[..., Routing]

__all__ = ["DevicePolicy"]


class DevicePolicy:
    """Chooses between the true routing, what was guessed, and what is in the slots.

    Args:
        policy: Whose rule to follow.
        device: Where the model is.
        score_rules: Per MoE layer, how its router makes weights, None where that is not known.
        choose: What chooses among who is there; the twin in plain torch by default.

    Attributes:
        pairs: (2,) int64 on the device: pairs of token and expert that were routed, and those of
            them that were not executed. Nothing is counted under the exact policy.
    """

    def __init__(
        self,
        policy: ExecutionPolicy,
        device: torch.device | str,
        score_rules: Sequence[LayerScores | None] = (),
        *,
        choose: ChoosePresent = choose_present,
    ) -> None:
        self._policy = policy
        self._score_rules = score_rules
        self._choose = choose
        self.pairs = torch.zeros(2, dtype=torch.int64, device=device)
        # By thread, as forwards are.
        self._guessed: dict[int, tuple[int, Routing]] = {}
        self._logits: dict[tuple[int, int], Tensor] = {}

    def see_logits(self, layer: int, logits: Tensor) -> None:
        """Keep a router's logits, (T, E), for the choice among other experts."""
        self._logits[threading.get_ident(), layer] = logits

    def see_guess(self, layer: int, output: RouterOutput) -> bool:
        """Keep what a layer's router answered early; tell whether it may be executed."""
        if not isinstance(self._policy, Speculate) or output.top_k_weights is None:
            return False
        guess = Routing(output.top_k_index, output.top_k_weights)
        self._guessed[threading.get_ident()] = (layer, guess)
        return True

    def decide(
        self, layer: int, true: Routing, slot_of: Tensor, *, is_prefill: bool = False
    ) -> Routing:
        """Give the routing to execute, (T, K) each; `true` itself where the true router decides.

        Args:
            layer: MoE layer. What was being fetched for it must have been waited for.
            true: The router's choice.
            slot_of: (E,) integers, the slot of each expert of the layer, negative where it has
                none. Routing to E and above stands for no expert. An expert whose prefetch was
                waited for has one; there is no such thing as one that is arriving.
            is_prefill: Whether the forward is part of a prompt.
        """
        policy = self._policy
        if isinstance(policy, Exact):
            return true
        thread = threading.get_ident()
        guess = self._guessed.pop(thread, None)
        logits = self._logits.pop((thread, layer), None)
        num_tokens = len(true.top_k_index)
        is_free = policy.applies(num_tokens, is_prefill=is_prefill)
        if is_free and isinstance(policy, SpeculateWhen):
            return self._choose_present(policy, layer, true, logits, slot_of)
        self.pairs[0] += true.top_k_index.numel()
        if guess is None or not is_free:
            return true
        index, weights = guess[1]
        if guess[0] != layer or len(index) != num_tokens:
            return true
        same = true.top_k_index[:, :, None] == index[:, None, :]
        self.pairs[1] += (~same.any(-1)).sum()
        return Routing(index, weights.to(true.top_k_weights.dtype))

    def forget(self) -> None:
        """Forget what a forward that was broken off has left."""
        self._guessed.clear()
        self._logits.clear()

    def _choose_present(
        self,
        policy: SpeculateWhen,
        layer: int,
        true: Routing,
        logits: Tensor | None,
        slot_of: Tensor,
    ) -> Routing:
        return self._choose(
            true,
            slot_of,
            self.pairs,
            most_lost=policy.most_lost,
            rule=self._score_rules[layer] if self._score_rules else None,
            logits=logits,
        )
