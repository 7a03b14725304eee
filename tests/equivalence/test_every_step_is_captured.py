"""Every architecture's step is captured and replayed, but for those named here, with the reason.

On a device that is not there (`pretend_cuda`), with kernels that give zeros: what is asked of the
device in a step is the model's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from test_every_architecture import SUPPORTED

import zoo
from fakes import make_engine
from pretend_cuda import pretend_cuda

if TYPE_CHECKING:
    from pathlib import Path

PROMPT = [11, 16, 21, 5, 9]
NUM_TOKENS = 4

_INDEXED = "keeps keys of an indexer too, and attends to those that it chooses"
_RECURRENT = "has layers with a recurrent state"

# A model is not given a static KV cache where a layer keeps anything but keys and values.
WITHOUT_A_STATIC_CACHE = {
    "axk2": _INDEXED,
    "bailing_hybrid": _RECURRENT,
    "deepseek_v32": _INDEXED,
    "deepseek_v4": "keeps compressed keys, in cache layers of its own",
    "dots3_note": _INDEXED,
    "glm5_next": f"{_RECURRENT}, and {_INDEXED}",
    "glm_moe_dsa": _INDEXED,
    "granitemoehybrid": _RECURRENT,
    "hy_v4": _INDEXED,
    "hy_v4_vl": _INDEXED,
    "inkling": "convolves beside its attention, and keeps the last inputs of that",
    "inkling2": "convolves beside its attention, and keeps the last inputs of that",
    "inkling2_loop": "convolves beside its attention, and keeps the last inputs of that",
    "jamba": _RECURRENT,
    "kimi_linear": _RECURRENT,
    "lara_mini": _RECURRENT,
    "lfm2_moe": "has convolutions, and keeps their last inputs",
    "minimax": "has a cache of its own, for linear attention",
    "mistral_large4": _INDEXED,
    "nemotron_h": _RECURRENT,
    "qwen3_5_moe": _RECURRENT,
    "qwen3_next": _RECURRENT,
    "qwen4_exp": f"{_RECURRENT}, and {_INDEXED}",
    "unlimited_ocr": "has windows that slide behind a reference, in cache layers of its own",
    "zaya": "convolves beside its attention, and keeps the last inputs of that",
}

# A step that asks for what a capture refuses.
CANNOT_BE_CAPTURED = {
    "phimoe": "makes the frequencies of its rotary embedding on the host, and copies them",
}


@pytest.mark.parametrize("arch", SUPPORTED)
def test_a_step_is_captured_and_replayed_or_it_is_known_why_not(
    arch: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny = zoo.save_tiny(arch, tmp_path)
    with pytest.MonkeyPatch.context() as patch, pretend_cuda(patch, is_quiet=True) as machine:
        with make_engine(
            tiny.path,
            device="cuda",
            dtype="float32",
            orchestration="device",
            expert_memory="60%",
            predictor="lookahead",
        ) as engine:
            result = engine.generate(PROMPT, max_new_tokens=NUM_TOKENS)
        counted = machine.num_captures, machine.num_replays
    assert result.stats.num_output_tokens > 1
    replays = result.stats.num_output_tokens - 1
    said = [record.getMessage() for record in caplog.records if "captured" in record.getMessage()]
    if arch in WITHOUT_A_STATIC_CACHE:
        assert counted == (0, 0), "it has a static cache: take it off the list"
        assert len(said) == 1
        assert "more than keys and values" in said[0]
    elif arch in CANNOT_BE_CAPTURED:
        assert counted == (1, 0), "it was captured: take it off the list"
        assert len(said) == 1
        assert "cannot be captured" in said[0]
    else:
        assert counted == (1, replays), said
        assert not said


def test_no_exception_stands_on_both_lists() -> None:
    assert not WITHOUT_A_STATIC_CACHE.keys() & CANNOT_BE_CAPTURED.keys()
