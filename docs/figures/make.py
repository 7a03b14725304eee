"""Draw the figures of docs/concepts.

    python docs/figures/make.py [MODEL] [--text FILE] [--only NAME ...]

`tiers`, `overlap` and `policies` are drawings and need no model. `timeline`, `eviction` and
`exactness` are measured with the model, `demo` by default, on its held-out text: forced decoding,
one thread. For `timeline` the model is widened first, in a temporary folder, because reads of the
demo's own experts are too short to be seen. Needs the extra `plots`; takes a minute.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.figure import Figure

from foreload.bench.arm import Arm
from foreload.bench.forced import run_forced
from foreload.bench.measure import run_engine_arm
from foreload.bench.plots import plot_timeline
from foreload.bench.widen import widen_checkpoint
from foreload.bench.workload import make_workloads
from foreload.model.architecture import quiet_transformers
from foreload.model.hf import load_model, load_tokenizer
from foreload.model.kv_cache import make_kv_cache
from foreload.model.source import resolve_model
from foreload.trace.replay import replay

if TYPE_CHECKING:
    from foreload.bench.workload import Workload
    from foreload.model.hf import LoadedModel
    from foreload.trace.record import RoutingTrace

HERE = Path(__file__).resolve().parent
BLUE, GREEN, RED, GREY = "#4878a8", "#6a9f58", "#c44e52", "#777777"
POLICIES = {
    "belady": ("Belady (knows the future)", "#333333", "--"),
    "history": ("history", BLUE, "-"),
    "next-use": ("next-use", "#8064a2", "-"),
    "lfu": ("lfu", GREEN, "-"),
    "least-stale": ("least-stale", "#c9a227", "-"),
    "lru": ("lru", RED, "-"),
}
SHARES = (5, 10, 15, 20, 25, 30, 37.5, 50, 62.5, 75, 87.5, 100)
TIMELINE_SHARE = 0.25
TIMELINE_FACTOR = 4
PROMPT_TOKENS = 100
DECODE_TOKENS = 256


def main() -> None:
    """Draw what was asked for."""
    parser = argparse.ArgumentParser(description="Draw the figures of docs/concepts.")
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--text", type=Path, help="text to decode; by default the demo's")
    parser.add_argument("--only", nargs="+", choices=[*DRAWN, *MEASURED])
    options = parser.parse_args()
    wanted = options.only or [*DRAWN, *MEASURED]
    for name in wanted:
        if name in DRAWN:
            DRAWN[name]()
    if any(name in MEASURED for name in wanted):
        with quiet_transformers():
            measured = Measured(options.model, options.text)
            for name in wanted:
                if name in MEASURED:
                    MEASURED[name](measured)


class Measured:
    """The model, a window of text, and one recorded run over it."""

    def __init__(self, model: str, text: Path | None) -> None:
        torch.set_num_threads(1)
        self.name = Path(model).name
        self.directory = resolve_model(model)
        self.loaded: LoadedModel = load_model(self.directory)
        self.tokenizer = load_tokenizer(self.directory)
        self._text = (text or resolve_model("demo") / "held_out.txt").read_text(encoding="utf-8")
        self.workload = self.window(DECODE_TOKENS)

    def window(self, num_decode_tokens: int) -> Workload:
        """Give a window of the text."""
        return make_workloads(
            self.tokenizer,
            self._text,
            num_workloads=1,
            num_prompt_tokens=PROMPT_TOKENS,
            num_decode_tokens=num_decode_tokens,
            vocab_size=self.loaded.spec.num_experts,
        )[0]

    def widened(self, folder: Path) -> Measured:
        """Give the same model with larger experts."""
        widen_checkpoint(self.directory, folder / self.name, TIMELINE_FACTOR)
        wide = copy.copy(self)
        wide.loaded = load_model(folder / self.name)
        return wide

    def run(self, arm: Arm, workload: Workload, budget: float, **more: Any) -> Any:
        """Run foreload, without calibrations of this machine."""
        with tempfile.TemporaryDirectory() as folder:
            return run_engine_arm(
                self.loaded,
                arm,
                workload,
                budget=budget,
                trial=0,
                cache_dir=Path(folder),
                **more,
            )


def draw_tiers() -> None:
    """Draw where an expert's bytes lie."""
    figure, axes = new_figure(8.4, 2.9)
    axes.set_axis_off()
    axes.set(xlim=(0, 84), ylim=(0, 29))
    for x, width, colour, title, lines in (
        (1, 20, GREY, "checkpoint on disk", "safetensors files, as downloaded\nall experts"),
        (32, 22, BLUE, "expert memory", "one block of equal slots\nat most expert_memory bytes"),
        (63, 20, GREEN, "computation", "router decides,\nexperts of the layer run"),
    ):
        box = {"facecolor": "white", "edgecolor": colour, "linewidth": 1.6}
        axes.add_patch(patch((x, 5), width, 17, **box))
        axes.text(x + width / 2, 19.4, title, ha="center", fontsize=10, weight="bold")
        axes.text(x + width / 2, 14.2, lines, ha="center", fontsize=8)
    for slot in range(8):
        is_held = slot not in (2, 5)
        colour = BLUE if is_held else "white"
        axes.add_patch(
            patch((33.4 + slot * 2.45, 7.5), 2, 4, facecolor=colour, edgecolor=BLUE, alpha=0.75)
        )
    arrow = {"arrowstyle": "-|>", "linewidth": 1.4}
    axes.annotate("", (31.5, 16), (21.5, 16), arrowprops={**arrow, "color": RED})
    axes.text(26.5, 17, "demand", ha="center", fontsize=8, color=RED)
    axes.annotate("", (31.5, 9.5), (21.5, 9.5), arrowprops={**arrow, "color": BLUE})
    axes.text(26.5, 10.5, "prefetch", ha="center", fontsize=8, color=BLUE)
    axes.annotate("", (62.5, 13), (54.5, 13), arrowprops={**arrow, "color": GREEN})
    axes.text(58.5, 14, "hit", ha="center", fontsize=8, color=GREEN)
    back = {**arrow, "color": GREY, "linestyle": "--", "connectionstyle": "arc3,rad=-0.12"}
    axes.annotate("", (43, 4.6), (73, 4.6), arrowprops=back)
    axes.text(58, 0.4, "guess: the coming layers' experts", ha="center", fontsize=8, color=GREY)
    axes.text(
        42,
        25.5,
        "Attention, norms, routers and shared experts stay in memory",
        ha="center",
        fontsize=8,
    )
    save(figure, "tiers")


