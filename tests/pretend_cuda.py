"""A CUDA device that is not there: its tensors are the processor's, and say that they are on it.

What a device would refuse is refused: an operation on tensors of both sides, and in a capture
whatever waits for the device or copies from memory that is not its own. A captured graph is a tape
of operations, replayed on the same memory, so that what the host did beside them is not repeated.
Kernels are Triton's, interpreted. Streams keep no order that the host does not keep.
"""

from __future__ import annotations

import functools
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from foreload.ops import triton_grouped_kernels, triton_kernels, triton_present, triton_slots

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import pytest

DEVICE = torch.device("cuda", 0)
FREE_BYTES = 4 << 30

COPIES = {"aten::copy_", "aten::_to_copy"}
# Arguments of kernels that something other than a kernel reads.
WRITTEN = ("outputs", "result", "chosen_ids", "chosen_weights")
KERNELS = [
    (triton_slots, "assign_slots"),
    (triton_slots, "copy_blocks"),
    (triton_kernels, "expert_products"),
    (triton_kernels, "sum_experts"),
    (triton_grouped_kernels, "grouped_products"),
    (triton_grouped_kernels, "sum_pairs"),
    (triton_present, "choose_among_present"),
]


def tensors_in(value: Any) -> list[Tensor]:
    """Give the tensors in arguments or outputs; torch's own way to do it takes most of the time."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, tuple | list):
        return []
    return [tensor for each in value for tensor in tensors_in(each)]


def with_tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """Copy arguments or outputs with other tensors."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: with_tensors(each, change) for name, each in value.items()}
    if isinstance(value, tuple | list):
        return type(value)([with_tensors(each, change) for each in value])
    return value


def there(tensor: Tensor) -> Tensor:
    """Give the memory that a tensor stands for."""
    return tensor.elem if isinstance(tensor, OnDevice) else tensor


class Tape:
    """What was asked for in a capture, with the memory it reads and writes."""

    def __init__(self) -> None:
        self.steps: list[Callable[[], None]] = []

    def add(self, call: Callable[[], Any], outputs: Any) -> None:
        held = tensors_in(outputs)

        def again() -> None:
            for old, new in zip(held, tensors_in(call()), strict=True):
                # Views and what was written in place are where they were.
                if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    old.copy_(new)

        self.steps.append(again)


class Machine:
    """The state of the device: a capture that is going on, and what was counted."""

    def __init__(self, *, is_quiet: bool = False) -> None:
        self.is_quiet = is_quiet
        self.tape: Tape | None = None
        self.num_syncs = 0
        self.num_captures = 0
        self.num_replays = 0
        self.num_launches = 0
        self.locked: dict[int, int] = {}


MACHINE = Machine()


