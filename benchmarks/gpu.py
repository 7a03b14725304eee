"""Check and time the device path on a machine with a CUDA device, stage by stage.

    python benchmarks/gpu.py equivalence tiers suites profile
    python benchmarks/gpu.py replay --trace FILE

Each stage ends well within ten minutes and writes a JSON file under `--output`, after every row
and whatever broke. Run through `scripts/gpu`, which has the stages that are tests and kernels alone
as well. Nothing here runs on a machine without such a device, and nothing was measured by being
written; `tests/bench/test_gpu_stages.py` runs every stage on a device that is not there.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from foreload import Engine
from foreload.memory.cuda import has_device
from foreload.model.hf import attach, load_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    Row = dict[str, Any]

ROOT = Path(__file__).resolve().parents[1]
DEVICE = "cuda:0"
SHARES = (15, 30, 45, 70, 100)
FAMILIES = ("qwen3_moe", "mixtral", "gpt_oss")
NUM_TOKENS = 512
NUM_STAGED_TOKENS = 256
# Shares of the experts, in percent: on the device, and in the host tier below it.
STAGED = ((30, 5), (30, 50), (70, 30))
SHARE_WITH_DRAFT, HOST_SHARES = 60, (10, 60)
NUM_DRAWS = 1000
NUM_RUNS = 5
NUM_TIMED = 256
NUM_WARM = 16
PROMPT = "def fibonacci(n):\n"


def open_engine(model: str | Path, share: float, **settings: Any) -> Engine:
    """Opens a model on the device with a share of its experts resident."""
    # The host's loop must be asked for: falling back to it would be timed as what it is not.
    settings = {"orchestration": "device", **settings}
    return Engine.from_pretrained(model, device=DEVICE, expert_memory=f"{share}%", **settings)


def open_staged(model: str | Path, share: float, host_share: float, **settings: Any) -> Engine:
    """Opens a model whose experts come from disk by way of a host tier of some of them."""
    return open_engine(model, share, host_memory=f"{host_share}%", orchestration="host", **settings)


def attempt(row: Row, measure: Callable[[], Row]) -> Row:
    """Gives a row with what was measured, or with what broke: the next rows are worth having."""
    try:
        row = {**row, **measure()}
    except Exception as error:
        traceback.print_exc()
        row = {**row, "error": repr(error), "is_fine": False}
    print(json.dumps(row), flush=True)
    return row


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


def shares_of(model: Path) -> list[float]:
    """Gives the shares to run a model at; the least serves one token."""
    spec = load_model(model).spec
    least = 100 * spec.top_k / spec.num_experts + 1e-6
    return sorted({max(share, least) for share in SHARES})


def resident_logits(path: Path, num_tokens: int) -> tuple[list[int], Tensor]:
    """Gives random tokens, and transformers' logits behind each with all experts on the device."""
    from transformers import AutoModelForCausalLM

    resident = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, experts_implementation="eager"
    ).to(DEVICE)
    vocabulary = resident.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocabulary, (num_tokens,), generator=generator).tolist()
    with torch.inference_mode():
        return ids, resident(torch.tensor([ids], device=DEVICE)).logits[0].float().cpu()


def compare(found: Tensor, wanted: Tensor) -> Row:
    """Compares logits (T, V) in float32: other orders of sums, through every layer."""
    gap, scale = (found - wanted).abs(), float(wanted.std())
    return {
        "largest_gap": float(gap.max()) / scale,
        "mean_gap": float(gap.mean()) / scale,
        "other_likeliest": int((found.argmax(-1) != wanted.argmax(-1)).sum()),
        "is_fine": bool(gap.mean() < 1e-3 * scale),
    }


def equivalence(arguments: argparse.Namespace) -> Iterator[Row]:
    """Compares captured decoding with transformers' resident model, token by token."""
    sys.path.insert(0, str(ROOT / "tests"))
    import zoo
    from foreload.model.source import resolve_model

    with tempfile.TemporaryDirectory() as folder:
        models = {"demo": resolve_model("demo")}
        for family in FAMILIES:
            models[family] = zoo.save_family(family, Path(folder) / family, torch.float32).path
        for name, path in models.items():
            ids, wanted = resident_logits(path, NUM_TOKENS)
            for share in shares_of(path):
                row = {"model": name, "share": share}
                yield attempt(row, functools.partial(_decode, path, share, ids, wanted))


def _decode(path: Path, share: float, ids: list[int], wanted: Tensor) -> Row:
    """Runs one model with one share of its experts resident."""
    with open_engine(path, share, dtype="float32", predictor="lookahead") as engine:
        logits, is_captured = step_through(engine, ids)
        row = compare(torch.stack(logits), wanted)
        row["is_fine"] = row["is_fine"] and is_captured
        return {"is_captured": is_captured, "hit_rate": engine.stats["hit_rate"], **row}


