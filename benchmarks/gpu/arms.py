"""Ways to decode a given text on the device, each opened once and run on text after text.

An arm gives, for a workload, the logits of every step, the time of every step, and what was counted
behind the prompt. What a step leaves is waited for by asking which token is the likeliest, as
greedy decoding does.
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from foreload.bench.forced import ForcedRun, run_forced, run_rounds
from foreload.bench.measure import load_all
from foreload.model.device_self_draft import DeviceSelfDraft
from foreload.model.graph import StepGraphs, forward_all
from foreload.model.kv_cache import make_kv_cache, make_static_cache
from foreload.model.sites import discover_sites
from foreload.predict.estimator import Estimator
from foreload.trace.record import RoutingRecorder
from foreload.types import RouterOutput
from gpu.models import load_resident, open_engine, open_staged
from gpu.settings import DEVICE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from torch import Tensor

    from foreload import Engine
    from foreload.bench.workload import Workload
    from foreload.model.graph import StepGraph
    from foreload.trace.record import RoutingTrace
    from foreload.types import RoutingEvent
    from gpu.rows import Row

    RunText = Callable[[Workload], "Outcome"]

RESIDENT = ("grouped_mm", "batched_mm")


class Outcome(NamedTuple):
    """One run of one arm over one workload.

    Attributes:
        run: Logits (1 + T, V) on the device, and seconds of every step or round.
        launch_s: Seconds of each step until the host was free again; empty where the host itself
            takes part in the step.
        counted: What was counted behind the prompt.
    """

    run: ForcedRun
    launch_s: list[float]
    counted: Row


class _Guesses:
    """A predictor of the next layer's experts that was told them beforehand.

    Args:
        steps: (L, 1, K) int64 of each step.
    """

    name = "told"

    def __init__(self, steps: list[Tensor]) -> None:
        self._now = torch.zeros_like(steps[0], device=DEVICE)
        self.tell(steps)

    def tell(self, steps: list[Tensor]) -> None:
        """Has it guess these steps from now on, at the addresses it has."""
        self._steps = steps

    def begin(self, number: int) -> None:
        """Sets what is guessed in a step; the host does not wait."""
        self._now.copy_(self._steps[number % len(self._steps)], non_blocking=True)

    def route_next(self, event: RoutingEvent) -> RouterOutput | None:
        """Gives what it was told of the next layer, for single tokens."""
        if len(event.top_k_index) != 1 or event.layer + 1 == len(self._now):
            return None
        return RouterOutput(self._now[event.layer + 1], None, None)


class Forcing:
    """Sends single tokens where a trace says, whatever the routers answer.

    Args:
        demands: Experts of each step and layer.
        top_k: Experts of each of them.
        num_experts: Experts of a layer, among which wrong guesses are drawn.
    """

    def __init__(
        self, demands: Sequence[Sequence[Sequence[int]]], top_k: int, num_experts: int
    ) -> None:
        self._steps = _pin_steps(demands, top_k)
        self._top_k = top_k
        self._num_experts = num_experts
        self._now = torch.zeros_like(self._steps[0], device=DEVICE)
        self._guesses: dict[float, _Guesses] = {}

    def guess(self, recall: float) -> _Guesses:
        """Gives a predictor that names the next layer's experts with so much recall, and others."""
        if recall not in self._guesses:
            generator = torch.Generator().manual_seed(0)
            steps = []
            for step in self._steps:
                is_right = torch.rand(step.shape, generator=generator) < recall
                other = torch.randint(self._num_experts, step.shape, generator=generator)
                told = torch.where(is_right, step, other)
                steps.append(torch.tensor(told.tolist(), pin_memory=True))
            self._guesses[recall] = _Guesses(steps)
        return self._guesses[recall]

    def attach(self, model: Any) -> None:
        """Have the experts of a model called with what the trace says."""
        for site in discover_sites(model):
            redirect = functools.partial(self._redirect, site.layer)
            site.experts.register_forward_pre_hook(redirect)

    def begin(self, number: int) -> None:
        """Set where the tokens of a step go; the host does not wait."""
        self._now.copy_(self._steps[number % len(self._steps)], non_blocking=True)
        for guesses in self._guesses.values():
            guesses.begin(number)

    def _redirect(self, layer: int, module: Any, given: tuple[Tensor, ...]) -> Any:
        hidden, index, weights = given
        if len(index) != 1:
            return None
        return hidden, self._now[layer], weights[:, : self._top_k].contiguous()


