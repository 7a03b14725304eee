"""One engine in one process: load, prefill, then decode along given tokens, and say what it cost.

Run by `run.py` as `arms.py SPEC RESULT`, both JSON files. Each arm answers the same three calls,
and each decoding step feeds exactly one token whose successor was fixed beforehand, so all arms
route the same text through the same experts.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

MISSING_EXIT_CODE = 3
"""How this program ends when an engine is not installed: the arm is skipped, not failed."""


class Arm(Protocol):
    """What is asked of an engine."""

    def load(self) -> None:
        """Make the model ready."""

    def prefill(self, tokens: list[int]) -> int:
        """Read the prompt into an empty KV cache; returns the likeliest next token."""

    def step(self, token: int) -> int:
        """Append one token; returns the likeliest next one."""

    def describe(self) -> dict[str, Any]:
        """Say what ran: versions, and the engine's own figures."""


def installed_versions(*names: str) -> dict[str, str]:
    """Look up package versions; one that is not installed is left out."""
    versions = {"python": platform.python_version()}
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


class LlamaCpp:
    """llama.cpp with its weights mapped, through xllamacpp's server object (no HTTP).

    The binding has no call for one decoding step. A completion request of one token whose prompt is
    the previous one plus a token evaluates exactly that token, because the KV cache of the common
    prefix is kept; the token sampled at the end costs no evaluation. `top` checks both in the
    server's own counts. What the request itself costs was measured at half a millisecond.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        import xllamacpp

        self._library = xllamacpp
        self._spec = spec
        self._tokens: list[int] = []

    def load(self) -> None:
        """Map the file. No warm-up run: it would read every expert of a model that does not fit."""
        spec, library = self._spec, self._library
        params = library.CommonParams()
        params.model.path = spec["gguf"]
        params.load_mode = library.llama_load_mode.LLAMA_LOAD_MODE_MMAP
        params.n_ctx = -(-(len(spec["prompt"]) + len(spec["forced"]) + 1) // 256) * 256
        params.n_parallel = 1
        params.cpuparams.n_threads = spec["threads"]
        params.cpuparams_batch.n_threads = spec["threads"]
        params.warmup = False
        params.fit_params = False
        params.cache_ram_mib = 0
        params.cache_idle_slots = False
        params.n_ctx_checkpoints = 0
        params.verbosity = 1
        self._server = library.Server(params)

    def prefill(self, tokens: list[int]) -> int:
        """Evaluate the prompt."""
        self._tokens = []
        return self.top(tokens)[0][0]

    def step(self, token: int) -> int:
        """Evaluate one more token."""
        return self.top([token])[0][0]

    def top(self, new: list[int], count: int = 1) -> list[tuple[int, float]]:
        """Evaluate more tokens; returns the likeliest next ones with their log-probabilities."""
        self._tokens += new
        answer = self._server.handle_completions(
            {
                "prompt": self._tokens,
                "max_tokens": 1,
                "temperature": 0,
                "cache_prompt": True,
                "logprobs": count,
            }
        )
        if "choices" not in answer:
            raise RuntimeError(f"llama.cpp refused: {answer}")
        timings = answer["timings"]
        if (timings["prompt_n"], timings["predicted_n"]) != (len(new), 1):
            raise RuntimeError(f"llama.cpp evaluated not just {len(new)} new tokens: {timings}")
        (position,) = answer["choices"][0]["logprobs"]["content"]
        return [(int(entry["id"]), entry["logprob"]) for entry in position["top_logprobs"]]

    def describe(self) -> dict[str, Any]:
        """Add which instruction sets this build of llama.cpp uses."""
        return {
            "versions": installed_versions("xllamacpp"),
            "system_info": self._library.get_system_info(),
        }


class _Transformers:
    """The two calls that any transformers-style model answers alike."""

    def __init__(self, spec: dict[str, Any]) -> None:
        import torch

        torch.set_num_threads(spec["threads"])
        torch.set_grad_enabled(False)
        self._torch = torch
        self._spec = spec
        self._model: Any = None
        self._cache: Any = None

    def prefill(self, tokens: list[int]) -> int:
        """Evaluate the prompt, with the head on its last position only."""
        self._cache = self._make_cache()
        return self._forward(tokens)

    def step(self, token: int) -> int:
        """Evaluate one more token."""
        return self._forward([token])

    def _make_cache(self) -> Any:
        raise NotImplementedError

    def _forward(self, tokens: list[int]) -> int:
        output = self._model(
            input_ids=self._torch.tensor([tokens]),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return int(output.logits[0, -1].argmax())


class Accelerate(_Transformers):
    """transformers with accelerate's disk offload.

    `placement` "experts" puts exactly the experts on disk and the rest in memory; "auto" lets
    accelerate fill `max_memory` with whole layers, as `device_map="auto"` does.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(spec)
        import accelerate  # noqa: F401
        import transformers

        self._library = transformers
        transformers.utils.logging.disable_progress_bar()

    def load(self) -> None:
        """Load, which merges the experts of each layer and writes them to the offload folder."""
        spec = self._spec
        placement: dict[str, Any] = {"device_map": self._expert_device_map()}
        if spec["placement"] == "auto":
            placement = {"device_map": "auto", "max_memory": {"cpu": spec["cpu_memory"]}}
        if spec.get("experts_implementation"):
            placement["experts_implementation"] = spec["experts_implementation"]
        self._model = self._library.AutoModelForCausalLM.from_pretrained(
            spec["model"],
            dtype=self._torch.bfloat16,
            offload_folder=spec["offload"],
            **placement,
        )
        # Else the second copy is still being written while the prompt is timed.
        os.sync()

    def _expert_device_map(self) -> dict[str, str]:
        config = json.loads((Path(self._spec["model"]) / "config.json").read_text())
        places = dict.fromkeys(
            ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu"
        )
        for layer in range(config["num_hidden_layers"]):
            prefix = f"model.layers.{layer}."
            for name in ("self_attn", "input_layernorm", "post_attention_layernorm", "mlp.gate"):
                places[prefix + name] = "cpu"
            places[prefix + "mlp.experts"] = "disk"
        return places

    def _make_cache(self) -> Any:
        return self._library.DynamicCache(config=self._model.config)

    def describe(self) -> dict[str, Any]:
        """Add what the second copy of the weights takes."""
        offload = Path(self._spec["offload"])
        return {
            "versions": installed_versions("torch", "transformers", "accelerate"),
            "experts_implementation": self._model.config._experts_implementation,
            "offload_bytes": sum(path.stat().st_size for path in offload.glob("*")),
        }


