"""Measure what knowing a round's experts is worth to eviction, against LRU and Belady.

    python benchmarks/foresight.py trace.jsonl.gz --widths 1,3,5,9 --budgets 5,10,25,50

Consecutive decoded tokens of a trace are verified in rounds of so many tokens. Hit rates without
prefetch: LRU, the default eviction, the same with foresight (each round's experts are known before
it begins, as a draft shows them, the last token's too), and Belady's, which knows all of the text.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from foreload.trace.read import read_trace
from foreload.trace.replay import in_rounds, replay

COUNT_FROM = 4


def main() -> None:
    """Prints one row per width and budget."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--widths", default="1,3,5,9")
    parser.add_argument("--budgets", default="5,10,25,50")
    options = parser.parse_args()
    trace = read_trace(options.trace)
    whole = trace.num_layers * trace.num_experts
    print(
        "| tokens per round | experts cached | LRU | history | LRU with foresight | "
        "history with foresight | Belady | of the gap from LRU to Belady |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for width in map(int, options.widths.split(",")):
        rounds = in_rounds(trace, width)
        for percent in map(float, options.budgets.split(",")):
            slots = max(1, round(whole * percent / 100))
            rates = [
                replay(rounds, slots, "lru", count_from=COUNT_FROM),
                replay(rounds, slots, "history", count_from=COUNT_FROM),
                replay(rounds, slots, "lru", count_from=COUNT_FROM, with_foresight=True),
                replay(rounds, slots, "history", count_from=COUNT_FROM, with_foresight=True),
                replay(rounds, slots, "belady", count_from=COUNT_FROM),
            ]
            lru, _, _, best, belady = (counts.hit_rate for counts in rates)
            shown = " | ".join(f"{counts.hit_rate:.3f}" for counts in rates)
            closed = (best - lru) / max(belady - lru, 1e-9)
            print(f"| {width} | {percent:g} % | {shown} | {closed:.0%} |")


if __name__ == "__main__":
    main()
