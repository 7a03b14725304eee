"""Checkpoints and engines that many tests share."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import settings as hypothesis_settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import interpreted_triton  # noqa: F401 (the zoo imports Triton)
import zoo
from fakes import assert_settled, make_engine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from transformers import PreTrainedModel

    from foreload import Engine

hypothesis_settings.register_profile("foreload", deadline=None, derandomize=True, database=None)
hypothesis_settings.load_profile("foreload")

VOCABULARY = 320
EOS_TOKEN = 2


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Compute on one thread: several would only fight over the cores that tests have."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: every text has tokens, and every token is a piece of text."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["the cat sat on the mat, then the cat ate the rat"] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


@pytest.fixture(scope="session")
def tiny_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast
) -> Path:
    """Qwen3-MoE with 4 layers of 16 experts, 4 at a time, in several shards, with a tokenizer."""
    path = tmp_path_factory.mktemp("tiny")
    settings = {**zoo.SEVEN_FAMILIES["qwen3_moe"], "vocab_size": VOCABULARY, "mlp_only_layers": []}
    cls = zoo.model_class("qwen3_moe")
    model = zoo._build(cls, cls.config_class(**settings), torch.float32, seed=0)
    zoo._save(model, path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny_model(tiny_checkpoint: Path) -> PreTrainedModel:
    """The tiny checkpoint as transformers loads it, all in memory, with eager experts."""
    cls = zoo.model_class("qwen3_moe")
    return cls.from_pretrained(tiny_checkpoint, experts_implementation="eager").eval()


@pytest.fixture
def checkpoint_copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint to damage."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "copy")


@pytest.fixture
def hollow_checkpoint(checkpoint_copy: Path) -> Path:
    """The tiny checkpoint as `open_headers` leaves a Hub model: true sizes, holes for weights."""
    for file in checkpoint_copy.glob("*.safetensors"):
        size = file.stat().st_size
        length = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        with file.open("r+b") as stream:
            stream.truncate(length)
            stream.truncate(size)
    return checkpoint_copy


@pytest.fixture
def open_engine(tiny_checkpoint: Path) -> Iterator[Callable[..., Engine]]:
    """Open engines on the tiny checkpoint; at the end they must have settled, and are closed."""
    engines: list[Engine] = []

    def open_one(directory: Path = tiny_checkpoint, **settings: Any) -> Engine:
        engines.append(make_engine(directory, **{"expert_memory": "50%", **settings}))
        return engines[-1]

    yield open_one
    for engine in engines:
        if not engine._closed:
            assert_settled(engine.tiers)
        engine.close()
        engine.tiers.cache.check()
