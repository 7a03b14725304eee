"""Check and time the device path on a machine with a CUDA device, stage by stage.

    python benchmarks/gpu.py equivalence suites profile
    python benchmarks/gpu.py replay --trace FILE

Each stage ends well within ten minutes and writes a JSON file under `--output`. Run through
`scripts/gpu`, which has the stages that are tests and kernels alone as well. Nothing here runs on
a machine without such a device, and nothing was measured by being written.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from foreload import Engine
from foreload.memory.cuda import has_device
from foreload.model.hf import attach

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
SHARES = (15, 30, 45, 70, 100)
FAMILIES = ("qwen3_moe", "mixtral", "gpt_oss")
NUM_TOKENS = 512
PROMPT = "def fibonacci(n):\n"


def open_engine(model: str | Path, share: float, **settings: Any) -> Engine:
    """Opens a model on the device with a share of its experts resident."""
    return Engine.from_pretrained(model, device="cuda", expert_memory=f"{share}%", **settings)


def step_through(engine: Engine, token_ids: Sequence[int]) -> tuple[list[Tensor], bool]:
    """Gives the logits of every token, decoded one by one, and whether steps were captured."""
    path = engine._device
    if path is None:
        sys.exit("the engine does not let the device decide")
    with path.lend_step(len(token_ids)) as step:
        if step is None:
            sys.exit(f"{engine.spec.architecture} has no static KV cache")
        logits = [step(token).float() for token in token_ids]
        return logits, step.is_captured


def smallest_share(engine: Engine) -> float:
    """Gives the least share, in percent, that serves one token."""
    return 100 * engine.spec.top_k / engine.spec.num_experts + 1e-6


def equivalence(arguments: argparse.Namespace) -> dict[str, Any]:
    """Compares captured decoding with transformers' resident model, token by token."""
    sys.path.insert(0, str(ROOT / "tests"))
    from transformers import AutoModelForCausalLM

    import zoo
    from foreload.model.source import resolve_model

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        models = {"demo": resolve_model("demo")}
        for family in FAMILIES:
            models[family] = zoo.save_family(family, Path(folder) / family, torch.float32).path
        for name, path in models.items():
            resident = AutoModelForCausalLM.from_pretrained(
                path, dtype=torch.float32, experts_implementation="eager"
            ).to("cuda")
            vocabulary = resident.get_input_embeddings().weight.shape[0]
            generator = torch.Generator().manual_seed(0)
            ids = torch.randint(3, vocabulary, (NUM_TOKENS,), generator=generator).tolist()
            with torch.inference_mode():
                wanted = resident(torch.tensor([ids], device="cuda")).logits[0].float().cpu()
            del resident
            for share in SHARES:
                try:
                    rows.append(_compare(name, path, share, ids, wanted))
                except Exception as error:
                    rows.append({"model": name, "share": share, "error": repr(error)})
                print(json.dumps(rows[-1]), flush=True)
    return {"rows": rows, "is_fine": all(row.get("is_fine", False) for row in rows)}


def _compare(name: str, path: Path, share: float, ids: list[int], wanted: Tensor) -> dict[str, Any]:
    """Runs one model with one share of its experts resident."""
    with Engine.from_pretrained(
        path, device="cuda", dtype="float32", expert_memory="100%", predictor="none"
    ) as whole:
        share = max(share, smallest_share(whole))
    with open_engine(path, share, dtype="float32", predictor="lookahead") as engine:
        logits, is_captured = step_through(engine, ids)
        found = torch.stack(logits)
        gap = (found - wanted).abs()
        scale = float(wanted.std())
        return {
            "model": name,
            "share": share,
            "is_captured": is_captured,
            "largest_gap": float(gap.max()) / scale,
            "mean_gap": float(gap.mean()) / scale,
            "other_likeliest": int((found.argmax(-1) != wanted.argmax(-1)).sum()),
            "hit_rate": engine.stats["hit_rate"],
            # float32 with another order of sums, through every layer.
            "is_fine": bool(is_captured and gap.mean() < 1e-3 * scale),
        }


def suites(arguments: argparse.Namespace) -> dict[str, Any]:
    """Times the widened demo model by share of resident experts, with prediction and without."""
    model = widened_demo()
    rows = []
    with open_engine(model, 100, predictor="none") as whole:
        least = smallest_share(whole)
    for share in sorted({max(share, least) for share in SHARES}):
        for predictor in ("none", "lookahead"):
            with open_engine(model, share, predictor=predictor) as engine:
                engine.generate(PROMPT, max_new_tokens=16)
                runs = [engine.generate(PROMPT, max_new_tokens=256).stats for _ in range(5)]
                rows.append(
                    {
                        "share": share,
                        "predictor": predictor,
                        "tpot_s": [run.tpot_s for run in runs],
                        "ttft_s": [run.ttft_s for run in runs],
                        "hit_rate": runs[-1].hit_rate,
                        "bytes_per_token": runs[-1].bytes_per_token,
                        "prefetch_precision": runs[-1].prefetch_precision,
                    }
                )
            print(json.dumps(rows[-1]), flush=True)
    return {"model": model.name, "rows": rows}


