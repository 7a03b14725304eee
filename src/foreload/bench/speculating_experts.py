"""The suite about executing predictions: the paper's arms, without a cache, and ours.

A lossy arm's time is never told without its quality, which is counted in the same run.

Reference:
    Madan et al. 2026, "Speculating Experts Accelerates Inference for Mixture-of-Experts",
    arXiv:2603.19289.
"""

from __future__ import annotations

from foreload.bench.arm import Arm
from foreload.bench.speculation_plots import plot_speculation
from foreload.bench.speculation_report import summarise_speculation
from foreload.bench.suite import STOCK_ARMS, Suite

__all__ = ["SPECULATING_EXPERTS", "SPECULATION_ARMS"]

# Only a guess one layer ahead can be executed: others would keep the wire from those that can.
_SPECULATE = {"policy": "speculate", "lookahead_layers": 1}
_CONFIDENCES = (0.98, 0.95, 0.9, 0.8, 0.7)

SPECULATION_ARMS: tuple[Arm, ...] = (
    # The paper's engine: whole layers, and no expert stays in memory after its use.
    Arm("layerwise-on-demand", {"predictor": "none", "eviction": "none"}, is_layerwise=True),
    Arm(
        "layerwise-speculate",
        {"predictor": "default-vectors", "eviction": "none", **_SPECULATE},
        is_layerwise=True,
    ),
    # The same, with every expert computed as it arrives.
    Arm("on-demand", {"predictor": "none", "eviction": "none"}),
    Arm("prefetch", {"predictor": "auto", "eviction": "none"}),
    Arm("speculate-lookahead", {"predictor": "lookahead", "eviction": "none", **_SPECULATE}),
    Arm(
        "speculate-default-vectors",
        {"predictor": "default-vectors", "eviction": "none", **_SPECULATE},
    ),
    Arm(
        "speculate-estimator",
        {"predictor": "estimator", "eviction": "none", **_SPECULATE},
        is_pure=True,
    ),
    Arm("speculate-hybrid", {"predictor": "estimator", "eviction": "none", **_SPECULATE}),
    # The same memory, used as a cache across tokens.
    Arm("cache", {"predictor": "none"}),
    Arm("cache-prefetch", {"predictor": "auto"}),
    Arm("cache-speculate", {"predictor": "auto", **_SPECULATE}),
    *(
        Arm(
            f"cache-speculate-when-{confidence * 100:.0f}",
            {"predictor": "auto", "policy": "speculate-when", "confidence": confidence},
        )
        for confidence in _CONFIDENCES
    ),
    Arm("cache-oracle", {"predictor": "none"}, is_oracle=True),
)
SPECULATING_EXPERTS = Suite(
    name="speculating-experts",
    arms=SPECULATION_ARMS,
    stock_arms=STOCK_ARMS[:1],
    budgets=(0.25,),
    contexts=(100, 400, 900),
    summarise=summarise_speculation,
    plot=plot_speculation,
)
