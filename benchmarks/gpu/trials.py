"""Runs arms in turns over the same texts, compares all logits, and sets times beside their limits.

All arms of a comparison are open together. Each trial has another text and begins with another
arm; an arm that breaks is left out from there on, and said to be.
"""

from __future__ import annotations

import statistics
import time
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from foreload.bench.arm import Sample
from foreload.bench.measure import judge
from foreload.bench.quality import pool_quality
from foreload.bench.workload import Workload, make_workloads
from foreload.errors import CapacityError
from foreload.model.hf import load_model, load_tokenizer
from gpu.rows import compare, failed, note
from gpu.settings import DEVICE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import Tensor

    from gpu.arms import Outcome, RunText
    from gpu.rows import Row
    from gpu.settings import Settings

TOLERANCE = 0.015
TOO_LATE = "the stage's time was up"


class Contender(NamedTuple):
    """An arm of a comparison.

    Attributes:
        name: As rows show it.
        open: Opens what runs texts.
        is_resident: Whether all experts are on the device: the quickest is the limit of all.
        is_lossy: Whether it may execute other experts than the routers ask for: then only the
            prompt's logits are held to the reference, and the others judged.
        num_tokens: Tokens it decodes; None for all. What is slow by an order needs fewer.
    """

    name: str
    open: Callable[[], AbstractContextManager[RunText]]
    is_resident: bool = False
    is_lossy: bool = False
    num_tokens: int | None = None


class Texts(NamedTuple):
    """What all arms decode, and what transformers' eager experts say behind each token of it."""

    windows: list[Workload]
    wanted: list[Tensor]


class Trial(NamedTuple):
    """One run of one arm: what was measured, how far its logits are off, what was counted."""

    sample: Sample
    launch_s: float | None
    compared: Row
    counted: Row


class Comparison:
    """What some arms took.

    Attributes:
        trials: Of each arm, by the trial's number; those that broke, or came too late, have fewer.
        errors: What broke, by arm.
        left_out: Why an arm could not be run, by arm.
        bandwidths: Bytes per second of a plain page-locked copy, by the trial's number.
    """

    def __init__(self, contenders: Sequence[Contender]) -> None:
        self.contenders = contenders
        self.trials: dict[str, dict[int, Trial]] = {each.name: {} for each in contenders}
        self.errors: dict[str, str] = {}
        self.left_out: dict[str, str] = {}
        self.bandwidths: list[float] = []

    def compute_s(self, trial: int) -> float | None:
        """Gives seconds per token of the quickest arm with all experts on the device."""
        resident = [each.name for each in self.contenders if each.is_resident]
        taken = [self.trials[name][trial] for name in resident if trial in self.trials[name]]
        return min((each.sample.tpot_s for each in taken), default=None)

    def over_limit(self, name: str, num_bytes: dict[int, float] | None = None) -> list[float]:
        """Gives, by trial, an arm's time over max(compute, bytes / bandwidth).

        Args:
            name: The arm.
            num_bytes: Bytes per token by trial; by default those that the arm moved.
        """
        found = []
        for number, trial in self.trials[name].items():
            compute_s = self.compute_s(number)
            if compute_s is None:
                continue
            moved = trial.sample.bytes_per_token if num_bytes is None else num_bytes[number]
            limit_s = max(compute_s, moved / self.bandwidths[number])
            found.append(trial.sample.tpot_s / limit_s)
        return found

    def over(self, name: str, other: str) -> list[float]:
        """Gives, by trial, the time of one arm over that of another."""
        mine, theirs = self.trials[name], self.trials[other]
        return [
            mine[number].sample.tpot_s / theirs[number].sample.tpot_s
            for number in mine
            if number in theirs
        ]

    def launches_ms(self, name: str) -> list[float]:
        """Gives, by trial, the milliseconds until the host was free again."""
        taken = [trial.launch_s for trial in self.trials[name].values()]
        return [each * 1e3 for each in taken if each is not None]

    def rows(self, place: Row) -> list[Row]:
        """Gives what is told of every arm."""
        return [self._row({**place, "arm": each.name}, each) for each in self.contenders]

    def _row(self, row: Row, contender: Contender) -> Row:
        if contender.name in self.errors:
            return failed(row, self.errors[contender.name])
        if contender.name in self.left_out:
            return {**row, "left_out": self.left_out[contender.name]}
        trials = list(self.trials[contender.name].values())
        if not trials:
            return {**row, "left_out": TOO_LATE}
        samples = [trial.sample for trial in trials]
        row |= {
            "tpot_ms": spread([sample.tpot_s * 1e3 for sample in samples]),
            "launch_ms": spread(self.launches_ms(contender.name)),
            "over_limit": spread(self.over_limit(contender.name)),
            "copy_gb_s": spread([each / 1e9 for each in self.bandwidths]),
            "bytes_per_token": spread([sample.bytes_per_token for sample in samples]),
            "counted": [trial.counted for trial in trials],
            "compared": [trial.compared for trial in trials],
            "is_fine": all(sample.is_equal for sample in samples),
        }
        quality = pool_quality(samples)
        if quality is not None:
            row["kl"] = list(_interval(quality.kl))
            row["perplexity_ratio"] = list(_interval(quality.perplexity_ratio))
            row["speculated_fraction"] = quality.speculated_fraction
        return row


