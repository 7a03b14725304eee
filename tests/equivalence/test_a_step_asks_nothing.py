"""A step can be captured: between its tokens and its logits no value is asked for by the host.

What would wait for a device shows on the CPU too: a tensor read as a number, or a shape that
depends on data. The kernels, which have their own tests, are stood in for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import masking_utils

import zoo
from fakes import make_engine
from foreload.model.kv_cache import pass_cache
from foreload.ops.device_tables import WorkList
from watch import Watch

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from foreload import Engine
    from foreload.ops.device_experts import LayerMemory
    from foreload.ops.device_tables import DeviceTables


class QuietKernels:
    """Gives zeros for experts, and remembers for which layers it was called."""

    def __init__(self) -> None:
        self.assigned: list[int] = []
        self.prefetched: list[int] = []

    def assign_slots(
        self, tables: DeviceTables, layer: int, top_k_index: Tensor, *, num_experts: int
    ) -> WorkList:
        self.assigned.append(layer)
        return WorkList(*[top_k_index.new_zeros(0)] * 4)

    def assign_prefetch(
        self, tables: DeviceTables, layer: int, predicted_index: Tensor, **settings: Any
    ) -> WorkList:
        self.prefetched.append(layer)
        return WorkList(*[predicted_index.new_zeros(0)] * 4)

    def forward(
        self, memory: LayerMemory, work: WorkList, experts: Any, hidden_states: Tensor, routing: Any
    ) -> Tensor:
        return torch.zeros_like(hidden_states)

    def fetch(self, memory: LayerMemory, work: WorkList) -> None:
        pass


def watch_step(engine: Engine) -> tuple[Watch, QuietKernels]:
    """Run a step behind a short prompt, and watch it."""
    path = engine._device
    assert path is not None
    with path.lend_step(32) as step:
        assert step is not None
        engine._prefill(torch.tensor([list(range(3, 12))]), step.cache)
        kernels = QuietKernels()
        path._experts._kernels = kernels
        with Watch() as watch:
            step.run([5])
    return watch, kernels


@pytest.mark.parametrize(
    ("predictor", "policy"),
    [
        ("lookahead", "exact"),
        ("default-vectors", "exact"),
        ("default-vectors", "speculate"),
        ("estimator", "speculate"),
        ("estimator", "speculate-when"),
    ],
)
@pytest.mark.parametrize("family", zoo.SEVEN_FAMILIES)
def test_no_value_is_asked_for(family: str, predictor: str, policy: str, tmp_path: Path) -> None:
    checkpoint = zoo.save_family(family, tmp_path / "model", torch.float32)
    engine = make_engine(
        checkpoint.path,
        device="cpu",
        orchestration="device",
        expert_memory="30%",
        predictor=predictor,
        policy=policy,
        confidence=0.3,
        cache_dir=tmp_path,
    )
    with engine:
        watch, kernels = watch_step(engine)
        layers = list(range(engine.spec.num_moe_layers))
        assert len(watch.called) > 20
        assert not watch.asked
        if policy == "speculate-when":
            engine._count()
            assert engine.metrics.num_speculated > 0, "it had nothing to choose"
        assert kernels.assigned == layers
        assert kernels.prefetched == layers[1:]


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_drafting_and_verifying_ask_nothing(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whether the mask of several tokens can be left out is asked while nothing is being captured.
    monkeypatch.setattr(masking_utils, "is_tracing", lambda tensor=None: True)
    checkpoint = zoo.save_family(family, tmp_path / "model", torch.float32)
    engine = make_engine(
        checkpoint.path,
        device="cpu",
        orchestration="device",
        expert_memory="200%",
        draft="int4",
        num_draft_tokens=3,
    )
    with engine:
        path = engine._device
        assert path is not None
        drafter = path.drafter
        assert drafter is not None
        assert drafter.draft is not None
        with path.lend_step(32) as step:
            assert step is not None
            engine._prefill(torch.tensor([list(range(3, 12))]), step.cache)
            target, quantised = QuietKernels(), QuietKernels()
            path._experts._kernels = target
            drafter.draft._experts._kernels = quantised
            with Watch() as watch:
                drafter.draft.restart()
                drafter.drafting_step(step).run([5])
            layers = list(range(engine.spec.num_moe_layers))
            assert (quantised.assigned, quantised.prefetched) == (layers, [])
            assert (target.assigned, target.prefetched) == ([], layers)
            with watch:
                step.rewind(1)
                drafter.verifying_step(step, 4).run([5, 6, 7, 8])
                step.rewind(2)
            assert target.assigned == layers
            assert not watch.asked


class QuietGrouped:
    """Gives zeros for experts, once they have all come."""

    def forward(
        self, memory: Any, pairs: Any, chunks: Any, experts: Any, hidden_states: Tensor, *_: Any
    ) -> Tensor:
        assert sum(len(chunk.experts) for chunk in chunks) > 2
        return torch.zeros_like(hidden_states)


def test_a_long_input_asks_once_per_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masking_utils, "is_tracing", lambda tensor=None: True)
    checkpoint = zoo.save_family("qwen3_moe", tmp_path / "model", torch.float32)
    asked: list[torch.Size] = []

    def tolist(tensor: Tensor) -> Any:
        asked.append(tensor.shape)
        return told(tensor)

    told = torch.Tensor.tolist
    with make_engine(
        checkpoint.path, device="cpu", orchestration="device", expert_memory="50%"
    ) as engine:
        path = engine._device
        assert path is not None
        path._experts._kernels = QuietKernels()
        path.runtime._prefill._kernels = QuietGrouped()
        cache = engine.make_cache()
        tokens = torch.tensor([list(range(3, 40))])
        monkeypatch.setattr(torch.Tensor, "tolist", tolist)
        with Watch() as watch, torch.inference_mode():
            engine.model(input_ids=tokens, **pass_cache(engine.model, cache), use_cache=True)
        assert not watch.asked
        assert len(asked) == engine.spec.num_moe_layers


def test_the_watch_sees_what_asks() -> None:
    with Watch() as watch:
        value = torch.ones(3)
        int(value.sum())
        value.nonzero()
        bool(value[0] > 0)
    assert [name.partition(".")[0] for name in watch.asked] == [
        "aten::_local_scalar_dense",
        "aten::nonzero",
        "aten::_local_scalar_dense",
    ]