def replay(arguments: argparse.Namespace) -> dict[str, Any]:
    """Times random weights in the shape of Qwen3-30B-A3B under routing that was recorded."""
    from foreload.bench.random_models import make_random_checkpoint
    from foreload.trace.read import read_trace

    if arguments.trace is None:
        sys.exit("replay needs --trace FILE, a recorded routing")
    trace = read_trace(arguments.trace).decode_part()
    model = ROOT / "build" / f"qwen3-30b-a3b-{arguments.layers}"
    if not model.is_dir():
        make_random_checkpoint("qwen3-30b-a3b", model, num_layers=arguments.layers)
    demands = [
        step[: arguments.layers] for step in trace.demands() if len(step) >= arguments.layers
    ][:NUM_TOKENS]
    top_k = min(len(experts) for step in demands for experts in step)
    rows = []
    for share in SHARES:
        with open_engine(model, share, predictor="none") as engine:
            rows.append({"share": share, "top_k": top_k, **_replay(engine, demands, top_k)})
        print(json.dumps(rows[-1]), flush=True)
    return {"model": model.name, "trace": str(arguments.trace), "rows": rows}


def _replay(engine: Engine, demands: Any, top_k: int) -> dict[str, Any]:
    """Decodes with every layer's routing written into a buffer before each step."""
    path = engine._device
    if path is None:
        sys.exit("the engine does not let the device decide")
    num_layers = engine.spec.num_moe_layers
    forced = torch.zeros((num_layers, 1, top_k), dtype=torch.int64, device="cuda")
    run_layer = path.runtime.run_layer

    def run_forced(layer: int, experts: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Any:
        return run_layer(layer, experts, hidden, forced[layer], weights[:, :top_k].contiguous())

    attach(engine._loaded.sites, run_forced)
    times = []
    with path.lend_step(len(demands) + 1) as step:
        if step is None:
            sys.exit("no static KV cache")
        for number, layers in enumerate(demands):
            routing = torch.tensor([[list(experts[:top_k])] for experts in layers])
            forced.copy_(routing)
            torch.cuda.synchronize()
            start = time.perf_counter()
            step.likeliest(3 + number % 1000)
            times.append(time.perf_counter() - start)
        is_captured = step.is_captured
    path.runtime.count()
    metrics = engine.metrics
    settled = times[len(times) // 4 :]
    return {
        "is_captured": is_captured,
        "median_step_s": statistics.median(settled),
        "mean_step_s": statistics.fmean(settled),
        "hit_rate": metrics.hit_rate,
        "bytes_per_step": metrics.bytes_moved / max(metrics.num_steps, 1),
    }


def profile(arguments: argparse.Namespace) -> dict[str, Any]:
    """Writes torch's profile of some captured steps, at 30 % of the experts."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiling

    with open_engine(widened_demo(), 30) as engine:
        engine.generate(PROMPT, max_new_tokens=32)
        activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
        with profiling(activities=activities) as found:
            stats = engine.generate(PROMPT, max_new_tokens=20).stats
        found.export_chrome_trace(str(arguments.output / "profile.trace.json"))
        table = found.key_averages().table(sort_by="cuda_time_total", row_limit=30)
    print(table)
    return {"tpot_s": stats.tpot_s, "table": table.splitlines()}


def widened_demo() -> Path:
    """Gives the demo model with 64 times the expert bytes, made on first use."""
    from foreload.bench.widen import widen_checkpoint
    from foreload.model.source import resolve_model

    model = ROOT / "build" / "demo-x8"
    if not model.is_dir():
        widen_checkpoint(resolve_model("demo"), model, 8)
    return model


STAGES: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "equivalence": equivalence,
    "suites": suites,
    "replay": replay,
    "profile": profile,
}


def main() -> None:
    """Runs the stages that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="+", choices=STAGES)
    parser.add_argument("--output", type=Path, required=True, help="folder of the JSON files")
    parser.add_argument("--trace", type=Path, help="recorded routing, for replay")
    parser.add_argument("--layers", type=int, default=12, help="layers of the model to replay on")
    arguments = parser.parse_args()
    if not has_device():
        sys.exit("this needs a CUDA device, and torch sees none here")
    arguments.output.mkdir(parents=True, exist_ok=True)
    is_fine = True
    for stage in arguments.stages:
        result = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            **STAGES[stage](arguments),
        }
        is_fine &= result.get("is_fine", True)
        (arguments.output / f"{stage}.json").write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(0 if is_fine else 1)


if __name__ == "__main__":
    main()
