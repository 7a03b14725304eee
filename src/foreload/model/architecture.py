"""Decide what a checkpoint's configuration asks for, and whether foreload can run it.

Reads `config.json`, picks transformers' class for it and builds that class on the meta device,
where it costs no memory. Everything foreload refuses is refused here, by name and with a way out.
Code that comes with a checkpoint is never run.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from foreload.errors import CheckpointError, UnsupportedModelError
from foreload.memory.checkpoint import CheckpointIndex, read_json
from foreload.model.recipes import torch_dtype
from foreload.model.sites import MoeSite, discover_sites

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "Architecture",
    "build_meta_model",
    "find_sites",
    "quiet_transformers",
    "read_architecture",
]

logger = logging.getLogger(__name__)

_USE_TRANSFORMERS = "run it with transformers itself"

_REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "llama4": "its block gives every expert all tokens, so no expert can be left on disk",
        "llama4_text": "its block gives every expert all tokens, so no expert can be left on disk",
        "dbrx": "it flattens all experts into one matrix",
        "jetmoe": "its attention is made of experts too",
        "longcat_flash": "it mixes experts with identity experts in its own way",
        "step3p7": "transformers does not let its experts be exchanged",
        "ernie4_5_vl_moe": "it stores text and vision experts in one list of different sizes",
        "diffusion_gemma": "it writes by diffusion, through experts shared by two decoders",
        "switch_transformers": "it is an encoder-decoder model",
        "nllb_moe": "it is an encoder-decoder model",
        "nllb-moe": "it is an encoder-decoder model",
    }
)

_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True, slots=True)
class Architecture:
    """What to build for a checkpoint.

    Attributes:
        directory: The checkpoint's folder.
        config: transformers' configuration, free of its quantisation.
        model_class: transformers' model class.
        dtype: Element type of the weights in memory.
        quantizer: transformers' quantizer, set to dequantise; None for plain checkpoints.
        quantization: `fp8`, `mxfp4` or None.
    """

    directory: Path
    config: Any
    model_class: type[Any]
    dtype: torch.dtype
    quantizer: Any | None = None
    quantization: str | None = None

    @property
    def model_type(self) -> str:
        """Give transformers' short name of the architecture."""
        return str(self.config.model_type)

    @property
    def text_config(self) -> Any:
        """Give the language model's part of the configuration."""
        return self.config.get_text_config()


def read_architecture(
    index: CheckpointIndex,
    *,
    dtype: str | torch.dtype = "auto",
    model_class: type[Any] | None = None,
) -> Architecture:
    """Find transformers' class for a checkpoint, or say why it cannot run.

    Args:
        index: The checkpoint.
        dtype: Element type in memory; `auto` takes the one of `config.json`, or else the one most
            bytes are stored in.
        model_class: Class to use instead of the one the configuration names.

    Raises:
        CheckpointError: `config.json` is missing or damaged.
        UnsupportedModelError: foreload cannot run this architecture or quantisation.
    """
    raw = read_json(index.directory / "config.json")
    _check_model_type(raw)
    quantization = _check_quantization(raw)
    config = _read_config(index.directory)
    if model_class is None:
        model_class = _choose_class(config)
    own_class = getattr(model_class, "config_class", None)
    if own_class is not None and own_class is type(config.get_text_config()):
        quantization_config = getattr(config, "quantization_config", None)
        config = config.get_text_config()
        if quantization_config is not None:
            config.quantization_config = quantization_config
    quantizer = None
    if quantization is not None:
        quantizer = _make_quantizer(config)
    chosen = _choose_dtype(config, index, dtype)
    if quantizer is not None:
        chosen = quantizer.update_dtype(chosen)
    return Architecture(index.directory, config, model_class, chosen, quantizer, quantization)


def build_meta_model(architecture: Architecture) -> Any:
    """Build the model on the meta device: shapes and names, no memory."""
    config = copy.deepcopy(architecture.config)
    try:
        with torch.device("meta"):
            return architecture.model_class._from_config(config, dtype=architecture.dtype)
    except ImportError as error:
        raise UnsupportedModelError(
            f"{architecture.model_type} needs a package that is not installed: {error}",
            hint="install that package",
        ) from error
    except Exception as error:
        raise CheckpointError(
            f"{architecture.directory / 'config.json'}: transformers cannot build "
            f"{architecture.model_class.__name__} from it: {error}",
            hint="check that config.json is complete and belongs to these weights",
        ) from error


def find_sites(model: Any, architecture: Architecture) -> list[MoeSite]:
    """Give the model's MoE layers.

    Raises:
        CheckpointError: A token is to have more experts than there are.
        UnsupportedModelError: It has none.
    """
    sites = discover_sites(model)
    if sites:
        _check_top_k(sites, architecture)
        return sites
    name = architecture.model_class.__name__
    if any((getattr(architecture.text_config, key, None) or 0) > 1 for key in _EXPERT_COUNTS):
        raise UnsupportedModelError(
            f"{name} has experts, but transformers does not let them be exchanged",
            hint=_USE_TRANSFORMERS,
        )
    raise UnsupportedModelError(
        f"{name} has no experts, so there is nothing to stream", hint=_USE_TRANSFORMERS
    )


