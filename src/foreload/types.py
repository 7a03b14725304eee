"""The words every other module speaks. No torch, no behaviour beyond arithmetic on itself."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

__all__ = [
    "ExpertKey",
    "ExpertPlan",
    "ExpertTensor",
    "FileStamp",
    "Lookup",
    "ModelSpec",
    "Prediction",
    "Predictor",
    "Priority",
    "RouterOutput",
    "Routing",
    "RoutingEvent",
    "Span",
    "TensorPredictor",
]


class ExpertKey(NamedTuple):
    """Name one expert: `layer` counts MoE layers from 0, `expert` counts within the layer."""

    layer: int
    expert: int


class RouterOutput(NamedTuple):
    """What a router answers.

    `top_k_index` (T, K) int64, `top_k_weights` (T, K) or None, `logits` (T, E) or None: whatever
    score the router ranks by, the larger the likelier.
    """

    top_k_index: Tensor
    top_k_weights: Tensor | None
    logits: Tensor | None


class Routing(NamedTuple):
    """Who computes each token: `top_k_index` (T, K) int64 and `top_k_weights` (T, K), final."""

    top_k_index: Tensor
    top_k_weights: Tensor


class RoutingEvent(NamedTuple):
    """The routing at one MoE layer of one forward, as a predictor sees it.

    `step` counts forwards since the engine was made, `residual` is the stream entering the MoE
    block's norm, (..., H), or None where it could not be observed. `top_k_index` and
    `top_k_weights` are the true router's; `executed` is what a policy executes instead, None where
    that is the same.
    """

    step: int
    layer: int
    residual: Tensor | None
    top_k_index: Tensor
    top_k_weights: Tensor
    executed: Routing | None = None

    @property
    def executed_routing(self) -> Routing:
        """Give the routing that contributes to the residual stream."""
        return self.executed or Routing(self.top_k_index, self.top_k_weights)


class Prediction(NamedTuple):
    """Experts that MoE layer `layer` is expected to want, likeliest first.

    `distance` counts MoE layers from the one the guess was made at. `confidence` has one number
    per expert, comparable across guesses of one kind: above zero where the expert would be
    demanded if the guess were right, the larger the surer. `num_expected` counts those.
    `routing` is the guess token by token with its weights, what a policy may execute; None where
    the predictor names experts only.
    """

    layer: int
    distance: int
    experts: tuple[int, ...]
    confidence: tuple[float, ...]
    num_expected: int
    routing: Routing | None = None


class Predictor(Protocol):
    """Guesses the routing of coming layers; moves nothing and executes nothing."""

    @property
    def name(self) -> str:
        """Give the name that settings and tables use."""

    def predict(self, event: RoutingEvent) -> list[Prediction]:
        """Guess the coming layers' experts; an empty list where there is nothing to say."""


class TensorPredictor(Protocol):
    """Guesses where the device decides: its guesses stay tensors, and nothing waits for them."""

    @property
    def name(self) -> str:
        """Give the name that settings and tables use."""

    def route_next(self, event: RoutingEvent) -> RouterOutput | None:
        """Give the next layer's router's early answer; None where there is nothing to say.

        Of several tokens nothing is said, but it is told of them as it is of the last layer: what
        it sees there may serve the next token's guesses.
        """


class Lookup(Enum):
    """How the cache answers: readable, on its way, or absent."""

    HIT = "hit"
    PENDING = "pending"
    MISS = "miss"


class Priority(IntEnum):
    """Order of copies; the smaller goes first."""

    DEMAND = 0
    PREFETCH = 1


class FileStamp(NamedTuple):
    """How a file is recognised as unchanged: `mtime_ns` is the time of its last change."""

    num_bytes: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Span:
    """A range of bytes in a checkpoint file, `offset` counted from the file's start.

    `stamp` is the file's when its header was read; None where it may change.
    """

    path: str
    offset: int
    num_bytes: int
    stamp: FileStamp | None = None


@dataclass(frozen=True, slots=True)
class ExpertTensor:
    """One parameter of one expert, as the experts forward wants it.

    Attributes:
        name: Parameter name in transformers' experts module, such as `gate_up_proj`.
        dtype: torch's name of the element type, such as `bfloat16`.
        shape: Shape without the experts dimension.
        num_bytes: Size of the tensor.
        span: Index of the span that holds the tensor, or -1 where `ExpertPlan.convert` makes it.
        start: Where in that span its bytes begin.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    span: int = -1
    start: int = 0


@dataclass(frozen=True, slots=True)
class ExpertPlan:
    """How to bring one expert from the checkpoint into memory.

    Where `convert` is None every tensor's bytes lie whole and in order inside one span, and the
    spans are read straight into the slot. Otherwise the spans are read into scratch memory and
    `convert` turns them into the tensors (dequantised, transposed, cast, interleaved...).

    Attributes:
        spans: Byte ranges to read; ranges adjacent in a file are already merged.
        tensors: The expert's parameters.
        convert: Maps one uint8 tensor per span to the parameters by name. Called on worker threads.
    """

    spans: tuple[Span, ...]
    tensors: tuple[ExpertTensor, ...]
    convert: Callable[[list[Any]], Mapping[str, Any]] | None = None

    @property
    def read_bytes(self) -> int:
        """Give the bytes that travel from the disk for this expert."""
        return sum(span.num_bytes for span in self.spans)

    @property
    def num_bytes(self) -> int:
        """Give the bytes of the expert's parameters in memory."""
        return sum(tensor.num_bytes for tensor in self.tensors)


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The numbers about a model that memory and scheduling decide by.

    Attributes:
        architecture: transformers' class name, such as `Qwen3MoeForCausalLM`.
        model_type: transformers' short name, such as `qwen3_moe`.
        num_moe_layers: L, decoder layers that have experts.
        num_experts: E, the most experts in a layer.
        top_k: K, experts per token and layer.
        hidden_size: H.
        expert_bytes: Bytes of the largest expert in memory.
        total_expert_bytes: Bytes of all experts in memory.
        dense_bytes: Bytes of everything else in memory.
        dtype: torch's name of the element type, such as `bfloat16`.
        identity: Hex digest of the checkpoint's configuration and headers.
    """

    architecture: str
    model_type: str
    num_moe_layers: int
    num_experts: int
    top_k: int
    hidden_size: int
    expert_bytes: int
    total_expert_bytes: int
    dense_bytes: int
    dtype: str
    identity: str
