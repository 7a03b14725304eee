"""The path for CUDA devices from end to end, on a device that is not there.

Everything but the device's own arithmetic and order: who is on which side, what may be asked in a
capture, replays at fixed addresses, and how kernels are launched.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

import zoo
from fakes import make_engine
from foreload.model.graph import StepGraph
from pretend_cuda import OnDevice, pretend_cuda

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

PROMPT = [11, 16, 21, 5, 9]
DEVICE = {"device": "cuda", "expert_memory": "200%", "dtype": "float32"}
NUM_TOKENS = 4


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small")
    zoo.save_small(path)
    return path


@pytest.mark.parametrize(
    "settings",
    [
        {"orchestration": "device", "predictor": "lookahead", "expert_memory": "50%"},
        {"orchestration": "device", "draft": "int8", "num_draft_tokens": 2},
        {"orchestration": "host", "draft": "int4", "num_draft_tokens": 2},
    ],
    ids=str,
)
def test_greedy_tokens_are_those_of_the_host(small: Path, settings: dict[str, Any]) -> None:
    """With the kernels themselves, interpreted."""
    with make_engine(small, device="cpu", dtype="float32", expert_memory="100%") as engine:
        wanted = engine.generate(PROMPT, max_new_tokens=NUM_TOKENS).token_ids
    with pytest.MonkeyPatch.context() as patch, pretend_cuda(patch) as machine:
        with make_engine(small, **{**DEVICE, **settings}) as engine:
            assert engine.generate(PROMPT, max_new_tokens=NUM_TOKENS).token_ids == wanted
            assert machine.locked, "host memory was locked"
        assert not machine.locked
        if settings["orchestration"] == "device":
            assert machine.num_captures > 0
            assert machine.num_replays >= 2


def test_a_step_may_make_tensors_of_numbers() -> None:
    """transformers 5.17 does for the masks of eager attention; a capture refuses copies of them."""

    def forward(token_ids: Tensor, cache: Any) -> Tensor:
        return token_ids[0, :, None] * torch.tensor(2.5, device=token_ids.device)

    with pytest.MonkeyPatch.context() as patch, pretend_cuda(patch) as machine:
        step = StepGraph(
            forward,
            SimpleNamespace(layers=[]),
            torch.device("cuda:0"),
            num_positions=8,
            is_captured=True,
        )
        assert [float(step(token).cpu()) for token in (2, 4)] == [5, 10]
        assert (machine.num_captures, step.is_captured) == (1, True)


@pytest.mark.parametrize("family", ["gpt_oss", "mixtral"])
def test_steps_are_captured_and_replayed(family: str, tmp_path: Path) -> None:
    path = zoo.save_family(family, tmp_path / "model", torch.float32).path
    sampling = {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 1}
    with pytest.MonkeyPatch.context() as patch, pretend_cuda(patch, is_quiet=True) as machine:
        settings = {**DEVICE, "orchestration": "device", "expert_memory": "60%"}
        with make_engine(path, predictor="lookahead", **settings) as engine:
            engine.generate(PROMPT, max_new_tokens=NUM_TOKENS)
            engine.generate(PROMPT, max_new_tokens=NUM_TOKENS, **sampling)
            assert (machine.num_captures, machine.num_replays) == (1, 2 * (NUM_TOKENS - 1))
            assert machine.num_launches > 0


@pytest.mark.parametrize(
    "settings",
    [
        {"policy": "speculate", "predictor": "lookahead"},
        {"policy": "speculate-when", "confidence": 0.5, "eviction": "next-use"},
        {"predictor": "default-vectors"},
    ],
    ids=str,
)
def test_policies_run_with_three_tiers(
    small: Path, settings: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch, pretend_cuda(patch) as machine:
        given = {**DEVICE, "orchestration": "host", "host_memory": "30%", "expert_memory": "80%"}
        with make_engine(small, cache_dir=tmp_path, **given, **settings) as engine:
            result = engine.generate(PROMPT, max_new_tokens=NUM_TOKENS, temperature=0.5, seed=1)
            assert result.stats.num_output_tokens > 0
        assert not machine.locked


def test_a_step_that_copies_from_the_host_runs_as_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Phi-3.5-MoE makes the frequencies of its rotary embedding anew in every forward."""
    path = zoo.save_family("phimoe", tmp_path / "model", torch.float32).path
    with pytest.MonkeyPatch.context() as patch, pretend_cuda(patch, is_quiet=True) as machine:
        with make_engine(path, **DEVICE, orchestration="device") as engine:
            result = engine.generate(PROMPT, max_new_tokens=NUM_TOKENS)
        assert (machine.num_captures, machine.num_replays) == (1, 0)
    assert result.stats.num_output_tokens > 0
    assert caplog.text.count("cannot be captured") == 1


