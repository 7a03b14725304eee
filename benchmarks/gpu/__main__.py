"""Check and time the device path on a machine with a CUDA device, stage by stage.

    PYTHONPATH=src:benchmarks python -m gpu equivalence suites profile --output FOLDER
    PYTHONPATH=src:benchmarks python -m gpu replay --trace FILE --output FOLDER

Each stage is to end well within ten minutes and writes a JSON file under `--output`, after every
row and whatever broke. Run through `scripts/gpu`, which has the stage of the bare kernels as well.
Nothing here runs on a machine without such a device; `tests/bench/test_gpu_stages.py` runs every
stage on one that is not there.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foreload.memory.cuda import has_device
from gpu.checks import equivalence, sampling
from gpu.kernels import kernels
from gpu.predictors import predictors
from gpu.profiles import profile
from gpu.replays import replay
from gpu.rows import broken, describe_run
from gpu.settings import Settings
from gpu.staged import tiers
from gpu.suites import baselines, drafts, slot_plan, speculation, suites

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from gpu.rows import Row

STAGES: dict[str, Callable[[Settings], Iterator[Row]]] = {
    "kernels": kernels,
    "equivalence": equivalence,
    "tiers": tiers,
    "sampling": sampling,
    "predictors": predictors,
    "suites": suites,
    "baselines": baselines,
    "speculation": speculation,
    "drafts": drafts,
    "slot_plan": slot_plan,
    "replay": replay,
    "profile": profile,
}


def main(argv: Sequence[str] | None = None, **sizes: Any) -> None:
    """Runs the stages that were asked for.

    Args:
        argv: The command's words.
        **sizes: Fields of `Settings`, whatever the options say.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="+", choices=STAGES)
    parser.add_argument("--output", type=Path, required=True, help="folder of the JSON files")
    parser.add_argument("--trace", type=Path, help="recorded routing, for replay")
    parser.add_argument("--layers", type=int, default=6, help="layers of the model to replay on")
    parser.add_argument("--trials", type=int, default=5, dest="num_trials", help="texts per arm")
    parser.add_argument("--shares", type=_numbers, help="percent of all experts, such as 15,30")
    parser.add_argument("--arms", type=_words, default=(), help="of the suites', or all")
    parser.add_argument("--contexts", type=_numbers, default=(), help="tokens of the prompt")
    arguments = vars(parser.parse_args(argv))
    if not has_device():
        sys.exit("this needs a CUDA device, and torch sees none here")
    stages = arguments.pop("stages")
    if shares := arguments.pop("shares"):
        arguments |= dict.fromkeys(("shares", "speculation_shares", "draft_shares"), shares)
    settings = Settings(**{**arguments, **sizes})
    settings.output.mkdir(parents=True, exist_ok=True)
    # A stage that broke leaves the others to run.
    fine = [run_stage(stage, settings) for stage in stages]
    sys.exit(0 if all(fine) else 1)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))


def run_stage(stage: str, settings: Settings) -> bool:
    """Runs a stage, keeps every row at once, and tells whether all were fine."""
    result: Row = {**describe_run(), "rows": []}
    begun = time.perf_counter()

    def keep(row: Row) -> None:
        result["rows"].append(row)
        result["took_s"] = time.perf_counter() - begun
        (settings.output / f"{stage}.json").write_text(json.dumps(result, indent=1) + "\n")

    try:
        for row in STAGES[stage](settings):
            keep(row)
    except Exception as error:
        keep(broken({}, error))
    return all(row.get("is_fine", True) for row in result["rows"])


if __name__ == "__main__":
    main()