class OnDevice(torch.Tensor):
    """A tensor that says it is on the device."""

    elem: Tensor

    @staticmethod
    def __new__(cls, elem: Tensor) -> OnDevice:
        made: OnDevice = torch.Tensor._make_wrapper_subclass(
            cls,
            elem.size(),
            strides=elem.stride(),
            storage_offset=elem.storage_offset(),
            dtype=elem.dtype,
            layout=elem.layout,
            device=DEVICE,
        )
        made.elem = elem
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def data_ptr(self) -> int:
        return self.elem.data_ptr()

    def tolist(self) -> Any:
        wait("tolist")
        return self.elem.tolist()

    def item(self) -> Any:
        wait("item")
        return self.elem.item()

    def __bool__(self) -> bool:
        return bool(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __float__(self) -> float:
        return float(self.item())

    def contiguous(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.elem.is_contiguous():
            return self
        return torch.ops.aten.clone.default(self, memory_format=torch.contiguous_format)

    def nonzero(self, *, as_tuple: bool = False) -> Any:
        wait("nonzero")
        found = torch.ops.aten.nonzero.default(self)
        return found.unbind(1) if as_tuple else found

    def __invert__(self) -> Tensor:
        return torch.ops.aten.bitwise_not.default(self)

    def new_tensor(self, data: Any, **kwargs: Any) -> Tensor:
        return torch.tensor(data, **{"dtype": self.dtype, "device": self.device, **kwargs})

    def copy_(self, source: Tensor, non_blocking: bool = False) -> Tensor:
        return torch.ops.aten.copy_.default(self, source, non_blocking)

    def __getitem__(self, place: Any) -> Any:
        return indexed(self, place, lambda elem, real: elem[real])

    def __setitem__(self, place: Any, value: Any) -> None:
        def write(elem: Tensor, real: Any) -> None:
            elem[real] = value.elem if isinstance(value, OnDevice) else value

        if isinstance(value, Tensor) and not isinstance(value, OnDevice) and value.ndim:
            wait("a write from the host's memory")
        is_number = isinstance(value, bool | int | float)
        indexed(self, place, write, is_write=True, is_number=is_number)

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def __repr__(self, **kwargs: Any) -> str:
        return f"OnDevice({self.elem!r})"

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return dispatch(function, args, kwargs or {})


class Pretend(TorchDispatchMode):
    """Makes tensors on the device where that is asked for."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return dispatch(function, args, kwargs or {})


def wait(name: str) -> None:
    """Note that the host waits for the device."""
    MACHINE.num_syncs += 1
    if MACHINE.tape is not None:
        raise RuntimeError(f"{name} waits for the device, and a step is being captured")


def indexed(
    tensor: OnDevice,
    place: Any,
    index: Callable[[Tensor, Any], Any],
    *,
    is_write: bool = False,
    is_number: bool = False,
) -> Any:
    """Index as torch would; its own way asks the build for a device before anything else."""
    for each in place if isinstance(place, tuple) else (place,):
        is_mask = isinstance(each, Tensor) and each.dtype in (torch.bool, torch.uint8)
        # Where a mask is all there is, torch writes a number as masked_fill_ does.
        is_filled = is_number and each is place and isinstance(each, OnDevice)
        if (is_mask and not is_filled) or (type(each) is Tensor and each.ndim):
            wait("a mask, or an index in the host's memory,")
    real = with_tensors(place, there)

    def call() -> Any:
        with torch.utils._python_dispatch._disable_current_modes():
            return index(tensor.elem, real)

    output = None if is_write and MACHINE.tape is not None else call()
    if MACHINE.tape is not None:
        MACHINE.tape.add(call, output)
    return output if output is None else OnDevice(output)


def dispatch(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation where its tensors are."""
    # In inference mode an operation made of others arrives whole.
    if is_made_of_others(function):
        with Pretend():
            return function.decompose(*args, **kwargs)
    name = function._schema.name
    tensors = tensors_in((args, kwargs))
    theirs = [each for each in tensors if isinstance(each, OnDevice)]
    here = [each for each in tensors if not isinstance(each, OnDevice)]
    device = kwargs.get("device")
    is_there = bool(theirs) if device is None else torch.device(device).type == "cuda"
    if theirs and name == "aten::_local_scalar_dense":
        wait(name)
    elif name in COPIES:
        is_target_there = isinstance(args[0], OnDevice) if name == "aten::copy_" else is_there
        is_source_there = isinstance(args[-1], OnDevice)
        if is_source_there and not is_target_there:
            wait(name)
        if MACHINE.tape is not None and is_target_there and not is_source_there:
            source = args[-1]
            if source.ndim or name != "aten::copy_":
                raise RuntimeError("a copy from the host's memory, and a step is being captured")
    elif theirs and any(each.ndim for each in here):
        shapes = [(str(each.device), tuple(each.shape)) for each in tensors]
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, got {shapes}")
    real_args, real_kwargs = with_tensors(args, there), with_tensors(kwargs, there)
    if device is not None and is_there:
        real_kwargs = {**real_kwargs, "device": torch.device("cpu")}
    real_kwargs.pop("pin_memory", None)

    def call() -> Any:
        if name == "aten::histc":
            # The device counts whole numbers, the processor does not.
            return function(real_args[0].float(), *real_args[1:], **real_kwargs).to(args[0].dtype)
        if name == "aten::mm" and function._overloadname == "dtype":
            # The device alone multiplies into another element type.
            left, right, dtype = real_args
            return torch.mm(left.to(dtype), right.to(dtype))
        return function(*real_args, **real_kwargs)

    # A capture computes nothing: what is only made has a shape to be given, what is there stays.
    is_written = MACHINE.tape is not None and is_there and function._schema.is_mutable
    outputs = real_args[0] if is_written else call()
    if MACHINE.tape is not None and name.startswith("aten::empty"):
        # What would be written to it is not, and it may be taken for an index.
        outputs.zero_()
    if is_there and MACHINE.tape is not None:
        MACHINE.tape.add(call, outputs)
    if not is_there:
        return outputs
    # What was written in place is what it was.
    known = {id(each.elem): each for each in theirs}
    # A view of what was made outside inference mode belongs there too.
    is_outside = function.is_view and any(not each.is_inference() for each in theirs)
    with torch.inference_mode(False) if is_outside else nullcontext():
        return with_tensors(
            outputs, lambda each: known[id(each)] if id(each) in known else OnDevice(each)
        )


@functools.cache
def is_made_of_others(function: Any) -> bool:
    """Tell whether torch knows an operation as a composition alone."""
    return bool(function._can_decompose())


class Launcher:
    """A kernel, interpreted on the memory that its arguments stand for."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **constants: Any) -> None:
            for each in (*args, *constants.values()):
                if isinstance(each, Tensor) and not isinstance(each, OnDevice):
                    raise ValueError(
                        "Pointer argument cannot be accessed from Triton (cpu tensor?)"
                    )
            real = with_tensors(args, there)

            def call() -> None:
                with torch.utils._python_dispatch._disable_current_modes():
                    if not MACHINE.is_quiet:
                        self._kernel[grid](*real, **constants)
                        return
                    for name, each in zip(self._kernel.arg_names, real, strict=False):
                        if name in WRITTEN:
                            each.zero_()

            MACHINE.num_launches += 1
            if MACHINE.tape is None:
                call()
            else:
                MACHINE.tape.add(call, ())

        return launch


class Stream:
    """A stream in the host's order."""

    def __init__(self, device: Any = None, **kwargs: Any) -> None:
        self.device = DEVICE

    def wait_stream(self, stream: Stream) -> None:
        pass

    def is_capturing(self) -> bool:
        return MACHINE.tape is not None

    def wait_event(self, event: Event) -> None:
        pass

    def record_event(self, event: Event | None = None) -> Event:
        return event or Event()


class Event:
    """A mark in the host's order."""

    def __init__(self, **kwargs: Any) -> None:
        pass

    def synchronize(self) -> None:
        wait("synchronize")


class Graph:
    """A captured step."""

    def __init__(self) -> None:
        self.tape = Tape()

    def pool(self) -> tuple[int, int]:
        return 0, 0

    def replay(self) -> None:
        MACHINE.num_replays += 1
        with torch.utils._python_dispatch._disable_current_modes():
            for step in self.tape.steps:
                step()


@contextmanager
def capture(graph: Graph, **settings: Any) -> Iterator[None]:
    """Capture instead of computing: what was written is as it was before."""
    MACHINE.tape = graph.tape
    MACHINE.num_captures += 1
    try:
        yield
    finally:
        MACHINE.tape = None


class Runtime:
    """The driver's page locking."""

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        MACHINE.locked[address] = num_bytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        del MACHINE.locked[address]
        return 0


@contextmanager
def pretend_cuda(patch: pytest.MonkeyPatch, *, is_quiet: bool = False) -> Iterator[Machine]:
    """Have the device inside the block; a quiet one's kernels give zeros."""
    MACHINE.__init__(is_quiet=is_quiet)  # type: ignore[misc]
    current = Stream()
    for name, value in {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "mem_get_info": lambda device=None: (FREE_BYTES, FREE_BYTES),
        "memory_reserved": lambda device=None: 0,
        "memory_allocated": lambda device=None: 0,
        "synchronize": lambda device=None: wait("synchronize"),
        "cudart": Runtime,
        "get_device_properties": lambda device: SimpleNamespace(),
        "get_device_name": lambda device=None: "a device that is not there",
        "get_device_capability": lambda device=None: (9, 0),
        "is_current_stream_capturing": lambda: MACHINE.tape is not None,
        "Stream": Stream,
        "Event": Event,
        "current_stream": lambda device=None: current,
        "stream": lambda stream: nullcontext(),
        "device": lambda device: nullcontext(),
        "CUDAGraph": Graph,
        "graph_pool_handle": lambda: (0, 0),
        "graph": capture,
    }.items():
        patch.setattr(torch.cuda, name, value)
    # torch's optimisers ask for it by this name since 2.14
    patch.setattr(torch.accelerator, "current_stream", lambda device=None: current)
    for module, name in KERNELS:
        patch.setattr(module, name, Launcher(getattr(module, name)))
    # All of the host's memory is the device's own. Torch keeps the functions that a device context
    # is for from the first use of one on: they must be its own.
    torch.utils._device._device_constructors()
    make, find = torch.tensor, torch.nonzero
    patch.setattr(torch, "tensor", lambda data, *, pin_memory=False, **given: make(data, **given))
    # As a function it asks the build for a device before anything else.
    patch.setattr(
        torch,
        "nonzero",
        lambda tensor, **how: (OnDevice.nonzero if isinstance(tensor, OnDevice) else find)(
            tensor, **how
        ),
    )
    # torch.tensor makes its tensor here, and copies it there where the mode sees it.
    torch._C._set_only_lift_cpu_tensors(True)
    # A parameter that moves is another tensor, not the same one with other contents.
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with Pretend():
            yield MACHINE
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
        torch._C._set_only_lift_cpu_tensors(False)
