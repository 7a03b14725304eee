"""Stand-ins for disks, models and predictors, and the invariants every test may check."""

from __future__ import annotations

import queue
import random
import threading
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from foreload.config import EngineConfig
from foreload.engine import Engine
from foreload.memory.arena import SlotArena, slot_bytes
from foreload.memory.disk import DiskBackend
from foreload.memory.eviction import make_eviction
from foreload.memory.tiers import ExpertTiers
from foreload.memory.transfer import TransferEngine
from foreload.metrics import Metrics, Timeline
from foreload.model.hf import load_model, load_tokenizer
from foreload.predict.calibration import DefaultVectorRecorder, calibration_path
from foreload.predict.estimator import LayerNetwork, TrainedEstimator, estimator_path
from foreload.resolution import resolve
from foreload.types import ExpertKey, ExpertPlan, ExpertTensor, Prediction, Routing, Span

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from foreload.memory.eviction import EvictionPolicy
    from foreload.memory.host_tier import HostTier
    from foreload.memory.transfer import CopyBackend
    from foreload.types import ModelSpec, Predictor, RoutingEvent

T = TypeVar("T")

PATIENCE_S = 30.0
"""How long a test waits for something that should take milliseconds."""


def finish(work: Callable[[], T], *, within_s: float = PATIENCE_S) -> T:
    """Run `work` on a thread of its own; fail instead of hanging."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(within_s)
    if thread.is_alive():
        raise AssertionError(f"still running after {within_s} s")
    if errors:
        raise errors[0]
    return results[0]


def make_plan(key: ExpertKey, num_bytes: int = 16) -> ExpertPlan:
    """Plan an expert whose file is called like the expert, "layer.expert"."""
    span = Span(f"{key.layer}.{key.expert}", 0, num_bytes)
    tensor = ExpertTensor("weight", "float32", (num_bytes // 4,), num_bytes, span=0, start=0)
    return ExpertPlan((span,), (tensor,))


def make_plans(num_layers: int, num_experts: int) -> list[list[ExpertPlan]]:
    """Plan all experts of a small model."""
    return [
        [make_plan(ExpertKey(layer, expert)) for expert in range(num_experts)]
        for layer in range(num_layers)
    ]


def mark_of(key: ExpertKey) -> float:
    """Give the number that the fake disks write into an expert's weights."""
    return 1000.0 * key.layer + key.expert + 1


class InstantBackend:
    """Copies at once; every weight of an expert becomes its `mark_of`."""

    def __init__(self, arena: SlotArena, *, pieces: int = 1) -> None:
        self.arena = arena
        self.pieces = pieces
        self.failing: set[str] = set()
        self.copied: list[str] = []
        self.is_closed = False
        self._lock = threading.Lock()

    def num_pieces(self, plan: ExpertPlan) -> int:
        return self.pieces

    def copy_piece(self, plan: ExpertPlan, slot: int, piece: int) -> int:
        name = plan.spans[0].path
        if name in self.failing:
            raise OSError(5, "Input/output error")
        if piece == self.pieces - 1:
            layer, expert = map(int, name.split("."))
            values = self.arena.tensors(slot, plan)["weight"]
            values.fill_(mark_of(ExpertKey(layer, expert)))
            with self._lock:
                self.copied.append(name)
        return plan.read_bytes // self.pieces

    def close(self) -> None:
        self.is_closed = True


class SteppedBackend(InstantBackend):
    """Copies one piece each time the test lets it."""

    def __init__(self, arena: SlotArena, *, pieces: int = 1) -> None:
        super().__init__(arena, pieces=pieces)
        self.log: list[tuple[str, int]] = []
        self._begun: queue.Queue[tuple[str, int]] = queue.Queue()
        self._permits = threading.Semaphore(0)
        self._is_free = False

    def copy_piece(self, plan: ExpertPlan, slot: int, piece: int) -> int:
        begun = (plan.spans[0].path, piece)
        self.log.append(begun)
        self._begun.put(begun)
        if not self._is_free and not self._permits.acquire(timeout=PATIENCE_S):
            raise AssertionError("no test let this piece go")
        return super().copy_piece(plan, slot, piece)

    def wait_begun(self) -> tuple[str, int]:
        """Wait until a worker has begun a piece, and give it."""
        return self._begun.get(timeout=PATIENCE_S)

    def let_go(self, pieces: int = 1) -> None:
        """Let this many pieces end."""
        self._permits.release(pieces)

    def let_all_go(self) -> None:
        """Let everything end from now on."""
        self._is_free = True
        self._permits.release(1000)


def make_tiers(
    num_slots: int,
    num_layers: int = 4,
    num_experts: int = 8,
    *,
    backend: type[InstantBackend] = InstantBackend,
    eviction: str = "lru",
    policy: EvictionPolicy | None = None,
    keep: bool = True,
    num_workers: int = 1,
    pieces: int = 1,
    in_use: int | None = None,
) -> tuple[ExpertTiers, Any, Metrics]:
    """Build tiers over a fake disk; of the slots all are in use, or so many."""
    plans = make_plans(num_layers, num_experts)
    arena = SlotArena(num_slots, slot_bytes(plans[0][0]))
    arena.poison()
    disk = backend(arena, pieces=pieces)
    metrics = Metrics()
    tiers = ExpertTiers(
        arena,
        plans,
        TransferEngine(disk, num_workers=num_workers),
        policy or make_eviction(eviction, num_layers, num_experts),
        metrics,
        Timeline(),
        keep=keep,
        num_slots=in_use,
    )
    return tiers, disk, metrics


