"""The composition root: builds everything once, generates, closes.

    Engine.from_pretrained -> load_model -> arena, tiers, predictor, runtime -> attach

Decides nothing at run time: every "auto" is resolved here, before anything is allocated.
"""

from __future__ import annotations

import functools
import inspect
import logging
import threading
import time
import warnings
import weakref
from collections import Counter
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from foreload.config import EngineConfig, SamplingConfig
from foreload.decode.chunks import Transcript, join_chunks
from foreload.decode.clock import RequestClock
from foreload.decode.loop import decode
from foreload.decode.prompt import encode_prompt
from foreload.errors import CapacityError, ConfigError, ForeloadError, UnsupportedModelError
from foreload.memory.cuda import find_device
from foreload.memory.disk import DiskBackend
from foreload.metrics import Metrics, Timeline
from foreload.model.device_path import DevicePath
from foreload.model.graph import forward_all
from foreload.model.hf import attach, detach, load_model, load_tokenizer
from foreload.model.host_path import HostPath
from foreload.model.kv_cache import make_kv_cache, pass_cache, rewind
from foreload.model.memory_guard import MemoryGuard
from foreload.model.selfcheck import find_sum_rules
from foreload.model.source import resolve_model
from foreload.model.watching import watch_logits, watch_residuals
from foreload.predictors import (
    corrected_routers,
    early_routers,
    find_routers,
    make_predictor,
    make_tensor_predictor,
)
from foreload.resolution import (
    default_cache_dir,
    device_slots,
    prepare_draft,
    resolve,
    slot_size,
)
from foreload.schedule.policy import Exact, Speculate, SpeculateWhen
from foreload.schedule.prefetch import PrefetchSwitch

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager, ExitStack
    from types import TracebackType

    from torch import Tensor

    from foreload.decode.chunks import Chunk, GenerationResult
    from foreload.decode.prompt import Prompt
    from foreload.memory.arena import SlotArena
    from foreload.memory.host_tier import HostTier
    from foreload.memory.tiers import ExpertTiers
    from foreload.memory.transfer import CopyBackend
    from foreload.model.device_runtime import DeviceRuntime
    from foreload.model.device_self_draft import DeviceSelfDraft
    from foreload.model.draft import DraftExperts
    from foreload.model.graph import StepGraph
    from foreload.model.hf import LoadedModel
    from foreload.model.runtime import ExpertRuntime
    from foreload.model.self_draft import SelfDraft
    from foreload.model.sites import EarlyRouter
    from foreload.predict.estimator import CorrectedRouter, LayerNetwork
    from foreload.schedule.policy import ExecutionPolicy
    from foreload.trace.record import RoutingTrace
    from foreload.types import ModelSpec, Predictor

__all__ = ["Engine"]

logger = logging.getLogger(__name__)


_IDLE_ROUNDS = 60
"""Rounds in a row without a draft, probes aside, after which an optional one is dropped."""


