"""Time a decoded token of foreload, llama.cpp and accelerate, at the same total memory.

See README.md for what is compared and which rules keep it fair.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hog
from arms import MISSING_EXIT_CODE, installed_versions

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

GIB = 2**30

# Name of an arm: the engine that runs it and what is fixed for it.
ARMS: dict[str, dict[str, Any]] = {
    "foreload": {"engine": "foreload", "predictor": "auto"},
    "foreload-lookahead": {"engine": "foreload", "predictor": "lookahead"},
    "foreload-on-demand": {"engine": "foreload", "predictor": "none"},
    "llama.cpp": {"engine": "llama.cpp"},
    "accelerate": {"engine": "accelerate", "placement": "experts"},
    "accelerate-auto": {"engine": "accelerate", "placement": "auto"},
}
DEFAULT_ARMS = ("foreload", "llama.cpp", "accelerate")
# Above this share of the processors in use beforehand, a figure is marked as noisy.
BUSY_FRACTION = 0.1


@dataclasses.dataclass(frozen=True)
class Spread:
    """A median with its range."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Take it from samples; at least one is needed."""
        values = list(values)
        return cls(statistics.median(values), min(values), max(values))

    def show(self, digits: int = 2, unit: float = 1) -> str:
        """Print it as `median (low to high)`."""
        median, low, high = (f"{x / unit:.{digits}f}" for x in (self.median, self.low, self.high))
        return f"{median} ({low} to {high})"


def read_tokens(model: Path, text: Path) -> list[int]:
    """Encode a text with the checkpoint's own tokeniser."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    return list(tokenizer.encode(text.read_text(), add_special_tokens=False).ids)


def cut_windows(
    tokens: Sequence[int], num_prompt: int, num_decode: int, num_windows: int
) -> list[tuple[list[int], list[int]]]:
    """Cut prompts and their true continuations, evenly spread over the text.

    Args:
        tokens: The whole text.
        num_prompt: Tokens of a prompt.
        num_decode: Tokens that follow it.
        num_windows: How many are needed.

    Returns:
        Pairs of prompt and continuation; they do not overlap.
    """
    length = num_prompt + num_decode
    if len(tokens) < length * num_windows:
        raise SystemExit(
            f"the text has {len(tokens)} tokens, {num_windows} windows need {length * num_windows}"
        )
    stride = len(tokens) // num_windows
    starts = range(0, stride * num_windows, stride)
    return [
        (list(tokens[s : s + num_prompt]), list(tokens[s + num_prompt : s + length]))
        for s in starts
    ]


def rotate(names: Sequence[str], trial: int) -> list[str]:
    """Order the arms of a trial: each starts one later than in the trial before."""
    shift = trial % len(names)
    return [*names[shift:], *names[:shift]]


def evict(paths: Iterable[Path]) -> None:
    """Drop the given files' pages from the page cache; nobody may have them mapped."""
    os.sync()
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def read_busy_fraction(seconds: float = 2) -> float:
    """Watch which share of all processors is in use."""

    def read() -> tuple[int, int]:
        fields = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        return sum(fields), fields[3] + fields[4]

    total, idle = read()
    time.sleep(seconds)
    later_total, later_idle = read()
    return 1 - (later_idle - idle) / max(1, later_total - total)


def read_machine() -> dict[str, Any]:
    """Describe the machine, without naming it."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    model = next((x.split(":")[1] for x in cpuinfo.splitlines() if x.startswith("model name")), "?")
    pages, page_bytes = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return {
        "processor": model.strip(),
        "num_processors": os.cpu_count(),
        "memory_bytes": pages * page_bytes,
        "kernel": platform.release(),
        "versions": installed_versions(
            "foreload", "torch", "transformers", "accelerate", "xllamacpp", "gguf"
        ),
    }


def child_environment(threads: int, wait_policy: str | None) -> dict[str, str]:
    """Give every arm the same number of threads."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if wait_policy:
        environment["OMP_WAIT_POLICY"] = wait_policy
    return environment