class Foreload(_Transformers):
    """foreload, the same forward calls through `engine.model`."""

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(spec)
        from foreload import Engine

        self._library = Engine
        self._engine: Any = None

    def load(self) -> None:
        """Open the checkpoint under an expert budget."""
        spec = self._spec
        self._engine = self._library.from_pretrained(
            spec["model"],
            expert_memory=spec["expert_memory"],
            predictor=spec["predictor"],
            dtype="bfloat16",
        )
        self._model = self._engine.model

    def _make_cache(self) -> Any:
        return self._engine.make_cache()

    def describe(self) -> dict[str, Any]:
        """Add what every "auto" came to, and the engine's counters."""
        config = self._engine.config.to_dict()
        config.pop("model", None)
        return {
            "versions": installed_versions("torch", "transformers", "foreload"),
            "config": config,
            "stats": self._engine.stats,
        }


ENGINES: dict[str, type] = {
    "llama.cpp": LlamaCpp,
    "accelerate": Accelerate,
    "foreload": Foreload,
}


def read_io_bytes() -> int:
    """Read how many bytes this process has had fetched from storage, page faults included."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("read_bytes:"):
            return int(line.split()[1])
    return 0


def read_status_bytes(key: str) -> int:
    """Read one memory figure of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return 0


class Meter:
    """Times a phase, with the storage it read, its page faults and its processor time."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Begin a phase."""
        self._usage, self._io = resource.getrusage(resource.RUSAGE_SELF), read_io_bytes()
        self._time = time.perf_counter()

    def stop(self) -> dict[str, float]:
        """End it."""
        seconds = time.perf_counter() - self._time
        usage, before = resource.getrusage(resource.RUSAGE_SELF), self._usage
        return {
            "s": seconds,
            "read_bytes": read_io_bytes() - self._io,
            "major_faults": usage.ru_majflt - before.ru_majflt,
            "cpu_s": usage.ru_utime + usage.ru_stime - before.ru_utime - before.ru_stime,
        }


def measure(arm: Arm, prompt: list[int], forced: list[int]) -> dict[str, Any]:
    """Run the three phases.

    Args:
        arm: The engine.
        prompt: The tokens of the prefill.
        forced: The tokens fed one by one afterwards.

    Returns:
        The phases' costs, every step's seconds, and the likeliest token at each position.
    """
    meter = Meter()
    arm.load()
    load = meter.stop()
    meter.start()
    predicted = [arm.prefill(prompt)]
    prefill = meter.stop()
    steps: list[float] = []
    meter.start()
    for token in forced:
        start = time.perf_counter()
        predicted.append(arm.step(token))
        steps.append(time.perf_counter() - start)
    decode = meter.stop()
    return {
        "load": load,
        "prefill": prefill,
        "decode": decode,
        "step_s": steps,
        "predicted": predicted,
        "peak_rss_bytes": read_status_bytes("VmHWM"),
        "anonymous_bytes": read_status_bytes("RssAnon"),
    }


def main() -> None:
    """Run one arm as its specification says."""
    spec = json.loads(Path(sys.argv[1]).read_text())
    # If memory runs out it must be this process that goes, not the hog that limits it.
    Path("/proc/self/oom_score_adj").write_text("1000")
    try:
        arm = ENGINES[spec["engine"]](spec)
    except ImportError as error:
        print(f"{spec['engine']} cannot be imported: {error}", file=sys.stderr)
        sys.exit(MISSING_EXIT_CODE)
    result = measure(arm, spec["prompt"], spec["forced"])
    result.update(arm.describe())
    Path(sys.argv[2]).write_text(json.dumps(result, default=str))
    # Nothing is left to save, and some servers take long to end.
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
