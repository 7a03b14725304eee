"""Load a transformers model without its experts, and route its experts to foreload.

The dense weights are loaded by transformers itself; the experts' parameters never exist. An
experts function registered under one name hands every MoE layer's work to the callable that
`attach` stored at that layer. This module decides nothing about caching or prediction.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from foreload.errors import CheckpointError, ForeloadError
from foreload.memory.checkpoint import CheckpointIndex
from foreload.model.architecture import (
    Architecture,
    build_meta_model,
    find_sites,
    quiet_transformers,
    read_architecture,
)
from foreload.model.conversion import conversion_mapping
from foreload.model.dense import Progress, lazy_tensors
from foreload.model.describe import CheckpointReport, describe
from foreload.model.plans import CheckpointPlan, plan_checkpoint
from foreload.model.sites import MoeSite, discover_sites, expert_parameters
from foreload.model.spec import make_spec

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from torch import Tensor, nn

    from foreload.types import ExpertPlan, ModelSpec

__all__ = [
    "EXPERTS_IMPLEMENTATION",
    "CheckpointReport",
    "GenerationDefaults",
    "LoadedModel",
    "RunExperts",
    "attach",
    "describe",
    "detach",
    "load_model",
    "load_tokenizer",
    "strip_experts",
]

logger = logging.getLogger(__name__)

EXPERTS_IMPLEMENTATION = "foreload"
_RUN_ATTRIBUTE = "_foreload_run"


class RunExperts(Protocol):
    """Compute one MoE layer's experts."""

    def __call__(
        self,
        layer: int,
        experts: nn.Module,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        /,
    ) -> Tensor:
        """Give (T, H) from (T, H), (T, K) and (T, K)."""


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What the checkpoint recommends for generating text; None where it says nothing.

    Attributes:
        eos_token_ids: Tokens that end the text.
        bos_token_id: Token that begins a text.
        pad_token_id: Token that fills up batches.
        do_sample: Whether to sample instead of taking the likeliest token.
        temperature: Sampling temperature.
        top_k: Sampling cut by count.
        top_p: Sampling cut by mass.
        max_positions: Longest context the model was built for.
    """

    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    do_sample: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    max_positions: int | None = None


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model whose experts are still on disk.

    Attributes:
        model: The transformers model, in evaluation mode; needs `attach` before it can run.
        sites: Its MoE layers.
        plans: How to read each expert, by layer and expert.
        spec: The numbers about it.
        index: The checkpoint.
        generation: The checkpoint's own generation settings.
    """

    model: Any
    sites: list[MoeSite]
    plans: list[list[ExpertPlan]]
    spec: ModelSpec
    index: CheckpointIndex
    generation: GenerationDefaults


def load_model(
    directory: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    progress: Progress | None = None,
    model_class: type[Any] | None = None,
) -> LoadedModel:
    """Load everything but the experts of the checkpoint in `directory`.

    Args:
        directory: Folder of the checkpoint.
        dtype: Element type in memory; `auto` takes the checkpoint's own.
        progress: Called with bytes read and bytes to read, from loader threads, one at a time.
        model_class: transformers class to use instead of the one the configuration names.

    Returns:
        The model with its plans; no tensor of an expert was read.

    Raises:
        CheckpointError: The checkpoint is damaged, incomplete, or does not fit its configuration.
        UnsupportedModelError: foreload cannot run this architecture or quantisation.

    Cost:
        Reads the dense weights once; peak memory is theirs plus the tensors being converted.
    """
    index = CheckpointIndex.open(directory)
    with quiet_transformers():
        architecture = read_architecture(index, dtype=dtype, model_class=model_class)
        meta = build_meta_model(architecture)
        plan = plan_checkpoint(meta, find_sites(meta, architecture), index, architecture)
        model = _load_dense(architecture, index, plan, progress)
        _settle_dtypes(model, meta)
    model.requires_grad_(False)
    sites = discover_sites(model)
    _refuse_saving(model, sites, index.directory)
    spec = make_spec(architecture, model, sites, plan.experts, index)
    logger.info(
        "loaded %s: %.2f GB dense, %.2f GB in %d experts on disk",
        spec.architecture,
        spec.dense_bytes / 1e9,
        spec.total_expert_bytes / 1e9,
        sum(len(layer) for layer in plan.experts),
    )
    generation = _read_generation_defaults(model, architecture)
    return LoadedModel(model, sites, plan.experts, spec, index, generation)


def attach(sites: Sequence[MoeSite], run: RunExperts) -> None:
    """Let `run` compute the experts of `sites` from now on.

    Args:
        sites: MoE layers of a model from `load_model`.
        run: Called on the thread that runs the model, once per MoE layer and forward.
    """
    _register()
    for site in sites:
        site.experts.__dict__[_RUN_ATTRIBUTE] = (site.layer, run)


def detach(sites: Sequence[MoeSite]) -> None:
    """Forget what `attach` stored; running the model afterwards is an error."""
    for site in sites:
        site.experts.__dict__.pop(_RUN_ATTRIBUTE, None)


def _register() -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, _dispatch_experts)