def read_windows(settings: Settings, model: Path, *, num_decode_tokens: int) -> list[Workload]:
    """Cuts held-out text into a prompt and tokens to decode, a window for each trial."""
    from foreload.model.source import resolve_model

    tokenizer = load_tokenizer(model)
    text = "" if tokenizer is None else (resolve_model("demo") / "held_out.txt").read_text()
    return make_workloads(
        tokenizer,
        text,
        num_workloads=settings.num_trials,
        num_prompt_tokens=settings.num_prompt_tokens,
        num_decode_tokens=num_decode_tokens,
        vocab_size=load_model(model).model.get_input_embeddings().weight.shape[0],
    )


def run_trials(settings: Settings, contenders: Sequence[Contender], texts: Texts) -> Comparison:
    """Runs every arm over every text, in turns, until the stage's time is up."""
    found = Comparison(contenders)
    # What rounding alone makes of a lossy arm's measures is what exact arms have.
    is_judged = any(each.is_lossy for each in contenders)
    with ExitStack() as stack:
        runs: dict[str, RunText] = {}
        for each in contenders:
            if settings.is_over():
                break
            try:
                runs[each.name] = stack.enter_context(each.open())
                # Captures, and whatever else is slow once.
                runs[each.name](_shortened(texts.windows[0], settings.num_warm))
            except Exception as error:
                # A device that ran out of memory is its cause; a draft too large has none.
                if isinstance(error, CapacityError) and error.__cause__ is None:
                    found.left_out[each.name] = str(error)
                else:
                    found.errors[each.name] = note(error)
        for number, (window, wanted) in enumerate(zip(*texts, strict=True)):
            if settings.is_over():
                break
            found.bandwidths.append(copy_bandwidth(settings.link_bytes))
            turn = number % len(contenders)
            for each in (*contenders[turn:], *contenders[:turn]):
                if each.name in found.errors or each.name not in runs or settings.is_over():
                    continue
                text = _shortened(window, each.num_tokens)
                try:
                    outcome = runs[each.name](text)
                    trial = _check(each, outcome, text, wanted, number, is_judged=is_judged)
                    found.trials[each.name][number] = trial
                except Exception as error:
                    found.errors[each.name] = note(error)
    return found


def copy_bandwidth(num_bytes: int) -> float:
    """Measures a plain copy of page-locked memory to the device, bytes per second."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(num_bytes, dtype=torch.uint8, device=DEVICE)
    best_s = []
    for _ in range(4):
        torch.cuda.synchronize()
        start = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        best_s.append(time.perf_counter() - start)
    return num_bytes / min(best_s)


def spread(values: Sequence[float]) -> Row | None:
    """Gives median, range and every value."""
    if not values:
        return None
    return {
        "median": statistics.median(values),
        "least": min(values),
        "most": max(values),
        "each": list(values),
    }


def _shortened(window: Workload, num_tokens: int | None) -> Workload:
    if num_tokens is None:
        return window
    end = window.num_prompt_tokens + num_tokens
    return Workload(window.token_ids[:end], window.num_prompt_tokens)


def _check(
    contender: Contender,
    outcome: Outcome,
    text: Workload,
    wanted: Tensor,
    number: int,
    *,
    is_judged: bool,
) -> Trial:
    run, counted = outcome.run, outcome.counted
    held = run.logits[:1] if contender.is_lossy else run.logits
    compared = compare(held, wanted, tolerance=TOLERANCE)
    sample = Sample(
        arm=contender.name,
        budget=0.0,
        trial=number,
        tpot_s=sum(run.step_s) / text.num_decode_tokens,
        prefill_s=run.prefill_s,
        step_s=run.step_s,
        is_equal=compared["is_fine"] and counted.get("is_captured", True),
        is_lossy=contender.is_lossy,
        bytes_per_token=counted.get("bytes_per_token", 0.0),
        speculated_fraction=counted.get("speculated_fraction", 0.0),
    )
    if is_judged:
        run.logits = run.logits.cpu()
        sample.quality = judge(run, wanted[: len(run.logits)].cpu(), text)
    launch_s = statistics.median(outcome.launch_s) if outcome.launch_s else None
    return Trial(sample, launch_s, compared, counted)


def _interval(interval: Any) -> tuple[float, float, float]:
    return interval.value, interval.low, interval.high
