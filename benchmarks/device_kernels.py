"""Check and time the kernels of experts on a GPU, on a layer shaped like those of Qwen3-30B-A3B.

Every number is of one layer: 128 experts of hidden size 2,048 and intermediate size 768, 8 to a
token. Steps run as one captured graph, each with experts of its own, so that neither launches nor
the GPU's cache are what is measured.

    PYTHONPATH=src:benchmarks python benchmarks/device_kernels.py --output kernels.json
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from gpu.rows import attempt, describe_run

from foreload.ops.device_experts import DeviceExperts, TwinKernels
from foreload.ops.device_layout import ExpertLayout, StoredFormat, expert_layout, pack_expert
from foreload.ops.reference import SumRule
from foreload.types import Routing

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

NUM_EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 128, 8, 2048, 768
NUM_STEPS = NUM_EXPERTS // TOP_K
NUM_TRIALS = 7
# Of bfloat16's roundings in another order, over the largest output; .005 was seen.
LARGEST_ERROR = 0.02


def make_experts() -> Any:
    """Gives what the experts forward asks of a module."""

    def apply_gate(products: Tensor) -> Tensor:
        gate, up = products.chunk(2, dim=-1)
        return F.silu(gate) * up

    return SimpleNamespace(
        num_experts=NUM_EXPERTS,
        has_gate=True,
        is_transposed=False,
        is_concatenated=True,
        has_bias=False,
        act_fn=F.silu,
        _apply_gate=apply_gate,
    )


def make_host(layout: ExpertLayout) -> Tensor:
    """Fills page-locked memory with experts; eight different ones, because packing takes long."""
    host = torch.empty(1, NUM_EXPERTS, layout.num_bytes, dtype=torch.uint8).pin_memory()
    generator = torch.Generator().manual_seed(0)
    for expert in range(NUM_EXPERTS):
        if expert < TOP_K:
            weights = {
                "gate_up_proj": torch.randn(2 * INTERMEDIATE, HIDDEN, generator=generator) / 45,
                "down_proj": torch.randn(HIDDEN, INTERMEDIATE, generator=generator) / 28,
            }
            pack_expert(layout, weights, host[0, expert])
        else:
            host[0, expert].copy_(host[0, expert % TOP_K])
    return host


class Layer:
    """One layer in one stored format."""

    def __init__(self, stored: StoredFormat) -> None:
        self.experts = make_experts()
        shapes = {
            "gate_up_proj": (2 * INTERMEDIATE, HIDDEN),
            "down_proj": (HIDDEN, INTERMEDIATE),
        }
        self.layout = expert_layout(self.experts, shapes, stored, dtype=torch.bfloat16)
        self.host = make_host(self.layout)

    def slots(self, num_slots: int, kernels: Any, device: str = "cuda") -> DeviceExperts:
        """Opens empty slots."""
        return DeviceExperts(
            [self.layout],
            self.host,
            num_slots=[num_slots],
            sum_rules=[SumRule.HIDDEN],
            device=device,
            kernels=kernels,
        )


def inputs(num_tokens: int) -> tuple[Tensor, list[Routing]]:
    """Gives hidden states and, per step, routings that share no expert with the step before."""
    generator = torch.Generator().manual_seed(num_tokens)
    hidden = torch.randn(num_tokens, HIDDEN, generator=generator).bfloat16().cuda()
    weights = torch.full((num_tokens, TOP_K), 1 / TOP_K, dtype=torch.bfloat16).cuda()
    routings = []
    for step in range(NUM_STEPS):
        first = torch.arange(num_tokens * TOP_K) + step * num_tokens * TOP_K
        routings.append(Routing((first % NUM_EXPERTS).view(num_tokens, TOP_K).cuda(), weights))
    return hidden, routings


def time_graph(steps: Callable[[], None], num_steps: int) -> list[float]:
    """Gives seconds per step of each trial."""
    steps()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        steps()
    return time_events(graph.replay, num_steps)


def time_events(call: Callable[[], Any], num_steps: int) -> list[float]:
    """Gives seconds per step of each trial of a call that makes so many."""
    call()
    seconds = []
    for _ in range(NUM_TRIALS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1000 / num_steps)
    return seconds


def time_copy(layer: Layer) -> dict[str, Any]:
    """Times torch's own copy of as many bytes as a token's experts have."""
    source = layer.host[0, :TOP_K]
    target = torch.empty_like(source, device="cuda")
    return rate(
        time_events(lambda: [target.copy_(source, non_blocking=True) for _ in range(8)], 8),
        source.numel(),
    )


def time_steps(layer: Layer, num_tokens: int, kernels: Any, *, is_resident: bool) -> dict[str, Any]:
    """Times steps that miss everything, or nothing."""
    device = layer.slots(NUM_EXPERTS if is_resident else num_tokens * TOP_K, kernels)
    hidden, routings = inputs(num_tokens)

    def steps() -> None:
        for routing in routings:
            device.run(0, layer.experts, hidden, routing)

    steps()
    before = device.read_counters()[0]
    result = rate(time_graph(steps, NUM_STEPS), num_tokens * TOP_K * layer.layout.num_bytes)
    after = device.read_counters()[0]
    result["hit_rate"] = (after.hits - before.hits) / (
        after.hits - before.hits + after.misses - before.misses
    )
    device.tables.check()
    return result


def time_prefetch(layer: Layer, num_programs: int) -> dict[str, Any]:
    """Times prefetches of a token's experts, none of them there."""
    from foreload.ops.triton import TritonKernels

    device = layer.slots(TOP_K, TritonKernels(num_copy_programs=num_programs))
    _, routings = inputs(1)
    device.run(0, layer.experts, inputs(1)[0], routings[0])

    def steps() -> None:
        for routing in routings:
            device.prefetch(0, routing.top_k_index)

    result = rate(time_graph(steps, NUM_STEPS), TOP_K * layer.layout.num_bytes)
    device.tables.check()
    return {"num_programs": num_programs, **result}


