"""From what a user gives as a prompt, or as a text to run, to token ids."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from foreload.errors import ConfigError

if TYPE_CHECKING:
    Prompt = str | Sequence[int] | Sequence[dict[str, str]]

__all__ = ["encode_prompt", "encode_text"]

_MAX_CHARS_PER_TOKEN = 16
"""More than any text has on average."""

_KINDS = {
    "prompt": (
        "text, token ids nor chat messages",
        "give a text, a flat list of token ids, or a list of messages",
    ),
    "text": ("text nor token ids", "give a text, or a flat list of token ids"),
}
_OTHER_TOKENIZER = "the tokenizer is not this model's: get its files again"


def encode_prompt(prompt: Prompt, tokenizer: Any | None, vocab_size: int) -> list[int]:
    """Give the token ids of a text, of chat messages, or of token ids.

    Args:
        prompt: Text, token ids (a list, a 1-D array or tensor), or chat messages.
        tokenizer: transformers' tokenizer; None where there is none.
        vocab_size: V, which no token id reaches.

    Raises:
        ConfigError: The prompt is empty, outside the vocabulary, or needs what the tokenizer lacks.
    """
    values = _as_sequence(prompt, "prompt")
    if len(values) == 0:
        raise ConfigError("the prompt is empty", hint="give at least one token")
    if isinstance(values, str):
        ids = _tokenize(values, tokenizer, vocab_size, "prompt")
        if not ids:
            raise ConfigError("the prompt has no tokens", hint="give at least one")
        return ids
    if isinstance(values[0], Mapping):
        return _write_messages(values, tokenizer, vocab_size)
    return _check_ids(values, vocab_size, "prompt")


def encode_text(
    text: str | Sequence[int], tokenizer: Any | None, vocab_size: int, *, max_tokens: int
) -> list[int]:
    """Give the first token ids of a text that is run as it is.

    Args:
        text: The text, or its token ids (a list, a 1-D array or tensor).
        tokenizer: transformers' tokenizer; None where there is none.
        vocab_size: V, which no token id reaches.
        max_tokens: Most tokens to give.

    Raises:
        ConfigError: It is neither, or outside the vocabulary, or there is no tokenizer.
    """
    values = _as_sequence(text, "text")
    if isinstance(values, str):
        start = values[: _MAX_CHARS_PER_TOKEN * max_tokens]
        return _tokenize(start, tokenizer, vocab_size, "text")[:max_tokens]
    return _check_ids(values[:max_tokens], vocab_size, "text")


def _as_sequence(given: Any, name: str) -> Sequence[Any]:
    """Give a text as it is, and the values of arrays and tensors."""
    values = given.tolist() if hasattr(given, "tolist") else given
    if not isinstance(values, Sequence) or isinstance(values, bytes | bytearray | memoryview):
        raise _wrong_kind(name, f"it is of type {type(given).__name__}")
    return values


def _wrong_kind(name: str, reason: object) -> ConfigError:
    kinds, hint = _KINDS[name]
    return ConfigError(f"the {name} is neither {kinds}: {reason}", hint=hint)


def _check_ids(values: Sequence[Any], vocab_size: int, name: str) -> list[int]:
    """Give plain token ids, all of them in the vocabulary."""
    try:
        if any(isinstance(value, bool) for value in values):
            raise TypeError("a truth value is no token")
        ids = [operator.index(value) for value in values]
    except TypeError as error:
        raise _wrong_kind(name, error) from error
    hint = f"give ids from 0 to {vocab_size - 1}"
    return _check_vocabulary(ids, vocab_size, name, hint)


def _check_vocabulary(ids: list[int], vocab_size: int, name: str, hint: str) -> list[int]:
    outside = next((token for token in ids if not 0 <= token < vocab_size), None)
    if outside is not None:
        raise ConfigError(
            f"token {outside} of the {name} is outside the vocabulary of {vocab_size}", hint=hint
        )
    return ids


def _tokenize(text: str, tokenizer: Any | None, vocab_size: int, name: str) -> list[int]:
    _check_unicode(text, name)
    ids = list(_require(tokenizer, name)(text, verbose=False)["input_ids"])
    return _check_vocabulary(ids, vocab_size, name, _OTHER_TOKENIZER)


def _write_messages(
    messages: Sequence[Mapping[str, Any]], tokenizer: Any | None, vocab_size: int
) -> list[int]:
    """Give the token ids of a conversation, as the model's template writes it."""
    tokenizer = _require(tokenizer, "prompt")
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            "this model has no chat template: it completes text, it does not converse",
            hint="give the prompt as plain text",
        )
    for message in messages:
        for part in message.values() if isinstance(message, Mapping) else ():
            if isinstance(part, str):
                _check_unicode(part, "prompt")
    try:
        ids: list[int] = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_dict=True
        )["input_ids"]
    except Exception as error:
        raise ConfigError(
            f"the model's chat template cannot write these messages: {error}",
            hint='give a list of {"role": ..., "content": ...}, with the roles that the model has',
        ) from error
    return _check_vocabulary(ids, vocab_size, "prompt", _OTHER_TOKENIZER)


def _require(tokenizer: Any | None, name: str) -> Any:
    if tokenizer is None:
        raise ConfigError(
            "this checkpoint has no tokenizer",
            hint=f"give the {name} as token ids; where a command takes none, use Python",
        )
    return tokenizer


def _check_unicode(text: str, name: str) -> None:
    """Refuse halves of characters, which no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"character {error.start} of the {name} is half of one, {text[error.start]!a}",
            hint="read the text with errors='replace', or leave the character out",
        ) from error