def run_arm(
    spec: dict[str, Any], environment: dict[str, str], log: Path, timeout_s: float
) -> dict[str, Any]:
    """Run one arm in its own process.

    Args:
        spec: What `arms.py` needs.
        environment: Its environment.
        log: File to append its messages to.
        timeout_s: How long it may take.

    Returns:
        Its result; or `skipped` or `failed` with the reason.
    """
    with tempfile.TemporaryDirectory(prefix="rivals-", dir=spec["work"]) as work:
        offload = Path(work) / "offload"
        offload.mkdir()
        spec = {**spec, "offload": str(offload)}
        spec_path, result_path = Path(work) / "spec.json", Path(work) / "result.json"
        spec_path.write_text(json.dumps(spec))
        command = [sys.executable, str(Path(__file__).with_name("arms.py"))]
        with log.open("a") as stream:
            stream.write(f"--- {spec['arm']}, trial {spec['trial']}\n")
            stream.flush()
            try:
                code = subprocess.run(
                    [*command, str(spec_path), str(result_path)],
                    env=environment,
                    stdout=stream,
                    stderr=stream,
                    stdin=subprocess.DEVNULL,
                    timeout=timeout_s,
                    check=False,
                ).returncode
            except subprocess.TimeoutExpired:
                return {"failed": f"took longer than {timeout_s:.0f} s"}
        if code == MISSING_EXIT_CODE:
            return {"skipped": "not installed"}
        if code == -9:
            return {"failed": "killed, probably out of memory"}
        if code != 0 or not result_path.exists():
            last = log.read_text().strip().splitlines()[-1]
            return {"failed": f"ended with status {code}: {last}"}
        return dict(json.loads(result_path.read_text()))


def step_mean_s(sample: dict[str, Any], last: float = 1) -> float:
    """Average the seconds per decoded token, of all steps or of the last share of them."""
    steps: list[float] = sample["step_s"]
    return float(statistics.fmean(steps[-max(1, round(len(steps) * last)) :]))


def agreement(sample: dict[str, Any], reference: dict[str, Any]) -> float:
    """Say at which share of the positions two arms find the same token likeliest."""
    pairs = list(zip(sample["predicted"], reference["predicted"], strict=True))
    return sum(a == b for a, b in pairs) / len(pairs)


def table_rows(samples: Sequence[dict[str, Any]], reference: str) -> list[list[str]]:
    """Summarise all trials, one row per arm.

    Args:
        samples: What every run gave, in the order it ran.
        reference: The arm the others are compared with.

    Returns:
        The cells of each row; an arm without any result gives one cell of explanation.
    """
    names = list(dict.fromkeys(sample["arm"] for sample in samples))
    good = {name: [s for s in samples if s["arm"] == name and "step_s" in s] for name in names}
    reference_by_trial = {s["trial"]: s for s in good.get(reference, ())}
    reference_s = [step_mean_s(s) for s in reference_by_trial.values()]
    rows = []
    for name in names:
        runs = good[name]
        if not runs:
            why = next(s.get("skipped") or s.get("failed") for s in samples if s["arm"] == name)
            rows.append([name, str(why)])
            continue
        per_token = Spread.of(step_mean_s(s) for s in runs)
        shared = [s for s in runs if s["trial"] in reference_by_trial]
        same = [agreement(s, reference_by_trial[s["trial"]]) for s in shared]
        speed = statistics.median(reference_s) / per_token.median if reference_s else None
        read_bytes = Spread.of(s["decode"]["read_bytes"] / len(s["step_s"]) for s in runs)
        rows.append(
            [
                name,
                per_token.show(3),
                Spread.of(step_mean_s(s, last=0.5) for s in runs).show(3),
                f"{1 / speed:.2f}" if speed else "",
                Spread.of(s["prefill"]["s"] for s in runs).show(1),
                Spread.of(s["load"]["s"] for s in runs).show(1),
                read_bytes.show(2, unit=1e9),
                Spread.of(s["peak_rss_bytes"] for s in runs).show(1, unit=GIB),
                Spread.of(s["anonymous_bytes"] for s in runs).show(1, unit=GIB),
                f"{statistics.fmean(same):.3f}" if same else "",
                str(len(runs)),
            ]
        )
    return rows


HEADER = [
    "arm",
    "s per token",
    "s per token, second half",
    "times the reference",
    "prefill s",
    "load s",
    "GB read per token",
    "peak RSS GiB",
    "of it anonymous GiB, at the end",
    "same likeliest token",
    "trials",
]