class Told:
    """Guesses what a text's own trace says, text by text: an oracle of the next layer.

    Args:
        traces: Routing of each text, the prompt being its first step.
        top_k: Experts of a token.
    """

    def __init__(self, traces: Sequence[tuple[Workload, RoutingTrace]], top_k: int) -> None:
        self._steps = {}
        for text, trace in traces:
            demands = [[visit.experts for visit in step] for step in trace.steps[1:]]
            self._steps[_prompt(text)] = _pin_steps(demands, top_k)
        self.guesses = _Guesses(next(iter(self._steps.values())))

    def start(self, text: Workload) -> None:
        """Has the guesses be of this text."""
        self.guesses.tell(self._steps[_prompt(text)])

    def begin(self, number: int) -> None:
        """Sets what is guessed in a step."""
        self.guesses.begin(number)


def _pin_steps(demands: Sequence[Sequence[Sequence[int]]], top_k: int) -> list[Tensor]:
    """Gives (L, 1, K) page-locked indices of each step."""
    return [
        torch.tensor([[list(experts[:top_k])] for experts in layers], pin_memory=True)
        for layers in demands
    ]


def _prompt(text: Workload) -> tuple[int, ...]:
    return text.token_ids[: text.num_prompt_tokens]


class _Steps:
    """The forward of a forced run: the prompt first, then one token at a time.

    Args:
        prefill: From the prompt's token ids (1, T) and a cache to the last logits (V,).
        ask: From a token to the logits (V,) behind it, waited for.
        teller: Told of each single token's step before it; None where nothing is.
    """

    def __init__(
        self,
        prefill: Callable[[Tensor, Any], Tensor],
        ask: Callable[[int], Tensor],
        teller: Forcing | Told | None = None,
    ) -> None:
        self._prefill = prefill
        self._ask = ask
        self._teller = teller
        self._number = -1

    def __call__(self, token_ids: Tensor, kv_cache: Any) -> Tensor:
        number, self._number = self._number, self._number + 1
        if number < 0:
            return self._prefill(token_ids, kv_cache).to(DEVICE)
        if self._teller is not None:
            self._teller.begin(number)
        return self._ask(int(token_ids)).to(DEVICE)


class _Launches:
    """Asks a step for one token after the other, as greedy decoding does.

    Attributes:
        took_s: Seconds of each until the host was free again.
    """

    def __init__(self, step: StepGraph) -> None:
        self.took_s: list[float] = []
        self._step = step

    def __call__(self, token: int) -> Tensor:
        start = time.perf_counter()
        logits, likeliest = self._step.run([token])
        self.took_s.append(time.perf_counter() - start)
        # The next step's will be where these are.
        kept = logits[-1].clone()
        int(likeliest[-1])
        return kept


