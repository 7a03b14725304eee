"""Check on held-out text that greedy decoding says the same with a draft as without.

    python benchmarks/draft_greedy.py --dtype float32
    python benchmarks/draft_greedy.py --dtype bfloat16

Twenty prompts of 100 tokens, 128 tokens each, for every number of draft tokens and the governor.
Where a token differs, the exact model is asked for both: the gap between their logits is printed
beside the step between neighbouring numbers of that size in the element type. A gap of a few steps
is a tie that rounding decides; after it both texts are right, and what follows is not compared.
"""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING, Any

import torch

from foreload import Engine
from foreload.model.source import resolve_model

if TYPE_CHECKING:
    from collections.abc import Sequence

PROMPT_TOKENS = 100


def tie(engine: Engine, ids: Sequence[int], one: int, other: int) -> tuple[float, float]:
    """Give the gap between two tokens' logits behind a text, and the step of their type there."""
    logits = engine.forward(torch.tensor([list(ids)]), engine.make_cache())
    gap = abs(float(logits[one]) - float(logits[other]))
    size = abs(float(logits[one]))
    step = 2.0 ** math.floor(math.log2(max(size, 1e-9))) * torch.finfo(logits.dtype).eps
    return gap, step


def main() -> None:
    """Runs everything, and fails where a difference is no tie."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--draft", default="int4")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=128)
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings: dict[str, Any] = {"dtype": options.dtype, "expert_memory": "150%"}
    text = (resolve_model("demo") / "held_out.txt").read_text()
    with Engine.from_pretrained(options.model, predictor="none", **settings) as plain:
        if plain.tokenizer is None:
            raise SystemExit("the model has no tokenizer")
        ids = plain.tokenizer(text, verbose=False)["input_ids"]
        stride = len(ids) // options.prompts
        prompts = [ids[n * stride :][:PROMPT_TOKENS] for n in range(options.prompts)]
        wanted = [plain.generate(p, max_new_tokens=options.tokens).token_ids for p in prompts]
        worst = 0.0
        for number in (*range(1, 9), "auto"):
            same, ties = 0, []
            with Engine.from_pretrained(
                options.model, draft=options.draft, num_draft_tokens=number, **settings
            ) as engine:
                for prompt, true in zip(prompts, wanted, strict=True):
                    found = engine.generate(prompt, max_new_tokens=options.tokens).token_ids
                    if found == true:
                        same += 1
                        continue
                    pairs = enumerate(zip(found, true, strict=False))
                    place = next(i for i, (a, b) in pairs if a != b)
                    before = [*prompt, *true[:place]]
                    ties.append((place, *tie(plain, before, found[place], true[place])))
                rate, length = engine.metrics.acceptance_rate, engine.metrics.accept_length
            told = ", ".join(f"token {p}: gap {g:.4f}, step {s:.4f}" for p, g, s in ties)
            print(
                f"{options.dtype}, {number} draft tokens: {same} of {len(prompts)} texts the same; "
                f"accepted {rate or 0:.3f}, {length or 1:.2f} tokens per round. {told}",
                flush=True,
            )
            worst = max([worst, *(gap / step for _, gap, step in ties)])
    print(f"widest difference: {worst:.1f} steps of {options.dtype}")
    if worst > 8:
        raise SystemExit("a token differs that was no tie")


if __name__ == "__main__":
    main()
