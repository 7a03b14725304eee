"""One decoding step at fixed addresses, captured as a CUDA graph where there is one to capture.

A step writes its tokens into a static input, runs the whole model on a static KV cache, and leaves
logits and the likeliest tokens where they always are. Captured, it is one launch, and the host
decides nothing in it. On the CPU the same function runs uncaptured. Chooses no token beyond the
likeliest, and keeps no request.
"""

from __future__ import annotations

import logging
import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from foreload.errors import ForeloadError
from foreload.memory.cuda import Turns, is_out_of_memory, leave_capture, on_device
from foreload.model.kv_cache import clear_static, pass_cache, rewind_static

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    ForwardAll = Callable[[Tensor, Any], Tensor]

__all__ = ["GraphPool", "StepGraph", "StepGraphs", "forward_all"]

logger = logging.getLogger(__name__)

_LEAST_POSITIONS = 256

_make_tensor = torch.tensor


def forward_all(model: Any, token_ids: Tensor, kv_cache: Any) -> Tensor:
    """Run a transformers model on new tokens (1, T); give the logits behind each of them (T, V)."""
    with torch.inference_mode():
        ids = token_ids.to(model.device)
        output = model(input_ids=ids, use_cache=True, **pass_cache(model, kv_cache))
        logits: Tensor = output.logits[0]
        return logits


class FilledNumbers(TorchFunctionMode):
    """Makes tensors of single numbers on the device, by filling them.

    torch.tensor would copy the number from the host's memory, which a capture refuses. transformers
    5.17 does that for the masks of eager attention.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Call a function of torch's, `torch.full` in place of `torch.tensor` of a number."""
        kwargs = kwargs or {}
        is_number = function is _make_tensor and isinstance(args[0], bool | int | float)
        if is_number and torch.device(kwargs.get("device") or "cpu").type != "cpu":
            return torch.full((), *args, **kwargs)
        return function(*args, **kwargs)


