"""Measure a model's default vectors, and how well each predictor names its experts.

One text is split: on its first part every expert's outputs are averaged, on the rest the recall
of the predictors is counted, token by token. Changes nothing about the engine it is given.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from foreload.config import check_whole
from foreload.decode.prompt import encode_text
from foreload.errors import ConfigError, UnsupportedModelError
from foreload.predict.calibration import DefaultVectorRecorder, calibration_path
from foreload.predict.lookahead import DefaultVectors, Lookahead

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from foreload.engine import Engine
    from foreload.types import Predictor, RoutingEvent

    Progress = Callable[[str, int, int], None]

__all__ = ["PREVIOUS_TOKEN", "CalibrationReport", "calibrate", "encode"]

PREVIOUS_TOKEN = "previous-token"

_WINDOW_TOKENS = 512
_MIN_TOKENS = 32
_MIN_HELD_OUT_TOKENS = 2
_CALIBRATED_SHARE = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationReport:
    """What a calibration measured.

    Attributes:
        identity: The checkpoint's identity.
        path: Where the default vectors were saved.
        num_tokens: Tokens the default vectors were measured on.
        num_held_out_tokens: Tokens the recall was measured on.
        coverage: Share of the experts that have a default vector.
        num_layers: MoE layers.
        top_k: Experts per token and layer.
        depths: The n of the recall: top_k, top_k + 2 and twice top_k.
        recall_at_n: By predictor, layer and n, the share of truly routed experts inside the n
            named one layer ahead; `previous-token` names the experts this layer used last. Layers
            a predictor has nothing to say about are missing.
    """

    identity: str
    path: str
    num_tokens: int
    num_held_out_tokens: int
    coverage: float
    num_layers: int
    top_k: int
    depths: tuple[int, ...]
    recall_at_n: dict[str, dict[int, dict[int, float]]]

    def mean_recall(self, predictor: str) -> dict[int, float]:
        """Give a predictor's recall by n, averaged over the layers that all speak about."""
        spoken = [set(layers) for layers in self.recall_at_n.values() if layers]
        layers = self.recall_at_n[predictor]
        shared = set(layers).intersection(*spoken)
        if not shared:
            return {}
        return {n: sum(layers[at][n] for at in shared) / len(shared) for n in self.depths}

    def to_dict(self) -> dict[str, Any]:
        """Give the report as plain values, ready for JSON."""
        means = {name: self.mean_recall(name) for name in self.recall_at_n}
        return asdict(self) | {"mean_recall_at_n": means}


def calibrate(
    engine: Engine,
    text: str | Sequence[int],
    *,
    max_tokens: int = 16384,
    max_held_out_tokens: int = 512,
    progress: Progress | None = None,
) -> CalibrationReport:
    """Measure default vectors on a text and save them; measure recall on its last fifth.

    An engine opened afterwards finds them. An interrupted calibration leaves an earlier one as it
    was, until the default vectors are complete.

    Args:
        engine: Opened with `predictor="lookahead"`, which lets it watch the residual stream.
        text: Text like the text to be generated, or its token ids.
        max_tokens: Most tokens of the text to use.
        max_held_out_tokens: Most tokens of the last fifth to use: they run one by one.
        progress: Called with what is being measured, tokens done, and tokens in all.

    Raises:
        ConfigError: The text is too short or no text, a number makes no sense, or the engine has no
            predictor or no tokenizer.
        CheckpointError: The vectors cannot be saved; earlier ones are left as they were.
        UnsupportedModelError: The experts do not work on the residual stream.
    """
    if engine.runtime.predictor is None:
        raise ConfigError(
            "a calibration watches the residual stream, and this engine does not",
            hint='open the engine with predictor="lookahead"',
        )
    check_whole("max_tokens", max_tokens, least=_MIN_TOKENS)
    check_whole("max_held_out_tokens", max_held_out_tokens, least=_MIN_HELD_OUT_TOKENS)
    token_ids = encode(engine, text, max_tokens, least=_MIN_TOKENS, purpose="a calibration")
    cut = int(_CALIBRATED_SHARE * len(token_ids))
    measured, held_out = token_ids[:cut], token_ids[cut:][:max_held_out_tokens]

    recorder = _record(engine, measured, progress)
    spec = engine.spec
    path = calibration_path(engine.cache_dir, spec.identity)
    recorder.write(path, spec.identity)

    depths = sorted(
        {min(n, spec.num_experts) for n in (spec.top_k, spec.top_k + 2, 2 * spec.top_k)}
    )
    routers = engine.early_routers()
    vectors = list(recorder.vectors().to(engine.model.device))
    extra = depths[-1] - spec.top_k
    predictors = (
        Lookahead(routers, num_extra=extra),
        DefaultVectors(routers, vectors, num_extra=extra),
    )
    meter = _RecallMeter(predictors, depths)
    _measure(engine, held_out, meter, progress)
    return CalibrationReport(
        identity=spec.identity,
        path=str(path),
        num_tokens=len(measured),
        num_held_out_tokens=len(held_out),
        coverage=recorder.coverage,
        num_layers=spec.num_moe_layers,
        top_k=spec.top_k,
        depths=tuple(depths),
        recall_at_n=meter.recall_at_n(),
    )


