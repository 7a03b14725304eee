"""Compiles every kernel for a GPU that need not be there, and prints what became of each as JSON.

Run as a script with `tests` on the path and without Triton's interpreter: launches are recorded,
not made. One line per variant, with the widest loads and stores of global memory in bits,
shared memory, registers and spills.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas

from foreload.ops import triton_grouped_kernels, triton_kernels, triton_present, triton_slots
from foreload.ops.device_experts import DeviceExperts
from foreload.ops.device_layout import StoredFormat, expert_layout
from foreload.ops.grouped import Chunk, SortedPairs, sort_pairs
from foreload.ops.reference import SumRule
from foreload.ops.scores import LayerScores, ScoreRule
from foreload.ops.triton import TritonKernels
from foreload.ops.triton_grouped import TritonGrouped
from foreload.types import Routing
from plain_experts import KINDS, PlainExperts, shapes_of

TYPES = {
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.uint8: "*u8",
}


class Recorder:
    """Stands in for a kernel and compiles what it would be launched with."""

    def __init__(self, kernel: Any, capability: int) -> None:
        self.kernel = kernel
        self.target = GPUTarget("cuda", capability, 32)
        self.seen: dict[str, dict[str, Any]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self.compile

    def compile(self, *args: Any, num_warps: int, **constants: Any) -> None:
        signature, constexprs, attributes = {}, dict(constants), {}
        values = iter(args)
        for number, name in enumerate(self.kernel.arg_names):
            if name in constants:
                signature[name] = "constexpr"
                continue
            value = next(values)
            if isinstance(value, torch.Tensor):
                signature[name] = TYPES[value.dtype]
                is_aligned = value.data_ptr() % 16 == 0
            elif value == 1:
                # Triton takes the number one for a constant.
                signature[name], constexprs[name] = "constexpr", 1
                continue
            else:
                signature[name] = "i32" if abs(value) < 2**31 else "i64"
                is_aligned = value % 16 == 0
            if is_aligned:
                attributes[(number,)] = [["tt.divisibility", 16]]
        key = repr((signature, constexprs, attributes, num_warps))
        if key in self.seen:
            return
        source = triton.compiler.ASTSource(self.kernel, signature, constexprs, attributes)
        made = triton.compile(source, target=self.target, options={"num_warps": num_warps})
        self.seen[key] = describe(made.asm["ptx"], self.target.arch, made.metadata.shared)


def describe(ptx: str, capability: int, shared: int) -> dict[str, Any]:
    """Tell what the machine will do: widths of loads and stores, shared memory, registers."""

    def widest(operation: str) -> int:
        found = re.findall(rf"{operation}\.global[.\w]*?(?:\.v(\d))?\.b(\d+)", ptx)
        return max((int(count or 1) * int(bits) for count, bits in found), default=0)

    sizes = re.findall(r"cp\.async.*, 0x([0-9a-f]+),", ptx)
    copied = max((8 * int(size, 16) for size in sizes), default=0)
    suffix = "a" if capability >= 90 else ""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [get_ptxas(capability).path, "-v", f"--gpu-name=sm_{capability}{suffix}"]
        report = subprocess.run(
            [*command, file.name, "-o", os.devnull], capture_output=True, text=True, check=True
        ).stderr
    registers = re.search(r"Used (\d+) registers", report)
    spilled = re.search(r"(\d+) bytes spill stores", report)
    return {
        "load_bits": max(widest("ld"), copied),
        "store_bits": widest("st"),
        "shared_bytes": shared,
        "registers": int(registers[1]) if registers else -1,
        "spilled_bytes": int(spilled[1]) if spilled else -1,
    }


def run(
    experts: PlainExperts, stored: StoredFormat, dtype: torch.dtype, sizes: tuple[int, int]
) -> None:
    """Launch, or rather record, everything that one layer can ask for."""
    layout = expert_layout(experts, shapes_of(experts, *sizes), stored, dtype=dtype)
    # Nothing is read: one byte that pretends to be all experts will do.
    host = torch.empty(2, experts.num_experts, layout.num_bytes, dtype=torch.uint8)
    # Slots for all experts, and for some.
    device = DeviceExperts(
        [layout] * 2,
        host,
        num_slots=[128, 64],
        sum_rules=[SumRule.HIDDEN] * 2,
        device="cpu",
        kernels=TritonKernels(),
    )
    for num_tokens in (1, 5):
        index = torch.zeros(num_tokens, 8, dtype=torch.int64)
        weights = torch.zeros(num_tokens, 8, dtype=dtype)
        hidden = torch.zeros(num_tokens, sizes[0], dtype=dtype)
        for layer in range(2):
            device.run(layer, experts, hidden, Routing(index, weights))
        device.prefetch(0, index)
    true = Routing(torch.zeros(1, 8, dtype=torch.int64), torch.zeros(1, 8, dtype=dtype))
    for rule in (None, LayerScores(ScoreRule.SOFTMAX, is_normalised=True)):
        triton_present.choose_present(
            true,
            device.tables.slot_of[0],
            torch.zeros(2, dtype=torch.int64),
            most_lost=0.1,
            rule=rule,
            logits=torch.zeros(1, experts.num_experts),
        )
    # So many tokens that a program has the least rows, and so many that it has the most.
    for num_tokens in (17, 1024):
        index = torch.arange(num_tokens * 8).view(num_tokens, 8) % experts.num_experts
        hidden = torch.zeros(num_tokens, sizes[0], dtype=dtype)
        order, starts = sort_pairs(index, experts.num_experts)
        chunk = Chunk(range(experts.num_experts), host[0], range(experts.num_experts))
        routing = Routing(index, torch.zeros(index.shape, dtype=dtype))
        pairs = SortedPairs(order, starts.tolist())
        TritonGrouped().forward(device.memory(0), pairs, [chunk], experts, hidden, routing)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--capability", type=int, default=90)
    parser.add_argument("--formats", nargs="*", default=[stored.value for stored in StoredFormat])
    parser.add_argument("--sizes", nargs=2, type=int, default=[2048, 768])
    arguments = parser.parse_args()
    recorders = {}
    for module in (triton_slots, triton_kernels, triton_present, triton_grouped_kernels):
        for name in module.__all__:
            kernel = getattr(module, name)
            if isinstance(kernel, triton.runtime.JITFunction):
                recorders[name] = Recorder(kernel, arguments.capability)
                setattr(module, name, recorders[name])
    for stored, kind in itertools.product(StoredFormat, ("gated", "ungated", "gpt-oss")):
        if stored.value not in arguments.formats:
            continue
        dtype = stored.code_dtype if stored.is_plain else torch.bfloat16
        known = {name: len(recorder.seen) for name, recorder in recorders.items()}
        run(replace(KINDS[kind], num_experts=128), stored, dtype, tuple(arguments.sizes))
        for name, recorder in recorders.items():
            for description in list(recorder.seen.values())[known[name] :]:
                line = {"kernel": name, "stored": stored.value, "kind": kind, **description}
                sys.stdout.write(json.dumps(line) + "\n")
                sys.stdout.flush()


if __name__ == "__main__":
    main()
