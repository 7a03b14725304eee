"""What the machine's CUDA devices are, and host memory they can read.

The one room, beside the kernels and the captured step, that asks `torch.cuda`. Everything in it
answers sensibly where there is no such device; what needs one says so.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import psutil
import torch

from foreload.errors import CapacityError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

__all__ = [
    "CopyStreams",
    "ReadMark",
    "SideStream",
    "Turns",
    "cpus_near",
    "find_device",
    "free_bytes",
    "has_device",
    "is_capturing",
    "is_out_of_memory",
    "leave_capture",
    "measure_shortage",
    "on_device",
    "page_lock",
    "page_unlock",
    "wait_idle",
]

logger = logging.getLogger(__name__)

_REGISTER_FLAGS = 1 | 2
"""cudaHostRegisterPortable, whichever device is the current one, and cudaHostRegisterMapped: the
device gets an address for the memory, equal to the host's."""


_SHORTAGES = ("out of memory", "ALLOC_FAILED")


def has_device() -> bool:
    """Tell whether there is a CUDA device that this torch can use."""
    return torch.cuda.is_available()


def find_device(name: str) -> torch.device:
    """Give the device of a setting such as "cpu", "cuda" or "cuda:1".

    Raises:
        ConfigError: There is no such CUDA device.
    """
    if name == "cpu":
        return torch.device("cpu")
    index = int(name.partition(":")[2] or 0)
    count = torch.cuda.device_count() if has_device() else 0
    if index >= count:
        found = f"there are {count} CUDA devices" if count else "no CUDA device can be used here"
        raise ConfigError(
            f"device={name!r}: {found}",
            hint="use device='cpu', or install torch's CUDA build and the driver",
        )
    return torch.device("cuda", index)


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make a CUDA device the current one inside the block: streams and kernels go to that one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def free_bytes(device: torch.device) -> int:
    """Give the free memory of a CUDA device, what torch holds in reserve included."""
    free, _ = torch.cuda.mem_get_info(device)
    reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(free + reserve)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether a device is out of memory, as torch, driver, Triton or cuBLAS say it."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SHORTAGES)
    )


def is_capturing(device: torch.device) -> bool:
    """Tell whether this thread's stream is in a capture, where nothing may be waited for."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def measure_shortage(error: BaseException, device: torch.device) -> tuple[int, int]:
    """Give the bytes that were asked for where memory ran out, and those that are free.

    Args:
        error: What was raised; one that names no number wanted more than is free.
        device: Where it ran out.
    """
    if device.type == "cuda":
        # Without torch's reserve: it was in pieces too small for what was asked for.
        free = int(torch.cuda.mem_get_info(device)[0])
    else:
        free = psutil.virtual_memory().available
    asked = re.search(r"Tried to allocate ([\d.]+) (bytes|KiB|MiB|GiB)", str(error))
    if asked is None:
        return free + 1, free
    return int(float(asked[1]) * 1024 ** ("bytes", "KiB", "MiB", "GiB").index(asked[2])), free


def wait_idle(device: torch.device) -> None:
    """Wait until a device has done all it was asked to do; the CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def page_lock(address: int, num_bytes: int, device: torch.device) -> None:
    """Let CUDA devices read a range of host memory in place. CUDA only.

    Args:
        address: Where it begins, a multiple of the page size.
        num_bytes: Its length.
        device: The one to ask; no other one is woken up.

    Raises:
        CapacityError: The driver refused.
    """
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    with on_device(device):
        code = int(runtime.cudaHostRegister(address, num_bytes, _REGISTER_FLAGS))
    if code != 0:
        _clear_error(device)
        raise CapacityError(
            f"the driver refused to lock host memory for the experts (error {code})",
            needed_bytes=num_bytes,
            available_bytes=0,
            setting="host_memory",
            hint="use orchestration='host' with less host_memory, or raise what may be locked "
            "(ulimit -l)",
        )


def page_unlock(address: int, device: torch.device) -> None:
    """Undo `page_lock` for the range that begins at `address`. CUDA only."""
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    with on_device(device):
        code = int(runtime.cudaHostUnregister(address))
    if code != 0:
        _clear_error(device)
        logger.warning("the driver refused to unlock host memory (error %d)", code)


def _clear_error(device: torch.device) -> None:
    """Take back the error that CUDA keeps of a refusal: the next kernel would be blamed for it."""
    with suppress(RuntimeError):
        torch.zeros(1, device=device)


def cpus_near(device: torch.device, *, root: Path = Path("/sys")) -> set[int] | None:
    """Give the processors on the device's own memory node; None where that is not known.

    Args:
        device: Any device; only CUDA devices have an answer.
        root: Where the system describes its devices.
    """
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    try:
        domain, bus, slot = (
            int(getattr(properties, f"pci_{part}_id")) for part in ("domain", "bus", "device")
        )
    except AttributeError:
        return None
    return _cpus_of_pci(f"{domain:04x}:{bus:02x}:{slot:02x}.0", root)