def draw_overlap() -> None:
    """Draw what overlap can gain: the sum of two times against the larger one."""
    figure, axes = new_figure(6.4, 3.4)
    ratio = [step / 50 for step in range(151)]
    apart = [1 + time for time in ratio]
    together = [max(1.0, time) for time in ratio]
    axes.plot(ratio, apart, color=RED, label="nothing overlaps: compute + copies")
    axes.plot(ratio, together, color=BLUE, label="wire limit: max(compute, copies)")
    axes.fill_between(ratio, together, apart, color=BLUE, alpha=0.12)
    axes.text(2.02, 2.9, "what prefetching can gain", fontsize=8, color=BLUE)
    axes.axvline(1, color=GREY, linewidth=0.8, linestyle=":")
    axes.set(xlim=(0, 3), ylim=(0, 4))
    axes.set_xlabel("missed bytes per token / bandwidth, in units of compute time")
    axes.set_ylabel("time per token")
    axes.set_title("Calculated, not measured", fontsize=9)
    axes.legend(loc="upper left", fontsize=8)
    save(figure, "overlap")


def draw_policies() -> None:
    """Draw what one layer computes under each policy."""
    figure, axes = new_figure(8.4, 3.3)
    axes.set_axis_off()
    axes.set(xlim=(0, 84), ylim=(0, 33))
    rows = (
        ("router's choice", "0.4 0.3 0.2 0.1", (("A", BLUE), ("B", BLUE), ("C", RED), ("D", RED))),
        ("exact", "waits for C and D", (("A", BLUE), ("B", BLUE), ("C", RED), ("D", RED))),
        (
            "speculate-when\n--confidence 0.7",
            "E and F, the best in memory, for C and D; waits for nothing",
            (("A", BLUE), ("B", BLUE), ("E", GREEN), ("F", GREEN)),
        ),
        (
            "speculate",
            "what was guessed one layer earlier, and brought since then",
            (("A", BLUE), ("C", BLUE), ("B", BLUE), ("G", GREEN)),
        ),
    )
    for row, (name, text, experts) in enumerate(rows):
        y = 25.5 - 7.6 * row - (1.2 if row else 0)
        axes.text(15, y + 2, name, ha="right", va="center", fontsize=9, weight="bold")
        for place, (expert, colour) in enumerate(experts):
            x = 17 + 5.6 * place
            axes.add_patch(patch((x, y), 4.6, 4.2, facecolor=colour, edgecolor=colour, alpha=0.75))
            axes.text(x + 2.3, y + 2.1, expert, ha="center", va="center", color="white")
        if row:
            axes.text(41, y + 2, text, va="center", fontsize=8)
        else:
            for place, weight in enumerate(text.split()):
                axes.text(19.3 + 5.6 * place, y + 5, weight, ha="center", fontsize=8)
    for line, (colour, meaning) in enumerate(
        ((BLUE, "in memory"), (RED, "missing"), (GREEN, "not the router's choice"))
    ):
        axes.add_patch(patch((41, 29.6 - 2.6 * line), 1.6, 1.6, facecolor=colour, edgecolor=colour))
        axes.text(43.6, 30.3 - 2.6 * line, meaning, va="center", fontsize=8)
    save(figure, "policies")


