"""Check a converted file: llama.cpp must predict what transformers predicts, on held-out text.

Both follow the same tokens. transformers runs in float32 as the truth and in bf16 as the yardstick:
llama.cpp passes if it departs from float32 hardly more than transformers' own bf16 does. The
checkpoint must fit in memory twice over: check the unwidened model, or one widened a little.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from arms import LlamaCpp
from run import cut_windows, read_tokens
from transformers import AutoModelForCausalLM

if TYPE_CHECKING:
    from torch import Tensor

NUM_TOP = 5
# The yardstick is itself a sample of a few hundred positions.
SLACK = 0.03


def read_llama(gguf: Path, prompt: list[int], forced: list[int], threads: int) -> list[dict]:
    """Follow the tokens in llama.cpp: the likeliest ones and their log-probabilities, per step."""
    spec = {"gguf": str(gguf), "prompt": prompt, "forced": forced, "threads": threads}
    arm = LlamaCpp(spec)
    arm.load()
    return [dict(arm.top(new, NUM_TOP)) for new in [prompt, *([token] for token in forced)]]


def read_transformers(model: Path, tokens: list[int], start: int, dtype: torch.dtype) -> Tensor:
    """Follow them in transformers: (positions, V) log-probabilities from position `start` on."""
    network = AutoModelForCausalLM.from_pretrained(
        model, dtype=dtype, experts_implementation="eager"
    )
    with torch.inference_mode():
        logits = network(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, start:]
    return logits.float().log_softmax(-1)


def main() -> None:
    """Compare on a few windows of text; the exit status says whether it passed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--text", type=Path, default=Path(argparse.__file__))
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    same = {"llama.cpp": 0, "transformers bf16": 0}
    apart: dict[str, list[float]] = {name: [] for name in same}
    num_positions = 0
    tokens = read_tokens(arguments.model, arguments.text)
    for prompt, forced in cut_windows(tokens, 100, 64, arguments.windows):
        start = len(prompt) - 1
        sequence = prompt + forced
        truth = read_transformers(arguments.model, sequence, start, torch.float32)
        yardstick = read_transformers(arguments.model, sequence, start, torch.bfloat16)
        found = read_llama(arguments.gguf, prompt, forced, arguments.threads)
        num_positions += len(found)
        for position, top in enumerate(found):
            best = int(truth[position].argmax())
            same["llama.cpp"] += best == max(top, key=lambda token: top[token])
            same["transformers bf16"] += best == int(yardstick[position].argmax())
            for token, log_probability in top.items():
                exact = float(truth[position, token])
                apart["llama.cpp"].append(abs(log_probability - exact))
                apart["transformers bf16"].append(abs(float(yardstick[position, token]) - exact))
    for name in same:
        print(
            f"{name}: same likeliest token as float32 at {same[name] / num_positions:.3f} of "
            f"{num_positions} positions; log-probabilities of llama.cpp's top {NUM_TOP} apart by "
            f"{sum(apart[name]) / len(apart[name]):.4f} on average, {max(apart[name]):.3f} at most"
        )
    if (same["transformers bf16"] - same["llama.cpp"]) / num_positions > SLACK:
        sys.exit("llama.cpp computes something else")


if __name__ == "__main__":
    main()
