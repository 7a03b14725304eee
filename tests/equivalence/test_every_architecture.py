"""Every architecture transformers can run gives the same logits, bit for bit, with foreload.

The reference holds all experts in memory and runs them eagerly. The engine reads them from
the same checkpoint into half the memory. Equal means `torch.equal`: there is no tolerance.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import pytest
import torch

import zoo
from foreload import Engine, UnsupportedModelError
from foreload.model.kv_cache import pass_cache

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from transformers import PreTrainedModel

DECODE_STEPS = 2
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# What transformers itself cannot run, in at least one of the supported versions.
REFERENCE_MAY_FAIL = {
    ("deepseek_v4", "bfloat16"): "transformers 5.17 multiplies float32 by bfloat16",
}


# Decorated architectures that are no causal language models, and what the refusal says.
REFUSED = {
    "diffusion_gemma": "writes by diffusion",
    "ernie4_5_vl_moe": "text and vision experts in one list",
    "openai_privacy_filter": "not a model that writes text",
}
SUPPORTED = [arch for arch in zoo.buildable_architectures() if arch not in REFUSED]


@pytest.mark.parametrize(
    "arch", [arch for arch in zoo.buildable_architectures() if arch in REFUSED]
)
def test_other_decorated_models_are_refused_by_name(arch: str, tmp_path: Path) -> None:
    tiny = zoo.save_tiny(arch, tmp_path)
    with pytest.raises(UnsupportedModelError, match=REFUSED[arch]):
        Engine.from_pretrained(tiny.path, expert_memory="50%")


@pytest.fixture(scope="module", params=SUPPORTED)
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> zoo.TinyCheckpoint:
    """One architecture's checkpoint, written once for both dtypes."""
    return zoo.save_tiny(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_are_equal_bit_for_bit(checkpoint: zoo.TinyCheckpoint, dtype: str) -> None:
    reference = checkpoint.load_reference(DTYPES[dtype])
    try:
        expected = list(prefill_and_decode(reference, checkpoint))
    except RuntimeError as error:
        if (checkpoint.arch, dtype) in REFERENCE_MAY_FAIL:
            pytest.skip(f"{REFERENCE_MAY_FAIL[checkpoint.arch, dtype]}: {error}")
        raise
    del reference
    with Engine.from_pretrained(
        checkpoint.path, expert_memory="50%", predictor="lookahead", dtype=dtype
    ) as engine:
        actual = prefill_and_decode(engine.model, checkpoint)
        for step, (logits, wanted) in enumerate(zip(actual, expected, strict=True)):
            assert logits.dtype == wanted.dtype
            assert torch.equal(logits, wanted), describe(logits, wanted, step)


def test_so_they_are_where_the_device_decides(checkpoint: zoo.TinyCheckpoint) -> None:
    """Who decides about slots changes nothing; on the CPU, with the twins of the kernels."""
    expected = list(prefill_and_decode(checkpoint.load_reference(), checkpoint))
    with Engine.from_pretrained(
        checkpoint.path,
        expert_memory="50%",
        predictor="lookahead",
        dtype="float32",
        device="cpu",
        orchestration="device",
    ) as engine:
        actual = prefill_and_decode(engine.model, checkpoint)
        for step, (logits, wanted) in enumerate(zip(actual, expected, strict=True)):
            assert torch.equal(logits, wanted), describe(logits, wanted, step)


def prefill_and_decode(
    model: PreTrainedModel, checkpoint: zoo.TinyCheckpoint
) -> Iterator[torch.Tensor]:
    """Yield the logits of the prompt and, where there is a cache, of each token after it.

    The tokens are fixed instead of generated: one wrong logit must not change what follows.
    """
    parameters = inspect.signature(checkpoint.model_class.forward).parameters
    asked = {"use_cache": True} if "past_key_values" in parameters else {}
    with torch.no_grad():
        output = model(input_ids=checkpoint.input_ids, **checkpoint.extra_inputs, **asked)
        yield output.logits
        if output.get("past_key_values") is None:
            return
        for step in range(DECODE_STEPS):
            output = model(
                input_ids=torch.tensor([[11 + 5 * step]]),
                **pass_cache(model, output.past_key_values),
                **checkpoint.extra_inputs,
                **asked,
            )
            yield output.logits


def describe(actual: torch.Tensor, expected: torch.Tensor, step: int) -> str:
    """Say where and how far two logits are apart."""
    where = "prefill" if step == 0 else f"decode step {step}"
    if actual.shape != expected.shape:
        return f"{where}: shape {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    difference = (actual.float() - expected.float()).abs()
    unequal = int((actual != expected).sum())
    return f"{where}: {unequal} of {expected.numel()} differ, by up to {difference.max():.1e}"
