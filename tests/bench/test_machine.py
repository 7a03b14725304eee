"""A result's header says what it was measured on."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
import transformers

import foreload
from foreload.bench import machine
from foreload.model.hf import load_model

if TYPE_CHECKING:
    from pathlib import Path

    from foreload.model.hf import LoadedModel


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint: Path) -> LoadedModel:
    return load_model(tiny_checkpoint)


def test_the_description_names_machine_versions_and_model(loaded: LoadedModel) -> None:
    described = machine.describe_machine(loaded, "some/folder/tiny")
    assert json.loads(json.dumps(described)) == described
    assert described["model"] == "tiny"
    assert described["architecture"] == "Qwen3MoeForCausalLM"
    assert described["dtype"] == "float32"
    assert (described["num_moe_layers"], described["num_experts"], described["top_k"]) == (4, 16, 4)
    assert described["total_expert_bytes"] == 64 * described["expert_bytes"]
    assert described["torch"] == torch.__version__
    assert described["transformers"] == transformers.__version__
    assert described["foreload"] == foreload.__version__
    assert described["threads"] == torch.get_num_threads()
    assert described["cores"] >= 1
    assert described["memory_bytes"] > 2**28


def test_random_weights_are_told_from_trained_ones(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert machine.describe_machine(loaded, "tiny")["is_random"] is False
    monkeypatch.setattr(loaded.model.config, "foreload_random_weights", True, raising=False)
    assert machine.describe_machine(loaded, "tiny")["is_random"] is True


@pytest.mark.parametrize(
    ("lines", "name"),
    [("processor : 0\nmodel name\t: Abacus 9000 @ 1 Hz\n", "Abacus 9000 @ 1 Hz"), ("", "plain")],
)
def test_the_processor_is_named(
    lines: str, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cpuinfo").write_text(lines)
    monkeypatch.setattr(machine, "Path", lambda _: tmp_path / "cpuinfo")
    monkeypatch.setattr(machine.platform, "processor", lambda: "plain")
    assert machine._cpu_name() == name
    (tmp_path / "cpuinfo").unlink()
    assert machine._cpu_name() == "plain"
