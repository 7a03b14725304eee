"""What a capture launches has been launched before: kernels load on first use, and then cannot.

Kernels are recorded instead of launched, each with what it is compiled for. torch's own operations
are compared by name. Captures are the stand-in's, and transformers is told of them.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

import zoo
from fake_cuda import FakeCuda
from fakes import make_engine
from watch import ASKING, Watch

pytest.importorskip("triton", reason="the triton extra is not installed")

from foreload.ops import triton as triton_module
from foreload.ops.triton import TritonKernels

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from foreload import Engine
    from foreload.model.graph import StepGraph

PROMPT = list(range(3, 30))
DRAFTED = 2
LAUNCHED = ("assign_slots", "copy_blocks", "expert_products", "sum_experts")


def signature(value: Any) -> Any:
    """Give what Triton compiles an argument for, its type and what is known of its value."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, int):
        return value == 1, value % 16 == 0, value >= 1 << 31
    return type(value)


class Launches:
    """Stands in for the modules of kernels: keeps what is launched, by phase."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.by_phase: dict[str, list[Any]] = {}
        self.cuda = cuda
        own = triton_module.kernels
        self.module = SimpleNamespace(
            **{name: getattr(own, name) for name in ("INT8", "FP8", "INT4", "MXFP4", "PLAIN")},
            **{name: self.recorder(name) for name in LAUNCHED},
        )

    def recorder(self, name: str) -> Any:
        def launch(*args: Any, **constants: Any) -> None:
            told = [*map(signature, args)], sorted(constants.items())
            self.by_phase.setdefault(self.cuda.phase, []).append((name, str(told)))

        class Grid:
            def __getitem__(self, grid: Any) -> Any:
                return launch

        return Grid()


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    cuda = FakeCuda()
    cuda.install(monkeypatch)
    return cuda


@pytest.fixture
def engine(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Engine]:
    family, settings = request.param
    checkpoint = zoo.save_family(family, tmp_path / "model", torch.float32)
    given = {"device": "cpu", "orchestration": "device", "predictor": "lookahead", **settings}
    with make_engine(checkpoint.path, **given) as engine:
        yield engine


def watched(cuda: FakeCuda, watches: dict[str, Watch]) -> Any:
    """Give what a step runs, watched by phase."""
    own = cuda.own_step

    def run(step: StepGraph) -> Any:
        with watches[cuda.phase]:
            return own(step)

    return run


ALL = {"expert_memory": "200%", "draft": "int4", "num_draft_tokens": DRAFTED}
UNEQUAL = {"expert_memory": "75%", "slot_plan": (4, 8, 2, 6)}


@pytest.mark.parametrize(
    "engine",
    [("qwen3_moe", ALL), ("gpt_oss", ALL), ("mixtral", UNEQUAL)],
    indirect=True,
    ids=str,
)
def test_a_capture_launches_what_its_warm_up_launched(
    engine: Engine, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = engine._device
    assert path is not None
    launches = Launches(cuda)
    with path.lend_step(64) as step:
        assert step is not None
        engine._prefill(torch.tensor([PROMPT]), step.cache)
        for name in ("kernels", "slot_kernels"):
            monkeypatch.setattr(triton_module, name, launches.module)
        path._experts._kernels = TritonKernels()
        steps = [step]
        drafter = path.drafter
        if drafter is not None:
            assert drafter.draft is not None
            drafter.draft._experts._kernels = TritonKernels()
            steps += [drafter.drafting_step(step), drafter.verifying_step(step, DRAFTED + 1)]
        step._is_capturing = True
        for each in steps:
            each.wants_capture = True
            launches.by_phase.clear()
            called = {"warm up": Watch(), "capture": Watch()}
            with monkeypatch.context() as patch:
                patch.setattr(cuda, "own_step", watched(cuda, called))
                assert each.prepare()
            warm, captured = launches.by_phase["warm up"], launches.by_phase["capture"]
            assert captured == warm
            prefetches = [name for name, _ in captured].count("copy_blocks")
            layers = engine.spec.num_moe_layers
            # A draft's step brings what each layer named, the target's what the next will want.
            assert prefetches == {0: layers - 1, 1: layers, 2: 0}[steps.index(each)]
            asking = {name for name in called["warm up"].called if name in ASKING}
            assert set(called["capture"].called) <= set(called["warm up"].called)
            assert not called["capture"].asked
            assert asking <= {"aten::is_nonzero", "aten::item", "aten::_local_scalar_dense"}
