"""The suite about drafts: speculative decoding beside caches of the same memory.

Every arm gets the same memory; where there is a draft, it is a part of it.

Reference:
    Wang et al. 2025, "MoE-SpeQ", arXiv:2511.14102: its comparisons and ablations, and the row it
    leaves out, the quantised model served alone.
"""

from __future__ import annotations

from foreload.bench.arm import Arm
from foreload.bench.moe_speq_plots import plot_moe_speq
from foreload.bench.moe_speq_report import summarise_moe_speq
from foreload.bench.suite import STOCK_ARMS, Suite

__all__ = ["MOE_SPEQ", "MOE_SPEQ_ARMS"]

_MOST = 8


def _draft(number: int | str, kind: str = "int4") -> dict[str, int | str]:
    return {"predictor": "auto", "draft": kind, "num_draft_tokens": number}


MOE_SPEQ_ARMS: tuple[Arm, ...] = (
    Arm("lru", {"predictor": "none", "eviction": "lru"}),
    Arm("lru-prefetch", {"predictor": "auto", "eviction": "lru"}),
    Arm("no-draft", {"predictor": "auto"}),
    *(Arm(f"draft-{number}", _draft(number)) for number in range(_MOST + 1)),
    Arm("governor", _draft("auto")),
    Arm("governor-int8", _draft("auto", "int8")),
    Arm("draft-4-no-prefetch", {**_draft(4), "predictor": "none"}, is_asynchronous=False),
    Arm("draft-4-no-kernel", _draft(4), has_kernel=False),
    Arm("draft-4-oracle", _draft(4), is_oracle=True),
    Arm("draft-7-resident", _draft(7), is_resident=True),
    Arm("int4-alone", {"predictor": "none", "draft": "int4"}, is_draft_alone=True),
)
MOE_SPEQ = Suite(
    name="moe-speq",
    arms=MOE_SPEQ_ARMS,
    stock_arms=STOCK_ARMS[:1],
    budgets=(0.3, 0.4, 0.5, 0.75),
    contexts=(100,),
    summarise=summarise_moe_speq,
    plot=plot_moe_speq,
    measures_shares=True,
)