def _dispatch_experts(
    experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    attached = experts.__dict__.get(_RUN_ATTRIBUTE)
    if attached is None:
        raise ForeloadError(
            "this model's experts are on disk and nothing is attached that reads them: its engine "
            "was closed, or never opened",
            hint="run the model through an open Engine",
        )
    layer, run = attached
    result: Tensor = run(layer, experts, hidden_states, top_k_index, top_k_weights)
    return result


def strip_experts(model: nn.Module) -> None:
    """Replace the experts' parameters of a meta model by plain meta tensors of the same shape."""
    for site in discover_sites(model):
        for name, parameter in expert_parameters(site.experts).items():
            if name in site.experts._parameters:
                del site.experts._parameters[name]
                site.experts.__dict__[name] = parameter.detach()
        # keeps transformers from initialising parameters that are gone
        site.experts.__dict__["_is_hf_initialized"] = True


def _refuse_saving(model: nn.Module, sites: Sequence[MoeSite], directory: Path) -> None:
    """Let neither the model nor a part of it that has experts be saved: they are not in it."""

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise ForeloadError(
            "this model cannot be saved: its experts are on disk, and what would be written lacks "
            "them; nothing was written",
            hint=f"copy the folder it was opened from, {directory}, or load the model with "
            "transformers and save that",
        )

    experts = {site.experts for site in sites}
    for module in model.modules():
        if hasattr(module, "save_pretrained") and not experts.isdisjoint(module.modules()):
            # On the instances: the classes are transformers' own, and stay as they are.
            module.__dict__.update(save_pretrained=refuse, push_to_hub=refuse)


def _streaming_class(architecture: Architecture) -> type[Any]:
    """Give a subclass of the model's class that loads itself without experts.

    A subclass of its own for each load leaves nothing of transformers changed, for this or any
    other thread.
    """
    base, quantizer = architecture.model_class, architecture.quantizer

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, *args, **kwargs)
        strip_experts(self)

    def _load_pretrained_model(
        model: Any, state_dict: Any, files: Any, load_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if quantizer is not None:
            load_config = dataclasses.replace(
                load_config,
                hf_quantizer=quantizer,
                weight_mapping=conversion_mapping(model, quantizer),
            )
        result = base._load_pretrained_model(model, state_dict, files, load_config, *args, **kwargs)
        _check_conversions(result[0])
        return result

    return type(
        base.__name__,
        (base,),
        {
            "__init__": __init__,
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "_load_pretrained_model": staticmethod(_load_pretrained_model),
        },
    )


def _check_conversions(info: Any) -> None:
    """Name what transformers would only report in a table on the terminal."""
    for name, message in getattr(info, "conversion_errors", {}).items():
        raise CheckpointError(
            f"{name} cannot be converted: {str(message).strip().splitlines()[-1]}",
            hint="check that config.json belongs to these weights",
        )
    for name, found, wanted in sorted(getattr(info, "mismatched_keys", ()), key=str):
        raise CheckpointError(
            f"{name} has shape {list(found)}, the model needs {list(wanted)}",
            hint="check that config.json belongs to these weights",
        )


def _load_dense(
    architecture: Architecture,
    index: CheckpointIndex,
    plan: CheckpointPlan,
    progress: Progress | None,
) -> Any:
    _register()
    config = copy.deepcopy(architecture.config)
    config._experts_implementation = EXPERTS_IMPLEMENTATION
    slices = lazy_tensors({name: index[name] for name in plan.dense_names}, progress)
    try:
        model, info = _streaming_class(architecture).from_pretrained(
            None,
            config=config,
            state_dict=slices,
            dtype=architecture.dtype,
            output_loading_info=True,
        )
    except ForeloadError:
        raise
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{index.directory}: transformers cannot load it: {error}",
            hint="check that config.json belongs to these weights",
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{index.directory} lacks {len(missing)} tensors the model needs, such as "
            f"{', '.join(missing[:3])}",
            hint="download the checkpoint again, or check that config.json belongs to it",
        )
    model.__class__ = architecture.model_class
    model.config.name_or_path = str(index.directory)
    return model


def _settle_dtypes(model: Any, meta: Any) -> None:
    """Cast what a dequantising load leaves in its stored element type."""
    wanted: Mapping[str, Tensor] = dict(meta.named_parameters())
    plan = meta._get_dtype_plan(meta.dtype)
    for name, parameter in model.named_parameters():
        like = wanted.get(name)
        kept = any(part in name for part in plan)
        if like is not None and like.dtype != parameter.dtype and not kept:
            parameter.data = parameter.data.to(like.dtype)


def _read_generation_defaults(model: Any, architecture: Architecture) -> GenerationDefaults:
    settings = getattr(model, "generation_config", None)
    if (architecture.directory / "generation_config.json").is_file():
        from transformers import GenerationConfig

        try:
            settings = GenerationConfig.from_pretrained(str(architecture.directory))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{architecture.directory / 'generation_config.json'}: {error}",
                hint="download the file again, or delete it",
            ) from error
        model.generation_config = settings
    text_config = architecture.text_config

    def setting(name: str) -> Any:
        value = getattr(settings, name, None)
        return getattr(text_config, name, None) if value is None else value

    eos = setting("eos_token_id")
    return GenerationDefaults(
        eos_token_ids=tuple(eos)
        if isinstance(eos, list | tuple)
        else ()
        if eos is None
        else (eos,),
        bos_token_id=setting("bos_token_id"),
        pad_token_id=setting("pad_token_id"),
        do_sample=bool(getattr(settings, "do_sample", False)),
        temperature=getattr(settings, "temperature", None),
        top_k=getattr(settings, "top_k", None),
        top_p=getattr(settings, "top_p", None),
        max_positions=getattr(text_config, "max_position_embeddings", None),
    )


def load_tokenizer(directory: str | Path) -> Any | None:
    """Give transformers' tokenizer of the checkpoint, or None where it has no tokenizer files.

    Raises:
        CheckpointError: The tokenizer's files cannot be read.
    """
    folder = Path(directory)
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    patterns = (*names, "*.tiktoken", "tekken.json")
    if not any(any(folder.glob(pattern)) for pattern in patterns):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True
        )
    except Exception as error:
        raise CheckpointError(
            f"{folder}: its tokenizer cannot be loaded: {str(error).strip().partition(chr(10))[0]}",
            hint="download the tokenizer files again; a tokenizer with its own code is not run",
        ) from error
