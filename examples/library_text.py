"""Write the standard library's source to one file, the demo model's held-out modules left out.

    python examples/library_text.py library.txt --megabytes 2

Text to train an estimator for the demo model on: like the text it was trained on, and none of what
`held_out.txt` is taken from.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from demo_corpus import collect, write_sample

LONGEST = 40_000


def main() -> None:
    """Writes the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--megabytes", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    documents = collect().train
    random.Random(options.seed).shuffle(documents)
    write_sample(options.file, documents, int(options.megabytes * 1e6), LONGEST)
    print(f"{options.file.stat().st_size:,} bytes in {options.file}")


if __name__ == "__main__":
    main()