def assert_settled(tiers: ExpertTiers) -> None:
    """Check that nothing is on its way, nothing is pinned and no slot is lost."""
    finish(tiers.wait_idle)
    tiers.cache.check()
    assert not tiers._open
    assert int(tiers.cache._pins.sum()) == 0, "an expert stayed pinned"
    for key in tiers.cache.keys():  # noqa: SIM118
        assert tiers.cache.lookup(key).value == "hit", f"{key} waits for a copy nobody makes"


class NoisePredictor:
    """Guesses at random: wrong layers' experts, twice the same, everything at once."""

    name = "noise"

    def __init__(self, num_layers: int, num_experts: int, seed: int = 0) -> None:
        self._num_layers = num_layers
        self._num_experts = num_experts
        self._random = random.Random(seed)

    def predict(self, event: RoutingEvent) -> list[Prediction]:
        guesses = []
        for distance in (1, 2, self._num_layers):
            layer = (event.layer + distance) % self._num_layers
            size = self._random.randint(0, self._num_experts)
            experts = tuple(self._random.choices(range(self._num_experts), k=size))
            expected = self._random.randint(1, self._num_experts)
            confidence = tuple(self._random.uniform(-3, 3) for _ in experts)
            routing = self._route(event.top_k_index.shape)
            guesses.append(Prediction(layer, distance, experts, confidence, expected, routing))
        return guesses

    def _route(self, shape: tuple[int, ...]) -> Routing:
        """Make a routing that could be executed, and must not be unless a policy asks for it."""
        rows = [self._random.sample(range(self._num_experts), shape[1]) for _ in range(shape[0])]
        weights = [[self._random.random() for _ in row] for row in rows]
        return Routing(torch.tensor(rows), torch.tensor(weights))


def least_memory(plans: Sequence[Sequence[ExpertPlan]], top_k: int) -> int:
    """Give the smallest expert memory an engine accepts."""
    size = max(slot_bytes(plan) for layer in plans for plan in layer)
    return size * (top_k + 1)


def write_random_vectors(cache_dir: Path, spec: ModelSpec) -> None:
    """Write a calibration that says nothing true about the model."""
    recorder = DefaultVectorRecorder(spec.num_moe_layers, spec.num_experts, spec.hidden_size)
    recorder._sum.normal_(generator=torch.Generator().manual_seed(0))
    recorder._count.fill_(1)
    recorder.write(calibration_path(cache_dir, spec.identity), spec.identity)


def write_random_estimator(cache_dir: Path, spec: ModelSpec) -> None:
    """Write an estimator that nobody trained, and that is asked about all layers but one."""
    generator = torch.Generator().manual_seed(0)
    networks = {}
    for layer in range(1, spec.num_moe_layers):
        network = LayerNetwork(spec.hidden_size, spec.num_experts, 8)
        for parameter in network.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        networks[layer] = network.requires_grad_(False)
    choices = ["lookahead", *["estimator"] * (spec.num_moe_layers - 1)]
    if spec.num_moe_layers > 2:
        choices[2] = "default-vectors"
    shape = (spec.num_moe_layers, spec.num_experts, spec.hidden_size)
    vectors = torch.randn(shape, generator=generator)
    path = estimator_path(cache_dir, spec.identity)
    TrainedEstimator(networks, tuple(choices), vectors).write(path, spec.identity)


def make_engine(
    directory: Path,
    *,
    predictor: str | Callable[[ModelSpec], Predictor] = "auto",
    backend: Callable[[SlotArena], Any] = DiskBackend,
    host_tier: Callable[[int], HostTier] | None = None,
    link: Callable[[CopyBackend], CopyBackend] | None = None,
    cache_dir: Path | None = None,
    **settings: Any,
) -> Engine:
    """Open a checkpoint with parts of the engine exchanged.

    A predictor may be a setting or a function that makes one; "minimum" is a size here too, and
    with a `cache_dir` the predictors "default-vectors" and "estimator" find random ones.
    """
    loaded = load_model(directory, dtype=settings.get("dtype", "auto"))
    if settings.get("expert_memory") == "minimum":
        settings["expert_memory"] = least_memory(loaded.plans, loaded.spec.top_k)
    settings["predictor"] = predictor if isinstance(predictor, str) else "lookahead"
    if predictor == "default-vectors" and cache_dir is not None:
        write_random_vectors(cache_dir, loaded.spec)
    if predictor == "estimator" and cache_dir is not None:
        write_random_estimator(cache_dir, loaded.spec)
    config = resolve(EngineConfig.from_dict({"model": str(directory), **settings}), loaded)
    return Engine(
        loaded,
        load_tokenizer(directory),
        config,
        cache_dir=cache_dir or directory / "no-cache",
        predictor=None if isinstance(predictor, str) else predictor(loaded.spec),
        backend=backend,
        host_tier=host_tier,
        link=link,
    )
