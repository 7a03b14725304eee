"""Train an estimator of the next layer's routing on a text, with the model frozen.

The model may itself be streamed: a part of the text runs through it, what was seen before each
layer is kept in a buffer of bounded size, the networks are trained on that, and the next part
follows. The last round runs on the residuals that executing the predictions brings about. Changes
nothing about the engine it is given.
"""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from foreload.calibrate import calibrate, encode
from foreload.config import check_whole
from foreload.errors import CheckpointError, ConfigError, UnsupportedModelError
from foreload.feature_collection import FeatureCollector, restored, window_tokens
from foreload.predict.calibration import calibration_path, read_default_vectors
from foreload.predict.estimator import (
    LayerNetwork,
    TrainedEstimator,
    estimator_path,
    save_whole,
)
from foreload.predict.estimator_recall import measure_recall, time_routers
from foreload.predict.fitting import FeatureBuffer, Fitter

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from foreload.engine import Engine
    from foreload.predict.estimator import CorrectedRouter

    Progress = Callable[[str, int, int], None]

__all__ = ["EstimatorReport", "train_estimator"]

HYBRID = "hybrid"
"""The name, in reports, of whoever is best layer by layer."""

_MIN_TOKENS = 64
_MIN_HELD_OUT_TOKENS = 32
_MOST_SEED = 2**32 - 1
_HELD_OUT_SHARE = 0.1
_MAX_HELD_OUT_TOKENS = 16384
_CALIBRATION_TOKENS = 16384
_PATIENCE = 3
_MAX_WIDTH = 128
_PARAMETER_SHARE = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class EstimatorReport:
    """What training an estimator came to.

    Attributes:
        identity: The checkpoint's identity.
        path: Where the estimator was saved.
        num_tokens: Tokens it was trained on.
        num_held_out_tokens: Tokens the recall was measured on; as many others chose by layer.
        num_layers: MoE layers.
        top_k: Experts per token and layer.
        depths: The n of the recall: top_k, top_k + 2 and twice top_k.
        recall_at_n: By predictor, layer and n, the share of truly routed experts inside the n
            named one layer ahead: `lookahead` and `default-vectors` before, `estimator` after
            training, and `hybrid`, the choice by layer.
        on_policy_recall: By layer, the estimator's recall at top_k where predictions are executed.
        choices: Per MoE layer, who guesses about it.
        width: Hidden units of each layer's network.
        num_parameters: Trained parameters.
        parameter_share: Of the model's parameters.
        flop_per_token: What the networks of all layers compute for a token.
        seconds_per_token: What asking all routers took with the networks, and what without.
    """

    identity: str
    path: str
    num_tokens: int
    num_held_out_tokens: int
    num_layers: int
    top_k: int
    depths: tuple[int, ...]
    recall_at_n: dict[str, dict[int, dict[int, float]]]
    on_policy_recall: dict[int, float]
    choices: tuple[str, ...]
    width: int
    num_parameters: int
    parameter_share: float
    flop_per_token: int
    seconds_per_token: tuple[float, float]

    def mean_recall(self, predictor: str) -> dict[int, float]:
        """Give a predictor's recall by n, averaged over the layers."""
        layers = self.recall_at_n[predictor].values()
        return {n: sum(layer[n] for layer in layers) / len(layers) for n in self.depths}

    def to_dict(self) -> dict[str, Any]:
        """Give the report as plain values, ready for JSON."""
        means = {name: self.mean_recall(name) for name in self.recall_at_n}
        return asdict(self) | {"mean_recall_at_n": means}


