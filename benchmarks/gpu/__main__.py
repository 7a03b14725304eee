"""Check and time the device path on a machine with a CUDA device, stage by stage.

    PYTHONPATH=src:benchmarks python -m gpu equivalence suites profile --output FOLDER
    PYTHONPATH=src:benchmarks python -m gpu replay --trace FILE --output FOLDER

Each stage is to end within ten minutes and writes a JSON file under `--output`, after every row and
whatever broke; a second call writes another. Run through `scripts/gpu`, which has the stage of the
bare kernels as well. Nothing here runs on a machine without such a device;
`tests/bench/test_gpu_stages.py` runs every stage on one that is not there.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foreload.bench.suite import choose_arms
from foreload.errors import ConfigError, ForeloadError
from foreload.memory.cuda import has_device
from gpu.checks import equivalence, sampling
from gpu.kernels import kernels
from gpu.predictors import predictors
from gpu.profiles import profile
from gpu.replays import replay
from gpu.rows import broken, describe_run
from gpu.settings import Settings
from gpu.staged import tiers
from gpu.suites import SUITES, baselines, drafts, slot_plan, speculation, suites

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

OF_SHARES = ("equivalence", "suites", "baselines", "replay")


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
    parser.add_argument("--trials", type=_count, default=5, dest="num_trials", help="texts per arm")
    parser.add_argument(
        "--limit", type=_count, default=540, dest="limit_s", help="seconds that a stage may take"
    )
    parser.add_argument("--shares", type=_shares, help="percent of all experts, such as 15,30")
    parser.add_argument("--arms", type=_words, default=(), help="of the suites', or all")
    parser.add_argument("--contexts", type=_counts, default=(), help="tokens of the prompt")
    arguments = vars(parser.parse_args(argv))
    if not has_device():
        sys.exit("this needs a CUDA device, and torch sees none here")
    stages = arguments.pop("stages")
    try:
        _check(stages, **arguments)
    except ForeloadError as error:
        parser.error(str(error))
    if shares := arguments.pop("shares"):
        arguments |= dict.fromkeys(("shares", "speculation_shares", "draft_shares"), shares)
    settings = Settings(**{**arguments, **sizes})
    settings.output.mkdir(parents=True, exist_ok=True)
    # A stage that broke leaves the others to run.
    fine = [run_stage(stage, settings) for stage in stages]
    sys.exit(0 if all(fine) else 1)


def _check(
    stages: Sequence[str],
    *,
    trace: Path | None,
    arms: tuple[str, ...],
    shares: tuple[float, ...] | None,
    contexts: tuple[int, ...],
    **others: Any,
) -> None:
    """Refuses what no stage could do, before anything is made."""
    if "replay" in stages and trace is None:
        raise ConfigError("replay needs --trace FILE, a recorded routing")
    of_suites = [SUITES[stage] for stage in stages if stage in SUITES]
    if (arms or contexts) and not of_suites:
        raise ConfigError(f"--arms and --contexts are for {' and '.join(SUITES)}")
    if arms and arms != ("all",):
        choose_arms([arm for suite in of_suites for arm in suite], arms)
    if shares and not any(stage in SUITES or stage in OF_SHARES for stage in stages):
        raise ConfigError(f"--shares is for {', '.join((*OF_SHARES, *SUITES))}")
    if shares and min(shares) >= 100 and not of_suites and "equivalence" not in stages:
        raise ConfigError("a share below 100 leaves something to fetch")


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _shares(text: str) -> tuple[float, ...]:
    try:
        numbers = tuple(float(word) for word in text.split(","))
    except ValueError:
        numbers = (0.0,)
    if min(numbers) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r}: give percent above 0, such as 15,30")
    return numbers


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a number from 1 on")
    return int(text)


def _counts(text: str) -> tuple[int, ...]:
    return tuple(_count(word) for word in text.split(","))


def run_stage(stage: str, settings: Settings) -> bool:
    """Runs a stage, keeps every row at once, and tells whether all were fine."""
    begun = time.perf_counter()
    path, number = settings.output / f"{stage}.json", 1
    while path.exists():
        number += 1
        path = settings.output / f"{stage}-{number}.json"
    ends_at_s = begun + settings.limit_s
    settings = dataclasses.replace(settings, stem=path.stem, ends_at_s=ends_at_s)
    result: Row = {**describe_run(), "asked": settings.to_dict(), "rows": []}

    def keep(*rows: Row) -> None:
        result["rows"] += rows
        result["took_s"] = time.perf_counter() - begun
        path.write_text(json.dumps(result, indent=1) + "\n")

    keep()
    try:
        for row in STAGES[stage](settings):
            keep(row)
    except Exception as error:
        keep(broken({}, error))
    return all(row.get("is_fine", True) for row in result["rows"])


if __name__ == "__main__":
    main()
