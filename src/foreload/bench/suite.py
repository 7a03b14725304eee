"""The engine suite: interleaved arms at several budgets, beside their limits.

Order of a trial: the reference logits (transformers, eager), the bandwidth, every arm. An arm whose
logits are not the reference's has its sample kept and no time printed.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from foreload.bench.machine import describe_machine
from foreload.bench.measure import (
    Arm,
    Sample,
    measure_bandwidth,
    run_engine_arm,
    run_stock_arm,
)
from foreload.bench.plots import plot_timeline, plot_tpot
from foreload.bench.report import BudgetLimits, summarise
from foreload.bench.workload import make_workloads
from foreload.config import EngineConfig
from foreload.engine import Engine, default_cache_dir, resolve
from foreload.errors import ConfigError
from foreload.model.hf import load_model, load_tokenizer
from foreload.model.source import resolve_model
from foreload.predict.calibration import calibration_path
from foreload.trace.replay import replay

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from foreload.bench.workload import Workload
    from foreload.model.hf import LoadedModel
    from foreload.trace.record import RoutingTrace

__all__ = ["ENGINE_ARMS", "SuiteOptions", "run_suite"]

ENGINE_ARMS: tuple[Arm, ...] = (
    Arm("on-demand", {"predictor": "none", "eviction": "none"}),
    Arm("lru", {"predictor": "none", "eviction": "lru"}),
    Arm("history", {"predictor": "none"}),
    Arm("lookahead", {"predictor": "lookahead"}),
    Arm("default-vectors", {"predictor": "default-vectors"}),
    Arm("auto", {"predictor": "auto"}),
    Arm("oracle", {"predictor": "none"}, is_oracle=True),
)
RESIDENT = Arm("all-resident", {"predictor": "none"}, is_resident=True)
STOCK_ARMS = tuple(
    Arm(f"transformers {name}", implementation=name)
    for name in ("eager", "grouped_mm", "batched_mm")
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteOptions:
    """What to run.

    Attributes:
        model: Checkpoint.
        text: Held-out text file to decode; None takes the demo's.
        arms: Names to run; None for all. "all-resident" always runs.
        budgets: Shares of all experts' bytes.
        num_trials: Trials, each on its own window of text.
        num_prompt_tokens: Prompt length.
        num_decode_tokens: Tokens decoded one at a time.
        dtype: Element type.
        with_stock: Whether transformers itself runs too; it needs memory for all experts.
        output: Where samples, table and figures go; None writes nothing.
        seed: Decides the windows.
    """

    model: str = "demo"
    text: Path | None = None
    arms: tuple[str, ...] | None = None
    budgets: tuple[float, ...] = (0.25,)
    num_trials: int = 5
    num_prompt_tokens: int = 100
    num_decode_tokens: int = 64
    dtype: str = "auto"
    with_stock: bool = True
    output: Path | None = None
    seed: int = 0


@dataclass(slots=True)
class SuiteResult:
    """Everything a run measured."""

    machine: dict[str, Any]
    samples: list[Sample] = field(default_factory=list)
    limits: list[BudgetLimits] = field(default_factory=list)
    summary: str = ""


def run_suite(
    options: SuiteOptions, progress: Callable[[str, int, int], None] | None = None
) -> SuiteResult:
    """Run the suite and write its results.

    Args:
        options: What to run.
        progress: Called with (what, done, total) before each arm.

    Raises:
        ConfigError: An unknown arm, or too short a text.
    """
    _choose_arms(options)
    suite = _Suite(options, progress)
    for trial, workload in enumerate(suite.workloads):
        suite.run_trial(trial, workload)
    suite.result.summary = summarise(
        suite.result.machine, suite.result.samples, suite.result.limits
    )
    if options.output is not None:
        _write(options.output, options, suite.result)
    return suite.result


class _Suite:
    """The model, the arms and what has been measured so far."""

    def __init__(
        self, options: SuiteOptions, progress: Callable[[str, int, int], None] | None
    ) -> None:
        directory = resolve_model(options.model)
        self._options = options
        self._progress = progress
        self._loaded = load_model(directory, dtype=options.dtype)
        self._cache_dir = default_cache_dir()
        self._arms = self._available_arms()
        self._stock = _load_stock(directory, self._loaded) if options.with_stock else None
        tokenizer = load_tokenizer(directory)
        self.workloads = make_workloads(
            tokenizer,
            "" if tokenizer is None else _read_text(options),
            num_workloads=options.num_trials,
            num_prompt_tokens=options.num_prompt_tokens,
            num_decode_tokens=options.num_decode_tokens,
            vocab_size=self._loaded.model.get_input_embeddings().weight.shape[0],
            seed=options.seed,
        )
        self.result = SuiteResult(machine=describe_machine(self._loaded, options.model))
        self._done = 0
        self._total = options.num_trials * (1 + len(options.budgets) * len(self._arms))

    def run_trial(self, trial: int, workload: Workload) -> None:
        """Run every arm at every budget on one window of text."""
        reference = self._run_stock(trial, workload)
        self._tell(f"trial {trial + 1}: all resident")
        sample, run, trace, _ = run_engine_arm(
            self._loaded,
            RESIDENT,
            workload,
            budget=1.0,
            trial=trial,
            cache_dir=self._cache_dir,
            reference=reference,
        )
        self.result.samples.append(sample)
        if reference is None:
            reference = run.logits
        # Another order each trial: no arm always follows the same neighbour.
        turn = trial % max(len(self._arms), 1)
        for budget in self._options.budgets:
            self.result.limits.append(
                self._limits(trace, budget, trial, sample.tpot_s, workload.num_decode_tokens)
            )
            for arm in self._arms[turn:] + self._arms[:turn]:
                self._tell(f"trial {trial + 1}: {arm.name} at {budget:.0%}")
                self._run_arm(arm, budget, trial, workload, trace, reference)

    def _run_arm(
        self,
        arm: Arm,
        budget: float,
        trial: int,
        workload: Workload,
        trace: RoutingTrace,
        reference: Tensor,
    ) -> None:
        output = self._options.output
        drawn = output is not None and trial == 0
        sample, _, _, timeline = run_engine_arm(
            self._loaded,
            arm,
            workload,
            budget=budget,
            trial=trial,
            cache_dir=self._cache_dir,
            trace=trace,
            reference=reference,
            with_timeline=drawn,
        )
        self.result.samples.append(sample)
        if drawn and sample.is_equal and output is not None:
            output.mkdir(parents=True, exist_ok=True)
            name = f"timeline-{arm.name}-{budget * 100:.0f}.png"
            plot_timeline(timeline, sample.step_s, output / name, title=f"{arm.name}, {budget:.0%}")

    def _run_stock(self, trial: int, workload: Workload) -> Tensor | None:
        """Run transformers itself; give the eager logits."""
        reference = None
        if self._stock is None:
            return None
        for arm in STOCK_ARMS:
            sample, run = run_stock_arm(
                self._stock, arm, workload, trial=trial, reference=reference
            )
            self.result.samples.append(sample)
            if reference is None:
                reference = run.logits
        return reference

    def _limits(
        self, trace: RoutingTrace, budget: float, trial: int, compute_s: float, num_tokens: int
    ) -> BudgetLimits:
        """Measure the bandwidth and replay the trace under every policy."""
        memory = f"{budget * 100:g}%"
        config = resolve(EngineConfig(expert_memory=memory, predictor="none"), self._loaded)
        with Engine(self._loaded, None, config, cache_dir=self._cache_dir) as engine:
            bandwidth = measure_bandwidth(engine)
            slots = engine.tiers.num_slots
        names = ("none", "lru", "lfu", "least-stale", "next-use", "history", "belady")
        counts = {name: replay(trace, slots, name, count_from=1) for name in names}
        return BudgetLimits(
            budget=budget,
            trial=trial,
            num_slots=slots,
            bandwidth_bytes_s=bandwidth,
            compute_s=compute_s,
            expert_bytes=self._loaded.plans[0][0].read_bytes,
            hit_rates={name: count.hit_rate for name, count in counts.items()},
            misses_per_token={
                name: count.num_misses / num_tokens for name, count in counts.items()
            },
        )

    def _available_arms(self) -> list[Arm]:
        arms = _choose_arms(self._options)
        calibration = calibration_path(self._cache_dir, self._loaded.spec.identity)
        if calibration.is_file():
            return arms
        if self._options.arms and "default-vectors" in self._options.arms:
            raise ConfigError(
                "the arm default-vectors needs a calibration, and there is none",
                hint=f"run `foreload calibrate {self._options.model}` first",
            )
        return [arm for arm in arms if arm.name != "default-vectors"]

    def _tell(self, what: str) -> None:
        if self._progress is not None:
            self._progress(what, self._done, self._total)
        self._done += 1


def _choose_arms(options: SuiteOptions) -> list[Arm]:
    known = {arm.name: arm for arm in ENGINE_ARMS}
    for name in options.arms or ():
        if name not in known:
            raise ConfigError(f"unknown arm {name!r}", hint=f"known are {', '.join(known)}")
    return [known[name] for name in (options.arms or known)]


def _read_text(options: SuiteOptions) -> str:
    path = options.text or resolve_model("demo") / "held_out.txt"
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the text {path}: {error}") from error


def _load_stock(directory: Path, loaded: LoadedModel) -> Any:
    """Load the model with all experts in memory, as transformers does."""
    stock = type(loaded.model).from_pretrained(
        directory, dtype=loaded.model.dtype, experts_implementation="eager"
    )
    # Torch rounds a product with misaligned weights differently, and files align to 8 bytes only.
    for parameter in stock.parameters():
        parameter.data = parameter.data.clone()
    return stock.eval().requires_grad_(False)


def _write(output: Path, options: SuiteOptions, result: SuiteResult) -> None:
    output.mkdir(parents=True, exist_ok=True)
    (output / "machine.json").write_text(json.dumps(result.machine, indent=1) + "\n")
    text = None if options.text is None else str(options.text)
    config = {**asdict(options), "text": text, "output": None}
    (output / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    lines = [json.dumps(sample.to_dict()) for sample in result.samples]
    lines += [json.dumps({"limits": asdict(limits)}) for limits in result.limits]
    (output / "samples.jsonl").write_text("\n".join(lines) + "\n")
    (output / "summary.md").write_text(result.summary)
    plot_tpot(result.samples, result.limits, output)
