"""Which predictor a setting makes, from the model's own routers and what was saved for it.

Reads calibrations and estimators from the cache directory; predicts nothing itself.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from foreload.errors import CheckpointError, ConfigError
from foreload.model.sites import EarlyRouter, probe_sites
from foreload.ops.scores import ScoreRule
from foreload.predict.calibration import calibration_path, read_default_vectors
from foreload.predict.choice import MeasuredChoice
from foreload.predict.estimator import CorrectedRouter, Estimator, estimator_path, read_estimator
from foreload.predict.lookahead import DefaultVectors, Lookahead

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from foreload.config import EngineConfig
    from foreload.model.hf import LoadedModel
    from foreload.predict.estimator import LayerNetwork
    from foreload.types import Predictor, TensorPredictor

    Reader = Callable[..., DefaultVectors | Estimator | None]

__all__ = [
    "corrected_routers",
    "early_routers",
    "find_routers",
    "make_predictor",
    "make_tensor_predictor",
]

logger = logging.getLogger(__name__)

_MADE_BY = {
    "default-vectors": ("a calibration", "calibrate"),
    "estimator": ("an estimator", "train-estimator"),
}
"""What a predictor needs that a verb makes."""


def find_routers(loaded: LoadedModel) -> None:
    """Find, once, what the model's routers are asked with: a small forward tells."""
    sites = loaded.sites
    if not any(site.is_predictable for site in sites):
        probe = torch.tensor([[1, 2, 3, 4] * 4], device=loaded.model.device)
        probe_sites(loaded.model, sites, probe)


def early_routers(loaded: LoadedModel) -> list[EarlyRouter]:
    """Give, per MoE layer, the model's own norm and router, to be asked with any residual."""
    find_routers(loaded)
    return [EarlyRouter(site) for site in loaded.sites]


def corrected_routers(
    loaded: LoadedModel, networks: Mapping[int, LayerNetwork]
) -> list[CorrectedRouter | None]:
    """Give, per MoE layer, its router corrected by its network; None where it has none."""
    model = loaded.model
    routers: list[CorrectedRouter | None] = []
    for router in early_routers(loaded):
        site = router.site
        network = networks.get(site.layer)
        if network is None:
            routers.append(None)
            continue
        rule = ScoreRule.SOFTMAX if site.scores is None else site.scores.rule
        routers.append(
            CorrectedRouter(
                router,
                network.to(model.device),
                rule,
                num_experts=site.num_experts,
                hidden_size=loaded.spec.hidden_size,
                dtype=model.dtype,
            )
        )
    return routers


def make_predictor(config: EngineConfig, loaded: LoadedModel, cache_dir: Path) -> Predictor:
    """Make the predictor of resolved settings; "auto" measures those there is everything for.

    Raises:
        ConfigError: What it needs has not been made.
        CheckpointError: What was saved for it is damaged, or another model's; "auto" warns and does
            without.
    """
    spec, wanted = loaded.spec, config.predictor
    routers = early_routers(loaded)
    ahead = config.lookahead_layers
    extra = max(1, spec.top_k // 2)
    lookahead = Lookahead(routers, max_distance=ahead, num_extra=extra)
    if wanted == "lookahead":
        return lookahead
    candidates: list[Predictor] = [lookahead]
    for name, read in _READERS.items():
        if wanted in ("auto", name):
            found = _read(
                wanted, read, loaded, routers, cache_dir, max_distance=ahead, num_extra=extra
            )
            candidates += [] if found is None else [found]
    if wanted == "auto":
        return MeasuredChoice(candidates) if len(candidates) > 1 else lookahead
    if len(candidates) == 1:
        raise _nothing_made(config)
    return candidates[1]


def make_tensor_predictor(
    config: EngineConfig, loaded: LoadedModel, cache_dir: Path
) -> TensorPredictor | None:
    """Make a predictor whose guesses stay on the device.

    "auto" measures nothing there: it is an estimator where one was trained, else default vectors
    where they were calibrated.

    Raises:
        ConfigError: What it needs has not been made.
        CheckpointError: What was saved for it is damaged, or another model's; "auto" warns and does
            without.
    """
    wanted = config.predictor
    if wanted == "none":
        return None
    routers = early_routers(loaded)
    for name, read in reversed(_READERS.items()):
        if wanted in ("auto", name):
            found = _read(wanted, read, loaded, routers, cache_dir)
            if found is not None:
                return found
    if wanted in _MADE_BY:
        raise _nothing_made(config)
    return Lookahead(routers)


def _read(
    wanted: str, read: Reader, *args: Any, **settings: int
) -> DefaultVectors | Estimator | None:
    """Read what was saved for a predictor; where nobody asked for it by name, it may be damaged."""
    try:
        return read(*args, **settings)
    except CheckpointError as error:
        if wanted != "auto":
            raise
        logger.warning("predictor='auto' does without one: %s; %s", error, error.hint)
        return None


def _read_vectors(
    loaded: LoadedModel, routers: list[EarlyRouter], cache_dir: Path, **settings: int
) -> DefaultVectors | None:
    """Give what guesses with a model's default vectors; None where there are none."""
    spec = loaded.spec
    path = calibration_path(cache_dir, spec.identity)
    if not path.is_file():
        return None
    shape = (spec.num_moe_layers, spec.num_experts, spec.hidden_size)
    vectors = read_default_vectors(path, spec.identity, shape).to(loaded.model.device)
    return DefaultVectors(routers, list(vectors), **settings)


def _read_estimator(
    loaded: LoadedModel,
    routers: list[EarlyRouter],
    cache_dir: Path,
    *,
    num_extra: int = 0,
    **settings: int,
) -> Estimator | None:
    """Give the estimator that was trained for a model; None where there is none."""
    spec = loaded.spec
    path = estimator_path(cache_dir, spec.identity)
    if not path.is_file():
        return None
    shape = (spec.num_moe_layers, spec.num_experts, spec.hidden_size)
    trained = read_estimator(path, spec.identity, shape)
    # Its own default vectors, those it was trained with.
    vectors = list(trained.default_vectors.to(loaded.model.device))
    return Estimator(
        corrected_routers(loaded, trained.networks),
        trained.choices,
        lookahead=Lookahead(routers, num_extra=num_extra, **settings),
        default_vectors=DefaultVectors(routers, vectors, num_extra=num_extra, **settings),
        num_extra=num_extra,
    )


_READERS: dict[str, Reader] = {
    "default-vectors": _read_vectors,
    "estimator": _read_estimator,
}
"""Predictors that something was saved for, the better last."""


def _nothing_made(config: EngineConfig) -> ConfigError:
    missing, verb = _MADE_BY[config.predictor]
    return ConfigError(
        f"predictor={config.predictor!r} needs {missing}, and there is none",
        hint=f"run `foreload {verb} {config.model}` first",
    )