class Engine:
    """A Mixture-of-Experts model whose experts live in a bounded memory.

    Made by `from_pretrained`. `engine.model` is a transformers model like any other: calling it,
    or its `generate`, streams experts just as `engine.generate` does. It stays on its device and in
    its element type. An engine that is dropped, its model too, without `close` is closed when it is
    collected, with a ResourceWarning.

    Attributes:
        config: The settings, every "auto" resolved.
        spec: The numbers about the model.
        model: The transformers model.
        tokenizer: Its tokenizer, or None where the checkpoint has none.
        cache_dir: Where calibrations, estimators and drafts are kept.
        metrics: Counters since the engine was made.
        drafter: Makes the rounds of speculative decoding; None without a draft.
        timeline: Spans of computation, disk and stall; switched off until `timeline.is_on`.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        tokenizer: Any | None,
        config: EngineConfig,
        *,
        cache_dir: Path,
        predictor: Predictor | None = None,
        draft: DraftExperts | None = None,
        is_draft_optional: bool = False,
        host_progress: Callable[[int, int], None] | None = None,
        draft_progress: Callable[[int, int], None] | None = None,
        backend: Callable[[SlotArena], CopyBackend] = DiskBackend,
        host_tier: Callable[[int], HostTier] | None = None,
        link: Callable[[CopyBackend], CopyBackend] | None = None,
    ) -> None:
        if link is not None and config.orchestration == "device":
            raise ConfigError(
                "a device that decides about experts copies them itself: its link is what it is",
                hint="use orchestration='host' to rehearse a slower one",
            )
        if draft is None and host_tier is None:
            draft = prepare_draft(config, loaded, cache_dir=cache_dir)
        self.config = config
        self.spec: ModelSpec = loaded.spec
        self.model = loaded.model
        self.tokenizer = tokenizer
        self.metrics = Metrics()
        self.timeline = Timeline()
        self._loaded = loaded
        self.cache_dir = cache_dir
        self._cancelled: weakref.WeakSet[threading.Event] = weakref.WeakSet()
        # Reentrant: a signal's handler may cancel in the middle of `stream`.
        self._cancelling = threading.RLock()
        self._closed = False
        self._dropped: weakref.finalize[..., Any] | None = None
        self._handles: list[Any] = []
        self._computes_on = find_device(config.device)
        self._guard = MemoryGuard(self._computes_on)
        self._is_draft_optional = is_draft_optional
        self._host: HostPath | None = None
        self._device: DevicePath | None = None
        self.drafter: SelfDraft | DeviceSelfDraft | None = None
        try:
            with self._guard.within("while the engine was opened", "set expert_memory to less"):
                if config.orchestration == "device":
                    self._open_device_path(host_progress, draft_progress)
                else:
                    self._open_host_path(
                        predictor,
                        draft=draft,
                        backend=backend,
                        host_tier=host_tier,
                        link=link,
                        draft_progress=draft_progress,
                    )
            turns = None if self._device is None else self._device.runtime.turns
            self._guard.watch(self.model, turns)
        except BaseException:
            self.close()
            raise
        self._opened_as = self._state_of_model()
        # The model may outlive the engine that was dropped, and goes on running until it is, too.
        held = (self._device or self._require_host()).held
        self._dropped = weakref.finalize(self.model, _let_go, held, config.model)
        self._dropped.atexit = False

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path = "demo",
        *,
        progress: Callable[[int, int], None] | None = None,
        draft_progress: Callable[[int, int], None] | None = None,
        host_progress: Callable[[int, int], None] | None = None,
        cache_dir: str | Path | None = None,
        **settings: Any,
    ) -> Engine:
        """Open a checkpoint with a bounded memory for its experts.

        Args:
            model: Local directory, Hub name, or "demo".
            progress: Called with (done, total) bytes while dense weights load.
            draft_progress: Called with (done, total) bytes while a draft is built.
            host_progress: Called with (done, total) bytes while experts are read into host memory,
                where a device fetches them from there.
            cache_dir: Where calibrations, estimators and drafts are kept; by default the user's
                cache directory.
            **settings: Fields of `EngineConfig`, such as `expert_memory="25%"`.

        Raises:
            ConfigError: A setting is unknown or makes no sense.
            CheckpointError: The checkpoint is missing, damaged or incomplete.
            UnsupportedModelError: foreload cannot run this architecture or quantisation.
            CapacityError: The expert memory is below one layer's needs, or host memory below what
                a device fetches from; or the device ran out of memory.
        """
        config = EngineConfig.from_dict({"model": str(model), **settings})
        find_device("cpu" if config.device == "auto" else config.device)
        directory = resolve_model(config.model)
        loaded = load_model(directory, dtype=config.dtype, progress=progress)
        folder = Path(cache_dir) if cache_dir is not None else default_cache_dir()
        tokenizer = load_tokenizer(directory)

        def open_with(resolved: EngineConfig) -> Engine:
            return cls(
                loaded,
                tokenizer,
                resolved,
                cache_dir=folder,
                draft=prepare_draft(resolved, loaded, cache_dir=folder, progress=draft_progress),
                is_draft_optional=config.draft == "auto",
                host_progress=host_progress,
                draft_progress=draft_progress,
            )

        resolved = resolve(config, loaded, cache_dir=folder)
        if config.orchestration != "auto" or resolved.orchestration != "device":
            return open_with(resolved)
        try:
            return open_with(resolved)
        except CapacityError as error:
            if error.setting != "host_memory":
                raise
            # As text: a record of the log may be kept, and the error's frames keep the experts.
            logger.warning("the host decides about the CUDA device's experts: %s", str(error))
            locked = error.available_bytes
        # Out here the error is gone. Settings are resolved for a device that has no weights yet.
        loaded.model.to("cpu")
        config = config.with_values(orchestration="host", device=resolved.device)
        resolved = resolve(config, loaded, cache_dir=folder)
        host_bytes = max(min(int(resolved.host_memory), locked), slot_size(loaded.plans))
        return open_with(resolved.with_values(host_memory=host_bytes))

    def generate(self, prompt: Prompt, **sampling: Any) -> GenerationResult:
        """Generate text and wait for all of it.

        Args:
            prompt: Text, token ids, or chat messages ({"role": ..., "content": ...}).
            **sampling: Fields of `SamplingConfig`, such as `max_new_tokens=64`.

        Raises:
            ConfigError: A setting or the prompt makes no sense, the prompt does not fit into the
                context, or `engine.model` was moved or cast.
            ForeloadError: The engine is closed.
        """
        return join_chunks(self.stream(prompt, **sampling))

    def stream(self, prompt: Prompt, **sampling: Any) -> Iterator[Chunk]:
        """Generate text token by token; the last chunk has the finish reason and statistics.

        Streams may overlap, on one thread or several. The statistics of each include then what the
        others did in the meantime.

        Args:
            prompt: As for `generate`.
            **sampling: Fields of `SamplingConfig`.

        Raises:
            ConfigError: As for `generate`.
            ForeloadError: The engine is closed.
        """
        submitted_s = time.perf_counter()
        config = SamplingConfig.from_dict(sampling)
        self._require_open()
        prompt_ids = encode_prompt(prompt, self.tokenizer, self.vocab_size)
        limit = "length"
        room = self._context_left(len(prompt_ids))
        if room is not None and room < config.max_new_tokens:
            logger.info("the context leaves room for %d tokens", room)
            limit = "context"
            config = SamplingConfig.from_dict(
                {
                    **{name: getattr(config, name) for name in config.__slots__},
                    "max_new_tokens": room,
                }
            )
        cancelled = threading.Event()
        with self._cancelling:
            self._cancelled.add(cancelled)
        return self._guard.each(self._stream(prompt_ids, config, limit, submitted_s, cancelled))

    def cancel(self) -> None:
        """End every stream there is, after its current token; may be called from any thread."""
        with self._cancelling:
            for cancelled in self._cancelled:
                cancelled.set()

    def make_cache(self) -> Any:
        """Make an empty KV cache for one sequence, to be passed to `engine.model`."""
        return make_kv_cache(self.model, self.max_positions)

    def close(self) -> None:
        """Stop the copies and let go of the experts' memory; may be called twice."""
        if self._closed:
            return
        self._closed = True
        if self._dropped is not None:
            self._dropped.detach()
        if self.drafter is not None:
            self.drafter.release()
        for handle in self._handles:
            handle.remove()
        self._guard.unwatch(self.model)
        detach(self._loaded.sites)
        if self._device is not None:
            self._device.release()
        if self._host is not None:
            self._host.release()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def tiers(self) -> ExpertTiers:
        """Give the tiers.

        Raises:
            ConfigError: The device decides about experts: there are none.
        """
        return self._require_host().tiers

    @property
    def runtime(self) -> ExpertRuntime:
        """Give what happens at each MoE layer.

        Raises:
            ConfigError: The device decides about experts: the host sees nothing of it.
        """
        return self._require_host().runtime

    @property
    def device_runtime(self) -> DeviceRuntime:
        """Give what happens at each MoE layer where the device decides.

        Raises:
            ConfigError: The host decides about experts.
        """
        return self._require_device().runtime

    @property
    def vocab_size(self) -> int:
        """Give V, which no token id reaches."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    @property
    def max_positions(self) -> int | None:
        """Give the most tokens of a request, by the setting `context` or by the model."""
        context = self.config.context
        return self._loaded.generation.max_positions if context == "auto" else int(context)

    @property
    def expert_bytes(self) -> tuple[int, ...]:
        """Give, per MoE layer, the bytes read from disk for its largest expert."""
        return tuple(max(plan.read_bytes for plan in layer) for layer in self._loaded.plans)

    @property
    def num_slots(self) -> int:
        """Give how many experts fit into the device tier."""
        return self.tiers.num_slots if self._device is None else sum(self._device.slots)

    @property
    def slots_per_layer(self) -> tuple[int, ...]:
        """Give the slots of each MoE layer, where the device decides.

        Raises:
            ConfigError: The host decides about experts: its slots are shared by all layers.
        """
        return self._require_device().slots

    def replan_slots(self, slot_plan: str | Path | Sequence[int] | RoutingTrace) -> None:
        """Divide the device's slots anew over the MoE layers, between requests.

        Texts stay what they are. Every expert leaves its slot, and steps are captured again, so
        the next request is slower.

        Args:
            slot_plan: As the setting: "equal", a trace of this model or its path, or the slots of
                each layer.

        Raises:
            ForeloadError: A request is running, or the engine is closed.
            ConfigError: The plan is not for this model; or the host decides about experts.
            TraceError: The trace cannot be read.
            CapacityError: The device ran out of memory; the slots are divided as before.
        """
        self._require_open()
        device = self._require_device()
        with self._guard.within("while slots were divided anew", "set expert_memory to less"):
            device.divide_slots(slot_plan)
        is_equal = isinstance(slot_plan, str) and slot_plan == "equal"
        self.config = self.config.with_values(slot_plan="equal" if is_equal else device.slots)

    @property
    def expert_memory_bytes(self) -> int:
        """Give the size of the device tier, a draft included."""
        return (self._device or self._require_host()).num_bytes

    @property
    def stats(self) -> dict[str, Any]:
        """Give the counters since the engine was made, with the derived rates."""
        self._count()
        metrics = self.metrics
        return {
            "num_steps": metrics.num_steps,
            "hit_rate": metrics.hit_rate,
            "late_rate": metrics.late_rate,
            "recall_at_n": metrics.recall_at_n,
            "prefetch_precision": metrics.prefetch_precision,
            "bytes_moved": metrics.bytes_moved,
            "host_bytes": metrics.host_bytes,
            "wasted_bytes": metrics.wasted_bytes,
            "stall_s": metrics.stall_s,
            "expert_memory_bytes": self.expert_memory_bytes,
            "speculated_fraction": metrics.speculated_fraction,
            "num_rounds": metrics.num_rounds,
            "acceptance_rate": metrics.acceptance_rate,
            "accept_length": metrics.accept_length,
            "governor": [] if self.drafter is None else self._describe_governor(self.drafter),
        }

    def forward(self, token_ids: Tensor, kv_cache: Any) -> Tensor:
        """Run the model on new tokens (1, T); give the last position's logits (V,), on the CPU."""
        with torch.inference_mode():
            output = self.model(
                input_ids=token_ids.to(self.model.device),
                use_cache=True,
                **pass_cache(self.model, kv_cache),
                **self._last_logits_only,
            )
            logits: Tensor = output.logits[0, -1].cpu()
            return logits

    def make_request_cache(self) -> Any:
        """Make a KV cache for `drafter`'s rounds: one that can forget its last tokens."""
        cache = self.make_cache()
        if self.drafter is not None:
            cache.activate_past_recording()
        return cache

    def drop_draft(self) -> bool:
        """Let go of the draft, and keep experts in its memory instead.

        Returns:
            Whether it is gone; not while another thread's text is being drafted.

        Raises:
            ConfigError: The experts lie on a device: its slots are given once.
        """
        return self.drafter is None or self._require_host().drop_draft()

    def early_routers(self) -> list[EarlyRouter]:
        """Give, per MoE layer, the model's own norm and router, to be asked with any residual."""
        return early_routers(self._loaded)

    def corrected_routers(
        self, networks: Mapping[int, LayerNetwork]
    ) -> list[CorrectedRouter | None]:
        """Give, per MoE layer, its router corrected by its network; None where it has none."""
        return corrected_routers(self._loaded, networks)

    def watch_routers(self) -> None:
        """Show the runtime every router's logits from now on, and how weights are made of them."""
        if self.runtime.score_rules:
            return
        find_routers(self._loaded)
        self.runtime.score_rules = [site.scores for site in self._loaded.sites]
        self._handles += watch_logits(self._loaded.sites, self.runtime.see_logits)

    def _open_host_path(self, predictor: Predictor | None, **parts: Any) -> None:
        """Build what brings experts as the host decides, and let it run the MoE layers."""
        config, loaded = self.config, self._loaded
        device = self._computes_on
        sum_rules = find_sum_rules(loaded.sites, self.model.dtype)
        if device != self.model.device:
            self.model.to(device)
        switch = None
        if predictor is None and config.predictor != "none":
            predictor, switch = make_predictor(config, loaded, self.cache_dir), PrefetchSwitch()
            self.config = config.with_values(predictor=predictor.name)
        path = self._host = HostPath(
            loaded,
            config,
            device,
            sum_rules=sum_rules,
            forward=functools.partial(forward_all, self.model),
            metrics=self.metrics,
            timeline=self.timeline,
            predictor=predictor,
            switch=switch,
            **parts,
        )
        self.drafter = path.drafter
        attach(loaded.sites, path.runtime.run_layer)
        if predictor is not None:
            find_routers(loaded)
            self._handles += watch_residuals(loaded.sites, path.runtime.see_residual)
        path.runtime.policy = self._make_policy()
        if isinstance(path.runtime.policy, SpeculateWhen):
            self.watch_routers()

    def _open_device_path(
        self,
        progress: Callable[[int, int], None] | None,
        draft_progress: Callable[[int, int], None] | None,
    ) -> None:
        """Build what fetches experts from host memory, and let it run the MoE layers."""
        config, loaded = self.config, self._loaded
        device = self._computes_on
        sum_rules = find_sum_rules(loaded.sites, self.model.dtype)
        self.model.to(device)
        predictor = make_tensor_predictor(config, loaded, self.cache_dir)
        self.config = config.with_values(predictor="none" if predictor is None else predictor.name)
        policy = self._make_policy()
        tokens = config.num_draft_tokens
        path = self._device = DevicePath(
            loaded,
            device,
            slots=device_slots(config, loaded),
            sum_rules=sum_rules,
            forward=functools.partial(forward_all, self.model),
            metrics=self.metrics,
            policy=policy,
            predictor=predictor,
            context=self.max_positions,
            num_workers=config.num_workers,
            limit_bytes=int(config.host_memory),
            progress=progress,
            draft=config.draft,
            num_draft_tokens=None if isinstance(tokens, str) else tokens,
            draft_progress=draft_progress,
        )
        self.drafter = path.drafter
        attach(loaded.sites, path.runtime.run_layer)
        if predictor is not None:
            find_routers(loaded)
            self._handles += watch_residuals(loaded.sites, path.runtime.see_residual)
        if isinstance(policy, SpeculateWhen):
            self._handles += watch_logits(loaded.sites, path.policy.see_logits)

    def _count(self) -> None:
        """Bring the counters up to date where others have counted."""
        if self._host is not None:
            self.metrics.host_bytes = self._host.host_bytes
        if self._device is not None and not self._closed:
            self._device.runtime.count()

    def _prefill(self, token_ids: Tensor, kv_cache: Any) -> Tensor:
        runtime = self.runtime if self._device is None else self._device.runtime
        with runtime.prefilling():
            logits = self.forward(token_ids, kv_cache)
        if self.drafter is not None and self._device is None:
            rewind(kv_cache, 0)
        return logits

    def _describe_governor(self, drafter: SelfDraft | DeviceSelfDraft) -> list[dict[str, Any]]:
        return [point._asdict() for point in drafter.governor.roofs()]

    def _make_policy(self) -> ExecutionPolicy:
        match self.config.policy:
            case "speculate":
                find_routers(self._loaded)
                if not any(site.is_routing_whole for site in self._loaded.sites[1:]):
                    raise UnsupportedModelError(
                        f"policy='speculate' cannot run {self.spec.architecture}: no router after "
                        "the first answers a residual stream with all its experts need",
                        hint="use policy='exact', or 'speculate-when'",
                    )
                return Speculate()
            case "speculate-when":
                find_routers(self._loaded)
                return SpeculateWhen(self.config.confidence)
        return Exact()

    @functools.cached_property
    def _last_logits_only(self) -> dict[str, int]:
        names = inspect.signature(type(self.model).forward).parameters
        return {"logits_to_keep": 1} if "logits_to_keep" in names else {}

    def _context_left(self, num_prompt_tokens: int) -> int | None:
        limit = self.max_positions
        if limit is None:
            return None
        if num_prompt_tokens >= limit:
            raise ConfigError(
                f"the prompt has {num_prompt_tokens} tokens, the context is {limit}",
                hint=self._more_context(limit),
            )
        return limit - num_prompt_tokens

    def _more_context(self, limit: int) -> str:
        own = self._loaded.generation.max_positions
        if own is not None and own <= limit:
            return f"shorten the prompt: the model was built for {own} tokens"
        return "shorten the prompt, or open the engine with a larger context"

    def _require_host(self) -> HostPath:
        if self._host is None:
            raise ConfigError(
                "this needs the host to decide about experts, and here the device does",
                hint="use orchestration='host'",
            )
        return self._host

    def _require_device(self) -> DevicePath:
        if self._device is None:
            raise ConfigError(
                "this needs the device to decide about experts, and here the host does",
                hint="use orchestration='device'",
            )
        return self._device

    def _require_open(self) -> None:
        if self._closed:
            raise ForeloadError("the engine is closed", hint="open a new one")
        now = self._state_of_model()
        if now != self._opened_as:
            raise ConfigError(
                f"engine.model was moved or cast: {self._opened_as} when the engine was opened, "
                f"{now} now",
                hint="open an engine with the device and dtype that you want, and leave its model",
            )

    def _state_of_model(self) -> str:
        return f"{self.model.dtype} on {self.model.device}"

    def _stream(
        self,
        prompt_ids: list[int],
        config: SamplingConfig,
        limit: str,
        submitted_s: float,
        cancelled: threading.Event,
    ) -> Generator[Chunk]:
        ends = set(self._loaded.generation.eos_token_ids)
        transcript = Transcript(self.tokenizer, ends, config.stop)
        drafter = self.drafter
        rounds = drafter.governor.rounds_by_draft if drafter is not None else Counter[int]()
        clock = RequestClock(
            self.metrics, rounds, submitted_s, len(prompt_ids), refresh=self._count
        )
        num_positions = len(prompt_ids) + config.max_new_tokens
        with self._told_of_closing(), self._lend_step(num_positions) as step:
            tokens = decode(
                self.forward,
                prompt_ids,
                self.make_request_cache() if step is None else step.cache,
                config,
                prefill=self._prefill,
                prefill_chunk=self.config.prefill_chunk,
                step=step,
                drafter=drafter,
                ends=ends,
                is_cancelled=cancelled.is_set,
            )
            for token in tokens:
                clock.token(is_output=token not in ends)
                chunk = transcript.add(token)
                if chunk is not None:
                    yield chunk
                if transcript.is_stopped or cancelled.is_set():
                    break
                self._reconsider_draft()
        stats = clock.stats(self.expert_memory_bytes)
        yield transcript.end(stats, is_cancelled=cancelled.is_set(), limit=limit)

    @contextmanager
    def _told_of_closing(self) -> Iterator[None]:
        """Say of whatever breaks off because the engine is closed that it is that."""
        try:
            yield
        except ForeloadError as error:
            if not self._closed:
                raise
            raise ForeloadError(
                "the engine is closed: the text was broken off", hint="open a new one"
            ) from error

    def _lend_step(self, num_positions: int) -> AbstractContextManager[StepGraph | None]:
        """Lend a request a step at fixed addresses; None where it has to do without."""
        return nullcontext() if self._device is None else self._device.lend_step(num_positions)

    def _reconsider_draft(self) -> None:
        """Give the draft's memory to the experts where drafting has long not paid."""
        drafter = self.drafter
        if not self._is_draft_optional or drafter is None:
            return
        # Above, not at: the probe that falls on it is heard first.
        if drafter.governor.num_idle_rounds > _IDLE_ROUNDS:
            self.drop_draft()


def _let_go(held: ExitStack, model: str) -> None:
    """Close what an engine held that nobody closed."""
    # Not here: garbage is collected anywhere, on the threads that closing waits for too.
    threading.Thread(target=held.close, name="foreload-closing", daemon=True).start()
    warnings.warn(
        f"an engine of {model} was dropped without close()", ResourceWarning, stacklevel=2
    )