def train_estimator(
    engine: Engine,
    text: str | Sequence[int],
    *,
    held_out: str | Sequence[int] | None = None,
    max_tokens: int = 1_000_000,
    num_passes: int = 4,
    width: int | None = None,
    buffer_bytes: int = 1 << 30,
    seed: int = 0,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
) -> EstimatorReport:
    """Train an estimator on a text, choose by layer on its last tenth, and save it.

    An engine opened afterwards finds it. Interrupted, the same call goes on after the last pass
    that was finished; an earlier estimator stays until the new one is complete. Default vectors
    are measured first where there are none.

    Args:
        engine: Opened with `predictor="lookahead"`, which lets it watch the residual stream.
        text: Text like the text to be generated, or its token ids.
        held_out: Text to measure the recall on instead of half of the last tenth.
        max_tokens: Most tokens of the text to use.
        num_passes: How often each token is trained on.
        width: Hidden units of each layer's network; None takes 128, or what 1 % of the model's
            parameters allows.
        buffer_bytes: Most memory for features.
        seed: Seed of the first weights and of the order of tokens, below 2**32.
        progress: Called with what is being done, how much of it is done, and how much there is.
        note: Called with a line after each pass.

    Raises:
        ConfigError: A text is too short or no text, a number makes no sense, the engine has no
            predictor or is not on the CPU, or an interrupted training had other settings.
        CheckpointError: The estimator cannot be saved; an earlier one is left as it was.
        UnsupportedModelError: The routers cannot be asked early, or do not read the residual
            stream.

    Reference:
        arXiv:2603.19289, Est-PF and Hybrid-PF.
    """
    if engine.runtime.predictor is None:
        raise ConfigError(
            "training watches the residual stream, and this engine does not",
            hint='open the engine with predictor="lookahead"',
        )
    if engine.model.device.type != "cpu":
        raise ConfigError(
            f"training keeps what it learns from on the CPU, and the model is on "
            f"{engine.model.device}",
            hint="open the engine with device='cpu'; any device finds the estimator",
        )
    check_whole("max_tokens", max_tokens, least=_MIN_TOKENS)
    check_whole("num_passes", num_passes, least=1)
    check_whole("buffer_bytes", buffer_bytes, least=1)
    check_whole("seed", seed, least=0, most=_MOST_SEED)
    if width is not None:
        check_whole("width", width, least=1)
    token_ids = encode(engine, text, max_tokens, least=_MIN_TOKENS, purpose="an estimator")
    other = None
    if held_out is not None:
        least, purpose = _MIN_HELD_OUT_TOKENS, "measuring on held_out"
        other = encode(engine, held_out, _MAX_HELD_OUT_TOKENS, least=least, purpose=purpose)
    _check_routers(engine)
    vectors = _default_vectors(engine, token_ids, progress)
    width = width or _fitting_width(engine)
    settings = {
        "tokens": hashlib.sha256(json.dumps(token_ids).encode()).hexdigest(),
        "num_passes": num_passes,
        "width": width,
        "buffer_bytes": buffer_bytes,
        "seed": seed,
    }
    training = _Training(engine, vectors, token_ids, settings, progress, note)
    return training.run(other)


def _check_routers(engine: Engine) -> None:
    """Refuse models whose routers cannot be asked with nothing but a residual stream."""
    spec = engine.spec
    stream = torch.zeros(1, spec.hidden_size, dtype=engine.model.dtype)
    for layer, router in enumerate(engine.early_routers()[1:], 1):
        reason = None
        if not router.site.is_predictable:
            reason = "cannot be asked with a residual stream alone"
        else:
            try:
                answer = router(stream)
                reason = None if answer and answer.logits is not None else "gives no logits"
            except RuntimeError:
                reason = f"does not read a stream of width {spec.hidden_size}"
        if reason:
            raise UnsupportedModelError(
                f"no estimator for {spec.architecture}: the router of MoE layer {layer} {reason}",
                hint='use predictor="auto", which takes what this model allows',
            )


def _default_vectors(engine: Engine, token_ids: list[int], progress: Progress | None) -> Tensor:
    """Read the checkpoint's default vectors; measure them first where there are none."""
    spec = engine.spec
    path = calibration_path(engine.cache_dir, spec.identity)
    if not path.is_file():
        calibrate(engine, token_ids[:_CALIBRATION_TOKENS], progress=progress)
    shape = (spec.num_moe_layers, spec.num_experts, spec.hidden_size)
    # As the estimator's file will have them.
    return read_default_vectors(path, spec.identity, shape).bfloat16().float()


def _num_model_parameters(engine: Engine) -> int:
    spec = engine.spec
    return (spec.dense_bytes + spec.total_expert_bytes) // int(engine.model.dtype.itemsize)


