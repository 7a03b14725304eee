"""Runs a suite: interleaved arms at several budgets and contexts, beside their limits.

Order of a trial: the reference logits (transformers, eager), the bandwidth, every arm. An arm whose
logits are not what they must be has its sample kept and no time printed. Here is what all suites
share, and the engine suite.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from foreload.bench.arm import Arm, Sample
from foreload.bench.machine import describe_machine
from foreload.bench.measure import (
    make_link,
    measure_bandwidth,
    run_engine_arm,
    run_stock_arm,
)
from foreload.bench.plots import plot_timeline, plot_tpot
from foreload.bench.probe import probe_experts
from foreload.bench.report import BudgetLimits, label_arm, summarise
from foreload.bench.workload import check_contexts, make_workloads
from foreload.config import EngineConfig, format_bytes
from foreload.engine import Engine
from foreload.errors import CapacityError, ConfigError
from foreload.model.headers import read_headers
from foreload.model.hf import load_model, load_tokenizer
from foreload.model.source import resolve_model
from foreload.predict.calibration import calibration_path
from foreload.predict.estimator import estimator_path
from foreload.resolution import default_cache_dir, resolve
from foreload.trace.replay import replay

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import Tensor

    from foreload.bench.workload import Workload
    from foreload.model.hf import LoadedModel
    from foreload.trace.record import RoutingTrace

    Summarise = Callable[[dict[str, Any], Sequence[Sample], Sequence[BudgetLimits]], str]
    Plot = Callable[[Sequence[Sample], Sequence[BudgetLimits], Path], None]

__all__ = [
    "ENGINE_ARMS",
    "ENGINE_SUITE",
    "Suite",
    "SuiteOptions",
    "SuiteResult",
    "choose_arms",
    "find_missing",
    "run_suite",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """What is run, and how its results are told.

    Attributes:
        name: As the command calls it.
        arms: Ways to run the model, at every budget and context. Beside them "all-resident" always
            runs.
        stock_arms: Ways to run transformers itself; the first gives the reference logits.
        budgets: Shares of all experts' bytes, unless others are asked for.
        contexts: Prompt lengths, unless others are asked for.
        summarise: Writes the Markdown summary.
        plot: Draws the figures into a folder.
        measures_shares: Whether its limits also count in that copying and computing slow each
            other down.
    """

    name: str
    arms: tuple[Arm, ...]
    stock_arms: tuple[Arm, ...]
    budgets: tuple[float, ...]
    contexts: tuple[int, ...]
    summarise: Summarise
    plot: Plot
    measures_shares: bool = False


RESIDENT = Arm("all-resident", {"predictor": "none"}, is_resident=True)
STOCK_ARMS = tuple(
    Arm(f"transformers {name}", implementation=name)
    for name in ("eager", "grouped_mm", "batched_mm")
)
ENGINE_ARMS: tuple[Arm, ...] = (
    Arm("on-demand", {"predictor": "none", "eviction": "none"}),
    Arm("lru", {"predictor": "none", "eviction": "lru"}),
    Arm("history", {"predictor": "none"}),
    Arm("lookahead", {"predictor": "lookahead"}),
    Arm("default-vectors", {"predictor": "default-vectors"}),
    Arm("auto", {"predictor": "auto"}),
    Arm("oracle", {"predictor": "none"}, is_oracle=True),
)
ENGINE_SUITE = Suite(
    name="engine",
    arms=ENGINE_ARMS,
    stock_arms=STOCK_ARMS,
    budgets=(0.1, 0.25, 0.5, 0.75),
    contexts=(100,),
    summarise=summarise,
    plot=plot_tpot,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteOptions:
    """What of a suite to run, on what.

    Attributes:
        model: Checkpoint.
        text: Held-out text file to decode; None takes the demo's.
        arms: Names to run; None for all that can.
        budgets: Shares of all experts' bytes; None for the suite's.
        contexts: Prompt lengths; None for the suite's. The decoded tokens are the same at each.
        num_trials: Trials, each on its own window of text.
        num_decode_tokens: Tokens decoded one at a time.
        dtype: Element type.
        with_stock: Whether transformers itself runs too; it needs memory for all experts.
        output: Where samples, table and figures go; None writes nothing.
        seed: Decides the windows.
        link_bytes_s: Bandwidth that copies are throttled to, to rehearse another machine; None
            takes what there is.
    """

    model: str = "demo"
    text: Path | None = None
    arms: tuple[str, ...] | None = None
    budgets: tuple[float, ...] | None = None
    contexts: tuple[int, ...] | None = None
    num_trials: int = 5
    num_decode_tokens: int = 64
    dtype: str = "auto"
    with_stock: bool = True
    output: Path | None = None
    seed: int = 0
    link_bytes_s: float | None = None


@dataclass(slots=True)
class SuiteResult:
    """Everything a run measured.

    Attributes:
        machine: What it was measured on.
        left_out: Arms that could not run, with the reason.
        samples: One per run of an arm.
        limits: One per trial, context and budget.
        summary: The tables.
    """

    machine: dict[str, Any]
    left_out: dict[str, str] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    limits: list[BudgetLimits] = field(default_factory=list)
    summary: str = ""


def run_suite(
    options: SuiteOptions,
    progress: Callable[[str, int, int], None] | None = None,
    *,
    suite: Suite = ENGINE_SUITE,
) -> SuiteResult:
    """Run a suite and write its results.

    Args:
        options: What to run.
        progress: Called with (what, done, total) before each arm.
        suite: Which suite.

    Raises:
        ConfigError: An unknown arm, one that lacks what it needs, too short a text, or a context
            that the model was not made for, no room for a layer's experts in a budget, or an
            output folder that cannot be made. What was measured before anything else breaks, or
            before an interruption, is written.
    """
    choose_arms(suite.arms, options.arms)
    if options.output is not None:
        _make_folder(options.output)
    run = _SuiteRun(suite, options, progress)
    try:
        for trial, workload in enumerate(run.workloads):
            run.run_trial(trial, workload)
    except BaseException:
        if options.output is not None and run.result.samples:
            run.write_samples(options.output)
        raise
    result = run.result
    result.summary = suite.summarise(result.machine, result.samples, result.limits)
    for name, reason in result.left_out.items():
        result.summary += f"\nLeft out: {name}, which needs {reason}.\n"
    if options.output is not None:
        run.write(options.output)
    return result


class _SuiteRun:
    """The model, the arms and what has been measured so far."""

    def __init__(
        self,
        suite: Suite,
        options: SuiteOptions,
        progress: Callable[[str, int, int], None] | None,
    ) -> None:
        directory = resolve_model(options.model)
        self._suite = suite
        self._options = options
        self._progress = progress
        self._budgets = options.budgets or suite.budgets
        self._contexts = options.contexts or suite.contexts
        self._loaded = load_model(directory, dtype=options.dtype)
        self._headers = read_headers(directory, dtype=options.dtype)
        self._directory = directory
        self._cache_dir = default_cache_dir()
        self.result = SuiteResult(machine=describe_machine(self._loaded, options.model))
        self.result.machine["link_bytes_s"] = options.link_bytes_s
        if not self.result.machine["is_random"]:
            limit = self._loaded.generation.max_positions
            check_contexts(self._contexts, options.num_decode_tokens, limit)
        self._check_budgets()
        self.arms = self._available_arms()
        self._stock = _load_stock(directory, self._loaded) if options.with_stock else None
        tokenizer = load_tokenizer(directory)
        self.workloads = make_workloads(
            tokenizer,
            "" if tokenizer is None else _read_text(options),
            num_workloads=options.num_trials,
            num_prompt_tokens=max(self._contexts),
            num_decode_tokens=options.num_decode_tokens,
            vocab_size=self._loaded.model.get_input_embeddings().weight.shape[0],
            seed=options.seed,
        )
        self._done = 0
        runs = len(self._contexts) * (1 + len(self._budgets) * len(self.arms))
        self._total = options.num_trials * runs

    def run_trial(self, trial: int, workload: Workload) -> None:
        """Run every arm at every context and budget on one window of text."""
        for number, context in enumerate(self._contexts):
            # Another order each time: no arm always follows the same neighbour.
            turn = (trial * len(self._contexts) + number) % max(len(self.arms), 1)
            arms = self.arms[turn:] + self.arms[:turn]
            self._run_context(trial, workload.shortened(context), arms)

    def write(self, output: Path) -> None:
        """Write what was measured and what it comes to, and draw the figures."""
        self.write_samples(output)
        (output / "summary.md").write_text(self.result.summary)
        self._suite.plot(self.result.samples, self.result.limits, output)

    def write_samples(self, output: Path) -> None:
        """Write what was measured."""
        result, options = self.result, self._options
        (output / "machine.json").write_text(json.dumps(result.machine, indent=1) + "\n")
        config = {
            "suite": self._suite.name,
            **asdict(options),
            "text": None if options.text is None else str(options.text),
            "arms": [arm.name for arm in self.arms],
            "budgets": self._budgets,
            "contexts": self._contexts,
            "output": None,
        }
        (output / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        lines = [json.dumps(sample.to_dict()) for sample in result.samples]
        lines += [json.dumps({"limits": asdict(limits)}) for limits in result.limits]
        (output / "samples.jsonl").write_text("\n".join(lines) + "\n")

    def _run_context(self, trial: int, workload: Workload, arms: Sequence[Arm]) -> None:
        reference = self._run_stock(trial, workload)
        place = f"trial {trial + 1}, {workload.num_prompt_tokens} tokens"
        self._tell(f"{place}: all resident")
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
        compute_share, copy_share = self._measure_shares()
        for budget in self._budgets:
            limits = self._limits(trace, budget, trial, sample.tpot_s, workload)
            self.result.limits.append(
                replace(limits, compute_share=compute_share, copy_share=copy_share)
            )
            for arm in arms:
                self._tell(f"{place}: {arm.name} at {budget:.0%}")
                if not self._fits(arm, budget):
                    continue
                self._run_arm(arm, budget, trial, workload, trace, reference)

    def _measure_shares(self) -> tuple[float, float]:
        """Measure what copying and computing keep of their speed beside each other."""
        if not self._suite.measures_shares:
            return 1.0, 1.0
        probe = probe_experts(
            self._headers,
            folder=self._directory,
            link=make_link(self._options.link_bytes_s),
        )
        return probe.compute_share, probe.copy_share

    def _fits(self, arm: Arm, budget: float) -> bool:
        """Tell whether a budget has room for an arm's draft; note it where it has not."""
        if not arm.has_draft or arm.is_resident or arm.is_draft_alone:
            return True
        memory = f"{budget * 100:g}%"
        settings = {"orchestration": "host", **(arm.settings or {}), "expert_memory": memory}
        try:
            resolve(EngineConfig.from_dict(settings), self._loaded)
        except CapacityError as error:
            needed = f"{format_bytes(error.needed_bytes)} of memory"
            self.result.left_out[f"{arm.name} at {budget:.0%}"] = needed
            return False
        return True

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
        is_first = trial == 0 and workload.num_prompt_tokens == self._contexts[0]
        drawn = output is not None and is_first
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
            link_bytes_s=self._options.link_bytes_s,
        )
        if self.result.machine["is_random"]:
            sample.quality = {}
        self.result.samples.append(sample)
        if drawn and sample.is_equal and output is not None:
            name = f"timeline-{arm.name}-{budget * 100:.0f}.png"
            title = f"{label_arm(arm.name, [sample])}, {budget:.0%}"
            plot_timeline(timeline, sample.step_s, output / name, title=title)

    def _run_stock(self, trial: int, workload: Workload) -> Tensor | None:
        """Run transformers itself; give the eager logits."""
        reference = None
        if self._stock is None:
            return None
        for arm in self._suite.stock_arms:
            sample, run = run_stock_arm(
                self._stock, arm, workload, trial=trial, reference=reference
            )
            self.result.samples.append(sample)
            if reference is None:
                reference = run.logits
        return reference

    def _limits(
        self, trace: RoutingTrace, budget: float, trial: int, compute_s: float, workload: Workload
    ) -> BudgetLimits:
        """Measure the bandwidth and replay the trace under every policy."""
        memory = f"{budget * 100:g}%"
        asked = EngineConfig(expert_memory=memory, predictor="none", orchestration="host")
        config = resolve(asked, self._loaded)
        with Engine(
            self._loaded,
            None,
            config,
            cache_dir=self._cache_dir,
            link=make_link(self._options.link_bytes_s),
        ) as engine:
            bandwidth = measure_bandwidth(engine)
            slots = engine.tiers.num_slots
        names = ("none", "lru", "lfu", "least-stale", "next-use", "history", "belady")
        counts = {name: replay(trace, slots, name, count_from=1) for name in names}
        num_tokens = workload.num_decode_tokens
        return BudgetLimits(
            budget=budget,
            trial=trial,
            context=workload.num_prompt_tokens,
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
        """Give the arms that can run; what was asked for by name must be able to."""
        available = []
        for arm in choose_arms(self._suite.arms, self._options.arms):
            missing = find_missing(arm, self._loaded.spec.identity, self._cache_dir)
            if missing is None:
                available.append(arm)
                continue
            needed, verb = missing
            if self._options.arms:
                raise ConfigError(
                    f"the arm {arm.name} needs {needed}, and there is none",
                    hint=f"run `foreload {verb} {self._options.model}` first",
                )
            self.result.left_out[arm.name] = f"{needed} (`foreload {verb}`)"
        return available

    def _check_budgets(self) -> None:
        """Refuse budgets that no engine could be opened with."""
        for budget in self._budgets:
            memory = f"{budget * 100:g}%"
            asked = EngineConfig(expert_memory=memory, predictor="none", orchestration="host")
            resolve(asked, self._loaded)

    def _tell(self, what: str) -> None:
        if self._progress is not None:
            self._progress(what, self._done, self._total)
        self._done += 1


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cannot write to {path}: {error}", hint="give a folder that can be written to"
        ) from error


def choose_arms(arms: Sequence[Arm], names: Sequence[str] | None) -> list[Arm]:
    """Give the arms of these names, or all.

    Raises:
        ConfigError: One of the names is no arm's.
    """
    known = {arm.name: arm for arm in arms}
    for name in names or ():
        if name not in known:
            raise ConfigError(f"unknown arm {name!r}", hint=f"known are {', '.join(known)}")
    return [known[name] for name in (names or known)]


def find_missing(arm: Arm, identity: str, cache_dir: Path) -> tuple[str, str] | None:
    """Tell what an arm needs that has not been made, and which verb makes it."""
    predictor = (arm.settings or {}).get("predictor")
    if predictor == "default-vectors":
        is_there = calibration_path(cache_dir, identity).is_file()
        return None if is_there else ("a calibration", "calibrate")
    if predictor == "estimator":
        is_there = estimator_path(cache_dir, identity).is_file()
        return None if is_there else ("an estimator", "train-estimator")
    return None


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