def make_summary(config: dict[str, Any], samples: Sequence[dict[str, Any]]) -> str:
    """Write the Markdown summary: medians with their range over the trials."""
    machine = config["machine"]
    left = f"{config['leave_gib']:g} GiB" if config["leave_gib"] else "all"
    noisy = [s for s in samples if s["busy_before"] > BUSY_FRACTION]
    lines = [
        "# Time per decoded token at the same total memory",
        "",
        f"{config['started']} UTC, {machine['processor']}, {machine['num_processors']} processors, "
        f"{machine['memory_bytes'] / GIB:.1f} GiB of memory of which {left} "
        f"was left for engine and page cache, {config['threads']} threads, "
        f"foreload commit {config['commit']}.",
        "",
        f"Model: {config['model_name']}, {config['model_bytes'] / GIB:.1f} GiB of safetensors; "
        f"prompt {config['prompt']} tokens, {config['decode']} forced tokens decoded, text "
        f"{config['text_name']}. Medians over trials, ranges in brackets; the reference is "
        f"{config['reference']}.",
        "",
        "| " + " | ".join(HEADER) + " |",
        "|" + "---|" * len(HEADER),
    ]
    for row in table_rows(samples, config["reference"]):
        lines.append("| " + " | ".join(row + [""] * (len(HEADER) - len(row))) + " |")
    lines += ["", "Versions: " + ", ".join(f"{k} {v}" for k, v in machine["versions"].items())]
    for info in dict.fromkeys(s["system_info"] for s in samples if "system_info" in s):
        lines.append(f"llama.cpp's build: {info.strip(' |')}")
    if noisy:
        lines.append(
            f"\n**Noisy: before {len(noisy)} of {len(samples)} runs other programs used more than "
            f"{BUSY_FRACTION:.0%} of the processors.**"
        )
    limit = config["leave_gib"] * GIB
    if limit and (
        off := [s for s in samples if abs(s["available_bytes_before"] - limit) > GIB / 4]
    ):
        lines.append(
            f"\n**Not the same memory: before {len(off)} of {len(samples)} runs another amount was "
            "available than asked for, because of other programs.**"
        )
    for sample in samples:
        if why := sample.get("failed"):
            lines.append(f"\nFailed: {sample['arm']}, trial {sample['trial']}: {why}")
    return "\n".join(lines) + "\n"


def read_commit() -> str:
    """Name the commit of the working tree."""
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    held_out = Path(sysconfig.get_paths()["stdlib"]) / "argparse.py"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("model", type=Path, help="Qwen3-MoE checkpoint, bf16 safetensors")
    add("--output", type=Path, required=True, help="directory for samples and summary")
    add("--gguf", type=Path, help="its GGUF file; made if missing (default: beside the model)")
    add("--work", type=Path, help="directory for accelerate's copy (default: beside the model)")
    add("--arms", default=",".join(DEFAULT_ARMS), help=f"of {', '.join(ARMS)}")
    add("--reference", default="foreload", help="arm the others are compared with")
    add("--leave-gib", type=float, default=5, help="memory left for engine and page cache; 0: all")
    add("--expert-memory", default="auto", help="foreload's budget inside that (default: its own)")
    add("--cpu-memory", default="3GiB", help="accelerate-auto's budget inside that")
    add("--experts-implementation", help="of transformers (default: its own)")
    add("--text", type=Path, default=held_out, help="held-out text (default: argparse.py)")
    add("--prompt", type=int, default=100, help="tokens in the prompt")
    add("--decode", type=int, default=64, help="tokens decoded, one at a time")
    add("--trials", type=int, default=5)
    add("--threads", type=int, default=2)
    add("--omp-wait-policy", choices=("PASSIVE", "ACTIVE"), help="for all arms (default: unset)")
    add("--timeout", type=float, default=1800, help="seconds one run may take")
    arguments = parser.parse_args()
    arguments.arms = arguments.arms.split(",")
    if unknown := [name for name in arguments.arms if name not in ARMS]:
        parser.error(f"unknown arms: {', '.join(unknown)}")
    arguments.model = arguments.model.resolve()
    arguments.work = (arguments.work or arguments.model.parent).resolve()
    arguments.gguf = arguments.gguf or arguments.model.with_name(arguments.model.name + ".gguf")
    arguments.gguf = arguments.gguf.resolve()
    return arguments