def _cpus_of_pci(address: str, root: Path) -> set[int] | None:
    """Read the processors near a PCI device that this process may use."""
    try:
        node = int((root / "bus/pci/devices" / address / "numa_node").read_text())
        text = (root / f"devices/system/node/node{node}/cpulist").read_text()
    except (OSError, ValueError):
        return None
    cpus: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first:
            cpus.update(range(int(first), int(last or first) + 1))
    return cpus & os.sched_getaffinity(0) or None


class SideStream:
    """Work beside the one that is going on, in order with itself.

    On the CPU there is no beside: everything happens where it is asked for.

    Args:
        device: Where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @contextmanager
    def forked(self) -> Iterator[None]:
        """Put what is asked for inside beside what follows, behind all that was asked before."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            yield

    def mark(self) -> torch.cuda.Event | None:
        """Mark the work so far, for `join`."""
        return None if self._stream is None else self._stream.record_event()

    def join(self, mark: torch.cuda.Event | None) -> None:
        """Let what is asked for from now on wait for marked work; the host does not."""
        if self._stream is not None and mark is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(mark)


class Turns:
    """One thread's work on a device at a time, behind all that was asked for in the turns before.

    Threads may have streams of their own.

    Args:
        device: Where the work is done.
        tidy: Called when a turn begins and when it ends, however it does.
    """

    def __init__(self, device: torch.device, tidy: Callable[[], None] = lambda: None) -> None:
        self._device = device
        self._tidy = tidy
        self._lock = threading.RLock()
        self._last: torch.cuda.Stream | None = None

    # Where an interruption falls, a generator that is not run to its end lets go of the lock; an
    # object with methods to enter and leave by may keep it.
    @contextmanager
    def taken(self) -> Iterator[None]:
        """Wait for a turn, and have it inside the block; those inside one are a part of it."""
        is_inside = self._lock._is_owned()  # type: ignore[attr-defined]
        with self._lock:
            if is_inside:
                yield
                return
            # What the turn before has left, where its own end was interrupted.
            self._tidy()
            if self._last is not None:
                current = torch.cuda.current_stream(self._device)
                if current != self._last:
                    current.wait_stream(self._last)
            try:
                yield
            finally:
                try:
                    self._tidy()
                finally:
                    if self._device.type == "cuda":
                        self._last = torch.cuda.current_stream(self._device)


def leave_capture(device: torch.device, pool: Any) -> None:
    """Take torch's allocator out of a capture that could not be ended; does nothing otherwise.

    torch 2.11 leaves its own books open there, and gives no cached memory back from then on.
    """
    with suppress(RuntimeError):
        # Raises where the books are closed, and the pool is let go of with its graph.
        torch._C._cuda_endAllocateToPool(device.index or 0, pool)
        torch._C._cuda_releasePool(device.index or 0, pool)


ReadMark: TypeAlias = torch.cuda.Event | None
"""What was asked to read, for a copy to wait for; None on the CPU, which has read it."""


class CopyStreams:
    """Copies to a device by several threads, each on a stream of its own beside the computation.

    A computation is asked for long before it is done, so nobody may overwrite what it reads only
    because it was asked for. The other way round there is nothing to order: a copy returns when
    its bytes are there, and only then is anything asked to read them. On the CPU what was asked
    for has been done.

    Args:
        device: Where the copies go.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._local = threading.local()
        self._reader: torch.cuda.Stream | None = None

    def order_reads(self) -> None:
        """Order what this thread asks for from now on behind all that was asked for before.

        One stream orders itself. Where callers use several, each waits for the one before it, so
        that the last of them is behind everything.
        """
        if self._device.type != "cuda":
            return
        current = torch.cuda.current_stream(self._device)
        if self._reader is not None and self._reader != current:
            current.wait_stream(self._reader)
        self._reader = current

    def mark_reads(self) -> ReadMark:
        """Mark all that has been asked for so far, for a copy to wait for."""
        if self._device.type != "cuda":
            return None
        self.order_reads()
        mark = torch.cuda.Event()  # type: ignore[no-untyped-call]
        torch.cuda.current_stream(self._device).record_event(mark)
        return mark

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: ReadMark) -> None:
        """Copy from page-locked host memory, and return when the bytes are there.

        Args:
            target: (n,) uint8 on the device.
            source: (n,) uint8 in host memory; free to be overwritten afterwards.
            after: What must be over before `target` is written to.
        """
        if self._device.type != "cuda":
            target.copy_(source)
            return
        stream = self._stream()
        if after is not None:
            stream.wait_event(after)
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
        # A thread that waits asleep leaves the processor to the others.
        arrived = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        stream.record_event(arrived)
        arrived.synchronize()

    def _stream(self) -> torch.cuda.Stream:
        held: torch.cuda.Stream | None = getattr(self._local, "stream", None)
        if held is None:
            held = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            self._local.stream = held
        return held
