"""The demo model that ships inside the package is what its card says it is."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

DEMO = Path(__file__).resolve().parents[1] / "src" / "foreload" / "demo"
LOSS_BOUND = 3.22  # nats per token; 3.07 was measured
SOURCE = 'def read(path: str) -> "list[int]":\n\n    """Reads it."""\n\treturn [ord("é"), 1_000]\n'


@pytest.fixture(scope="module")
def held_out() -> str:
    return (DEMO / "held_out.txt").read_text(encoding="utf-8")


def test_architecture() -> None:
    config = json.loads((DEMO / "config.json").read_text())
    assert config["model_type"] == "qwen3_moe"
    assert config["num_hidden_layers"] == 8
    assert config.get("num_local_experts", config.get("num_experts")) == 32
    assert config["num_experts_per_tok"] == 4
    assert config["max_position_embeddings"] >= 1024
    assert config["dtype"] == "bfloat16"


def test_sizes(held_out: str) -> None:
    assert sum(path.stat().st_size for path in DEMO.glob("*.safetensors")) < 60_000_000
    assert 150_000 <= len(held_out.encode()) <= 250_000
    assert 100_000 <= (DEMO / "calibration.txt").stat().st_size <= 200_000


def test_files_are_marked(held_out: str) -> None:
    calibration = (DEMO / "calibration.txt").read_text(encoding="utf-8")
    for text in (held_out, calibration):
        assert text.startswith("# --- file: ")
        assert text.count("\n# --- file: ") >= 5


def test_nothing_held_out_is_calibrated_on(held_out: str) -> None:
    calibration = (DEMO / "calibration.txt").read_text(encoding="utf-8")
    files = [
        {line for line in text.splitlines() if line.startswith("# --- file: ")}
        for text in (held_out, calibration)
    ]
    assert not files[0] & files[1]


def test_tokenizer_round_trips() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    assert tokenizer.decode(tokenizer(SOURCE)["input_ids"]) == SOURCE
    assert tokenizer.model_max_length >= 1024
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 0, 1)


def test_held_out_text_is_predicted(held_out: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    tokens = AutoTokenizer.from_pretrained(DEMO)(held_out[:8000])["input_ids"][:512]
    ids = torch.tensor([[0, *tokens]])
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(ids[:, :-1]).logits[0], ids[0, 1:])
    assert float(loss) < LOSS_BOUND
