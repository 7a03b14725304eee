"""A prompt of any kind becomes token ids of the model's vocabulary, or is refused by what it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from foreload.decode.prompt import encode_prompt, encode_text
from foreload.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCABULARY = 320
MESSAGES = [{"role": "user", "content": "the cat"}]


@pytest.mark.parametrize(
    "prompt",
    [
        [5, 0, 319],
        (5, 0, 319),
        torch.tensor([5, 0, 319]),
        np.array([5, 0, 319]),
        [np.int64(5), torch.tensor(0), 319],
    ],
    ids=lambda prompt: type(prompt).__name__,
)
def test_token_ids_of_any_kind_become_plain_numbers(prompt: Any) -> None:
    ids = encode_prompt(prompt, None, VOCABULARY)
    assert ids == [5, 0, 319]
    assert [type(token) for token in ids] == [int] * 3


@pytest.mark.parametrize("prompt", [[320], [5, -1], [10**12]])
def test_tokens_outside_the_vocabulary_are_refused(prompt: list[int]) -> None:
    with pytest.raises(ConfigError, match=f"token {prompt[-1]} .* vocabulary of 320") as caught:
        encode_prompt(prompt, None, VOCABULARY)
    assert "0 to 319" in str(caught.value.hint)


@pytest.mark.parametrize(
    "prompt",
    [
        [1.5],
        [5, None],
        [5, "x"],
        [True, False],
        [[5, 6]],
        b"abc",
        bytearray(b"abc"),
        None,
        5,
        {5, 6},
        {"role": "user"},
        iter([5]),
        torch.tensor(3),
        torch.tensor([[3]]),
        np.float64(0.5),
    ],
    ids=lambda prompt: str(prompt).partition(" at 0x")[0],
)
def test_what_is_no_token_is_refused_with_what_would_be(prompt: Any) -> None:
    with pytest.raises(ConfigError, match="neither text, token ids nor chat messages") as caught:
        encode_prompt(prompt, None, VOCABULARY)
    assert "flat list" in str(caught.value.hint)


@pytest.mark.parametrize("prompt", ["", [], (), torch.tensor([]).long()], ids=repr)
def test_an_empty_prompt_is_refused(prompt: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match="empty"):
        encode_prompt(prompt, tokenizer, VOCABULARY)


def test_a_text_is_tokenised(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = encode_prompt("the cat sat", tokenizer, VOCABULARY)
    assert ids == tokenizer("the cat sat")["input_ids"]
    assert tokenizer.decode(ids) == "the cat sat"


def test_a_text_without_tokens_is_refused() -> None:
    with pytest.raises(ConfigError, match="no tokens"):
        encode_prompt("x", lambda text, **settings: {"input_ids": []}, VOCABULARY)


@pytest.mark.parametrize("prompt", ["the cat", MESSAGES], ids=["text", "messages"])
def test_text_and_messages_need_a_tokenizer(prompt: Any) -> None:
    with pytest.raises(ConfigError, match="no tokenizer") as caught:
        encode_prompt(prompt, None, VOCABULARY)
    assert "token ids" in str(caught.value.hint)


def test_half_a_character_is_refused_with_its_place(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "user", "content": "ab\ud800"}]
    for prompt, reader in (("ab\ud800c", tokenizer), (messages, Chatty())):
        with pytest.raises(ConfigError, match=r"character 2 of the prompt .*\\ud800"):
            encode_prompt(prompt, reader, VOCABULARY)


def test_a_tokenizer_of_another_model_is_found_out() -> None:
    foreign = Chatty()
    for prompt in ("x", MESSAGES):
        with pytest.raises(
            ConfigError, match=r"token 9 of the prompt .* vocabulary of 9"
        ) as caught:
            encode_prompt(prompt, foreign, 9)
        assert "tokenizer" in str(caught.value.hint)


def test_messages_that_the_template_cannot_write_are_refused() -> None:
    class Strict(Chatty):
        def apply_chat_template(self, messages: Any, **settings: Any) -> dict[str, list[int]]:
            raise TypeError("roles must alternate")

    with pytest.raises(ConfigError, match=r"chat template cannot write .* roles must alternate"):
        encode_prompt(MESSAGES, Strict(), VOCABULARY)


def test_a_text_to_run_is_text_or_token_ids(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "the cat sat on the mat"
    ids = tokenizer(text)["input_ids"]
    assert encode_text(text, tokenizer, VOCABULARY, max_tokens=3) == ids[:3]
    assert encode_text(text, tokenizer, VOCABULARY, max_tokens=99) == ids
    for given in (ids, tuple(ids), torch.tensor(ids), np.array(ids)):
        assert encode_text(given, None, VOCABULARY, max_tokens=3) == ids[:3]
    assert encode_text("", tokenizer, VOCABULARY, max_tokens=3) == []
    # What is not used need not be right.
    assert encode_text([5, 6, 999], None, VOCABULARY, max_tokens=2) == [5, 6]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ([5, 320], "token 320 of the text is outside the vocabulary of 320"),
        ([-1], "token -1 of the text"),
        ("\ud800", "character 0 of the text"),
        (b"abc", "the text is neither text nor token ids: it is of type bytes"),
        (None, "of type NoneType"),
        ([1.5], "neither text nor token ids"),
        (MESSAGES, "neither text nor token ids"),
    ],
)
def test_what_is_no_text_to_run_is_refused(
    text: Any, message: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ConfigError, match=message):
        encode_text(text, tokenizer, VOCABULARY, max_tokens=99)


def test_a_text_to_run_needs_a_tokenizer() -> None:
    with pytest.raises(ConfigError, match="no tokenizer") as caught:
        encode_text("the cat", None, VOCABULARY, max_tokens=9)
    assert "token ids" in str(caught.value.hint)


class Chatty:
    """A tokenizer that writes messages down."""

    chat_template = "template"

    def __init__(self) -> None:
        self.seen: list[tuple[Any, dict[str, Any]]] = []

    def __call__(self, text: str, **settings: Any) -> dict[str, list[int]]:
        return {"input_ids": [7, 8, 9]}

    def apply_chat_template(self, messages: Any, **settings: Any) -> dict[str, list[int]]:
        self.seen.append((messages, settings))
        return {"input_ids": [7, 8, 9]}


def test_messages_are_written_by_the_template_and_await_an_answer() -> None:
    tokenizer = Chatty()
    assert encode_prompt(tuple(MESSAGES), tokenizer, VOCABULARY) == [7, 8, 9]
    assert tokenizer.seen == [(MESSAGES, {"add_generation_prompt": True, "return_dict": True})]


def test_messages_need_a_template(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match="no chat template") as caught:
        encode_prompt(MESSAGES, tokenizer, VOCABULARY)
    assert "plain text" in str(caught.value.hint)