def draw_timeline(measured: Measured) -> None:
    """Draw one token of a real run."""
    arm = Arm("lookahead", {"predictor": "lookahead"})
    with tempfile.TemporaryDirectory() as folder:
        wide = measured.widened(Path(folder))
        sample, _, _, timeline = wide.run(arm, wide.window(48), TIMELINE_SHARE, with_timeline=True)
    title = (
        f"{measured.name} widened {TIMELINE_FACTOR} times, "
        f"{TIMELINE_SHARE:.0%} of the experts' memory, lookahead"
    )
    plot_timeline(timeline, sample.step_s, HERE / "timeline.png", title=title)


def draw_eviction(measured: Measured) -> None:
    """Draw the hit rates of the eviction policies on one recorded trace."""
    arm = Arm("recorded", {"predictor": "none"})
    trace: RoutingTrace = measured.run(arm, measured.workload, 1.0)[2]
    spec = measured.loaded.spec
    num_experts = spec.num_moe_layers * spec.num_experts
    figure, axes = new_figure(6.4, 3.6)
    for policy, (label, colour, style) in POLICIES.items():
        rates = [
            replay(trace, round(share / 100 * num_experts), policy, count_from=1).hit_rate
            for share in SHARES
        ]
        axes.plot(SHARES, rates, style, color=colour, label=label, marker=".", markersize=4)
    cycle = 100 * spec.top_k / spec.num_experts
    axes.axvline(cycle, color=GREY, linewidth=0.8, linestyle=":")
    axes.text(cycle + 1, 0.02, "one token's experts", fontsize=8, color=GREY)
    axes.set(xlim=(0, 100), ylim=(0, 1))
    axes.set_xlabel("expert memory, percent of all experts")
    axes.set_ylabel("hit rate")
    axes.set_title(
        f"{measured.name}: {DECODE_TOKENS} tokens of held-out text, replayed without prefetching",
        fontsize=9,
    )
    axes.legend(loc="lower right", fontsize=8)
    save(figure, "eviction")


def draw_exactness(measured: Measured) -> None:
    """Draw how many logits differ from those of transformers' eager experts."""
    workload = measured.window(64)
    model = type(measured.loaded.model).from_pretrained(
        measured.directory, dtype=measured.loaded.model.dtype, experts_implementation="eager"
    )
    model = model.eval().requires_grad_(False)
    # Weights mapped from the file lie at multiples of 8 bytes, where torch rounds differently.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    reference = forced(model, workload)
    names, shares = [], []
    for implementation in ("grouped_mm", "batched_mm"):
        model.set_experts_implementation(implementation)
        names.append(f"transformers, {implementation}")
        shares.append(differing(forced(model, workload), reference))
    for budget in (0.25, 1.0):
        arm = Arm("lookahead", {"predictor": "lookahead"})
        names.append(f"foreload, {budget:.0%} of the experts' memory")
        shares.append(differing(measured.run(arm, workload, budget)[1].logits, reference))
    figure, axes = new_figure(7.0, 2.2)
    bars = axes.barh(names, [100 * share for share in shares], color=[GREY, GREY, BLUE, BLUE])
    axes.bar_label(bars, [f" {100 * share:.3g} %" for share in shares], fontsize=8)
    axes.set_xlim(0, 115)
    axes.invert_yaxis()
    axes.set_xlabel("percent of logits that differ from eager")
    dtype = measured.loaded.spec.dtype
    axes.set_title(f"{measured.name}, {dtype}, {len(reference)} positions, CPU", fontsize=9)
    save(figure, "exactness")


def forced(model: Any, workload: Workload) -> torch.Tensor:
    """Give transformers' logits of every decoded position."""

    def forward(ids: torch.Tensor, kv_cache: Any) -> torch.Tensor:
        with torch.inference_mode():
            output = model(
                input_ids=ids, past_key_values=kv_cache, use_cache=True, logits_to_keep=1
            )
            logits: torch.Tensor = output.logits[0, -1]
            return logits

    return run_forced(forward, workload, make_kv_cache(model.config)).logits


def differing(logits: torch.Tensor, reference: torch.Tensor) -> float:
    """Give the share of logits that differ in any bit."""
    return float((logits != reference).float().mean())


def patch(place: tuple[float, float], width: float, height: float, **style: Any) -> Any:
    """Make a rectangle with round corners."""
    from matplotlib.patches import FancyBboxPatch

    return FancyBboxPatch(place, width, height, boxstyle="round,pad=0,rounding_size=0.6", **style)


def new_figure(width: float, height: float) -> tuple[Figure, Any]:
    """Make a figure with one plot."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def save(figure: Figure, name: str) -> None:
    """Write a figure beside this file."""
    figure.savefig(HERE / f"{name}.png", dpi=110, metadata={"Software": None})


DRAWN = {"tiers": draw_tiers, "overlap": draw_overlap, "policies": draw_policies}
MEASURED = {"timeline": draw_timeline, "eviction": draw_eviction, "exactness": draw_exactness}

if __name__ == "__main__":
    main()
