"""Let EleutherAI's lm-evaluation-harness run foreload: any settings on any of its tasks.

    python -m foreload.lm_eval --model foreload --model_args model=demo,policy=speculate-when ...

takes the harness's own arguments. Importing this module registers the model "foreload"; no other
module imports it. Requests are answered as generation runs: contexts are read exactly, what follows
is fed token by token under the policy.
"""

from __future__ import annotations

import copy
import itertools
import logging
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from foreload.config import check_whole
from foreload.engine import Engine
from foreload.errors import ConfigError, MissingExtraError
from foreload.evaluate import prefill_exactly

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError as error:
    raise MissingExtraError("lm-eval", "lm-eval") from error

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["ForeloadLM"]

logger = logging.getLogger(__name__)

_UNBOUNDED_CONTEXT = 2048
_SAMPLING = ("temperature", "top_p", "top_k")


@register_model("foreload")
class ForeloadLM(TemplateLM):  # type: ignore[misc]
    """A model of the harness that answers with an engine, one sequence at a time.

    The first token of every answer comes from the context's forward and is exact under every
    policy, as it is in generation.

    Args:
        model: Local directory, Hub name or "demo"; or an engine, which stays the caller's to close.
        max_length: Most tokens of a context and its answer; None for what the model was made for.
        max_gen_toks: Most tokens to generate where a task does not say.
        cache_dir: Where calibrations are kept; by default the user's cache directory.
        device: As in `EngineConfig`; one that foreload does not know counts as "auto", because the
            harness asks every model for a GPU unless told otherwise.
        batch_size: Ignored, as is `max_batch_size`: the harness gives them to every model.
        max_batch_size: Ignored.
        **settings: Fields of `EngineConfig`.

    Raises:
        ConfigError: A setting is unknown or makes no sense, or the model has no tokenizer.
    """

    def __init__(
        self,
        model: str | Engine = "demo",
        *,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        cache_dir: str | None = None,
        device: str | None = None,
        batch_size: object = None,
        max_batch_size: object = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        check_whole("max_gen_toks", max_gen_toks, least=1)
        if max_length is not None:
            check_whole("max_length", max_length, least=2)
        if isinstance(model, Engine):
            if settings:
                raise ConfigError(f"an open engine has its settings: {', '.join(settings)}")
            self.engine = model
        else:
            # The harness reads the word none as None.
            given: dict[str, Any] = {
                name: "none" if value is None else value for name, value in settings.items()
            }
            given["device"] = device if device in ("auto", "cpu") else "auto"
            # Prompts are read exactly whatever the policy: only the host's loop knows them.
            given.setdefault("orchestration", "host")
            self.engine = Engine.from_pretrained(model, cache_dir=cache_dir, **given)
        if self.engine.tokenizer is None:
            raise ConfigError("this checkpoint has no tokenizer, and tasks are text")
        self.tokenizer = self.engine.tokenizer
        context = self.engine.max_positions or _UNBOUNDED_CONTEXT
        self.max_length = context if max_length is None else min(max_length, context)
        self.max_gen_toks = max_gen_toks

    @property
    def eot_token_id(self) -> int:
        """Give the token that ends a text.

        Raises:
            ConfigError: The tokenizer has none.
        """
        token: int | None = self.tokenizer.eos_token_id
        if token is None:
            raise ConfigError("the tokenizer has neither a first nor a last token for a text")
        return token

    @property
    def prefix_token_id(self) -> int:
        """Give the token that stands where a context is empty."""
        token: int | None = self.tokenizer.bos_token_id
        return self.eot_token_id if token is None else token

    @property
    def tokenizer_name(self) -> str:
        """Give the name that the harness keeps cached requests under."""
        return self.engine.config.model.replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """Give the resolved settings, for the harness's results file."""
        return {"foreload": self.engine.config.to_dict()}

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Turn text into token ids; a first token that the text spells out is not doubled."""
        first = self.tokenizer.bos_token
        if add_special_tokens is None:
            add_special_tokens = not (first and string.startswith(first))
        encoded = self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False)
        return list(encoded["input_ids"])

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Write a conversation as the model's template does."""
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Give the log-likelihood of whole texts, in windows of the model's context."""
        answers = []
        for request in tqdm(requests, disable=disable_tqdm, desc="Texts"):
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            parts = [(None, *make_disjoint_window(window)) for window in windows]
            answer = sum(score for score, _ in self._loglikelihood_tokens(parts, disable_tqdm=True))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
            answers.append(answer)
        return answers

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Complete contexts until a stop text, an end token or the wanted length."""
        answers = []
        for number, request in enumerate(tqdm(requests, disable=disable_tqdm, desc="Completions")):
            context, wishes = request.args
            answer = self._complete(context, wishes, seed=number)
            self.cache_hook.add_partial("generate_until", request.args, answer)
            answers.append(answer)
        return answers

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """Score continuations; a context that several share is read once."""
        answers: list[tuple[float, bool]] = []
        cut = [(key, self._cut(context, rest), rest) for key, context, rest in requests]
        with tqdm(total=len(cut), disable=disable_tqdm, desc="Continuations") as bar:
            for context, shared in itertools.groupby(cut, key=lambda item: item[1]):
                cache, logits = prefill_exactly(self.engine, context)
                for key, _, continuation in shared:
                    answer = self._score(copy.deepcopy(cache), logits, continuation)
                    if key is not None:
                        self.cache_hook.add_partial("loglikelihood", key, answer)
                    answers.append(answer)
                    bar.update()
        return answers

    def _cut(self, context: list[int], continuation: list[int]) -> list[int]:
        """Shorten a context from the left, so that all but the last token fit."""
        room = self.max_length + 1 - len(continuation)
        if room < 1:
            raise ConfigError(
                f"a continuation of {len(continuation)} tokens does not fit the model's "
                f"{self.max_length}"
            )
        return (context or [self.prefix_token_id])[-room:]

    def _score(self, kv_cache: Any, logits: Tensor, continuation: list[int]) -> tuple[float, bool]:
        """Give the log-likelihood of a continuation, and whether it is the likeliest throughout."""
        total, is_greedy = 0.0, True
        for place, token in enumerate(continuation):
            if place > 0:
                logits = self.engine.forward(torch.tensor([[continuation[place - 1]]]), kv_cache)
            total += float(logits.double().log_softmax(-1)[token])
            is_greedy &= int(logits.argmax()) == token
        return total, is_greedy

    def _complete(self, context: str, wishes: dict[str, Any], seed: int) -> str:
        wishes = dict(normalize_gen_kwargs(wishes, self.max_gen_toks))
        stop, max_new_tokens = wishes.pop("until"), wishes.pop("max_gen_toks")
        del wishes["do_sample"]
        sampling = {name: wishes.pop(name) for name in _SAMPLING if name in wishes}
        if wishes:
            logger.warning("ignored of what a task asks for: %s", ", ".join(wishes))
        room = self.max_length - max_new_tokens
        if room < 1:
            raise ConfigError(
                f"max_gen_toks={max_new_tokens} leaves no room for a context: the model has "
                f"{self.max_length} tokens"
            )
        prompt = self.tok_encode(context) or [self.prefix_token_id]
        result = self.engine.generate(
            prompt[-room:],
            max_new_tokens=max_new_tokens,
            stop=tuple(text for text in stop if text),
            seed=seed,
            **sampling,
        )
        return result.text


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
