"""From what a user gives as a prompt to token ids."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

from foreload.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    Prompt = str | Sequence[int] | Sequence[dict[str, str]]

__all__ = ["encode_prompt"]


def encode_prompt(prompt: Prompt, tokenizer: Any | None, vocab_size: int) -> list[int]:
    """Give the token ids of a text, of chat messages, or of token ids.

    Args:
        prompt: Text, token ids (a list, a 1-D array or tensor), or chat messages.
        tokenizer: transformers' tokenizer; None where there is none.
        vocab_size: V, which no token id reaches.

    Raises:
        ConfigError: The prompt is empty, outside the vocabulary, or needs what the tokenizer lacks.
    """
    ids = _as_token_ids(prompt)
    if ids is not None:
        if not all(0 <= token < vocab_size for token in ids):
            raise ConfigError(f"a prompt token is outside the vocabulary of {vocab_size}")
        return ids
    if len(prompt) == 0:
        raise ConfigError("the prompt is empty", hint="give at least one token")
    if tokenizer is None:
        raise ConfigError("this checkpoint has no tokenizer", hint="give the prompt as token ids")
    if isinstance(prompt, str):
        text_ids: list[int] = tokenizer(prompt)["input_ids"]
        if not text_ids:
            raise ConfigError("the prompt has no tokens", hint="give at least one")
        return text_ids
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            "this model has no chat template: it completes text, it does not converse",
            hint="give the prompt as plain text",
        )
    chat_ids: list[int] = tokenizer.apply_chat_template(
        list(prompt), add_generation_prompt=True, return_dict=True
    )["input_ids"]
    return chat_ids


def _as_token_ids(prompt: Any) -> list[int] | None:
    """Give the token ids of a prompt made of them (a list, a 1-D array or tensor), else None."""
    if isinstance(prompt, str):
        return None
    values = prompt.tolist() if hasattr(prompt, "tolist") else list(prompt)
    if not values or isinstance(values[0], dict):
        return None
    try:
        if any(isinstance(value, bool) for value in values):
            raise TypeError("a truth value is no token")
        return [operator.index(value) for value in values]
    except TypeError as error:
        raise ConfigError(
            f"the prompt is neither text, token ids nor chat messages: {error}",
            hint="give a text, a flat list of token ids, or a list of messages",
        ) from error