def rate(seconds: list[float], num_bytes: int) -> dict[str, Any]:
    """Gives the median, the rate it means, and every trial."""
    median = statistics.median(seconds)
    return {
        "us": median * 1e6,
        "gb_s": num_bytes / median / 1e9,
        "us_each": [round(each * 1e6, 2) for each in seconds],
    }


def check(layer: Layer, num_tokens: int, kernels: Any) -> dict[str, float]:
    """Compares missing and resident experts with the twin on the CPU: largest relative error.

    With the slots of what is timed: where each expert has one, formats are fetched in other ways.
    """
    hidden, routings = inputs(num_tokens)
    twin = layer.slots(NUM_EXPERTS, TwinKernels(), "cpu")
    cpu = Routing(routings[0].top_k_index.cpu(), routings[0].top_k_weights.cpu())
    wanted = twin.run(0, layer.experts, hidden.cpu(), cpu).float()
    errors = {}
    for number in (num_tokens * TOP_K, NUM_EXPERTS):
        device = layer.slots(number, kernels)
        for name in ("missing", "resident"):
            found = device.run(0, layer.experts, hidden, routings[0]).cpu().float()
            error = ((found - wanted).abs().max() / wanted.abs().max()).item()
            errors[f"{name}, {number} slots"] = error
        device.tables.check()
    return errors


def sweep_tiles(layer: Layer) -> list[dict[str, Any]]:
    """Times one resident token with other tiles than the chosen ones."""
    from foreload.ops.triton import Tile, TritonKernels

    found = []
    for num_rows, num_columns, num_warps in product((8, 16, 32), (256, 512, 1024), (2, 4, 8)):
        tile = Tile(num_rows, num_columns, num_warps)
        kernels = TritonKernels(tile=lambda matrix, num_tokens, tile=tile: tile)
        timed = time_steps(layer, 1, kernels, is_resident=True)
        found.append({**tile._asdict(), "us": timed["us"], "gb_s": timed["gb_s"]})
    return sorted(found, key=lambda each: each["us"])


def main() -> None:
    """Checks and times every stored format."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--sweep", action="store_true", help="try other tiles too")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this measures kernels on a GPU, and torch sees none here")
    from foreload.ops.triton import TritonKernels

    kernels = TritonKernels()
    formats: dict[str, Any] = {}
    results = {**describe_run(), "formats": formats}
    for stored in (StoredFormat.BFLOAT16, *(s for s in StoredFormat if not s.is_plain)):
        measure = functools.partial(measure_format, stored, kernels, sweep=arguments.sweep)
        formats[stored.value] = found = attempt({}, measure)
        print(stored.value, json.dumps(found))
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")
    sys.exit(0 if all(found["is_fine"] for found in formats.values()) else 1)


def measure_format(stored: StoredFormat, kernels: Any, *, sweep: bool) -> dict[str, Any]:
    """Checks and times the experts of one stored format."""
    layer = Layer(stored)
    found: dict[str, Any] = {"copy": time_copy(layer)}
    errors: list[float] = []
    for num_tokens in (1, 5):
        error = check(layer, num_tokens, kernels)
        errors += error.values()
        found[f"tokens_{num_tokens}"] = {
            "error": error,
            "all_miss": time_steps(layer, num_tokens, kernels, is_resident=False),
            "all_hit": time_steps(layer, num_tokens, kernels, is_resident=True),
        }
    if stored is StoredFormat.BFLOAT16:
        found["prefetch"] = [time_prefetch(layer, number) for number in (4, 8, 16, 32)]
        if sweep:
            found["tiles"] = sweep_tiles(layer)
    return {**found, "is_fine": max(errors) < LARGEST_ERROR}


if __name__ == "__main__":
    main()