def tiers(arguments: argparse.Namespace) -> Iterator[Row]:
    """Checks and times three tiers: a host tier too small for the experts, over the disk."""
    from foreload.model.source import resolve_model

    demo = resolve_model("demo")
    ids, wanted = resident_logits(demo, NUM_STAGED_TOKENS)
    for share, host_share in STAGED:
        row: Row = {"what": "logits", "share": share, "host_share": host_share}
        yield attempt(row, functools.partial(_decode_staged, demo, share, host_share, ids, wanted))
    yield attempt({"what": "a draft's texts"}, functools.partial(_say_staged, demo))
    for draft in ("none", "int4"):
        for host_share in HOST_SHARES:
            share = SHARE_WITH_DRAFT
            row = {"what": "times", "draft": draft, "share": share, "host_share": host_share}
            yield attempt(row, functools.partial(_time_staged, share, host_share, draft))


def _decode_staged(
    path: Path, share: float, host_share: float, ids: list[int], wanted: Tensor
) -> Row:
    """Runs given tokens one by one, with experts from all three tiers."""
    with open_staged(path, share, host_share, dtype="float32", predictor="lookahead") as engine:
        cache = engine.make_cache()
        logits = [engine.forward(torch.tensor([[token]]), cache).float() for token in ids]
        stats = engine.stats
        return {
            "hit_rate": stats["hit_rate"],
            "host_bytes": stats["host_bytes"],
            "bytes_moved": stats["bytes_moved"],
            **compare(torch.stack(logits), wanted),
        }


def _say_staged(path: Path) -> Row:
    """Compares greedy texts with a draft and without."""
    said = {}
    for draft in ("none", "int4"):
        with open_staged(
            path, SHARE_WITH_DRAFT, HOST_SHARES[-1], dtype="float32", draft=draft
        ) as engine:
            said[draft] = engine.generate(PROMPT, max_new_tokens=NUM_STAGED_TOKENS)
    pairs = zip(said["none"].token_ids, said["int4"].token_ids, strict=False)
    num_same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    return {
        "num_tokens": len(said["none"].token_ids),
        "num_same": num_same,
        "acceptance_rate": said["int4"].stats.acceptance_rate,
        "is_fine": said["none"].token_ids == said["int4"].token_ids,
    }