def _fitting_width(engine: Engine) -> int:
    """Give the widest networks that stay below the share of the model's parameters."""
    num_experts = [router.site.num_experts for router in engine.early_routers()[1:]]
    fixed = sum(num_experts)
    per_unit = sum(2 * engine.spec.hidden_size + 1 + count for count in num_experts)
    allowed = int(_PARAMETER_SHARE * _num_model_parameters(engine)) - fixed
    return max(1, min(_MAX_WIDTH, allowed // max(1, per_unit)))


@dataclass(frozen=True, slots=True)
class _Round:
    """A part of the text, collected once and trained on several times."""

    start: int
    stop: int
    num_passes: int
    is_on_policy: bool
    first_batch: int


class _Training:
    """One training, from the first token to the saved file."""

    def __init__(
        self,
        engine: Engine,
        vectors: Tensor,
        token_ids: list[int],
        settings: dict[str, Any],
        progress: Progress | None,
        note: Callable[[str], None] | None,
    ) -> None:
        self._engine = engine
        self._vectors = vectors
        self._settings = settings
        self._progress = progress or (lambda stage, done, total: None)
        self._note = note or (lambda text: None)
        spec = engine.spec
        self._path = estimator_path(engine.cache_dir, spec.identity)
        self._state_path = self._path.with_suffix(".training")
        sites = [router.site for router in engine.early_routers()[1:]]
        self._experts = {site.layer: site.num_experts for site in sites}
        self._can_execute = all(site.is_routing_whole for site in sites)
        held_out = min(_MAX_HELD_OUT_TOKENS, int(_HELD_OUT_SHARE * len(token_ids)))
        cut = len(token_ids) - max(held_out, _MIN_TOKENS // 2)
        half = (cut + len(token_ids)) // 2
        self._train_ids, self._choose_ids = token_ids[:cut], token_ids[cut:half]
        self._test_ids = token_ids[half:]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings["seed"])
            self._networks = {
                layer: LayerNetwork(spec.hidden_size, count, settings["width"])
                for layer, count in self._experts.items()
            }
        self._routers: dict[int, CorrectedRouter] = {
            layer: router
            for layer, router in enumerate(engine.corrected_routers(self._networks))
            if router is not None
        }
        self._collector = FeatureCollector(engine, vectors, self._routers, self._experts)
        self._rounds, num_batches = self._plan()
        self._fitter = Fitter(self._routers, num_batches=num_batches, seed=settings["seed"])
        self._num_batches = num_batches
        self._best = copy.deepcopy(self._networks)
        self._best_loss = float("inf")
        self._num_worse = 0

    def run(self, held_out: list[int] | None) -> EstimatorReport:
        """Train, choose, measure, save; by default measure on a part of the text."""
        self._test_ids = held_out or self._test_ids
        position = self._read_state()
        with restored(self._engine):
            choosing = self._collect(self._choose_ids, "Held-out text", has_plain=True)
            for number, part in enumerate(self._rounds):
                first = position[1] if number == position[0] else 0
                if number < position[0] or (first and first >= part.num_passes):
                    continue
                self._run_round(number, part, first, choosing)
            self._load_best()
            choices = self._choose(choosing)
            report = self._report(choices)
        trained = TrainedEstimator(self._networks, choices, self._vectors)
        trained.write(self._path, self._engine.spec.identity)
        self._state_path.unlink(missing_ok=True)
        return report

    def _plan(self) -> tuple[list[_Round], int]:
        """Cut the text into rounds that fit the buffer, the last one on-policy."""
        spec, dtype = self._engine.spec, self._engine.model.dtype
        size = FeatureBuffer.bytes_per_token(self._experts, spec.hidden_size, spec.top_k, dtype)
        window = window_tokens(self._engine)
        room = max(window, self._settings["buffer_bytes"] // size // window * window)
        passes = self._settings["num_passes"]
        rounds: list[_Round] = []
        done = 0
        for start in range(0, len(self._train_ids), room):
            stop = min(start + room, len(self._train_ids))
            rounds.append(_Round(start, stop, passes, False, done))
            done += passes * Fitter.batches_in(stop - start)
        if self._can_execute:
            # Half as many tokens, because each is there twice: as it is, and under speculation.
            stop = min(room // 2, max(window, len(self._train_ids) // 4), len(self._train_ids))
            rounds.append(_Round(0, stop, max(1, passes // 2), True, done))
            done += rounds[-1].num_passes * Fitter.batches_in(2 * stop)
        return rounds, done

    def _run_round(self, number: int, part: _Round, first: int, choosing: FeatureBuffer) -> None:
        """Collect a part of the text and train on it."""
        if self._num_worse >= _PATIENCE and not part.is_on_policy:
            return
        stage = "Collecting on-policy" if part.is_on_policy else "Collecting"
        if part.is_on_policy and first == 0:
            self._load_best()
            self._best_loss, self._num_worse = float("inf"), 0
        ids = self._train_ids[part.start : part.stop]
        features = self._collect(ids, stage, is_on_policy=part.is_on_policy)
        if part.is_on_policy:
            choosing = self._collect(self._choose_ids, "Held-out text", is_on_policy=True)
            if first == 0:
                self._keep_if_best(choosing)
        if first == 0:
            self._fitter.num_done = part.first_batch
        for done in range(first, part.num_passes):
            if self._num_worse >= _PATIENCE:
                break
            train_loss = self._fitter.run_pass(
                features, lambda batch: self._progress("Training", batch, self._num_batches)
            )
            loss = self._keep_if_best(choosing)
            self._write_state(number, done + 1)
            kind = "on-policy pass" if part.is_on_policy else "pass"
            self._note(
                f"{kind} {done + 1} of {part.num_passes}, part {number + 1} of "
                f"{len(self._rounds)}: divergence {train_loss:.4f}, held out {loss:.4f}"
            )

    def _collect(
        self,
        token_ids: list[int],
        stage: str,
        *,
        is_on_policy: bool = False,
        has_plain: bool = False,
    ) -> FeatureBuffer:
        return self._collector.collect(
            token_ids,
            lambda done: self._progress(stage, done, len(token_ids)),
            is_on_policy=is_on_policy,
            has_plain=has_plain,
        )

    def _keep_if_best(self, choosing: FeatureBuffer) -> float:
        loss = self._fitter.measure(choosing)
        self._num_worse += 1
        if loss < self._best_loss:
            self._best, self._best_loss = copy.deepcopy(self._networks), loss
            self._num_worse = 0
        return loss

    def _load_best(self) -> None:
        for layer, network in self._networks.items():
            network.load_state_dict(self._best[layer].state_dict())

    def _choose(self, choosing: FeatureBuffer) -> tuple[str, ...]:
        """Choose by layer whoever names most of the true experts."""
        depth = (self._engine.spec.top_k,)
        recall = measure_recall(self._routers, choosing, depth)
        # Of equals the cheapest.
        order = ("lookahead", "default-vectors", "estimator")
        return (
            "default-vectors",
            *(max(order, key=lambda n: recall[n][at][depth[0]]) for at in self._experts),
        )

    def _report(self, choices: tuple[str, ...]) -> EstimatorReport:
        spec = self._engine.spec
        depths = sorted(
            {min(n, spec.num_experts) for n in (spec.top_k, spec.top_k + 2, 2 * spec.top_k)}
        )
        test = self._collect(self._test_ids, "Recall", has_plain=True)
        recall = measure_recall(self._routers, test, depths)
        recall[HYBRID] = {layer: recall[choices[layer]][layer] for layer in self._experts}
        under: dict[int, float] = {}
        if self._rounds[-1].is_on_policy:
            both = self._collect(self._test_ids, "Recall on-policy", is_on_policy=True)
            speculated = both.rows(both.size // 2, both.size)
            found = measure_recall(self._routers, speculated, depths[:1])["estimator"]
            under = {layer: shares[depths[0]] for layer, shares in found.items()}
        trained = TrainedEstimator(self._networks, choices, self._vectors)
        width = self._settings["width"]
        return EstimatorReport(
            identity=spec.identity,
            path=str(self._path),
            num_tokens=len(self._train_ids),
            num_held_out_tokens=len(self._test_ids),
            num_layers=spec.num_moe_layers,
            top_k=spec.top_k,
            depths=tuple(depths),
            recall_at_n=recall,
            on_policy_recall=under,
            choices=choices,
            width=width,
            num_parameters=trained.num_parameters,
            parameter_share=trained.num_parameters / _num_model_parameters(self._engine),
            flop_per_token=sum(
                2 * width * (2 * spec.hidden_size + count) + 2 * count * spec.hidden_size
                for count in self._experts.values()
            ),
            seconds_per_token=time_routers(self._routers, test),
        )

    def _write_state(self, number: int, num_passes_done: int) -> None:
        """Save what is needed to go on after this pass."""
        tensors = {f"adam.{name}": value for name, value in self._fitter.state().items()}
        for kind, networks in (("network", self._networks), ("best", self._best)):
            for layer, network in networks.items():
                for name, value in network.state_dict().items():
                    tensors[f"{kind}.{layer}.{name}"] = value
        position = {
            "round": number,
            "num_passes_done": num_passes_done,
            "num_done": self._fitter.num_done,
            "best_loss": self._best_loss,
            "num_worse": self._num_worse,
        }
        metadata = {
            "identity": self._engine.spec.identity,
            "settings": json.dumps(self._settings),
            "position": json.dumps(position),
        }
        save_whole(self._state_path, tensors, metadata)

    def _read_state(self) -> tuple[int, int]:
        """Go on where an interrupted training was; give the round and its passes done."""
        if not self._state_path.is_file():
            return 0, 0
        path = self._state_path
        hint = f"give the same text and settings to go on, or delete {path} to begin anew"
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            if metadata["identity"] != self._engine.spec.identity:
                raise ConfigError("the interrupted training was of another checkpoint", hint=hint)
            before = json.loads(metadata["settings"])
            position = json.loads(metadata["position"])
            if before != self._settings:
                other = sorted(n for n in self._settings if before.get(n) != self._settings[n])
                raise ConfigError(
                    f"an interrupted training had other {', '.join(other)}", hint=hint
                )
            for kind, networks in (("network", self._networks), ("best", self._best)):
                for layer, network in networks.items():
                    network.load_state_dict(_under(tensors, f"{kind}.{layer}."))
            self._fitter.load_state(_under(tensors, "adam."), position["num_done"])
        except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"cannot read the interrupted training {path}: {error}",
                hint=f"delete {path} to begin anew",
            ) from error
        self._best_loss, self._num_worse = position["best_loss"], position["num_worse"]
        self._note(f"going on with the training that was interrupted ({path})")
        return position["round"], position["num_passes_done"]


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