class GraphPool:
    """What the captured steps of an engine share: a stream to be captured on, and memory.

    Graphs may share memory, in whatever order they are replayed, where no two run at once and none
    reads what another has left there. Replays follow each other on one stream, and a step's outputs
    are copied out. Each replay overwrites what the others have left in the pool.

    Args:
        turns: Held while a step is captured or launched: none is when it is closed. Whatever else
            runs on the device beside such a step holds it, too.

    Attributes:
        turns: The same.
        can_capture: Whether captures are tried: none is after one that the model does not allow.
    """

    def __init__(self, turns: Turns) -> None:
        self._stream: Any = None
        self.turns = turns
        self.can_capture = True
        # A pool ends with its last graph, and its name must not be used again then.
        self._steps: weakref.WeakSet[StepGraph] = weakref.WeakSet()

    def warm_up(self, run: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Run a step as it is where it will be captured, so that nothing is left to load then.

        What is compiled, loaded or allocated on first use cannot be while a capture is under way.
        """
        if self._stream is None:
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                return run()
        finally:
            current.wait_stream(self._stream)

    def capture(self, step: StepGraph, run: Callable[[], None]) -> bool:
        """Capture what has been warmed up as the graph of a step.

        Returns:
            Whether it could be. Where something in it cannot be captured that is said, once, and
            no other step is tried.

        Raises:
            RuntimeError: The device ran out of memory, which says nothing about the model.
        """
        # Only one at a time can be under way.
        with self.turns.taken():
            if not self.can_capture:
                return False
            graph, handle = torch.cuda.CUDAGraph(), self._handle()
            try:
                # One that breaks may leave this thread on the stream it was captured on.
                with (
                    torch.cuda.stream(torch.cuda.current_stream()),
                    torch.cuda.graph(
                        graph,
                        pool=handle,
                        stream=self._stream,
                        capture_error_mode="thread_local",
                    ),
                ):
                    run()
            except BaseException as error:
                leave_capture(step.device, handle)
                if not isinstance(error, RuntimeError):
                    raise
                # One that was broken off may not be ended either, which hides the reason.
                causes = _causes(error)
                for cause in causes:
                    if is_out_of_memory(cause):
                        raise cause from None
                self.can_capture = False
                logger.warning(
                    "this model's step cannot be captured, and runs as it is: %s", causes[-1]
                )
                return False
            step.graph = graph
            self._steps.add(step)
            return True

    def _handle(self) -> Any:
        """Name the pool of the graphs there are, or a new one."""
        pools = (step.graph.pool() for step in self._steps if step.graph is not None)
        return next(pools, None) or torch.cuda.graph_pool_handle()


def _causes(error: BaseException) -> list[BaseException]:
    """Give an error and those it was raised in the handling of, the first to happen last."""
    found = [error]
    while (cause := found[-1].__context__) is not None and cause not in found:
        found.append(cause)
    return found


class StepGraph:
    """Runs the model on a fixed number of new tokens of the sequence in its own KV cache.

    Args:
        forward: From token ids (1, T) and the cache to logits (T, V), without a host sync.
        cache: A static KV cache.
        device: Where the model is.
        num_positions: Tokens the cache has room for.
        num_tokens: T.
        is_captured: Whether to capture the step on its first use. CUDA only.
        on_broken: Called where a capture was broken off in the middle of a forward.
        pool: Shared with the other steps of the engine; one of its own by default.

    Attributes:
        cache: The KV cache; what precedes the steps is put there by ordinary forwards.
        num_positions: Its room.
        graph: The captured step; None where there is none.
        wants_capture: Whether the first use will capture it.
        is_closed: Whether it runs no more.
    """

    def __init__(
        self,
        forward: ForwardAll,
        cache: Any,
        device: torch.device,
        *,
        num_positions: int,
        num_tokens: int = 1,
        is_captured: bool = False,
        on_broken: Callable[[], None] = lambda: None,
        pool: GraphPool | None = None,
    ) -> None:
        self.cache = cache
        self.num_positions = num_positions
        self._forward = forward
        self._token_ids = torch.zeros((1, num_tokens), dtype=torch.int64, device=device)
        self._is_capturing = self.wants_capture = is_captured
        self._on_broken = on_broken
        self.is_closed = False
        self._pool = pool or GraphPool(Turns(device))
        self.graph: Any = None
        self._outputs: tuple[Tensor, Tensor] | None = None
        self._beside: dict[tuple[int, ForwardAll], StepGraph] = {}

    @property
    def device(self) -> torch.device:
        """Tell where it runs."""
        return self._token_ids.device

    @property
    def is_captured(self) -> bool:
        """Tell whether steps are replays of a captured one."""
        return self.graph is not None

    def run(self, token_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Run the step on T tokens.

        Returns:
            Logits (T, V) and the likeliest tokens (T,), valid until this step runs again.

        Raises:
            ForeloadError: The engine was closed.

        Cost:
            One launch, where the step is captured; the host does not wait.
        """
        with self._pool.turns.taken(), torch.inference_mode(), on_device(self.device):
            if self.is_closed:
                raise ForeloadError("the engine is closed", hint="open a new one")
            # From page-locked memory, which torch does not use again before it was read.
            is_locked = self._token_ids.is_cuda
            given = torch.tensor([list(token_ids)], pin_memory=is_locked)
            self._token_ids.copy_(given, non_blocking=is_locked)
            self.prepare()
            if self.graph is not None:
                self.graph.replay()
            else:
                self._outputs = self._step()
            # Under the lock: whoever closes the step takes them away.
            if self._outputs is None:
                raise RuntimeError("the step left no logits")
            return self._outputs

    def __call__(self, token: int) -> Tensor:
        """Give the logits (V,) behind one token, on the CPU."""
        return self.run([token])[0][-1].cpu()

    def likeliest(self, token: int) -> int:
        """Give the likeliest token behind one token."""
        return int(self.run([token])[1][-1])

    def prepare(self) -> bool:
        """Capture the step, where that is wanted and was not done; the sequence stays as it is.

        The sequence must have room for T more tokens.

        Returns:
            Whether it was done now: the step has then been run on whatever tokens it had, and
            experts were looked up and fetched for them.
        """
        with self._pool.turns.taken(), torch.inference_mode(), on_device(self.device):
            if not (self.wants_capture and self._pool.can_capture):
                self.wants_capture = False
                return False
            self._capture()
            # Not before: where memory ran out the next use tries again.
            self.wants_capture = False
            return True

    def beside(
        self, num_tokens: int, *, forward: ForwardAll | None = None, can_capture: bool = True
    ) -> StepGraph:
        """Give a step on the same sequence that differs, made on first use; it goes with this one.

        Args:
            num_tokens: Its T.
            forward: What it runs; by default what this one runs.
            can_capture: Whether it can be captured, where this one is to be.
        """
        if self.is_closed:
            raise ForeloadError("the engine is closed", hint="open a new one")
        key = num_tokens, forward or self._forward
        if key not in self._beside:
            self._beside[key] = StepGraph(
                key[1],
                self.cache,
                self.device,
                num_positions=self.num_positions,
                num_tokens=num_tokens,
                is_captured=self._is_capturing and can_capture,
                on_broken=self._on_broken,
                pool=self._pool,
            )
        return self._beside[key]

    def rewind(self, num_tokens: int) -> None:
        """Forget the last `num_tokens` of the sequence; the host does not wait."""
        if num_tokens:
            with torch.inference_mode():
                rewind_static(self.cache, num_tokens)

    def clear(self) -> None:
        """Forget the sequence; buffers and the captured step stay."""
        with torch.inference_mode():
            clear_static(self.cache)

    def close(self) -> None:
        """Let go of the captured step, which reads memory that is about to go."""
        with self._pool.turns.taken():
            self.is_closed = True
            self.graph = self._outputs = None
            for step in list(self._beside.values()):
                step.close()

    def _step(self) -> tuple[Tensor, Tensor]:
        with FilledNumbers():
            logits = self._forward(self._token_ids, self.cache)
        return logits, logits.argmax(-1)

    def _capture(self) -> None:
        seen = self._pool.warm_up(self._step)
        # What was just written is written again by the replay.
        rewind_static(self.cache, self._token_ids.shape[1])
        logits, likeliest = (torch.empty_like(value) for value in seen)

        def run() -> None:
            # Out of the pool, which other steps' replays write to.
            for output, value in zip((logits, likeliest), self._step(), strict=True):
                output.copy_(value)

        is_done = False
        try:
            is_done = self._pool.capture(self, run)
        finally:
            if not is_done:
                self._on_broken()
        if is_done:
            self._outputs = logits, likeliest


class StepGraphs:
    """Keeps the steps that no request is using, so that a capture serves many requests.

    Args:
        forward: As for `StepGraph`.
        make_cache: Makes a static KV cache with room for a number of tokens.
        device: Where the model is.
        is_captured: As for `StepGraph`.
        on_broken: As for `StepGraph`.
        most_positions: Most tokens of a request, where there is a limit.
        turns: As for `GraphPool`; their own by default.
    """

    def __init__(
        self,
        forward: ForwardAll,
        make_cache: Callable[[int], Any],
        device: torch.device,
        *,
        is_captured: bool = False,
        on_broken: Callable[[], None] = lambda: None,
        most_positions: int | None = None,
        turns: Turns | None = None,
    ) -> None:
        self._forward = forward
        self._make_cache = make_cache
        self._device = device
        self._is_captured = is_captured
        self._on_broken = on_broken
        self._most_positions = most_positions
        self._turns = turns or Turns(device)
        self._pool = GraphPool(self._turns)
        self._idle: list[StepGraph] = []
        self._lent: list[StepGraph] = []

    @contextmanager
    def lend(self, num_positions: int) -> Iterator[StepGraph]:
        """Lend a step with an empty cache for so many tokens; one request has it to itself."""
        with self._turns.taken():
            step = self._take(num_positions)
        try:
            self._lent.append(step)
            yield step
        except Exception:
            with self._turns.taken():
                # Memory may be what lacked: this step's, and that of those nobody uses.
                step.close()
                self._idle.clear()
            raise
        finally:
            # After `release` it is in neither list. Before anything is waited for, which may be
            # interrupted: nobody would get this step again.
            if step in self._lent:
                self._lent.remove(step)
                with self._turns.taken():
                    if not step.is_closed:
                        step.clear()
                        self._idle.append(step)

    def step_of(self, cache: Any) -> StepGraph:
        """Give the lent step whose KV cache this is.

        Raises:
            ForeloadError: It is lent no longer: the engine was closed.
        """
        for step in self._lent:
            if step.cache is cache:
                return step
        raise ForeloadError("the engine is closed", hint="open a new one")

    def release(self) -> None:
        """Close all steps; those that are lent answer no more."""
        with self._turns.taken():
            for step in (*self._idle, *self._lent):
                step.close()
            self._idle.clear()
            self._lent.clear()

    def _take(self, num_positions: int) -> StepGraph:
        for place, step in enumerate(self._idle):
            if step.num_positions >= num_positions:
                return self._idle.pop(place)
        # Too small for this request: their memory is better spent on one that is not.
        self._idle.clear()
        room = _LEAST_POSITIONS
        while room < num_positions:
            room *= 2
        if self._most_positions is not None:
            room = max(min(room, self._most_positions), num_positions)
        return StepGraph(
            self._forward,
            self._make_cache(room),
            self._device,
            num_positions=room,
            is_captured=self._is_captured,
            on_broken=self._on_broken,
            pool=self._pool,
        )
