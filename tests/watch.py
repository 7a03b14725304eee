"""Sees what asks a device for values, where the CPU answers at once."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

ASKING = {
    "aten::_local_scalar_dense",
    "aten::item",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_consecutive",
    "aten::is_nonzero",
    "aten::repeat_interleave.Tensor",
}


class Watch(TorchDispatchMode):
    """Remembers what is called, and what of it asks for values."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.called: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.name()
        self.called.append(name)
        if name in ASKING or name.partition(".")[0] in ASKING:
            self.asked.append(name)
        return function(*args, **(kwargs or {}))