def _check_top_k(sites: Sequence[MoeSite], architecture: Architecture) -> None:
    for site in sites:
        if site.top_k is not None and site.top_k > site.num_experts:
            raise CheckpointError(
                f"{architecture.directory / 'config.json'} gives each token {site.top_k} experts "
                f"of {site.num_experts}",
                hint="check that config.json belongs to these weights",
            )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' reports and bars off the terminal for the time of a load."""
    from transformers.utils import logging as hf_logging

    verbosity, had_bar = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if had_bar:
            hf_logging.enable_progress_bar()


def _check_model_type(raw: Mapping[str, Any]) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(
            "config.json has no model_type",
            hint="this is no transformers checkpoint; use the model's transformers release",
        )
    if model_type in _REFUSED:
        raise UnsupportedModelError(
            f"{model_type} is not supported: {_REFUSED[model_type]}", hint=_USE_TRANSFORMERS
        )
    if model_type in CONFIG_MAPPING_NAMES:
        return
    if "auto_map" in raw:
        raise UnsupportedModelError(
            f"{model_type} comes with its own code, which foreload never runs",
            hint="use a release whose architecture is part of transformers",
        )
    raise UnsupportedModelError(
        f"the installed transformers does not know the model type {model_type!r}",
        hint="pip install --upgrade transformers",
    )


def _check_quantization(raw: Mapping[str, Any]) -> str | None:
    found = raw.get("quantization_config")
    if found is None and isinstance(raw.get("text_config"), Mapping):
        found = raw["text_config"].get("quantization_config")
    if found is None:
        return None
    if not isinstance(found, Mapping):
        raise CheckpointError("config.json: quantization_config is not an object")
    method = found.get("quant_method")
    if method == "mxfp4" or (method == "fp8" and found.get("weight_block_size")):
        return str(method)
    name = "fp8 without blocks" if method == "fp8" else str(method or "unnamed")
    raise UnsupportedModelError(
        f"checkpoints quantised by {name} are not supported",
        hint="use the model's bfloat16, block-FP8 or MXFP4 release",
    )


def _read_config(directory: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            str(directory), trust_remote_code=False, local_files_only=True
        )
    except Exception as error:
        raise CheckpointError(
            f"{directory / 'config.json'}: transformers cannot read it: {error}",
            hint="download config.json again",
        ) from error


def _choose_class(config: Any) -> type[Any]:
    import transformers
    from transformers.models.auto import modeling_auto as auto

    mapping = auto.MODEL_FOR_CAUSAL_LM_MAPPING
    if type(config) in mapping:
        return _first_class(mapping[type(config)])
    for name in getattr(config, "architectures", None) or ():
        named = getattr(transformers, name, None)
        if isinstance(named, type) and getattr(named, "can_generate", bool)():
            return named
    for mapping_name in (
        "MODEL_FOR_MULTIMODAL_LM_MAPPING",
        "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    ):
        mapping = getattr(auto, mapping_name, {})
        if type(config) in mapping:
            return _first_class(mapping[type(config)])
    raise UnsupportedModelError(
        f"{config.model_type} is not a model that writes text",
        hint="give a causal language model with experts",
    )


def _first_class(found: Any) -> type[Any]:
    result: type[Any] = found[0] if isinstance(found, list | tuple) else found
    return result


def _make_quantizer(config: Any) -> Any:
    """Give the dequantiser, and take the quantisation off `config` and its parts."""
    from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig

    found = getattr(config, "quantization_config", None)
    if found is None:
        found = config.get_text_config().quantization_config
    settings = found if isinstance(found, dict) else found.to_dict()
    quantization_config = AutoQuantizationConfig.from_dict(settings)
    quantization_config.dequantize = True
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return AutoHfQuantizer.from_config(quantization_config, pre_quantized=True)


def _choose_dtype(config: Any, index: CheckpointIndex, dtype: str | torch.dtype) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        named = getattr(torch, dtype, None)
        if not isinstance(named, torch.dtype) or not named.is_floating_point:
            raise UnsupportedModelError(
                f"no floating element type is called {dtype!r}", hint="use bfloat16 or float32"
            )
        return named
    for part in (config, config.get_text_config()):
        declared = getattr(part, "dtype", None)
        if isinstance(declared, str):
            declared = getattr(torch, declared, None)
        if isinstance(declared, torch.dtype):
            return declared
    stored: Counter[str] = Counter()
    for entry in index.entries.values():
        if entry.dtype in ("BF16", "F16", "F32"):
            stored[entry.dtype] += entry.num_bytes
    return torch_dtype(stored.most_common(1)[0][0]) if stored else torch.bfloat16