class TestTheDevice:
    """It refuses what one that is there would refuse."""

    def test_tensors_of_both_sides(self) -> None:
        with pytest.MonkeyPatch.context() as patch, pretend_cuda(patch):
            there = torch.ones(3, device="cuda:0")
            assert isinstance(there, OnDevice)
            with pytest.raises(RuntimeError, match="same device"):
                there + torch.ones(3)
            with pytest.raises(TypeError, match="numpy"):
                there.numpy()
            assert (there + 1).cpu().tolist() == [2.0, 2.0, 2.0]

    @pytest.mark.parametrize(
        "ask",
        [
            lambda there: there.sum().item(),
            lambda there: there.tolist(),
            lambda there: there.cpu(),
            lambda there: bool(there[0] > 0),
            lambda there: there.copy_(torch.ones(3)),
            lambda there: there[there > 0],
            lambda there: there.__setitem__(there > 0, there[:1]),
            lambda there: torch.nonzero(there, as_tuple=True),
        ],
    )
    def test_waiting_in_a_capture(self, ask: Any) -> None:
        with pytest.MonkeyPatch.context() as patch, pretend_cuda(patch):
            there = torch.ones(3, device="cuda:0")
            with (
                pytest.raises(RuntimeError, match="captured"),
                torch.cuda.graph(torch.cuda.CUDAGraph()),
            ):
                ask(there)

    def test_a_number_behind_a_mask_is_written_without_waiting(self) -> None:
        with pytest.MonkeyPatch.context() as patch, pretend_cuda(patch) as machine:
            there = torch.zeros(2, 2, device="cuda:0")
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                there[there < 2] = 7
                there[there[:, 0] > 8] = 1.5
            for row, wanted in (([1.0, 2.0], [7.0, 2.0]), ([9.0, 1.0], [1.5, 1.5])):
                there.copy_(torch.tensor([row, [2.0, 2.0]]))
                machine.num_syncs = 0
                graph.replay()
                assert machine.num_syncs == 0
                assert there.cpu().tolist() == [wanted, [2.0, 2.0]]

    def test_what_is_not_zero_is_found(self) -> None:
        with pytest.MonkeyPatch.context() as patch, pretend_cuda(patch) as machine:
            there = torch.tensor([[0, 3], [5, 0]], device="cuda:0")
            assert torch.nonzero(there).tolist() == [[0, 1], [1, 0]]
            rows, columns = torch.nonzero(there, as_tuple=True)
            assert machine.num_syncs == 3, "each of them waits, and so does reading one"
            assert (rows.tolist(), columns.tolist()) == ([0, 1], [1, 0])

    def test_matrices_are_multiplied_into_another_element_type(self) -> None:
        with pytest.MonkeyPatch.context() as patch, pretend_cuda(patch):
            there = torch.tensor([[1.0, 2**-10]], device="cuda:0").bfloat16()
            found = torch.mm(there, torch.ones_like(there).t(), out_dtype=torch.float32)
            assert found.cpu().tolist() == [[1 + 2**-10]]

    def test_it_leaves_torch_as_it_was(self) -> None:
        with pytest.MonkeyPatch.context() as patch, pretend_cuda(patch), torch.device("meta"):
            assert torch.tensor([1]).device.type == "meta"
        with torch.device("meta"):
            assert torch.tensor([1]).device.type == "meta"

    def test_whole_numbers_are_counted(self) -> None:
        with pytest.MonkeyPatch.context() as patch, pretend_cuda(patch):
            there = torch.tensor([0, 1, 1], device="cuda:0")
            found = torch.histc(there, bins=2, min=0, max=1)
            assert (found.dtype, found.tolist()) == (torch.int64, [1, 2])

    def test_a_replay_computes_on_what_is_there_and_a_capture_does_not(self) -> None:
        with pytest.MonkeyPatch.context() as patch, pretend_cuda(patch):
            given, total = (torch.zeros(2, device="cuda:0") for _ in range(2))
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                doubled = given * 2
                total.add_(doubled)
                total[0] = doubled[1]
            assert total.cpu().tolist() == [0, 0]
            for value in (1.0, 2.0):
                given.copy_(torch.tensor([value, value]))
                graph.replay()
            assert doubled.cpu().tolist() == [4, 4]
            assert total.cpu().tolist() == [4, 6]