class _Counts:
    """What an engine counts behind the prompt."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def prefill(self, token_ids: Tensor, kv_cache: Any) -> Tensor:
        engine = self._engine
        logits = engine._prefill(token_ids, kv_cache).to(DEVICE)
        engine._count()
        self._before = engine.metrics.snapshot()
        if engine.drafter is not None:
            self._rounds = Counter(engine.drafter.governor.rounds_by_draft)
        return logits

    def since(self, workload: Workload) -> Row:
        engine, num_tokens = self._engine, workload.num_decode_tokens
        engine._count()
        counted = engine.metrics.since(self._before)
        found = {
            "orchestration": engine.config.orchestration,
            "predictor": engine.config.predictor,
            "num_slots": engine.num_slots,
            "hit_rate": counted.hit_rate,
            "bytes_per_token": counted.bytes_moved / num_tokens,
            "prefetch_precision": counted.prefetch_precision,
            "speculated_fraction": counted.speculated_fraction,
        }
        if engine.config.orchestration == "device":
            found["slots_per_layer"] = list(engine.slots_per_layer)
        if engine.drafter is not None:
            rounds = engine.drafter.governor.rounds_by_draft - self._rounds
            found |= {
                "acceptance_rate": counted.acceptance_rate,
                "accept_length": counted.accept_length,
                "rounds_by_draft": dict(sorted(rounds.items())),
            }
        return found


@contextmanager
def device_arm(
    model: Path,
    share: float,
    *,
    forcing: Forcing | None = None,
    recall: float | None = None,
    told: Told | None = None,
    **settings: Any,
) -> Iterator[RunText]:
    """Opens an engine whose device decides.

    Args:
        model: The checkpoint.
        share: Of all experts, percent.
        forcing: Where single tokens are sent; None lets the routers say.
        recall: That of guesses at a forced routing.
        told: Guesses in place of the predictor's.
        **settings: Of the engine.
    """
    with open_engine(model, share, **settings) as engine:
        path = engine._device
        if path is None:
            raise RuntimeError("the engine does not let the device decide")
        if forcing is not None:
            forcing.attach(engine.model)
            if recall is not None:
                path.runtime._predictor = forcing.guess(recall)
        if told is not None:
            path.runtime._predictor = told.guesses

        def run(workload: Workload) -> Outcome:
            counts = _Counts(engine)
            if told is not None:
                told.start(workload)
            with path.lend_step(len(workload.token_ids)) as step:
                if step is None:
                    raise RuntimeError(f"{engine.spec.architecture} has no static KV cache")
                is_captured = _capture(engine, step)
                launches = _Launches(step)
                if engine.drafter is not None:
                    ran = run_rounds(engine.drafter, counts.prefill, workload, step.cache)
                else:
                    steps = _Steps(counts.prefill, launches, told or forcing)
                    ran = run_forced(steps, workload, step.cache)
            counted = {"is_captured": is_captured, **counts.since(workload)}
            return Outcome(ran, launches.took_s, counted)

        yield run


def _capture(engine: Engine, step: StepGraph) -> bool:
    """Capture whatever a request may use, before any clock runs; tell whether all could be."""
    steps, drafter = [step], engine.drafter
    if isinstance(drafter, DeviceSelfDraft):
        widths = range(2, drafter.governor.most + 2)
        steps += [drafter.verifying_step(step, width) for width in widths]
        steps.append(drafter.drafting_step(step))
    for each in steps:
        each.prepare()
    return all(each.is_captured for each in steps)


@contextmanager
def host_arm(
    model: Path,
    share: float,
    *,
    forcing: Forcing | None = None,
    is_layerwise: bool = False,
    is_pure: bool = False,
    **settings: Any,
) -> Iterator[RunText]:
    """Opens an engine whose host decides, with every expert in page-locked host memory.

    Args:
        model: The checkpoint.
        share: Of all experts on the device, percent.
        forcing: Where single tokens are sent; None lets the routers say.
        is_layerwise: Whether a layer waits for all of its experts.
        is_pure: Whether an estimator speaks for every layer.
        **settings: Of the engine.
    """
    with open_staged(model, share, 100, **settings) as engine:
        engine.tiers.is_layerwise = is_layerwise
        predictor = engine.runtime.predictor
        if is_pure and isinstance(predictor, Estimator):
            engine.runtime.predictor = predictor.make_pure()
        load_all(engine)
        if forcing is not None:
            forcing.attach(engine.model)

        def run(workload: Workload) -> Outcome:
            counts, cache = _Counts(engine), engine.make_cache()

            def ask(token: int) -> Tensor:
                return engine.forward(torch.tensor([[token]]), cache)

            ran = run_forced(_Steps(counts.prefill, ask, forcing), workload, cache)
            return Outcome(ran, [], counts.since(workload))

        yield run


def record_routing(model: Path, windows: Sequence[Workload]) -> list[RoutingTrace]:
    """Gives where each window's tokens are sent, the prompt being the first step."""
    traces = []
    with open_engine(model, 100, predictor="none") as engine:
        for window in windows:
            recorder = RoutingRecorder(engine.spec.num_moe_layers, engine.spec.num_experts)
            cache = engine.make_cache()

            def ask(token: int, cache: Any = cache) -> Tensor:
                return engine.forward(torch.tensor([[token]]), cache)

            with engine.device_runtime.showing(recorder):
                run_forced(_Steps(engine._prefill, ask), window, cache)
            traces.append(recorder.trace)
    return traces


