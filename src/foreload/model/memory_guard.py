"""A device that runs out of memory in the middle of a forward: told once, where it was begun."""

from __future__ import annotations

import functools
import threading
import traceback
from contextlib import closing, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

from foreload.errors import CapacityError
from foreload.memory.cuda import Turns, is_capturing, is_out_of_memory, measure_shortage

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    import torch

__all__ = ["MemoryGuard"]

_LESS_AT_ONCE = "use a shorter prompt, or set prefill_chunk or expert_memory to less"

T = TypeVar("T")


class MemoryGuard:
    """Makes a CapacityError of a device that runs out of memory; the engine stays usable.

    Args:
        device: Where the model computes.

    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # By thread, as forwards are.
        self._computing: set[int] = set()

    @contextmanager
    def within(self, doing: str, hint: str = _LESS_AT_ONCE) -> Iterator[None]:
        """Guard some work.

        Args:
            doing: What is going on, for the message: "while ...".
            hint: What to do about it.

        Raises:
            CapacityError: The device ran out of memory.
        """
        thread = threading.get_ident()
        if thread in self._computing or is_capturing(self._device):
            # Told where it was begun, when all that it was in the middle of has been left.
            yield
            return
        self._computing.add(thread)
        try:
            yield
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            needed, available = measure_shortage(error, self._device)
            # They keep what was computed so far for as long as anybody keeps the error.
            traceback.clear_frames(error.__traceback__)
            raise CapacityError(
                f"the device ran out of memory {doing}",
                needed_bytes=needed,
                available_bytes=available,
                setting="expert_memory",
                hint=hint,
            ) from error
        finally:
            self._computing.discard(thread)

    def watch(self, model: Any, turns: Turns | None) -> None:
        """Guard the calls of a model, until `unwatch`.

        Args:
            model: A transformers model.
            turns: Taken for every call; None where calls need none.
        """
        forward = model.forward

        @functools.wraps(forward)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            turn = nullcontext() if turns is None else turns.taken()
            with self.within("while the model ran"), turn:
                return forward(*args, **kwargs)

        model.forward = guarded

    def unwatch(self, model: Any) -> None:
        """Give a model back its own forward; one that was not watched keeps it."""
        vars(model).pop("forward", None)

    def each(self, chunks: Generator[T]) -> Iterator[T]:
        """Guard what a stream brings; between two chunks the thread is the caller's."""
        with closing(chunks):
            while True:
                with self.within("while text was generated"):
                    try:
                        chunk = next(chunks)
                    except StopIteration:
                        return
                yield chunk