def make_config(arguments: argparse.Namespace) -> dict[str, Any]:
    """Collect what a reader of the results must know; no paths."""
    files = arguments.model.glob("*.safetensors")
    kept = (
        *("arms", "reference", "leave_gib", "expert_memory", "cpu_memory", "prompt", "decode"),
        *("trials", "threads", "omp_wait_policy", "experts_implementation"),
    )
    return {
        **{key: getattr(arguments, key) for key in kept},
        "started": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "model_name": arguments.model.name,
        "model_bytes": sum(path.stat().st_size for path in files),
        "text_name": arguments.text.name,
        "commit": read_commit(),
        "machine": read_machine(),
    }


def make_gguf(arguments: argparse.Namespace) -> None:
    """Convert the checkpoint once, if llama.cpp is to run."""
    if "llama.cpp" in arguments.arms and not arguments.gguf.exists():
        print(f"converting to {arguments.gguf.name}", flush=True)
        command = [sys.executable, str(Path(__file__).with_name("to_gguf.py"))]
        subprocess.run([*command, str(arguments.model), str(arguments.gguf)], check=True)


def check_disk(arguments: argparse.Namespace, model_bytes: int) -> None:
    """Refuse to start when accelerate's copy would not fit."""
    if any(name.startswith("accelerate") for name in arguments.arms):
        free = shutil.disk_usage(arguments.work).free
        if free < model_bytes * 1.1:
            raise SystemExit(f"accelerate copies {model_bytes} bytes, the disk has {free} free")


def run_trials(
    arguments: argparse.Namespace, limiter: hog.MemoryHog | None
) -> Iterable[dict[str, Any]]:
    """Run all arms of all trials, interleaved, and yield each result."""
    tokens = read_tokens(arguments.model, arguments.text)
    windows = cut_windows(tokens, arguments.prompt, arguments.decode, arguments.trials)
    environment = child_environment(arguments.threads, arguments.omp_wait_policy)
    files = [*arguments.model.glob("*.safetensors"), arguments.gguf]
    for trial, (prompt, forced) in enumerate(windows):
        for name in rotate(arguments.arms, trial):
            evict(path for path in files if path.exists())
            available = limiter.balance() if limiter else hog.read_available_bytes()
            busy = read_busy_fraction()
            spec = {
                **ARMS[name],
                "arm": name,
                "trial": trial,
                "model": str(arguments.model),
                "gguf": str(arguments.gguf),
                "work": str(arguments.work),
                "threads": arguments.threads,
                "expert_memory": arguments.expert_memory,
                "cpu_memory": arguments.cpu_memory,
                "experts_implementation": arguments.experts_implementation,
                "prompt": prompt,
                "forced": forced,
            }
            log = arguments.output / "engines.log"
            result = run_arm(spec, environment, log, arguments.timeout)
            if limiter and not limiter.is_alive:
                raise SystemExit("the memory hog died: this and later figures would be unlimited")
            yield {
                "arm": name,
                "trial": trial,
                "available_bytes_before": available,
                "busy_before": busy,
                **result,
            }


def show_progress(sample: dict[str, Any]) -> None:
    """Print one line per run."""
    what = sample.get("skipped") or sample.get("failed")
    if what is None:
        what = (
            f"{step_mean_s(sample):.3f} s/token, prefill {sample['prefill']['s']:.1f} s, "
            f"load {sample['load']['s']:.1f} s"
        )
    print(f"trial {sample['trial']} {sample['arm']}: {what}", flush=True)


def main() -> None:
    """Measure, and write config.json, samples.jsonl and summary.md."""
    arguments = parse_arguments()
    arguments.output.mkdir(parents=True, exist_ok=True)
    make_gguf(arguments)
    config = make_config(arguments)
    check_disk(arguments, config["model_bytes"])
    (arguments.output / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    samples: list[dict[str, Any]] = []

    def collect(limiter: hog.MemoryHog | None) -> None:
        with (arguments.output / "samples.jsonl").open("w") as stream:
            for sample in run_trials(arguments, limiter):
                samples.append(sample)
                stream.write(json.dumps(sample) + "\n")
                stream.flush()
                show_progress(sample)

    try:
        if arguments.leave_gib:
            with hog.MemoryHog(round(arguments.leave_gib * GIB)) as limiter:
                collect(limiter)
        else:
            collect(None)
    finally:
        if samples:
            summary = make_summary(config, samples)
            (arguments.output / "summary.md").write_text(summary)
            print(summary)


if __name__ == "__main__":
    main()