class ResidentModel:
    """transformers' model with all of its experts on the device, beside which all is compared.

    Args:
        path: The checkpoint.
        forcing: Where single tokens are sent; None lets the routers say.
    """

    def __init__(self, path: Path, forcing: Forcing | None = None) -> None:
        self._model = load_resident(path, torch.bfloat16)
        self._forcing = forcing
        if forcing is not None:
            forcing.attach(self._model)
        limit = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        self._graphs = {
            name: StepGraphs(
                functools.partial(forward_all, self._model),
                functools.partial(make_static_cache, self._model),
                torch.device(DEVICE),
                is_captured=True,
                most_positions=limit,
            )
            for name in RESIDENT
        }

    def eager_logits(self, workload: Workload) -> Tensor:
        """Gives the logits (1 + T, V) of its eager experts, nothing captured."""
        self._model.set_experts_implementation("eager")
        return _run_plain(self._model, workload, self._forcing).logits

    def run(self, implementation: str, workload: Workload) -> Outcome:
        """Decodes under one CUDA graph, with the experts implementation of that name."""
        model = self._model

        def prefill(token_ids: Tensor, kv_cache: Any) -> Tensor:
            # batched_mm copies every token's experts, and is for decoding only.
            model.set_experts_implementation("grouped_mm")
            logits = forward_all(model, token_ids, kv_cache)[-1]
            model.set_experts_implementation(implementation)
            return logits

        with self._graphs[implementation].lend(len(workload.token_ids)) as step:
            # Before any clock runs, whatever room the text takes.
            model.set_experts_implementation(implementation)
            step.prepare()
            launches = _Launches(step)
            steps = _Steps(prefill, launches, self._forcing)
            ran = run_forced(steps, workload, step.cache)
            return Outcome(ran, launches.took_s, {"is_captured": step.is_captured})

    def close(self) -> None:
        """Let go of captured steps; the weights go with this object."""
        for graphs in self._graphs.values():
            graphs.release()


@contextmanager
def accelerate_arm(path: Path) -> Iterator[RunText]:
    """Opens transformers' model with its experts in host memory, from where accelerate brings them.

    A layer's experts come all together, whichever are wanted, and leave when it is done.
    """
    from accelerate import dispatch_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, experts_implementation="grouped_mm"
    )
    places = _experts_on_cpu(model)
    moved = sum(
        parameter.nbytes
        for name, module in model.named_modules()
        if places.get(name) == "cpu"
        for parameter in module.parameters()
    )
    model = dispatch_model(model.eval(), places)
    yield lambda workload: Outcome(_run_plain(model, workload), [], {"bytes_per_token": moved})


def _experts_on_cpu(model: Any) -> dict[str, str]:
    """Gives a device map that has all but the experts on the device."""
    experts = {site.name for site in discover_sites(model)}
    places = {}
    for name, module in model.named_modules():
        if name in experts:
            places[name] = "cpu"
        elif any(True for _ in (*module.parameters(False), *module.buffers(False))):
            places[name] = DEVICE
    return places


def _run_plain(model: Any, workload: Workload, forcing: Forcing | None = None) -> ForcedRun:
    """Runs a transformers model as it is, nothing captured."""
    cache = make_kv_cache(model)

    def forward(token_ids: Tensor, kv_cache: Any) -> Tensor:
        return forward_all(model, token_ids, kv_cache)[-1]

    def ask(token: int) -> Tensor:
        logits = forward(torch.tensor([[token]]), cache)
        int(logits.argmax())
        return logits

    return run_forced(_Steps(forward, ask, forcing), workload, cache)