def encode(
    engine: Engine, text: str | Sequence[int], max_tokens: int, *, least: int, purpose: str
) -> list[int]:
    """Give the first token ids of a text.

    Args:
        engine: Whose vocabulary they are of.
        text: The text, or its token ids.
        max_tokens: Most of them to give.
        least: How many are needed.
        purpose: What for, for the message.

    Raises:
        ConfigError: They are too few or none, or the checkpoint has no tokenizer.
    """
    token_ids = encode_text(text, engine.tokenizer, engine.vocab_size, max_tokens=max_tokens)
    if len(token_ids) < least:
        raise ConfigError(
            f"{purpose} needs at least {least} tokens, and its text has {len(token_ids)}",
            hint="give a longer text",
        )
    return token_ids


def _record(
    engine: Engine, token_ids: Sequence[int], progress: Progress | None
) -> DefaultVectorRecorder:
    """Average every expert's outputs over the text."""
    spec = engine.spec
    recorder = DefaultVectorRecorder(spec.num_moe_layers, spec.num_experts, spec.hidden_size)

    def add(layer: int, expert: int, output: Tensor) -> None:
        if output.shape[-1] != spec.hidden_size:
            raise UnsupportedModelError(
                "this model's experts do not work on the residual stream, so that default vectors "
                "cannot stand in for them",
                hint='use predictor="lookahead"',
            )
        recorder.add(layer, expert, output)

    before, engine.runtime.on_output = engine.runtime.on_output, add
    try:
        done = 0
        for window in _windows(engine, token_ids):
            cache = engine.make_cache()
            for start in range(0, len(window), engine.config.prefill_chunk):
                chunk = window[start : start + engine.config.prefill_chunk]
                engine.forward(torch.tensor([chunk]), cache)
                done += len(chunk)
                if progress is not None:
                    progress("Default vectors", done, len(token_ids))
    finally:
        engine.runtime.on_output = before
    return recorder


def _measure(
    engine: Engine, token_ids: Sequence[int], meter: _RecallMeter, progress: Progress | None
) -> None:
    """Run the text token by token while the meter counts."""
    before, engine.runtime.on_routing = engine.runtime.on_routing, meter.see
    try:
        done = 0
        for window in _windows(engine, token_ids):
            cache = engine.make_cache()
            meter.restart()
            for token in window:
                engine.forward(torch.tensor([[token]]), cache)
                done += 1
                if progress is not None:
                    progress("Recall", done, len(token_ids))
    finally:
        engine.runtime.on_routing = before


def _windows(engine: Engine, token_ids: Sequence[int]) -> Iterator[list[int]]:
    """Cut the text into contexts, each with a KV cache of its own."""
    size = min(_WINDOW_TOKENS, engine.max_positions or _WINDOW_TOKENS)
    for start in range(0, len(token_ids), size):
        yield list(token_ids[start : start + size])


class _RecallMeter:
    """Compares what predictors named one layer ahead with the true routing of single tokens."""

    def __init__(self, predictors: Sequence[Predictor], depths: Sequence[int]) -> None:
        self._predictors = predictors
        self._depths = depths
        self._guesses: dict[int, dict[str, Sequence[int]]] = {}
        self._recent: dict[int, list[int]] = {}
        self._demanded: dict[str, dict[int, int]] = {}
        self._right: dict[tuple[str, int, int], int] = {}

    def restart(self) -> None:
        """Forget the previous tokens: another context begins."""
        self._guesses.clear()
        self._recent.clear()

    def see(self, event: RoutingEvent, wanted: Sequence[int]) -> None:
        """Count the guesses about this layer, and collect those about the next."""
        true: list[int] = event.top_k_index[0].tolist()
        recent = self._recent.get(event.layer, [])
        guesses = self._guesses.pop(event.layer, {})
        # All are counted on the same tokens, so the first one of a context is left out.
        if recent:
            for name, guess in {**guesses, PREVIOUS_TOKEN: recent}.items():
                self._count(name, event.layer, true, guess)
        self._recent[event.layer] = true + [expert for expert in recent if expert not in true]
        for predictor in self._predictors:
            for prediction in predictor.predict(event):
                named = self._guesses.setdefault(prediction.layer, {})
                named[predictor.name] = prediction.experts

    def _count(self, name: str, layer: int, true: Sequence[int], guess: Sequence[int]) -> None:
        demanded = self._demanded.setdefault(name, {})
        demanded[layer] = demanded.get(layer, 0) + len(true)
        for n in self._depths:
            place = (name, layer, n)
            right = set(true).intersection(guess[:n])
            self._right[place] = self._right.get(place, 0) + len(right)

    def recall_at_n(self) -> dict[str, dict[int, dict[int, float]]]:
        """Give the recall by predictor, layer and n."""
        names = [*(predictor.name for predictor in self._predictors), PREVIOUS_TOKEN]
        return {
            name: {
                layer: {n: self._right[name, layer, n] / demanded for n in self._depths}
                for layer, demanded in sorted(self._demanded.get(name, {}).items())
            }
            for name in names
        }