def _time_staged(share: float, host_share: float, draft: str) -> Row:
    """Times the widened demo in bfloat16."""
    start = time.perf_counter()
    with open_staged(widened_demo(), share, host_share, draft=draft) as engine:
        opened_s = time.perf_counter() - start
        engine.generate(PROMPT, max_new_tokens=NUM_WARM)
        runs = [
            engine.generate(PROMPT, max_new_tokens=NUM_TIMED // 4).stats for _ in range(NUM_RUNS)
        ]
        return {
            "opened_s": opened_s,
            "num_slots": engine.num_slots,
            "tpot_s": [run.tpot_s for run in runs],
            "ttft_s": [run.ttft_s for run in runs],
            "hit_rate": runs[-1].hit_rate,
            "bytes_per_token": runs[-1].bytes_per_token,
            "host_bytes": engine.stats["host_bytes"],
            "bytes_moved": engine.stats["bytes_moved"],
            "acceptance_rate": runs[-1].acceptance_rate,
        }


def sampling(arguments: argparse.Namespace) -> Iterator[Row]:
    """Tests by chi-square that tokens are drawn as the logits say, with a draft and without."""
    sys.path.insert(0, str(ROOT / "tests"))
    import zoo

    with tempfile.TemporaryDirectory() as folder:
        path = zoo.save_family("qwen3_moe", Path(folder), torch.float32).path
        for draft in ("none", "int4"):
            yield attempt({"draft": draft}, functools.partial(_draw, path, draft))


def _draw(path: Path, draft: str) -> Row:
    """Draws second tokens, a seed each, and compares them with their exact distribution."""
    from distribution import compare_draws, exact_second

    settings: dict[str, Any] = {"temperature": 0.7, "top_k": 6, "top_p": 0.95}
    prompt = [11, 16, 21, 5]
    with open_engine(path, 200, dtype="float32", draft=draft) as engine:
        seconds = [
            engine.generate(prompt, max_new_tokens=3, seed=seed, **settings).token_ids[1]
            for seed in range(NUM_DRAWS)
        ]
        found = compare_draws(seconds, exact_second(engine, prompt, settings))
        return {**found._asdict(), "is_fine": found.is_fine}


def suites(arguments: argparse.Namespace) -> Iterator[Row]:
    """Times the widened demo model by share of resident experts, with prediction and without."""
    model = widened_demo()
    for share in shares_of(model):
        for predictor in ("none", "lookahead"):
            row = {"share": share, "predictor": predictor}
            yield attempt(row, functools.partial(_time_suite, model, share, predictor))


def _time_suite(model: Path, share: float, predictor: str) -> Row:
    """Times one share with one predictor."""
    with open_engine(model, share, predictor=predictor) as engine:
        engine.generate(PROMPT, max_new_tokens=NUM_WARM)
        runs = [engine.generate(PROMPT, max_new_tokens=NUM_TIMED).stats for _ in range(NUM_RUNS)]
        return {
            "tpot_s": [run.tpot_s for run in runs],
            "ttft_s": [run.ttft_s for run in runs],
            "hit_rate": runs[-1].hit_rate,
            "bytes_per_token": runs[-1].bytes_per_token,
            "prefetch_precision": runs[-1].prefetch_precision,
        }


def replay(arguments: argparse.Namespace) -> Iterator[Row]:
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
    for share in SHARES:
        row = {"model": model.name, "trace": str(arguments.trace), "share": share, "top_k": top_k}
        yield attempt(row, functools.partial(_replay, model, share, demands, top_k))


def _replay(model: Path, share: float, demands: Any, top_k: int) -> Row:
    """Decodes with every layer's routing written into a buffer before each step."""
    with open_engine(model, share, predictor="none") as engine:
        return _force(engine, demands, top_k)


def _force(engine: Engine, demands: Any, top_k: int) -> Row:
    path = engine._device
    if path is None:
        sys.exit("the engine does not let the device decide")
    num_layers = engine.spec.num_moe_layers
    forced = torch.zeros((num_layers, 1, top_k), dtype=torch.int64, device=DEVICE)
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


def profile(arguments: argparse.Namespace) -> Iterator[Row]:
    """Writes torch's profile of some captured steps, at 30 % of the experts."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiling

    model = widened_demo()
    share = next(share for share in shares_of(model) if share >= 30)

    def measure() -> Row:
        with open_engine(model, share) as engine:
            engine.generate(PROMPT, max_new_tokens=NUM_WARM)
            activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
            with profiling(activities=activities) as found:
                stats = engine.generate(PROMPT, max_new_tokens=NUM_WARM).stats
            found.export_chrome_trace(str(arguments.output / "profile.trace.json.gz"))
            table = found.key_averages().table(sort_by="device_time_total", row_limit=30)
        return {"tpot_s": stats.tpot_s, "table": table.splitlines()}

    yield attempt({"share": share}, measure)


def widened_demo() -> Path:
    """Gives the demo model with 64 times the expert bytes, made on first use."""
    from foreload.bench.widen import widen_checkpoint
    from foreload.model.source import resolve_model

    model = ROOT / "build" / "demo-x8"
    if not model.is_dir():
        widen_checkpoint(resolve_model("demo"), model, 8)
    return model


STAGES: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
    "equivalence": equivalence,
    "tiers": tiers,
    "sampling": sampling,
    "suites": suites,
    "replay": replay,
    "profile": profile,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the stages that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="+", choices=STAGES)
    parser.add_argument("--output", type=Path, required=True, help="folder of the JSON files")
    parser.add_argument("--trace", type=Path, help="recorded routing, for replay")
    parser.add_argument("--layers", type=int, default=6, help="layers of the model to replay on")
    arguments = parser.parse_args(argv)
    if not has_device():
        sys.exit("this needs a CUDA device, and torch sees none here")
    arguments.output.mkdir(parents=True, exist_ok=True)
    # A stage that broke leaves the others to run.
    fine = [run_stage(stage, arguments) for stage in arguments.stages]
    sys.exit(0 if all(fine) else 1)


def run_stage(stage: str, arguments: argparse.Namespace) -> bool:
    """Runs a stage, keeps every row at once, and tells whether all were fine."""
    result: Row = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": []}
    begun = time.perf_counter()

    def keep(row: Row) -> None:
        result["rows"].append(row)
        result["took_s"] = time.perf_counter() - begun
        (arguments.output / f"{stage}.json").write_text(json.dumps(result, indent=1) + "\n")

    try:
        for row in STAGES[stage](arguments):
            keep(row)
    except Exception as error:
        traceback.print_exc()
        keep({"error": repr(error), "is_fine": False})
    return all(row.get("is_fine", True) for row in result["rows"])


if __name__ == "__main__":
    main()
